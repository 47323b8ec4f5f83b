"""Accounting from a config against constructed models and against operations that torch counts."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moesaic.accounting import count_parameters, flops_per_token, kv_bytes_per_token, weight_bytes
from moesaic.config import ModelConfig, MoEConfig
from moesaic.model.kv_cache import KVCache
from moesaic.model.transformer import Transformer

BASE = ModelConfig(
    vocab_size=1000,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=96,
)
MOE = MoEConfig(num_experts=16, num_experts_per_tok=4, moe_intermediate_size=32)
CONFIGS = {
    "dense": BASE,
    "dense, tied, biases, no QK-norm": replace(BASE, tie_word_embeddings=True, attention_bias=True, qk_norm=False),
    "every layer sparse": replace(BASE, moe=MOE),
    "shared experts and a dense start": replace(BASE, moe=replace(MOE, n_shared_experts=2, first_k_dense_replace=1)),
    "sigmoid router, tied": replace(BASE, moe=replace(MOE, router="sigmoid_topk"), tie_word_embeddings=True),
    "OLMoE-1B-7B": ModelConfig(
        vocab_size=50304,
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128,
        moe=MoEConfig(num_experts=64, num_experts_per_tok=8, moe_intermediate_size=1024, norm_topk_prob=False),
    ),
    "Mixtral-8x7B": ModelConfig(
        vocab_size=32000,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        qk_norm=False,
        moe=MoEConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=14336),
    ),
}


def on_meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_equal_the_constructed_model(name: str) -> None:
    config = CONFIGS[name]
    model = on_meta(config)
    count = count_parameters(config)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    unused = 0
    if config.moe is not None:
        idle_share = 1 - config.moe.num_experts_per_tok / config.moe.num_experts
        experts = [layer.experts for layer in model.moe_layers]
        unused = idle_share * sum(expert.gate_up.numel() + expert.down.numel() for expert in experts)
    assert count.active == count.total - unused


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_equal_the_constructed_model(name: str) -> None:
    config = CONFIGS[name]
    model = on_meta(config).to(torch.bfloat16)
    assert weight_bytes(config, "bfloat16") == sum(parameter.nbytes for parameter in model.parameters())
    kv = KVCache(config, batch_size=1, capacity=1, dtype=torch.bfloat16, device="meta")
    assert kv_bytes_per_token(config, "bfloat16") == kv.keys.nbytes + kv.values.nbytes


@pytest.mark.parametrize("name", [name for name in CONFIGS if "B" not in name])
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


def test_training_costs_three_forward_passes() -> None:
    flops = flops_per_token(BASE, 100)
    assert flops.training == 3 * flops.forward


@pytest.mark.parametrize(
    ("name", "total", "active"), [("OLMoE-1B-7B", 6.92e9, 1.28e9), ("Mixtral-8x7B", 46.7e9, 12.9e9)]
)
def test_published_sizes(name: str, total: float, active: float) -> None:
    count = count_parameters(CONFIGS[name])
    assert abs(count.total / total - 1) < 0.01
    assert abs(count.active / active - 1) < 0.01
