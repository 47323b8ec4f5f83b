"""Rotary frequencies stretched beyond the context that a model was first trained on.

Every method takes the plain frequencies and returns other ones, and what cos and sin are to be multiplied by.
B batch, L positions, r rotary dim; frequencies are (r/2,) float32, fastest first.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moesaic.config import ModelConfig, RopeScaling

Scaled = tuple[Tensor, float | Tensor]
BY_LENGTH = ("dynamic", "longrope")
"""Methods whose frequencies depend on how long the text is."""


def rotary_frequencies(config: ModelConfig, positions: Tensor) -> Scaled:
    """Frequencies in radians per token, (r/2,), and the multiplier of cos and sin.

    `positions` (B, L) matters to `dynamic` and `longrope` alone: they look at the longest sequence of this forward
    pass, without waiting for the device.
    """
    exponents = torch.arange(0, config.rotary_dim, 2, device=positions.device, dtype=torch.float32) / config.rotary_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is None:
        return frequencies, 1.0
    return METHODS[config.rope_scaling.rope_type](frequencies, config, config.rope_scaling, positions)


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """How much sharper attention must be in a context stretched by `factor` (YaRN, arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0


def scaling_factor(config: ModelConfig, scaling: RopeScaling) -> float:
    """The factor that is named, or else the ratio of the two context lengths."""
    return scaling.factor or config.max_position_embeddings / _original_length(config, scaling)


def _linear(frequencies: Tensor, config: ModelConfig, scaling: RopeScaling, positions: Tensor) -> Scaled:
    """Position interpolation (arXiv 2306.15595)."""
    return frequencies / scaling_factor(config, scaling), 1.0


def _dynamic(frequencies: Tensor, config: ModelConfig, scaling: RopeScaling, positions: Tensor) -> Scaled:
    """NTK-aware: a larger base stretches the slowest wave by the whole factor and leaves the fastest alone.

    The factor grows with what exceeds the original context, or is `alpha` whatever the length (Hunyuan).
    """
    stretch: float | Tensor
    if scaling.alpha is not None:
        stretch = scaling.alpha
    else:
        factor, original = scaling_factor(config, scaling), _original_length(config, scaling)
        stretch = factor * (positions.max() + 1).clamp_min(original) / original - (factor - 1)
    # A base multiplied by stretch^(r / (r - 2)) divides frequency i by stretch^(2 i / (r - 2)).
    steps = torch.arange(len(frequencies), device=frequencies.device, dtype=torch.float32)
    return frequencies / stretch ** (steps / max(len(frequencies) - 1, 1)), 1.0


def _yarn(frequencies: Tensor, config: ModelConfig, scaling: RopeScaling, positions: Tensor) -> Scaled:
    """YaRN (arXiv 2309.00071): waves that turn often within the original context stay, those that never do are
    interpolated, and those between are blended by their index."""
    factor = scaling_factor(config, scaling)

    def index_with(turns: float) -> float:
        """Index of the wave that makes so many turns in the original context."""
        tokens_per_radian = _original_length(config, scaling) / (turns * 2 * math.pi)
        return config.rotary_dim * math.log(tokens_per_radian) / (2 * math.log(config.rope_theta))

    first, last = index_with(scaling.beta_fast), index_with(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.rotary_dim - 1)
    steps = torch.arange(len(frequencies), device=frequencies.device, dtype=torch.float32)
    interpolated = ((steps - first) / (last - first if last != first else 0.001)).clamp(0, 1)
    blended = frequencies * (1 - interpolated) + frequencies / factor * interpolated
    if scaling.attention_factor is not None:
        return blended, scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return blended, yarn_mscale(factor, scaling.mscale) / yarn_mscale(factor, scaling.mscale_all_dim)
    return blended, yarn_mscale(factor)


def _longrope(frequencies: Tensor, config: ModelConfig, scaling: RopeScaling, positions: Tensor) -> Scaled:
    """LongRoPE (arXiv 2402.13753): one set of divisors within the original context and another beyond it."""
    factor, original = scaling_factor(config, scaling), _original_length(config, scaling)
    computed = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    default = computed if scaling.attention_factor is None else scaling.attention_factor
    multipliers = [default if named is None else named for named in (scaling.short_mscale, scaling.long_mscale)]
    rows = [(*scaling.short_factor, multipliers[0]), (*scaling.long_factor, multipliers[1])]
    short, long = torch.tensor(rows, device=frequencies.device, dtype=torch.float32)
    chosen = torch.where(positions.max() + 1 > original, long, short)
    return frequencies / chosen[:-1], chosen[-1]


def _llama3(frequencies: Tensor, config: ModelConfig, scaling: RopeScaling, positions: Tensor) -> Scaled:
    """Llama 3.1 (arXiv 2407.21783): as YaRN, but blended by the number of turns, and cos and sin stay."""
    turns = frequencies * _original_length(config, scaling) / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / max(high - low, 1e-6)).clamp(0, 1)  # in Llama 4 the two are equal
    return frequencies * kept + frequencies / scaling_factor(config, scaling) * (1 - kept), 1.0


def _original_length(config: ModelConfig, scaling: RopeScaling) -> int:
    return scaling.original_max_position_embeddings or config.max_position_embeddings


METHODS: dict[str, Callable[[Tensor, ModelConfig, RopeScaling, Tensor], Scaled]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
