"""RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450), computed in float32, or in float64 where x is."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from moesaic.config import ModelConfig
from moesaic.ops import native_step


class RMSNorm(nn.Module):
    """x (..., size) -> x / rms(x) * weight, in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalize(x, self.eps, self.weight)


class LayerNorm(nn.Module):
    """x (..., size) -> (x - mean(x)) / std(x) * weight [+ bias], in x's dtype."""

    def __init__(self, size: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        dtype = _wide(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        return functional.layer_norm(x.to(dtype), (x.shape[-1],), self.weight.to(dtype), bias, self.eps).to(x.dtype)


def make_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """The norm of the residual stream that `config` names."""
    if config.norm == "layer":
        return LayerNorm(config.hidden_size, config.rms_norm_eps, config.norm_bias)
    return RMSNorm(config.hidden_size, config.rms_norm_eps)


def rms_normalize(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """x (..., size) / rms(x), times `weight` (size,) where there is one, in x's dtype."""
    if native_step.serves(x):
        return native_step.rms_norm(x, weight, eps)
    dtype = _wide(x)
    weight = None if weight is None else weight.to(dtype)
    return functional.rms_norm(x.to(dtype), (x.shape[-1],), weight, eps).to(x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
