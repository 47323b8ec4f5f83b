"""Accounting from a config against constructed models, against operations that torch counts, and against what is
published."""

import random
from dataclasses import fields, replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moesaic.accounting import (
    count_parameters,
    flops_per_token,
    kv_bytes_per_token,
    training_flops_per_token,
    weight_bytes,
)
from moesaic.config import MLAConfig, ModelConfig, MoEConfig, RopeScaling
from moesaic.model.kv_cache import KVCache
from moesaic.model.routers import ROUTERS
from moesaic.model.transformer import Transformer
from moesaic.moe_config import SCORE_ROUTERS, TOPK_ROUTERS, UNLEARNED_ROUTERS

BASE = ModelConfig(
    vocab_size=1000, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    intermediate_size=96,
)  # fmt: skip
MOE = MoEConfig(num_experts=16, num_experts_per_tok=4, moe_intermediate_size=32)
BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True, "lm_head_bias": True}
LATENT = replace(
    BASE, num_key_value_heads=4, head_dim=12, qk_norm="none",
    mla=MLAConfig(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12),
)  # fmt: skip
assert LATENT.mla is not None
CONFIGS = {
    "dense": BASE,
    "dense, tied, biases, no QK-norm": replace(BASE, tie_word_embeddings=True, attention_bias=True, qk_norm="none"),
    "every bias": replace(BASE, **BIASES, moe=replace(MOE, router_bias=True, projection_bias=True)),
    "every layer sparse": replace(BASE, moe=MOE),
    "shared experts and a dense start": replace(BASE, moe=replace(MOE, n_shared_experts=2, first_k_dense_replace=1)),
    "gated shared experts, dense layers": replace(
        BASE, moe=replace(MOE, shared_expert_intermediate_size=40, shared_expert_gate=True, mlp_only_layers=(1, 2))
    ),
    "sigmoid router, tied": replace(BASE, moe=replace(MOE, router="sigmoid_topk"), tie_word_embeddings=True),
    "expert choice": replace(BASE, moe=replace(MOE, router="expert_choice", capacity_factor=2.0)),
    "noisy": replace(BASE, moe=replace(MOE, router="noisy_topk")),
    "hash": replace(BASE, moe=replace(MOE, router="hash")),
    "soft": replace(BASE, moe=replace(MOE, router="soft", slots_per_expert=3, n_shared_experts=1)),
    "latent attention": LATENT,
    "latent queries too": replace(LATENT, moe=MOE, mla=replace(LATENT.mla, q_lora_rank=20)),
}  # fmt: skip


def on_meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def pick(*values: object) -> object:
    return random.choice(values)


def draw_moe(layers: int) -> MoEConfig:
    """Every field, within what MoEConfig allows."""
    router = pick(*ROUTERS, "soft")
    by_score = router in SCORE_ROUTERS
    linear = router not in (*UNLEARNED_ROUTERS, "soft")
    n_group = pick(1, 2, 4) if by_score else 1
    has_free = router in TOPK_ROUTERS and n_group == 1
    shared = {"n_shared_experts": pick(0, 1, 3), "shared_expert_intermediate_size": pick(0, 5)}
    drawn = {
        "num_experts": pick(8, 16), "num_experts_per_tok": 2 if router == "sparsemixer" else pick(1, 2),
        "moe_intermediate_size": pick(4, 7), "router": router, "norm_topk_prob": pick(False, True),
        "norm_topk_order": pick(1.0, 2.0), "norm_topk_min": pick(1e-20, 0.1), "routed_scaling_factor": pick(1.0, 2.5),
        "expert_bias": pick(None, False, True) if by_score else pick(None, False),
        "router_bias": linear and pick(False, True),
        "router_input_jitter": pick(0.0, 0.1) if linear else 0.0,
        "capacity_factor": pick(None, 1.5) if router in (*TOPK_ROUTERS, "expert_choice") else None,
        "top_p": pick(0.3, 1.0) if router == "softmax_top_p" else 0.4,
        "slots_per_expert": pick(1, 3) if router == "soft" else 1,
        "num_zero_experts": pick(0, 2) if has_free else 0, "num_copy_experts": pick(0, 1) if has_free else 0,
        "num_constant_experts": pick(0, 1, 3) if has_free else 0,
        "router_jitter_noise": pick(0.01, 0.1), "n_group": n_group, "topk_group": pick(1, n_group),
        "group_score": pick("max", "top2_sum"), **shared,
        "shared_expert_gate": any(shared.values()) and pick(False, True),
        "first_k_dense_replace": pick(0, 1), "mlp_only_layers": pick((), (1,), (0, 1)) if layers > 2 else (),
        "activation": pick("swiglu", "clamped_swiglu"), "swiglu_limit": 7.0, "swiglu_alpha": 1.702,
        "projection_bias": pick(False, True),
    }  # fmt: skip
    has_capacity = router in TOPK_ROUTERS and drawn["capacity_factor"] is not None
    drawn["drop_policy"] = pick("drop", "next_choice", "pad") if has_capacity else "drop"
    has_bias = router == "sigmoid_topk" if drawn["expert_bias"] is None else drawn["expert_bias"]
    drawn["expert_bias_form"] = pick("add", "multiply") if has_bias else "add"
    assert drawn.keys() == {field.name for field in fields(MoEConfig)}
    return MoEConfig(**drawn)  # type: ignore[arg-type]


def draw_config() -> ModelConfig:
    """Every field, within what ModelConfig allows."""
    layers, heads = random.randint(2, 4), random.choice((2, 4))
    mla = None
    if pick(False, True):
        mla = MLAConfig(
            kv_lora_rank=random.choice((6, 10)), qk_nope_head_dim=random.choice((4, 6)), qk_rope_head_dim=2,
            v_head_dim=random.choice((4, 10)), q_lora_rank=random.choice((None, 5)),
        )  # fmt: skip
    norm, tied = pick("rms", "layer"), pick(False, True)
    kinds = ("full_attention", "sliding_attention", "chunked_attention")
    layer_types = tuple(pick(*kinds) for _ in range(layers)) if pick(False, True) else ()
    head_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim if mla else 8
    drawn = {
        "vocab_size": 31, "hidden_size": pick(12, 16), "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads if mla else pick(1, 2, heads), "head_dim": head_dim,
        "intermediate_size": pick(9, 20), "moe": draw_moe(layers) if pick(False, True, True) else None,
        "max_position_embeddings": 64, "model_type": "",
        "norm": norm, "norm_bias": norm == "layer" and pick(False, True), "rms_norm_eps": 1e-5,
        "norm_placement": pick("pre", "post"), "rope_theta": 1e4, "partial_rotary_factor": pick(0.5, 1.0),
        "rope_scaling": pick(None, RopeScaling(rope_type="linear", factor=2.0)), "rope_interleaved": pick(False, True),
        "nope_layers": pick((), (0,)),
        "qk_norm": "none" if mla else pick("none", "head", "width", "head_after_rope", "l2_after_rope"),
        "attention_bias": pick(False, True), "attention_output_bias": pick(False, True),
        "clip_qkv": None if mla else pick(None, 8.0), "layer_types": layer_types, "sliding_window": pick(3, 8),
        "attention_chunk_size": 4, "attention_sinks": pick(False, True), "attn_scale": pick(0.0, 0.1),
        "floor_scale": 16, "mla": mla, "depth_layers": pick((), (1,), (0, 1)), "depth_capacity": pick(0.125, 1.0),
        "mlp_bias": pick(False, True), "tie_word_embeddings": tied,
        "lm_head_bias": not tied and pick(False, True), "embedding_multiplier": 1.0, "attention_multiplier": None,
        "residual_multiplier": 1.0, "logits_scaling": 1.0, "initializer_range": 0.02, "bos_token_id": None,
        "eos_token_ids": (),
    }  # fmt: skip
    assert drawn.keys() == {field.name for field in fields(ModelConfig)}
    return ModelConfig(**drawn)  # type: ignore[arg-type]


def assert_counts_equal(config: ModelConfig) -> None:
    model, count = on_meta(config), count_parameters(config)
    assert count.total == sum(parameter.numel() for parameter in model.parameters()), config
    routed = sum(parameter.numel() for layer in model.moe_layers for parameter in layer.experts.parameters())
    assert count.routed_experts == routed, config
    share = 0.0
    if config.moe is not None:
        share = 1.0 if config.moe.router == "soft" else config.moe.num_experts_per_tok / config.moe.num_experts
    assert count.active == count.total - routed + share * routed, config
    vectors = [name for name, value in model.named_parameters() if value.ndim == 1]
    assert count.vectors == sum(model.get_parameter(name).numel() for name in vectors), config


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_equal_the_constructed_model(name: str) -> None:
    assert_counts_equal(CONFIGS[name])


def test_parameters_equal_the_constructed_model_whatever_is_chosen() -> None:
    for _ in range(60):
        assert_counts_equal(draw_config())


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_equal_the_constructed_model(name: str) -> None:
    config = CONFIGS[name]
    model = on_meta(config).to(torch.bfloat16)
    assert weight_bytes(config, "bfloat16") == sum(parameter.nbytes for parameter in model.parameters())
    kv = KVCache(config, batch_size=1, capacity=1, dtype=torch.bfloat16, device="meta")
    assert kv_bytes_per_token(config, "bfloat16") == kv.keys.nbytes + kv.values.nbytes


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_flops_equal_what_torch_counts(name: str) -> None:
    """torch counts attention without its causal mask, so every token attends to all L positions there."""
    config = CONFIGS[name]
    model = Transformer(config, backend="reference")
    model.init_weights(0)
    length = 24
    plain_attention = sdpa_kernel(SDPBackend.MATH)  # torch has no count for its fused CPU attention
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain_attention:
        model(torch.randint(0, config.vocab_size, (1, length)))
    assert counter.get_total_flops() == flops_per_token(config, length).forward * length


def test_a_layer_that_tokens_pass_by_costs_its_share() -> None:
    """Torch counts what the picked half of the tokens took; the router's product it does not see."""
    config = replace(BASE, moe=MOE, depth_layers=(1, 3), depth_capacity=0.5)
    model, length = Transformer(config, backend="reference"), 24
    model.init_weights(0)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.randint(0, config.vocab_size, (1, length)))
    routers = 2 * 2 * config.hidden_size * length
    assert counter.get_total_flops() + routers == flops_per_token(config, length).forward * length


def test_experts_that_compute_nothing_cost_no_more_than_the_router_that_sees_them() -> None:
    config, free = replace(BASE, moe=MOE), {"num_zero_experts": 1, "num_copy_experts": 3}
    more = flops_per_token(replace(BASE, moe=replace(MOE, **free)), 8).forward - flops_per_token(config, 8).forward
    assert more == 2 * config.num_hidden_layers * 4 * config.hidden_size


def test_parameters_of_unusual_layers() -> None:
    """Counted by hand: D 64, E 16, 4 layers."""

    def more(**settings: object) -> int:
        of_moe = {name: value for name, value in settings.items() if not name.startswith("depth")}
        of_model = {name: value for name, value in settings.items() if name.startswith("depth")}
        config = replace(BASE, moe=replace(MOE, **of_moe), **of_model)  # type: ignore[arg-type]
        return count_parameters(config).total - count_parameters(replace(BASE, moe=MOE)).total

    assert more(router="noisy_topk") == 4 * 16 * 64
    assert more(router="hash") == -4 * 16 * 64
    assert more(num_zero_experts=2) == 4 * 2 * 64
    assert more(num_constant_experts=2) == 4 * (2 * 64 + 2 * (64 + 2 * 64))
    assert more(router="soft", slots_per_expert=3) == 4 * (2 * 16 * 64 + 1)
    assert more(depth_layers=(0, 2)) == 2 * 64


def test_training_costs_three_forward_passes() -> None:
    flops = flops_per_token(BASE, 100)
    assert flops.training == 3 * flops.forward


def test_windows_and_chunks_limit_the_context() -> None:
    """The mean over a sequence of what each token sees, counted token by token."""
    kinds = ("full_attention", "sliding_attention", "chunked_attention", "sliding_attention")
    config = replace(BASE, layer_types=kinds, sliding_window=7, attention_chunk_size=5)
    per_visible_token = 2 * 2 * BASE.num_attention_heads * BASE.head_dim
    without_attention = flops_per_token(config, 0).forward
    for length in (1, 4, 5, 7, 13, 40):
        seen = [(p + 1) + 2 * min(p + 1, 7) + (p % 5 + 1) for p in range(length)]
        expected = without_attention + per_visible_token * sum(seen) / length
        assert training_flops_per_token(config, length) == pytest.approx(3 * expected, rel=1e-12)
        visible = length + 2 * min(length, 7) + min(length, 5)
        assert flops_per_token(config, length).forward == without_attention + per_visible_token * visible


def decoder(shape: tuple[int, ...], vocab_size: int, moe: MoEConfig | None, **settings: object) -> ModelConfig:
    """`shape` is layers, hidden size, query heads, key-value heads, head dim."""
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    return ModelConfig(vocab_size=vocab_size, moe=moe, **dict(zip(names, shape, strict=True)), **settings)  # type: ignore[arg-type]


def experts(num_experts: int, top_k: int, size: int, **settings: object) -> MoEConfig:
    return MoEConfig(
        num_experts=num_experts, num_experts_per_tok=top_k, moe_intermediate_size=size, **settings  # type: ignore[arg-type]
    )  # fmt: skip


PUBLISHED = {
    "Granite-3.1-1b-a400m": (
        decoder((24, 1024, 16, 8, 64), 49155, experts(32, 8, 512, router="topk_softmax"), qk_norm="none",
                tie_word_embeddings=True),
        1.335e9, 0.43e9,
    ),
    "OLMoE-1B-7B": (
        decoder((16, 2048, 16, 16, 128), 50304, experts(64, 8, 1024, norm_topk_prob=False), qk_norm="width"),
        6.92e9, 1.28e9,
    ),
    "DeepSeek-V2-Lite": (
        decoder((27, 2048, 16, 16, 192), 102400,
                experts(64, 6, 1408, norm_topk_prob=False, n_shared_experts=2, first_k_dense_replace=1),
                intermediate_size=10944, qk_norm="none",
                mla=MLAConfig(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)),
        15.7e9, 2.66e9,
    ),
    "Qwen3-30B-A3B": (decoder((48, 2048, 32, 4, 128), 151936, experts(128, 8, 768)), 30.5e9, 3.35e9),
    "Mixtral-8x7B": (
        decoder((32, 4096, 32, 8, 128), 32000, experts(8, 2, 14336), qk_norm="none"), 46.7e9, 12.9e9,
    ),
    "DeepSeek-V3": (
        decoder((61, 7168, 128, 128, 192), 129280,
                experts(256, 8, 2048, router="sigmoid_topk", routed_scaling_factor=2.5, n_group=8, topk_group=4,
                        n_shared_experts=1, first_k_dense_replace=3),
                intermediate_size=18432, qk_norm="none",
                mla=MLAConfig(q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
                              v_head_dim=128)),
        671e9, 37e9,
    ),
}  # fmt: skip
GPT_OSS_20B = decoder(
    (24, 2880, 64, 8, 64), 201088,
    experts(32, 4, 2880, router="topk_softmax", router_bias=True, projection_bias=True, activation="clamped_swiglu"),
    qk_norm="none", attention_bias=True, attention_output_bias=True, attention_sinks=True,
)  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    """To 2 %, because they are published with two digits at worst (37 billion)."""
    config, total, active = PUBLISHED[name]
    count = count_parameters(config)
    assert count.total == pytest.approx(total, rel=0.005)
    assert count.active == pytest.approx(active, rel=0.02)
    assert count.total == sum(parameter.numel() for parameter in on_meta(config).parameters())


def test_published_size_of_gpt_oss_whose_active_parameters_leave_out_the_input_embedding() -> None:
    count = count_parameters(GPT_OSS_20B)
    assert count.total == pytest.approx(20.9e9, rel=0.005)
    assert count.active - 201088 * 2880 == pytest.approx(3.61e9, rel=0.005)
    assert count.total == sum(parameter.numel() for parameter in on_meta(GPT_OSS_20B).parameters())


def test_published_cache_of_latent_attention() -> None:
    """DeepSeek-V3 keeps 512 + 64 numbers per layer and token: 70.3 kB in bfloat16 (arXiv 2505.09343, table 1)."""
    assert kv_bytes_per_token(PUBLISHED["DeepSeek-V3"][0], "bfloat16") == 61 * 576 * 2 == 70272
