"""Stretched rotary frequencies against transformers."""

import random

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moesaic.config import ModelConfig, RopeScaling
from moesaic.model.rope_scaling import rotary_frequencies, yarn_mscale

CONTEXT = 4096
ORIGINAL = 512
HEAD_DIM = 48
METHODS: dict[str, dict[str, object]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "dynamic, large factor": {"rope_type": "dynamic", "factor": 7.5},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": ORIGINAL},
    "yarn within the whole context": {"rope_type": "yarn", "factor": 4.0},
    "yarn, not truncated": {
        "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": ORIGINAL, "truncate": False,
        "beta_fast": 16.0, "beta_slow": 2.0,
    },
    "yarn, attention_factor": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": ORIGINAL, "attention_factor": 0.7,
    },
    "yarn, DeepSeek": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": ORIGINAL, "mscale": 0.707,
        "mscale_all_dim": 1.0,
    },
    "yarn, mscale alone": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.5},
    "yarn, everything blended alike": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1e6, "beta_slow": 1e5},
    "yarn, shrunk": {"rope_type": "yarn", "factor": 0.5},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": ORIGINAL, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "llama3, narrow": {
        "rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 200, "low_freq_factor": 2.0,
        "high_freq_factor": 2.5,
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": ORIGINAL},
    "longrope, factor": {"rope_type": "longrope", "original_max_position_embeddings": ORIGINAL, "factor": 16.0},
    "longrope, attention_factor": {
        "rope_type": "longrope", "original_max_position_embeddings": ORIGINAL, "attention_factor": 1.3,
    },
}  # fmt: skip


def config_with(scaling: RopeScaling | None, theta: float = 10000.0, partial: float = 1.0) -> ModelConfig:
    return ModelConfig(
        vocab_size=8, hidden_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=HEAD_DIM, intermediate_size=8, max_position_embeddings=CONTEXT, rope_theta=theta,
        partial_rotary_factor=partial, rope_scaling=scaling,
    )  # fmt: skip


def frequencies(config: ModelConfig, length: int) -> tuple[Tensor, float]:
    """Ours, in a forward pass over two sequences of which the longer has `length` tokens."""
    ours, multiplier = rotary_frequencies(config, torch.tensor([[0, 3, length - 1], [0, 1, 2]]))
    return ours, float(multiplier)


@pytest.mark.parametrize("length", [5, ORIGINAL, ORIGINAL + 1, CONTEXT, 3 * CONTEXT])
@pytest.mark.parametrize("name", METHODS)
def test_frequencies_equal_transformers(name: str, length: int) -> None:
    options = dict(METHODS[name])
    theta, partial = random.uniform(500, 1e6), random.choice([0.5, 1.0])
    if name.startswith("longrope"):
        count = int(HEAD_DIM * partial) // 2
        for key in ("short_factor", "long_factor"):
            options[key] = [random.uniform(1, 40) for _ in range(count)]
    theirs = LlamaConfig(
        hidden_size=96, num_attention_heads=2, head_dim=HEAD_DIM, max_position_embeddings=CONTEXT,
        rope_parameters={**options, "rope_theta": theta, "partial_rotary_factor": partial},
    )  # fmt: skip
    expected, multiplier = ROPE_INIT_FUNCTIONS[str(options["rope_type"])](theirs, torch.device("cpu"), seq_len=length)
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    ours = frequencies(config_with(RopeScaling(**fields), theta, partial), length)  # type: ignore[arg-type]
    torch.testing.assert_close(ours[0], expected, rtol=2e-5, atol=0)
    assert ours[1] == pytest.approx(multiplier, rel=1e-6)


def test_without_scaling_wave_i_turns_by_theta_to_the_minus_2i_over_r() -> None:
    ours, multiplier = frequencies(config_with(None, theta=700.0, partial=0.5), 9)
    expected = torch.tensor([700.0 ** (-2 * index / 24) for index in range(12)], dtype=torch.float64)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=0)
    assert multiplier == 1.0


@pytest.mark.parametrize("length", [9, 3 * CONTEXT])
def test_alpha_multiplies_the_base_whatever_the_length(length: int) -> None:
    """Hunyuan: the base grows by alpha^(r / (r - 2))."""
    alpha = random.uniform(2, 1000)
    ours, multiplier = frequencies(config_with(RopeScaling(rope_type="dynamic", alpha=alpha, factor=1.0)), length)
    base = 10000.0 * alpha ** (HEAD_DIM / (HEAD_DIM - 2))
    expected = torch.tensor([base ** (-2 * index / HEAD_DIM) for index in range(HEAD_DIM // 2)], dtype=torch.float64)
    torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=0)
    assert multiplier == 1.0


@pytest.mark.parametrize(("length", "expected"), [(ORIGINAL, 1.1), (ORIGINAL + 1, 1.4)])
def test_longrope_of_phi_multiplies_by_the_mscale_of_its_length(length: int, expected: float) -> None:
    scaling = RopeScaling(
        rope_type="longrope", original_max_position_embeddings=ORIGINAL, short_factor=(2.0,) * 24,
        long_factor=(5.0,) * 24, short_mscale=1.1, long_mscale=1.4,
    )  # fmt: skip
    assert frequencies(config_with(scaling), length)[1] == pytest.approx(expected)


def test_a_single_wave_cannot_be_stretched_by_a_larger_base() -> None:
    config = config_with(RopeScaling(rope_type="dynamic", factor=4.0), partial=2 / HEAD_DIM)
    assert frequencies(config, 3 * CONTEXT)[0].tolist() == [1.0]


def test_mscale_grows_with_the_logarithm_of_the_factor_and_never_shrinks() -> None:
    assert yarn_mscale(40.0, 0.5) == pytest.approx(1 + 0.05 * 3.688879454)
    assert yarn_mscale(0.5) == yarn_mscale(1.0) == 1.0
