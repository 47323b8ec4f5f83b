"""Experts of two precisions: which of them get 8 bits beside 4, within a budget, and a layer of both kinds in memory.

Few experts take most of the assignments of a text, and what 4 bits change in the others is rarely seen; so bits go
where tokens go.

L layers with experts, E experts of a layer, N assignments, D hidden size.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moesaic.config import ModelConfig
from moesaic.errors import UsageError
from moesaic.ops import ExpertWeights
from moesaic.ops.quantize import packed_shape

if TYPE_CHECKING:
    from moesaic.model.experts import Experts

COLD_FORMAT, HOT_FORMAT = "int4", "int8"
ROUNDING = 1e-9
"""A budget that is met but for the last bits of its number is met."""

HotExperts = tuple[tuple[int, ...], ...]
"""By layer with experts, in their order: the numbers, ascending, of those packed as int8. () is none at all."""


@dataclass(frozen=True)
class HotBudget:
    """How many experts get 8 bits: a `share` of all, or what `bits` per expert weight, on average, allow.

    `record` says which were used most, as moesaic.residency.placement.read_uses reads it.
    Raises UsageError unless there is one of the two, and sensible.
    """

    record: str | Path
    share: float | None = None
    bits: float | None = None

    def __post_init__(self) -> None:
        if (self.share is None) == (self.bits is None):
            given = "neither is" if self.share is None else "both are"
            raise UsageError(f"hot experts need a hot share or bits, and {given} given; give one: --hot-share 0.25")
        if self.share is not None and not 0 < self.share < 1:
            raise UsageError(f"hot share {self.share:g} is not between 0 and 1; try --hot-share 0.25")

    def plan(self, uses: NDArray[np.float64], config: ModelConfig, group_size: int) -> HotExperts:
        """Of uses (L, E), shares of a layer's assignments: the experts used most, of all layers together.

        Raises UsageError for a budget that makes no expert hot, or all.
        """
        number = self._number(config, group_size, uses.size)
        chosen = np.argsort(-uses, axis=None, kind="stable")[:number]
        is_hot_LE = np.zeros(uses.shape, dtype=bool)
        is_hot_LE.flat[chosen] = True
        return tuple(tuple(np.flatnonzero(row).tolist()) for row in is_hot_LE)

    def _number(self, config: ModelConfig, group_size: int, total: int) -> int:
        if self.share is not None:
            number = math.floor(self.share * total + ROUNDING)
            if number == 0:
                raise UsageError(
                    f"hot share {self.share:g} of {total} experts is none; one of them is --hot-share {_up(1 / total)}"
                )
            return number
        assert self.bits is not None
        cold, hot = (expert_bits(config, format, group_size) for format in (COLD_FORMAT, HOT_FORMAT))
        step = (hot - cold) / total
        if not cold + step * (1 - ROUNDING) <= self.bits < hot:
            raise UsageError(
                f"{self.bits:g} bits: the experts take {cold:.2f} per weight in {COLD_FORMAT}, {hot:.2f} in "
                f"{HOT_FORMAT} and one of the {total} adds {step:.2g}; try --bits {(cold + hot) / 2:.2f}"
            )
        return math.floor((self.bits - cold) / step + ROUNDING)


def expert_bits(config: ModelConfig, format: str, group_size: int) -> float:
    """Per weight of an expert that is packed so, with its factors and what fills up panels and groups."""
    assert config.moe is not None
    D, F = config.hidden_size, config.moe.moe_intermediate_size
    nbytes = sum(math.prod(packed_shape(*shape, format, group_size)) for shape in ((2 * F, D), (D, F)))
    return 8 * nbytes / (3 * D * F)


def require_experts(hot: Sequence[Sequence[int]], config: ModelConfig) -> None:
    """Raises UsageError unless these are experts of such a model, each named once and in order, layer by layer."""
    if config.moe is None:
        raise UsageError("hot experts: this model has no experts; leave hot out")
    if len(hot) != config.num_moe_layers:
        raise UsageError(
            f"hot experts are given for {len(hot)} layers, and {config.num_moe_layers} layers of this model have "
            "experts; give a list for each, which may be empty"
        )
    for layer, numbers in enumerate(hot):
        if list(numbers) != sorted(set(numbers)) or not all(0 <= one < config.moe.num_experts for one in numbers):
            raise UsageError(
                f"hot experts of layer {layer} of {len(hot)}: they need to be numbers from 0 to "
                f"{config.moe.num_experts - 1}, ascending, each once"
            )


@dataclass(frozen=True, eq=False)
class StacksByPrecision:
    """An ExpertStore: one layer's experts in memory, a stack of those in 4 bits and one of those in 8."""

    experts: "Experts"

    @property
    def format(self) -> str:
        """Of the cold ones; the same backends compute both."""
        return self.experts.packed["gate_up"].format

    def chunks(self, expert_ids: Tensor, x: Tensor) -> AbstractContextManager[Iterator[ExpertWeights]]:
        return nullcontext(iter(self.experts.stacks(x.dtype)))


def _up(value: float) -> str:
    """With three digits, no less than it is."""
    scale = 10 ** (2 - math.floor(math.log10(value)))
    return f"{math.ceil(value * scale - ROUNDING) / scale:g}"
