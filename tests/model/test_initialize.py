"""Initial values: what is a matrix, what is not, and that the two do not disturb each other."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moesaic.config import MLAConfig, ModelConfig, MoEConfig
from moesaic.model.initialize import initialize
from moesaic.model.moe import MoE
from moesaic.model.transformer import Transformer

MOE = MoEConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=1)
BASE = ModelConfig(
    vocab_size=300, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=96, moe=replace(MOE, first_k_dense_replace=1),
)  # fmt: skip
LATENT = replace(
    BASE, num_key_value_heads=4, head_dim=24, qk_norm="none",
    mla=MLAConfig(kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, q_lora_rank=48),
)  # fmt: skip
BIASES = {
    "attention_bias": True, "attention_output_bias": True, "attention_sinks": True, "mlp_bias": True,
    "lm_head_bias": True, "norm": "layer", "norm_bias": True,
    "moe": replace(MOE, first_k_dense_replace=1, router_bias=True, projection_bias=True),
}  # fmt: skip


def state(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    model = Transformer(config)
    for tensor in (*model.parameters(), *model.buffers()):
        nn.init.constant_(tensor, math.nan)
    model.init_weights(seed)
    return {name: value.detach() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("initializer_range", [0.02, 0.0])
@pytest.mark.parametrize("base", [BASE, LATENT], ids=["heads", "latent"])
def test_biases_and_sinks_are_0_norms_are_1_and_neither_moves_a_matrix(
    base: ModelConfig, initializer_range: float, seed: int
) -> None:
    base = replace(base, initializer_range=initializer_range)
    plain, extended = state(base, seed), state(replace(base, **BIASES), seed)  # type: ignore[arg-type]
    assert len(extended) > len(plain)
    for name, value in extended.items():
        if name.endswith(("bias", "sinks")):
            assert not value.any(), name
        elif name.endswith("norm.weight"):
            assert (value == 1).all(), name
        else:
            assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize("base", [BASE, LATENT], ids=["heads", "latent"])
def test_the_fixed_scale_is_the_standard_deviation_of_every_matrix(base: ModelConfig, seed: int) -> None:
    gated = replace(base, moe=replace(MOE, shared_expert_gate=True))
    for name, value in state(replace(gated, initializer_range=0.05), seed).items():
        if value.ndim > 1:
            writes = any(part in name for part in ("o_proj", "down"))
            expected = 0.05 / math.sqrt(2 * 3) if writes else 0.05
            spread = 6 / math.sqrt(2 * value.numel())  # six standard errors of a standard deviation
            assert float(value.std()) == pytest.approx(expected, rel=spread), name


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_the_fitted_scale_starts_blocks_as_the_identity_where_no_norm_follows(placement: str, seed: int) -> None:
    gated = replace(BASE, norm_placement=placement, initializer_range=0.0, moe=replace(MOE, shared_expert_gate=True))
    for name, value in state(gated, seed).items():
        if value.ndim == 1:
            continue
        expected = 0.5 / math.sqrt(value.shape[-1])
        if any(part in name for part in ("embed_tokens", "lm_head", "router", "shared_expert_gate")):
            expected = 0.02
        elif placement == "pre" and any(part in name for part in ("o_proj", "down")):
            expected = 0.0
        assert float(value.std()) == pytest.approx(expected, rel=6 / math.sqrt(2 * value.numel())), name


EXTENDED = {
    "noise": {"router": "noisy_topk"},
    "soft": {"router": "soft", "slots_per_expert": 2},
    "constants": {"num_constant_experts": 2, "num_copy_experts": 1},
}


@pytest.mark.parametrize("initializer_range", [0.02, 0.0])
@pytest.mark.parametrize("name", EXTENDED)
def test_what_unusual_routers_and_experts_start_from(name: str, initializer_range: float, seed: int) -> None:
    config = replace(
        BASE, initializer_range=initializer_range, moe=replace(MOE, **EXTENDED[name]), depth_layers=(1,)
    )  # fmt: skip
    found = set()
    for key, value in state(config, seed).items():
        leaf = key.rpartition(".")[2]
        if leaf in ("noise_weight", "scale", "constants", "mix") or key.endswith("router.weight"):
            found.add(leaf)
            fixed = {"noise_weight": 0.0, "scale": 0.0}.get(leaf)
            constants = 0.02 / math.sqrt(2 * 3) if initializer_range else 0.0
            expected = fixed if fixed is not None else constants if leaf == "constants" else 0.02
            assert float(value.std(correction=0)) == pytest.approx(expected, rel=6 / math.sqrt(2 * value.numel())), key
            assert leaf != "scale" or value.tolist() == [1.0]
    assert found == {"weight"} | {
        "noise": {"noise_weight"}, "soft": {"scale"}, "constants": {"constants", "mix"}
    }[name]  # fmt: skip


def test_the_noise_of_a_router_moves_no_other_matrix(seed: int) -> None:
    plain, noisy = (
        state(replace(BASE, moe=replace(MOE, router=name)), seed) for name in ("topk_softmax", "noisy_topk")
    )
    assert len(noisy) > len(plain)
    assert all(torch.equal(value, noisy[name]) for name, value in plain.items())


def test_equal_seeds_give_equal_layers_and_others_do_not(seed: int) -> None:
    config = replace(BASE, moe=replace(MOE, router_bias=True, shared_expert_gate=True))
    first, second, third = MoE(config), MoE(config), MoE(config)
    for layer, its_seed in ((first, seed), (second, seed), (third, seed + 1)):
        initialize(layer, config, its_seed)
    ours, same, other = (nn.utils.parameters_to_vector(layer.parameters()) for layer in (first, second, third))
    assert torch.equal(ours, same)
    assert not torch.equal(ours, other)
