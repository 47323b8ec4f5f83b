"""What a model costs, from its config alone: parameters, floating-point operations, bytes.

D hidden size, L layers, H query heads, G key-value heads, d head dim, F intermediate size, E experts, K per token.
"""

import math
from dataclasses import dataclass

from moesaic.config import ModelConfig
from moesaic.moe_config import UNLEARNED_ROUTERS, MoEConfig

DTYPE_BYTES = {"float64": 8.0, "float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters. Buffers (the selection bias) do not count."""

    embedding: int
    """Input embedding and output projection; once when they are tied."""
    attention: int
    router: int
    """Matrices of all routers: of the experts, of noise, of slots, and of blocks that tokens may pass by."""
    routed_experts: int
    """All experts of all layers, with their biases."""
    active_experts: int
    """Those that one token visits: all E of soft mixtures, else num_experts_per_tok, which is the mean, the target or
    the most with routers that give each token another number, and the most beside experts that compute nothing."""
    free_experts: int
    """Matrices of the experts that compute next to nothing."""
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
        """Parameters that take part in one token, embedding and head included, if it passes no layer by."""
        return self.embedding + self._always_active + self.active_experts

    @property
    def _always_active(self) -> int:
        return self.attention + self.router + self.free_experts + self.shared_experts + self.dense_mlp + self.vectors


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token; a multiply-add counts as two."""

    forward: float
    training: float
    """Forward plus backward, three times the forward; recomputation is not counted."""


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Exact numbers of the parameters that `Transformer(config)` holds."""
    hidden, moe, moe_layers = config.hidden_size, config.moe, config.num_moe_layers
    expert, shared, router, active_experts, free = 0, 0, 0, 0, 0
    if moe is not None:
        biases = 2 * moe.moe_intermediate_size + hidden if moe.projection_bias else 0
        expert = _swiglu_matrices(hidden, moe.moe_intermediate_size) + biases
        shared = _swiglu_matrices(hidden, moe.shared_intermediate_size) + (hidden if moe.shared_expert_gate else 0)
        router = _router_rows(moe) * hidden
        active_experts = moe.num_experts if moe.router == "soft" else moe.num_experts_per_tok
        free = 3 * hidden * moe.num_constant_experts
    return ParameterCount(
        embedding=config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2),
        attention=config.num_hidden_layers * _attention_matrices(config),
        router=moe_layers * router + len(set(config.depth_layers)) * hidden,
        routed_experts=moe_layers * moe.num_experts * expert if moe else 0,
        active_experts=moe_layers * active_experts * expert,
        free_experts=moe_layers * free,
        shared_experts=moe_layers * shared,
        dense_mlp=config.num_dense_layers * _swiglu_matrices(hidden, config.intermediate_size),
        vectors=_vectors(config),
    )


def _router_rows(moe: MoEConfig) -> int:
    """Rows of D parameters in the router of one layer."""
    if moe.router in UNLEARNED_ROUTERS:
        return 0
    if moe.router == "soft":
        return moe.num_experts * moe.slots_per_expert
    return moe.num_routed * (2 if moe.router == "noisy_topk" else 1)


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
        per_layer = moe.num_routed if moe.router_bias else 0
        per_layer += 1 if moe.router == "soft" else 0  # the scale of its logits
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

    A token visits num_experts_per_tok experts that compute (times the capacity_factor of `expert_choice`), which is the
    most with `softmax_top_p` and beside experts that compute nothing; these are left out. `soft` shares E x S slots
    among the `context_length` tokens of a sequence. Layers of `depth_layers` count for `depth_capacity` of the tokens,
    each of which attends to that share of the others. Routers count as in training, with their noise.
    """
    visible = [min(context_length, _window(config, index)) for index in range(config.num_hidden_layers)]
    return _flops(config, visible, context_length)


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
    return _flops(config, visible, sequence_length).training


def _window(config: ModelConfig, layer_index: int) -> float:
    """The most tokens, itself included, that a token of this layer attends to."""
    kind = config.layer_type(layer_index)
    size = {"sliding_attention": config.sliding_window, "chunked_attention": config.attention_chunk_size}.get(kind)
    return math.inf if size is None else size


def _flops(config: ModelConfig, visible: list[float], sequence_length: float) -> Flops:
    """`visible` holds, for each layer, how many tokens one token attends to on average."""
    hidden = config.hidden_size
    attention, feed_forward = _attention_matrices(config), _swiglu_matrices(hidden, config.intermediate_size)
    per_visible_token = config.num_attention_heads * (config.head_dim + config.v_head_dim)
    products = float(config.vocab_size * hidden)
    for index, seen in enumerate(visible):
        passes_by = index in config.depth_layers
        share = config.depth_capacity if passes_by else 1.0
        moe = config.moe if config.is_moe_layer(index) else None
        inner = feed_forward if moe is None else _moe_products(config, moe, share * sequence_length)
        products += share * (attention + inner + per_visible_token * share * seen) + (hidden if passes_by else 0)
    forward = 2.0 * products
    return Flops(forward=forward, training=3 * forward)


def _moe_products(config: ModelConfig, moe: MoEConfig, sequence_length: float) -> float:
    """Multiply-adds per token of one layer of experts, of which `sequence_length` tokens make a sequence."""
    hidden = config.hidden_size
    expert = _swiglu_matrices(hidden, moe.moe_intermediate_size)
    shared = _swiglu_matrices(hidden, moe.shared_intermediate_size) + (hidden if moe.shared_expert_gate else 0)
    if moe.router == "soft":
        slots = moe.num_experts * moe.slots_per_expert
        # Logits, mixing tokens into slots, mixing slots into tokens; and the experts of the slots.
        return 3 * slots * hidden + slots * expert / max(sequence_length, 1.0) + shared
    experts_per_token = float(moe.num_experts_per_tok)
    if moe.router == "expert_choice":
        experts_per_token = min(experts_per_token * (moe.capacity_factor or 1.0), moe.num_experts)
    return _router_rows(moe) * hidden + experts_per_token * expert + shared


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
