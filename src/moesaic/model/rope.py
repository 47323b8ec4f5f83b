"""Rotary position embedding (arXiv 2104.09864): pairs of dimensions turn by an angle that grows with the position.

B batch, L positions, H heads, d head dim, r rotary dim, p pairs.
"""

import torch
from torch import Tensor

from moesaic.config import ModelConfig
from moesaic.model.rope_scaling import rotary_frequencies


def rotary_tables(positions: Tensor, config: ModelConfig, text_length: int | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin, each (B, 1, L, r) float32, for integer positions (B, L), in the order of `config`'s pairs.

    Some stretch with the length of the text: that is what these positions say, or `text_length`.
    """
    last = positions if text_length is None else torch.tensor([[text_length - 1]], device=positions.device)
    frequencies, multiplier = rotary_frequencies(config, last)
    angle_B1Lp = (positions[..., None].float() * frequencies).unsqueeze(1)
    cos_B1Lp, sin_B1Lp = angle_B1Lp.cos() * multiplier, angle_B1Lp.sin() * multiplier
    if config.rope_interleaved:
        return cos_B1Lp.repeat_interleave(2, dim=-1), sin_B1Lp.repeat_interleave(2, dim=-1)
    return torch.cat((cos_B1Lp, cos_B1Lp), dim=-1), torch.cat((sin_B1Lp, sin_B1Lp), dim=-1)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor], interleaved: bool = False) -> Tensor:
    """Turn the first r of the d dimensions of x (B, H, L, d); the others pass.

    Dimension i turns with i + r/2, or, `interleaved`, dimension 2i with 2i + 1.
    """
    cos_B1Lr, sin_B1Lr = (table.to(x.dtype) for table in tables)
    rotary_dim = cos_B1Lr.shape[-1]
    if rotary_dim < x.shape[-1]:
        turned, passed = x.split((rotary_dim, x.shape[-1] - rotary_dim), dim=-1)
        return torch.cat((rotate(turned, tables, interleaved), passed), dim=-1)
    if interleaved:
        partner = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        partner = torch.cat((-second, first), dim=-1)
    return x * cos_B1Lr + partner * sin_B1Lr
