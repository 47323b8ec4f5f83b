"""What a model takes of a memory budget, part by part, and how many experts fit beside it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from moesaic.config import ModelConfig
from moesaic.errors import UsageError

UNITS = {"": 1, "B": 1} | {
    f"{prefix}{ending}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for ending, base in (("iB", 1024), ("B", 1000), ("", 1024))
}
LEAST_SLOTS = 2
"""One is computed while the other is read."""
EXPERTS_PER_CHUNK = 8
"""Computed together at most, so that their rows are few."""
ACTIVATIONS = "activations"
"""The part of a plan that depends on what is computed."""
SLACK_BYTES = 32 * 2**20
"""What allocators keep, and threads need."""


def parse_bytes(text: str | int, what: str = "memory") -> int:
    """8GiB, 8GB, 8G (as GiB), 512MiB, or a number of bytes. Raises UsageError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]*)\s*", str(text))
    units = {name.upper(): factor for name, factor in UNITS.items()}
    if match is None or match[2].upper() not in units or not float(match[1]):
        raise UsageError(f"{what} {text!r} is not a size; write it like 8GiB, 500MB or 2.5GiB")
    return int(float(match[1]) * units[match[2].upper()])


def shown(nbytes: float) -> str:
    if nbytes < 2**20:
        return f"{nbytes / 2**10:.0f} KiB"
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.0f} MiB"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of everything that is in memory at the same time."""

    budget: int
    parts: Mapping[str, int]
    """All but the experts, in the order in which they are told."""
    slots: int
    """Experts that fit beside them."""
    slot_bytes: int
    num_experts: int
    """Of all layers together."""

    def __str__(self) -> str:
        parts = ", ".join(f"{shown(nbytes)} {name}" for name, nbytes in self.parts.items())
        return f"{shown(self.budget)}: {parts}, {shown(self.slots * self.slot_bytes)} for {self.slots} experts"


def make_plan(budget: int, parts: Mapping[str, int], slot_bytes: int, num_experts: int) -> MemoryPlan:
    """As many slots as fit, and no more than there are experts in all layers together.

    Raises UsageError, with the numbers, where not even a few fit.
    """
    fixed = sum(parts.values())
    least = min(LEAST_SLOTS, num_experts)
    if fixed + least * slot_bytes > budget:
        needed = fixed + least * slot_bytes
        told = " + ".join(f"{shown(nbytes)} {name}" for name, nbytes in parts.items())
        enough = -(-needed // (64 * 2**20)) * 64
        raise UsageError(
            f"memory {shown(budget)} is too little: the model needs at least {shown(needed)}: {told} + "
            f"{shown(least * slot_bytes)} for {least} experts; try memory {enough}MiB, fewer bits per weight, or less "
            "text at a time"
        )
    return MemoryPlan(budget, parts, min((budget - fixed) // slot_bytes, num_experts), slot_bytes, num_experts)


def activation_bytes(config: ModelConfig, tokens: int, logits: int, context: int = 0) -> int:
    """Of a pass over so many tokens, about: the residual stream and what a layer makes of it, the rows of all its
    experts' outputs, what those of one chunk compute, and so many rows of logits. With a `context` its keys and values
    are spread over all heads, and there is a mask."""
    moe = config.moe
    assert moe is not None
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    chunk = min(1.0, 2 * EXPERTS_PER_CHUNK / moe.num_experts)  # twice its share, for experts that are asked for more
    rows = moe.num_experts_per_tok * (1 + 2 * chunk) * config.hidden_size
    spread = 2 * config.num_attention_heads * _head_size(config) + tokens if tokens > 1 else 0
    numbers = tokens * (12 * config.hidden_size + 2 * heads + rows) + logits * config.vocab_size + context * spread
    return int(4 * numbers)


def _head_size(config: ModelConfig) -> int:
    mla = config.mla
    return config.head_dim if mla is None else max(mla.qk_nope_head_dim + mla.qk_rope_head_dim, mla.v_head_dim)
