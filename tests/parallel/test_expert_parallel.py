"""Experts on several ranks compute what one process with all of them does.

B sequences, L positions, T = B x L tokens, E experts, K experts per token, D hidden size, V vocabulary.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.config import ModelConfig, MoEConfig, ParallelConfig
from moesaic.model.transformer import Transformer
from moesaic.parallel.all_to_all import AllToAllDispatcher
from moesaic.parallel.expert_parallel import apply_expert_parallel, expert_bounds
from moesaic.parallel.ranks import make_ranks

from .processes import on_ranks

B, L, D, E, K, V = 4, 5, 16, 6, 3, 40
BASE = ModelConfig(
    vocab_size=V, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    initializer_range=0.3,
    moe=MoEConfig(num_experts=E, num_experts_per_tok=K, moe_intermediate_size=8),
)  # fmt: skip
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {"router": "softmax_topk"},
    "shared experts": {"router": "sigmoid_topk", "n_shared_experts": 1},
    "weighs inputs": {"router": "topk_sigmoid_input"},
    "expert biases": {"projection_bias": True},
    "drops": {"router": "softmax_topk", "capacity_factor": 1.0},
    "expert choice": {"router": "expert_choice"},
    "free experts": {"router": "softmax_topk", "num_zero_experts": 1, "num_copy_experts": 1},
    "soft": {"router": "soft", "slots_per_expert": 2},
}


def with_moe(**settings: Any) -> ModelConfig:
    assert BASE.moe is not None
    return replace(BASE, moe=replace(BASE.moe, **settings))


def build(
    config: ModelConfig, seed: int, dtype: torch.dtype = torch.float64, backend: str = "reference"
) -> Transformer:
    model = Transformer(config, backend=backend)
    model.init_weights(seed)
    return model.to(dtype).train()


def draw(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, L), noise keys (B,), and what the logits (B, L, V) are weighed with to make a loss."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BL = torch.randint(0, V, (B, L), generator=generator)
    return tokens_BL, torch.arange(B), torch.randn(B, L, V, generator=generator, dtype=torch.float64)


def learn(model: Transformer, seed: int, rows: slice, checkpointing: bool = False) -> dict[str, Tensor]:
    """The logits of some sequences, and what they give every parameter."""
    model.activation_checkpointing = checkpointing
    tokens_BL, keys_B, factors_BLV = draw(seed)
    logits_BLV = model(tokens_BL[rows], noise_keys=keys_B[rows])
    (logits_BLV * factors_BLV[rows]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return {"logits": logits_BLV.detach(), **{name: value for name, value in gradients.items() if value is not None}}


def learn_on_ranks(
    config: ModelConfig, seed: int, cuts: list[int], checkpointing: bool = False, ep: int = 0, **settings: Any
) -> tuple[dict[str, Tensor], int]:
    """As rank r of all, which takes the sequences cuts[r] to cuts[r + 1]; and the bytes that it sent."""
    ranks = make_ranks(ParallelConfig(ep=ep or len(cuts) - 1))
    assert ranks.mesh is not None
    model = build(config, seed)
    apply_expert_parallel(model, ranks.mesh, **settings)
    seen = learn(model, seed, slice(cuts[ranks.index], cuts[ranks.index + 1]), checkpointing)
    sent = 0
    for layer in model.moe_layers:
        if isinstance(layer.dispatcher, AllToAllDispatcher):
            sent += layer.dispatcher.exchange.bytes_sent
    return seen, sent


def whole(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the ranks of one ep group have together: experts side by side, dense gradients summed up."""
    joined = {"logits": torch.cat([part["logits"] for part in parts])}
    for name in (name for name in parts[0] if name != "logits"):
        values = [part[name] for part in parts]
        joined[name] = torch.cat(values) if ".experts." in name else torch.stack(values).sum(0)
    return joined


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    largest = max(float(value.abs().max()) for name, value in expected.items() if name != "logits")
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        scale = max(float(value.abs().max()), 1e-3 * largest)
        assert float((got[name] - value).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("router", ROUTERS)
def test_two_ranks_learn_what_one_process_does(router: str, seed: int) -> None:
    config = with_moe(**ROUTERS[router])
    expected = learn(build(config, seed), seed, slice(None))
    parts = on_ranks(2, learn_on_ranks, config, seed, [0, 2, 4])
    assert_close(whole([part for part, _ in parts]), expected, 1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_four_ranks_share_six_experts_and_one_has_no_token(checkpointing: bool, seed: int) -> None:
    expected = learn(build(BASE, seed), seed, slice(None), checkpointing)
    parts = on_ranks(4, learn_on_ranks, BASE, seed, [0, 3, 3, 4, 4], checkpointing)
    assert [len(part["layers.0.feed_forward.experts.down"]) for part, _ in parts] == [2, 2, 1, 1]
    assert_close(whole([part for part, _ in parts]), expected, 1e-12)


def test_more_ranks_than_experts_are_refused_by_name() -> None:
    with pytest.raises(AssertionError, match=r"parallel.ep is 3, but a layer has 2 experts; set it to 2 or less"):
        on_ranks(3, learn_on_ranks, with_moe(num_experts=2, num_experts_per_tok=1), 0, [0, 1, 2, 4])


def test_tokens_travel_once_to_each_rank() -> None:
    """With all experts chosen by every token, each sends one row to the other rank and gets one back."""
    config = replace(with_moe(num_experts_per_tok=E), num_hidden_layers=1)
    for (_, sent), tokens in zip(on_ranks(2, learn_on_ranks, config, 0, [0, 1, 4]), (L, 3 * L), strict=True):
        rows = 8 * D * 2 * B * L  # there and back, forward and backward: own tokens and those of the other rank
        labels = tokens * E // 2 * (4 + 8) + (B * L - tokens) * E // 2 * 8
        assert sent == rows + labels + 16


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(6, 4), (5, 5), (7, 2), (8, 1)])
def test_bounds_share_all_experts_almost_evenly(num_experts: int, num_ranks: int) -> None:
    bounds = expert_bounds(num_experts, num_ranks)
    sizes = [last - first for first, last in pairwise(bounds)]
    assert (bounds[0], bounds[-1], len(sizes)) == (0, num_experts, num_ranks)
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
