"""What one token asks of a machine, by kind of work, from the config alone: operations, weights read, keys and values.

D hidden size, K experts per token, E experts, F inner width of one, T tokens that are computed together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from moesaic.accounting import count_parameters, flops_per_token, training_flops_per_token
from moesaic.config import ModelConfig
from moesaic.errors import UsageError
from moesaic.plan.subject import Subject

BITS: Mapping[str, float] = {
    "float32": 32, "bfloat16": 16, "float16": 16, "float8": 8, "int8": 8.5, "int4": 4.5, "mxfp4": 4.25,
    "q8_0": 8.5, "q4_0": 4.5, "q4_k_m": 4.85, "f16": 16,
}  # fmt: skip
"""Bits a weight, with its share of the scales: a factor for each 32 weights in our int8 and int4 and in llama.cpp's
formats, for each 32 as 8 bits in mxfp4; float8's factors for blocks of 128 x 128 are left out."""


def bytes_per_weight(precision: str) -> float:
    if precision not in BITS:
        raise UsageError(f"precision {precision!r} is not known; choose {', '.join(BITS)}")
    return BITS[precision] / 8


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one token's forward pass, by kind; a multiply-add counts as two."""

    dense: float
    """Projections of attention, dense and shared feed-forward layers, routers, the head."""
    experts: float
    """Routed experts."""
    scores: float
    """Products of queries with keys, and of probabilities with values."""

    @property
    def total(self) -> float:
        return self.dense + self.experts + self.scores


@lru_cache(maxsize=256)
def forward_work(subject: Subject, context: float) -> Work:
    """Of one token that attends to `context` tokens."""
    return _work(subject, flops_per_token(subject.config, context).forward, flops_per_token(subject.config, 0).forward)


@lru_cache(maxsize=256)
def training_work(subject: Subject, sequence: int) -> Work:
    """Forward pass of one token in causal training, the mean over a sequence."""
    forward = training_flops_per_token(subject.config, sequence) / 3
    return _work(subject, forward, flops_per_token(subject.config, 0).forward)


def _work(subject: Subject, forward: float, without_scores: float) -> Work:
    experts = 2.0 * count_parameters(subject.config).active_experts
    return Work(
        dense=without_scores - experts + 2.0 * subject.extra_parameters,
        experts=experts,
        scores=forward - without_scores,
    )


@lru_cache(maxsize=256)
def last_feed_forward(subject: Subject) -> Work:
    """The part of a token's forward pass that is in the last feed-forward layer. Prefill computes it for the last token
    of each text alone: nothing after it looks at other tokens."""
    config, count = subject.config, count_parameters(subject.config)
    if not config.is_moe_layer(config.num_hidden_layers - 1):
        return Work(dense=2.0 * count.dense_mlp / config.num_dense_layers, experts=0.0, scores=0.0)
    layers = config.num_moe_layers
    return Work(dense=2.0 * count.shared_experts / layers, experts=2.0 * count.active_experts / layers, scores=0.0)


@dataclass(frozen=True)
class Parameters:
    """Where the weights are, for reading and for sharding."""

    input_embedding: int
    """Of which a token reads one row."""
    head: int
    dense: int
    """Everything else that every token uses."""
    routed: int
    expert: int
    """Of one expert of one layer."""

    @property
    def always(self) -> int:
        """What every step reads, however few tokens it has."""
        return self.dense + self.head

    @property
    def not_routed(self) -> int:
        return self.always + self.input_embedding


@lru_cache(maxsize=256)
def parameters(subject: Subject) -> Parameters:
    config, count = subject.config, count_parameters(subject.config)
    table = config.vocab_size * config.hidden_size
    experts = config.num_moe_layers * config.moe.num_experts if config.moe else 0
    return Parameters(
        input_embedding=0 if config.tie_word_embeddings else table,
        head=table,
        dense=count.total - count.embedding - count.routed_experts + subject.extra_parameters,
        routed=count.routed_experts,
        expert=count.routed_experts // experts if experts else 0,
    )


def experts_visited(config: ModelConfig, tokens: float, skew: float = 0.0) -> float:
    """Distinct experts of one layer that so many tokens visit together, on average.

    Each token draws K of E evenly; `skew` from 0 to 1 takes that share of the tokens to the same experts as the others.
    """
    moe = config.moe
    if moe is None:
        return 0.0
    if moe.router == "soft":
        return float(moe.num_experts)
    missed = (1 - moe.num_experts_per_tok / moe.num_experts) ** (tokens * (1 - skew))
    return max(moe.num_experts * (1 - missed), min(float(moe.num_experts_per_tok), float(moe.num_experts)))


def weights_read(subject: Subject, tokens: float) -> float:
    """Numbers of weights that a forward pass over so many tokens reads: what all use, and the experts they visit."""
    part = parameters(subject)
    return part.always + subject.config.num_moe_layers * experts_visited(subject.config, tokens) * part.expert


def kv_numbers_per_token(config: ModelConfig) -> int:
    """Of one layer."""
    if config.mla is not None:
        return config.mla.kv_lora_rank + config.mla.qk_rope_head_dim
    return config.num_key_value_heads * (config.head_dim + config.v_head_dim)


@lru_cache(maxsize=256)
def kv_numbers(subject: Subject, context: float) -> float:
    """Numbers that the cache of one text of `context` tokens holds, windows and chunks considered."""
    config = subject.config
    limits = {"sliding_attention": config.sliding_window, "chunked_attention": config.attention_chunk_size}
    kept = 0.0
    for layer in range(config.num_hidden_layers):
        limit = limits.get(config.layer_type(layer))
        kept += context if limit is None else min(context, limit)
    return kept * kv_numbers_per_token(config) * subject.kv_share


@lru_cache(maxsize=256)
def absorbed_score_flops(subject: Subject, context: float) -> float:
    """Of decoding with latent attention, where queries go to the latent instead of the latent to every head."""
    config, mla = subject.config, subject.config.mla
    if mla is None:
        return flops_per_token(config, context).forward - flops_per_token(config, 0).forward
    per_layer = 2 * config.num_attention_heads * (2 * mla.kv_lora_rank + mla.qk_rope_head_dim) * context
    return float(config.num_hidden_layers * per_layer)
