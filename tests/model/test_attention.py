"""Grouped-query attention against a float64 loop. B sequences, L positions, D hidden size."""

from dataclasses import replace

import pytest
import torch

from moesaic.config import ModelConfig
from moesaic.model.attention import Attention

from .attention_oracle import assert_equals_loop, grouped_query_attention, randomize, run

PLAIN = ModelConfig(
    vocab_size=8, hidden_size=20, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=8, qk_norm="none", rope_theta=100.0, sliding_window=3, attention_chunk_size=3,
)  # fmt: skip
CONFIGS = {
    "plain": PLAIN,
    "one key head per query head": replace(PLAIN, num_key_value_heads=4),
    "norm of each head": replace(PLAIN, qk_norm="head"),
    "norm of the width": replace(PLAIN, qk_norm="width"),
    "norm of each head after RoPE": replace(PLAIN, qk_norm="head_after_rope", partial_rotary_factor=0.5),
    "norm without weights after RoPE": replace(PLAIN, qk_norm="l2_after_rope"),
    "biases": replace(PLAIN, attention_bias=True, attention_output_bias=True),
    "clamped": replace(PLAIN, clip_qkv=0.8),
    "clamped after the norm": replace(PLAIN, clip_qkv=0.8, qk_norm="width"),
    "sinks": replace(PLAIN, attention_sinks=True),
    "sinks, sliding": replace(PLAIN, attention_sinks=True, layer_types=("full_attention", "sliding_attention")),
    "sliding": replace(PLAIN, layer_types=("full_attention", "sliding_attention")),
    "chunked": replace(PLAIN, layer_types=("full_attention", "chunked_attention")),
    "interleaved": replace(PLAIN, rope_interleaved=True, partial_rotary_factor=0.5),
    "no RoPE": replace(PLAIN, nope_layers=(1,), qk_norm="l2_after_rope"),
    "no RoPE, growing queries": replace(PLAIN, nope_layers=(1,), attn_scale=0.4, floor_scale=2),
    "RoPE, no growing queries": replace(PLAIN, nope_layers=(0,), attn_scale=0.4, floor_scale=2),
    "own softmax scale": replace(PLAIN, attention_multiplier=0.1),
}


def build(config: ModelConfig) -> Attention:
    attention = Attention(config, layer_index=1)
    randomize(attention)
    return attention


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_equal_the_loop(name: str, padded: bool) -> None:
    config = CONFIGS[name]
    assert_equals_loop(
        build(config), config, padded, lambda weights, x, at: grouped_query_attention(weights, config, 1, x, at)
    )


def test_a_sink_takes_its_share_and_gives_nothing() -> None:
    """Without other tokens, and with a logit equal to the query's own, the sink halves the output."""
    config = replace(PLAIN, attention_sinks=True, num_attention_heads=1, num_key_value_heads=1)
    attention, x = build(config), torch.randn(1, 1, 20)
    logit = (attention.q_proj(x) * attention.k_proj(x)).sum() * attention.scale
    assert attention.sinks is not None
    attention.sinks.data[:] = logit.detach()
    torch.testing.assert_close(run(attention, config, x), attention.o_proj(attention.v_proj(x) / 2))


def test_parameters_have_the_sizes_that_checkpoints_expect() -> None:
    shapes = {
        name: {key: tuple(value.shape) for key, value in build(CONFIGS[name]).state_dict().items() if "norm" in key}
        for name in CONFIGS
        if name.startswith("norm")
    }
    heads = {"q_norm.weight": (8,), "k_norm.weight": (8,)}
    assert shapes == {
        "norm of each head": heads,
        "norm of the width": {"q_norm.weight": (32,), "k_norm.weight": (16,)},
        "norm of each head after RoPE": heads,
        "norm without weights after RoPE": {},
    }
    assert build(CONFIGS["sinks"]).state_dict()["sinks"].shape == (4,)
