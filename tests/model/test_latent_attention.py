"""Latent attention against a float64 loop and against transformers. B sequences, L positions, D hidden size."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from moesaic.config import MLAConfig, ModelConfig, RopeScaling
from moesaic.model.attention_context import make_attention_context
from moesaic.model.kv_cache import KVCache
from moesaic.model.latent_attention import LatentAttention

from .attention_oracle import (
    LENGTH,
    PADDED,
    assert_equals_loop,
    attended,
    project,
    randomize,
    rms,
    run,
    turned,
)

MLA = MLAConfig(kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=7, q_lora_rank=9)
PLAIN = ModelConfig(
    vocab_size=8, hidden_size=21, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3, head_dim=10,
    intermediate_size=8, qk_norm="none", rope_theta=100.0, sliding_window=3, rope_interleaved=True, mla=MLA,
)  # fmt: skip
CONFIGS = {
    "plain": PLAIN,
    "queries without a latent": replace(PLAIN, mla=replace(MLA, q_lora_rank=None)),
    "biases": replace(PLAIN, attention_bias=True, attention_output_bias=True),
    "halves turn": replace(PLAIN, rope_interleaved=False),
    "sinks": replace(PLAIN, attention_sinks=True),
    "sliding": replace(PLAIN, layer_types=("full_attention", "sliding_attention")),
    "no RoPE, growing queries": replace(PLAIN, nope_layers=(1,), attn_scale=0.4, floor_scale=2),
    "a latent so small that absorbing is always cheaper": replace(PLAIN, mla=replace(MLA, kv_lora_rank=2)),
}
YARN = RopeScaling(
    rope_type="yarn", factor=40.0, original_max_position_embeddings=64, mscale=0.707, mscale_all_dim=0.9,
)  # fmt: skip


def build(config: ModelConfig) -> LatentAttention:
    attention = LatentAttention(config, layer_index=1)
    randomize(attention)
    return attention


def by_hand(weights: dict[str, Tensor], config: ModelConfig, x: Tensor, positions: Tensor) -> Tensor:
    assert config.mla is not None
    nope, rope, latent_size = config.mla.qk_nope_head_dim, config.mla.qk_rope_head_dim, config.mla.kv_lora_rank
    has_rope, heads = 1 not in config.nope_layers, config.num_attention_heads
    if config.mla.q_lora_rank is None:
        query = project(x, weights, "q_proj")
    else:
        query = project(
            rms(project(x, weights, "q_a_proj"), 1e-6, weights["q_a_norm.weight"]), weights, "q_b_proj"
        )  # fmt: skip
    query_nope, query_rope = query.unflatten(-1, (heads, -1)).split((nope, rope), dim=-1)
    latent, key_rope = project(x, weights, "kv_a_proj").split((latent_size, rope), dim=-1)
    expanded = project(rms(latent, 1e-6, weights["kv_a_norm.weight"]), weights, "kv_b_proj").unflatten(-1, (heads, -1))
    key_nope, value = expanded.split((nope, config.mla.v_head_dim), dim=-1)
    key_rope = key_rope.unsqueeze(2)
    if has_rope:
        query_rope, key_rope = turned(query_rope, positions, config), turned(key_rope, positions, config)
    query = torch.cat((query_nope, query_rope), dim=-1)
    if not has_rope:
        steps = positions.clamp_min(0).double()
        query = query * (1 + 0.4 * torch.log(1 + torch.floor((steps + 1) / 2)))[..., None, None]
    key = torch.cat((key_nope, key_rope.expand(-1, -1, heads, -1)), dim=-1)
    out = attended(query, key, value, positions, config, 1, (nope + rope) ** -0.5, weights.get("sinks"))
    return project(out, weights, "o_proj")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_equal_the_loop(name: str, padded: bool) -> None:
    config = CONFIGS[name]
    assert_equals_loop(build(config), config, padded, lambda weights, x, at: by_hand(weights, config, x, at))


@pytest.mark.parametrize("new", [1, 3, 20])
@pytest.mark.parametrize("name", ["plain", "sinks"])
def test_absorbed_and_decompressed_attention_are_the_same(name: str, new: int) -> None:
    attention, total = build(CONFIGS[name]), new + 4
    query, latent = torch.randn(2, 3, new, 10), torch.randn(2, 1, total, 14)
    mask = torch.ones(new, total, dtype=torch.bool).tril(4).expand(2, 1, -1, -1)
    absorbed = attention._attend_absorbed(query, latent, mask)
    assert absorbed.shape == (2, 3, new, 7)
    torch.testing.assert_close(absorbed, attention._attend_decompressed(query, latent, mask), rtol=1e-4, atol=1e-4)


def test_few_tokens_after_many_are_absorbed_and_whole_prompts_are_not() -> None:
    """DeepSeek-V3's sizes."""
    sizes = MLAConfig(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, q_lora_rank=1536)
    config = replace(PLAIN, mla=sizes, head_dim=192, hidden_size=7168, num_attention_heads=128, num_key_value_heads=128)
    with torch.device("meta"):
        attention = LatentAttention(config, 0)
    assert [attention._absorbing_is_cheaper(new, 4096) for new in (1, 64, 512, 4096)] == [True, True, False, False]


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_from_the_cached_latents_equals_the_full_pass(name: str) -> None:
    config, x = CONFIGS[name], torch.randn(2, LENGTH, 21)
    attention = build(config)
    expected = run(attention, config, x, PADDED)
    kv, parts = KVCache(config, batch_size=2, capacity=LENGTH), []
    with torch.no_grad():
        for start, end in ((0, 4), (4, 6), (6, 7)):
            kv.extend(PADDED[:, start:end])
            context = make_attention_context(config, PADDED[:, start:end], kv, plainly_causal=False)
            parts.append(attention(x[:, start:end], context))
    is_token = (PADDED >= 0).unsqueeze(-1)
    torch.testing.assert_close(torch.cat(parts, 1) * is_token, expected * is_token, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("q_lora_rank", [9, None])
@pytest.mark.parametrize("scaling", [None, YARN, replace(YARN, mscale=None, mscale_all_dim=None)])
@pytest.mark.parametrize("version", ["v2", "v3"])
def test_outputs_equal_transformers(version: str, scaling: RopeScaling | None, q_lora_rank: int | None) -> None:
    config = replace(
        PLAIN, mla=replace(MLA, q_lora_rank=q_lora_rank), rope_scaling=scaling, max_position_embeddings=2560,
        attention_bias=True, attention_output_bias=True,
    )  # fmt: skip
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": 100.0}
    if scaling is not None:
        names = ("rope_type", "factor", "original_max_position_embeddings", "mscale", "mscale_all_dim")
        rope |= {name: getattr(scaling, name) for name in names if getattr(scaling, name) is not None}
    kinds = {
        "v2": (DeepseekV2Config, DeepseekV2Attention, DeepseekV2RotaryEmbedding),
        "v3": (DeepseekV3Config, DeepseekV3Attention, DeepseekV3RotaryEmbedding),
    }
    config_type, attention_type, rotary_type = kinds[version]
    theirs = config_type(
        hidden_size=21, num_attention_heads=3, num_key_value_heads=3, kv_lora_rank=10, qk_nope_head_dim=6,
        qk_rope_head_dim=4, v_head_dim=7, q_lora_rank=q_lora_rank, attention_bias=True, max_position_embeddings=2560,
        rope_parameters=rope, attn_implementation="eager",
    )  # fmt: skip
    ours, peer = build(config), attention_type(theirs, 0)
    renames = {"kv_a_proj.": "kv_a_proj_with_mqa.", "q_a_norm": "q_a_layernorm", "kv_a_norm": "kv_a_layernorm"}
    state = {}
    for name, value in ours.state_dict().items():
        for old, new in renames.items():
            name = name.replace(old, new)
        state[name] = value
    peer.load_state_dict(state)
    x, positions = torch.randn(2, LENGTH, 21), torch.arange(LENGTH).expand(2, LENGTH)
    mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1).expand(2, 1, -1, -1)
    tables = rotary_type(theirs)(x, positions)
    expected = peer(x, attention_mask=mask, position_embeddings=tables)[0]
    torch.testing.assert_close(run(ours, config, x), expected, rtol=1e-4, atol=1e-4)
