"""Rotary position embedding (arXiv 2104.09864), half-split layout: dimension i turns with dimension i + rotary_dim/2.

B batch, L positions, H heads, d head dim, r rotary dim.
"""

import torch
from torch import Tensor

from moesaic.config import ModelConfig


def rotary_tables(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, each (B, 1, L, r) float32, for integer positions (B, L)."""
    exponent_r = torch.arange(0, config.rotary_dim, 2, device=positions.device, dtype=torch.float32)
    frequency_r = config.rope_theta ** (-exponent_r / config.rotary_dim)
    angle_BLr = positions[..., None].float() * frequency_r
    angle_B1Lr = torch.cat((angle_BLr, angle_BLr), dim=-1).unsqueeze(1)
    return angle_B1Lr.cos(), angle_B1Lr.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the first r of the d dimensions of x (B, H, L, d); the others pass."""
    cos_B1Lr, sin_B1Lr = (table.to(x.dtype) for table in tables)
    rotary_dim = cos_B1Lr.shape[-1]
    if rotary_dim < x.shape[-1]:
        turned, passed = x.split((rotary_dim, x.shape[-1] - rotary_dim), dim=-1)
        return torch.cat((rotate(turned, tables), passed), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos_B1Lr + torch.cat((-second, first), dim=-1) * sin_B1Lr
