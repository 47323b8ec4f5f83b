"""What a model costs, from its config alone: parameters, floating-point operations, bytes.

D hidden size, L layers, H query heads, G key-value heads, d head dim, F intermediate size, E experts, K per token.
"""

import math
from dataclasses import dataclass

from moesaic.config import ModelConfig

DTYPE_BYTES = {"float64": 8.0, "float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters. Buffers (the selection bias) do not count."""

    embedding: int
    """Input embedding and output projection; once when they are tied."""
    attention: int
    router: int
    routed_experts: int
    """All experts of all layers, with their biases."""
    active_experts: int
    """Those that one token visits."""
    shared_experts: int
    """With the gate that weighs them."""
    dense_mlp: int
    vectors: int
    """Norms, attention sinks, and all biases but those of the routed experts."""

    @property
    def total(self) -> int:
        return self.embedding + self._always_active + self.routed_experts

    @property
    def active(self) -> int:
        """Parameters of the layers that take part in one token, embedding and head included."""
        return self.embedding + self._always_active + self.active_experts

    @property
    def _always_active(self) -> int:
        return self.attention + self.router + self.shared_experts + self.dense_mlp + self.vectors


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token; a multiply-add counts as two."""

    forward: float
    training: float
    """Forward plus backward, three times the forward; recomputation is not counted."""


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Exact numbers of the parameters that `Transformer(config)` holds."""
    hidden, moe, moe_layers = config.hidden_size, config.moe, config.num_moe_layers
    expert, shared = 0, 0
    if moe is not None:
        biases = 2 * moe.moe_intermediate_size + hidden if moe.projection_bias else 0
        expert = _swiglu_matrices(hidden, moe.moe_intermediate_size) + biases
        shared = _swiglu_matrices(hidden, moe.shared_intermediate_size) + (hidden if moe.shared_expert_gate else 0)
    return ParameterCount(
        embedding=config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2),
        attention=config.num_hidden_layers * _attention_matrices(config),
        router=moe_layers * moe.num_experts * hidden if moe else 0,
        routed_experts=moe_layers * moe.num_experts * expert if moe else 0,
        active_experts=moe_layers * moe.num_experts_per_tok * expert if moe else 0,
        shared_experts=moe_layers * shared,
        dense_mlp=config.num_dense_layers * _swiglu_matrices(hidden, config.intermediate_size),
        vectors=_vectors(config),
    )


def _swiglu_matrices(hidden: int, inner: int) -> int:
    return 3 * hidden * inner


def _attention_matrices(config: ModelConfig) -> int:
    """Weights of the projections of one layer."""
    hidden, heads, mla = config.hidden_size, config.num_attention_heads, config.mla
    output = heads * config.v_head_dim * hidden
    if mla is None:
        return (heads + 2 * config.num_key_value_heads) * config.head_dim * hidden + output
    queries = heads * config.head_dim
    query = hidden * queries if mla.q_lora_rank is None else mla.q_lora_rank * (hidden + queries)
    to_latent = hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    from_latent = mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return query + to_latent + from_latent + output


def _vectors(config: ModelConfig) -> int:
    """Norms, sinks and biases of the whole model, without the biases of routed experts."""
    hidden, moe = config.hidden_size, config.moe
    norms = (2 * config.num_hidden_layers + 1) * hidden * (2 if config.norm_bias else 1)
    feed_forward = 0
    if config.mlp_bias:
        feed_forward += config.num_dense_layers * (2 * config.intermediate_size + hidden)
    if moe is not None:
        per_layer = moe.num_experts if moe.router_bias else 0
        if config.mlp_bias and moe.shared_intermediate_size:
            per_layer += 2 * moe.shared_intermediate_size + hidden
        feed_forward += config.num_moe_layers * per_layer
    head = config.vocab_size if config.lm_head_bias else 0
    return norms + config.num_hidden_layers * _attention_vectors(config) + feed_forward + head


def _attention_vectors(config: ModelConfig) -> int:
    """Of one layer."""
    mla, heads, kv_heads = config.mla, config.num_attention_heads, config.num_key_value_heads
    sinks = heads if config.attention_sinks else 0
    output_bias = config.hidden_size if config.attention_output_bias else 0
    if mla is not None:
        query_rank = mla.q_lora_rank or 0
        norms = query_rank + mla.kv_lora_rank
        biases = query_rank + mla.kv_lora_rank + mla.qk_rope_head_dim if config.attention_bias else 0
    else:
        normed_heads = {"head": 2, "head_after_rope": 2, "width": heads + kv_heads}.get(config.qk_norm, 0)
        norms = normed_heads * config.head_dim
        biases = (heads + 2 * kv_heads) * config.head_dim if config.attention_bias else 0
    return norms + biases + sinks + output_bias


def flops_per_token(config: ModelConfig, context_length: float) -> Flops:
    """Matrix products of one token that attends to `context_length` tokens; less where a window or chunk is shorter.

    The embedding look-up is free; norms, activations and softmax are left out, as is usual. Latent attention is counted
    as prefill and training compute it: keys and values are expanded from the latent, once per token.
    """
    visible = [min(context_length, _window(config, index)) for index in range(config.num_hidden_layers)]
    return _flops(config, visible)


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Forward and backward of one token in causal training, the mean over a sequence of this length."""
    visible = []
    for index in range(config.num_hidden_layers):
        window = min(sequence_length, _window(config, index))
        if config.layer_type(index) == "chunked_attention":
            chunks, rest = divmod(sequence_length, int(window))
            tokens_seen = chunks * window * (window + 1) / 2 + rest * (rest + 1) / 2
        else:
            tokens_seen = window * (window + 1) / 2 + (sequence_length - window) * window
        visible.append(tokens_seen / sequence_length)
    return _flops(config, visible).training


def _window(config: ModelConfig, layer_index: int) -> float:
    """The most tokens, itself included, that a token of this layer attends to."""
    kind = config.layer_type(layer_index)
    size = {"sliding_attention": config.sliding_window, "chunked_attention": config.attention_chunk_size}.get(kind)
    return math.inf if size is None else size


def _flops(config: ModelConfig, visible: list[float]) -> Flops:
    """`visible` holds, for each layer, how many tokens one token attends to on average."""
    count, moe = count_parameters(config), config.moe
    head = config.vocab_size * config.hidden_size
    matrices = count.attention + count.router + count.shared_experts + count.dense_mlp + head
    if moe is not None:
        expert = _swiglu_matrices(config.hidden_size, moe.moe_intermediate_size)
        matrices += config.num_moe_layers * moe.num_experts_per_tok * expert
    scores_and_values = config.num_attention_heads * (config.head_dim + config.v_head_dim) * sum(visible)
    forward = 2.0 * (matrices + scores_and_values)
    return Flops(forward=forward, training=3 * forward)


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of all parameters stored as `dtype`; scales of quantised formats are not counted."""
    return int(count_parameters(config).total * DTYPE_BYTES[dtype])


def kv_bytes_per_token(config: ModelConfig, dtype: str) -> int:
    """Bytes of keys and values, or of the latent and the rotated key of latent attention, that one token adds to the
    cache."""
    if config.mla is None:
        per_layer = 2 * config.num_key_value_heads * config.head_dim
    else:
        per_layer = config.mla.kv_lora_rank + config.mla.qk_rope_head_dim
    return int(config.num_hidden_layers * per_layer * DTYPE_BYTES[dtype])
