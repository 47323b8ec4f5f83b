"""What a device has to hold, byte by byte, in training and in inference.

D hidden size, F inner width of an expert, K experts per token, H and G query and key-value heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from moesaic.plan.layout import Layout
from moesaic.plan.subject import Subject
from moesaic.plan.work import bytes_per_weight, kv_numbers, parameters

RESERVED = 0.06
"""Share of a device's memory that drivers, libraries and fragments of the allocator take."""
EIGHT_BIT_SAVED = 0.65
"""Products of 8 bits keep their inputs in 8 bits; the rest stays."""
MASTER_BYTES, GRADIENT_BYTES = 12.0, 4.0
"""A parameter's float32 copy and two moments of AdamW; its float32 gradient, which sums up over micro-batches."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device, by what they are."""

    parts: Mapping[str, float]
    capacity: float
    """What the device has for them."""

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity

    @property
    def largest(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name])


def usable(memory: float) -> float:
    return memory * (1 - RESERVED)


def held_parameters(subject: Subject, layout: Layout) -> tuple[float, float]:
    """Parameters of one device, without the cut of FSDP: those that are not routed, and those of its experts."""
    part, config = parameters(subject), subject.config
    ends = part.not_routed - part.dense
    dense = (part.dense / layout.pp + ends / min(2, layout.pp)) / layout.tp
    return dense, part.routed / (layout.pp * layout.ep) if config.moe else 0.0


def training_memory(subject: Subject, layout: Layout, sequence: int, memory: float, precision: str) -> Memory:
    """With the optimizer's state cut over all copies of a parameter (ZeRO stage 1) in any case, and with fsdp also
    gradients and parameters."""
    dense, routed = held_parameters(subject, layout)
    weight = max(2.0, bytes_per_weight("bfloat16")) + (1.0 if precision == "float8" else 0.0)
    cut = layout.fsdp
    expert_cut = min(layout.fsdp, max(1, layout.expert_copies))
    config = subject.config
    largest_layer = (dense + routed) / max(1, config.num_hidden_layers / layout.pp) if cut > 1 else 0.0
    state = dense / (layout.replicas) + routed / max(1, layout.expert_copies)
    in_flight = min(layout.pp, 64) if layout.pp > 1 else 1
    layers = config.num_hidden_layers / layout.pp
    tokens = layout.micro * sequence
    saved = activation_bytes(subject, layout) * tokens * layers * in_flight
    saved *= (1 + (1 / layout.pp if layout.vp > 1 else 0)) * (EIGHT_BIT_SAVED if precision == "float8" else 1.0)
    working = _block_bytes(subject) * tokens / layout.tp if layout.recompute == "full" else 0.0
    logits = 6.0 * tokens * config.vocab_size / layout.tp
    parts = {
        "weights": weight * (dense / cut + routed / expert_cut) + weight * 2 * largest_layer,
        "gradients": GRADIENT_BYTES * (dense / cut + routed / expert_cut),
        "optimizer": MASTER_BYTES * state,
        "activations": saved + working,
        "logits": logits,
    }
    return Memory(parts, usable(memory))


def activation_bytes(subject: Subject, layout: Layout) -> float:
    """Kept for the backward pass, for each token and layer, on one device."""
    kept = {
        "none": _block_bytes(subject),
        "selective": 0.6 * _block_bytes(subject),
        "full": 2.0 * subject.config.hidden_size,
    }
    return kept[layout.recompute] / layout.tp


@lru_cache(maxsize=256)
def _block_bytes(subject: Subject) -> float:
    """bfloat16 inputs of everything that has a gradient, the mean over layers. Fused attention keeps no scores, and
    fused norms and activations are computed again from what came in."""
    config = subject.config
    hidden, heads = config.hidden_size, config.num_attention_heads
    attention = 3 * hidden + (heads + 2 * config.num_key_value_heads) * config.head_dim + heads * config.v_head_dim
    dense = 2 * config.intermediate_size * config.num_dense_layers
    routed = 0.0
    if config.moe is not None:
        rows = config.moe.num_experts_per_tok * (2 * hidden + 2 * config.moe.moe_intermediate_size)
        routed = config.num_moe_layers * (rows + 2 * config.moe.shared_intermediate_size)
    return 2.0 * (attention + (dense + routed) / config.num_hidden_layers)


def inference_memory(
    subject: Subject, layout: Layout, batch: float, context: float, step_tokens: float, memory: float,
    weight: float, dense_weight: float, kv_precision: str = "bfloat16",
) -> Memory:  # fmt: skip
    """`batch` texts of `context` tokens over all replicas; `step_tokens` are computed together on one replica; `weight`
    and `dense_weight` are bytes of a weight of experts and of all others."""
    dense, routed = held_parameters(subject, layout)
    texts = batch / layout.replicas
    heads_cut = 1 if subject.config.mla else min(layout.tp, subject.config.num_key_value_heads)
    cache = texts * kv_numbers(subject, context) * bytes_per_weight(kv_precision) / (layout.pp * heads_cut)
    working = _block_bytes(subject) * step_tokens / layout.tp + 4.0 * texts * subject.config.vocab_size
    cut, expert_cut = layout.fsdp, min(layout.fsdp, max(1, layout.expert_copies))
    parts = {
        "dense weights": dense_weight * dense / cut,
        "experts": weight * routed / expert_cut,
        "keys and values": cache,
        "activations": working,
    }
    return Memory(parts, usable(memory))
