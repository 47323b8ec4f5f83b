"""Rotation by position against complex numbers in float64. B sequences, L positions, H heads, d head dim, r rotary."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PhimoeConfig
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

from moesaic.config import ModelConfig, RopeScaling
from moesaic.model.rope import rotary_tables, rotate

from .attention_oracle import rotated_by_hand

CONFIG = ModelConfig(
    vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=12,
    intermediate_size=8, rope_theta=300.0,
)  # fmt: skip
LAYOUTS = {
    "halves": CONFIG,
    "halves, partial": replace(CONFIG, partial_rotary_factor=0.5),
    "interleaved": replace(CONFIG, rope_interleaved=True),
    "interleaved, partial": replace(CONFIG, rope_interleaved=True, partial_rotary_factor=0.34),
    "yarn": replace(CONFIG, rope_scaling=RopeScaling(rope_type="yarn", factor=4.0, attention_factor=1.5)),
}


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "yarn"])
def test_pairs_turn_as_complex_numbers(name: str) -> None:
    config, x, positions = LAYOUTS[name], torch.randn(2, 3, 5, 12), torch.randint(0, 60, (2, 5))
    turned = rotate(x, rotary_tables(positions, config), config.rope_interleaved)
    torch.testing.assert_close(turned.double(), rotated_by_hand(x, positions, config), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_products_depend_on_the_distance_alone(name: str) -> None:
    config, query, key = LAYOUTS[name], torch.randn(1, 1, 1, 12), torch.randn(1, 1, 1, 12)

    def product(query_position: int, key_position: int) -> Tensor:
        tables = [rotary_tables(torch.tensor([[position]]), config) for position in (query_position, key_position)]
        turned = [rotate(x, table, config.rope_interleaved) for x, table in zip((query, key), tables, strict=True)]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(9, 4), product(45, 40), rtol=1e-4, atol=1e-4)
    assert (product(9, 4) - product(9, 8)).abs() > 1e-6


def test_the_multiplier_of_the_method_scales_what_is_turned() -> None:
    config = LAYOUTS["yarn"]
    cos, sin = rotary_tables(torch.arange(6)[None], config)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, 1.5**2))


def test_tables_equal_phi_within_the_original_context() -> None:
    """Beyond it transformers 5.23 keeps the short divisors, which is not what the method says."""
    factors = {key: [1.0 + index / 4 for index in range(6)] for key in ("short_factor", "long_factor")}
    options = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    mscales = {"short_mscale": 1.2, "long_mscale": 1.3}
    theirs = PhimoeConfig(
        hidden_size=24, num_attention_heads=2, max_position_embeddings=256,
        rope_parameters={**options, **mscales, **factors, "rope_theta": 300.0},
    )  # fmt: skip
    scaling = RopeScaling(**options, **mscales, **{key: tuple(value) for key, value in factors.items()})  # type: ignore[arg-type]
    config = replace(CONFIG, rope_scaling=scaling, max_position_embeddings=256)
    positions = torch.arange(40)[None]
    expected = PhimoeRotaryEmbedding(theirs)(torch.zeros(1), positions)
    for ours, table in zip(rotary_tables(positions, config), expected, strict=True):
        torch.testing.assert_close(ours[:, 0], table, rtol=1e-4, atol=1e-5)
