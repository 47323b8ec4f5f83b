"""What a model costs, from its config alone: parameters, floating-point operations, bytes.

D hidden size, L layers, H query heads, G key-value heads, d head dim, F intermediate size, E experts, K per token.
"""

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
    """All experts of all layers."""
    active_experts: int
    """Those that one token visits."""
    shared_experts: int
    dense_mlp: int
    vectors: int
    """Norms and biases."""

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
    hidden, layers = config.hidden_size, config.num_hidden_layers
    query_size = config.num_attention_heads * config.head_dim
    key_value_size = config.num_key_value_heads * config.head_dim
    vectors = 2 * hidden + (2 * config.head_dim if config.qk_norm else 0)
    if config.attention_bias:
        vectors += query_size + 2 * key_value_size
    moe, moe_layers = config.moe, config.num_moe_layers
    expert = 3 * hidden * moe.moe_intermediate_size if moe else 0
    return ParameterCount(
        embedding=config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2),
        attention=layers * hidden * (2 * query_size + 2 * key_value_size),
        router=moe_layers * moe.num_experts * hidden if moe else 0,
        routed_experts=moe_layers * moe.num_experts * expert if moe else 0,
        active_experts=moe_layers * moe.num_experts_per_tok * expert if moe else 0,
        shared_experts=moe_layers * moe.n_shared_experts * expert if moe else 0,
        dense_mlp=config.num_dense_layers * 3 * hidden * config.intermediate_size,
        vectors=layers * vectors + hidden,
    )


def flops_per_token(config: ModelConfig, context_length: float) -> Flops:
    """Matrix products of one token that attends to `context_length` tokens on average.

    The embedding look-up is free; norms, activations and softmax are left out, as is usual.
    """
    count = count_parameters(config)
    head = config.vocab_size * config.hidden_size
    matrices = count.attention + count.router + count.active_experts + count.shared_experts + count.dense_mlp + head
    scores_and_values = 2 * config.num_attention_heads * config.head_dim * context_length * config.num_hidden_layers
    forward = 2.0 * (matrices + scores_and_values)
    return Flops(forward=forward, training=3 * forward)


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Forward and backward of one token in causal training on sequences of this length."""
    return flops_per_token(config, (sequence_length + 1) / 2).training


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of all parameters stored as `dtype`; scales of quantised formats are not counted."""
    return int(count_parameters(config).total * DTYPE_BYTES[dtype])


def kv_bytes_per_token(config: ModelConfig, dtype: str) -> int:
    """Bytes of keys and values that one token adds to the cache."""
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * DTYPE_BYTES[dtype])
