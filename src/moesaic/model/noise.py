"""Random numbers that are functions of keys: the same token of the same step draws the same noise, however the batch is
cut into micro-batches, padded, recomputed or spread over ranks.

T tokens, W numbers per token.
"""

import math

import torch
from torch import Tensor

_MIX = (-0x4B47D0C5A1A6D9E5, -0x61C8864680B583EB)  # odd, without pattern
_START = 0x2545F4914F6CDD1D  # so that 0, of all keys, does not stay 0
_TO_UNIT = 2.0**-52


def mix(values: Tensor) -> Tensor:
    """int64 -> int64 that look random: every input bit moves about half of the output bits."""
    values = values + _START
    for factor in _MIX:
        values = (values ^ _shifted_right(values, 31)) * factor
    return values ^ _shifted_right(values, 29)


def combine(left: Tensor, right: Tensor | int) -> Tensor:
    """One key from two; (left, right) and (right, left) give different ones."""
    return mix(mix(left) + right)


def uniform(keys: Tensor, width: int) -> Tensor:
    """keys (T,) int64 -> (T, width) float64, evenly in 0..1, neither 0 nor 1."""
    counters_W = torch.arange(width, device=keys.device)
    bits_TW = _shifted_right(combine(keys.unsqueeze(1), counters_W), 12)
    return (bits_TW.double() + 0.5) * _TO_UNIT


def normal(keys: Tensor, width: int) -> Tensor:
    """keys (T,) int64 -> (T, width) float64 of mean 0 and variance 1 (Box and Muller's transform)."""
    radius_TW = torch.sqrt(-2.0 * torch.log(uniform(keys, width)))
    angle_TW = 2.0 * math.pi * uniform(mix(keys + 1), width)
    return radius_TW * torch.cos(angle_TW)


def _shifted_right(values: Tensor, bits: int) -> Tensor:
    """As if int64 had no sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
