"""Hash, expert choice, top-p and ReLU routing against their definitions, one token or expert at a time in float64.

B sequences, L positions, n tokens of a sequence, T = B x L, D hidden size, E experts, K experts per token.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.config import MoEConfig
from moesaic.model.noise import combine
from moesaic.model.routers import ReLURouter
from moesaic.model.routing_context import RoutingContext

from .helpers import MARGIN, MAX_DRAWS, VOCAB_SIZE, D, E, as_matrix, context_of, exact_logits, make_config, make_router

B, L = 3, 11
CASES: dict[str, dict[str, Any]] = {
    "hash": {"router": "hash"},
    "hash, scaled": {"router": "hash", "routed_scaling_factor": 2.5, "num_experts_per_tok": 1},
    "expert choice": {"router": "expert_choice"},
    "expert choice, much, scaled": {
        "router": "expert_choice", "capacity_factor": 2.2, "router_bias": True, "routed_scaling_factor": 0.5,
    },
    "expert choice, more than there is": {"router": "expert_choice", "capacity_factor": 9.0},
    "top-p": {"router": "softmax_top_p"},
    "top-p, as they are": {"router": "softmax_top_p", "norm_topk_prob": False, "top_p": 0.6, "router_bias": True},
    "top-p, the most": {"router": "softmax_top_p", "top_p": 0.97, "num_experts_per_tok": 5},
    "top-p, of all": {"router": "softmax_top_p", "top_p": 0.9, "num_experts_per_tok": E},
    "relu": {"router": "relu"},
    "relu, scaled": {"router": "relu", "routed_scaling_factor": 1.5, "router_bias": True},
}  # fmt: skip

Definition = Callable[[MoEConfig, Tensor, list[int]], tuple[list[dict[int, Tensor]], float]]
"""Logits (n, E) and ids of a sequence's tokens -> weights by expert of each token, and what gap decided."""


def hashed(moe: MoEConfig, logits: Tensor, tokens: list[int]) -> tuple[list[dict[int, Tensor]], float]:
    rows = []
    for token in tokens:
        drawn = [int(combine(torch.tensor(token), expert)) for expert in range(E)]
        best = sorted(range(E), key=lambda expert, drawn=drawn: -drawn[expert])[: moe.num_experts_per_tok]
        rows.append({expert: torch.tensor(1 / moe.num_experts_per_tok, dtype=torch.float64) for expert in best})
    return rows, math.inf


def chosen_by_experts(moe: MoEConfig, logits: Tensor, tokens: list[int]) -> tuple[list[dict[int, Tensor]], float]:
    n, margin = len(logits), math.inf
    scores = [row.softmax(0) for row in logits]
    rows: list[dict[int, Tensor]] = [{} for _ in range(n)]
    room = min(n, math.ceil((moe.capacity_factor or 1.0) * n * moe.num_experts_per_tok / E - 1e-9))
    for expert in range(E):
        ranked = sorted(range(n), key=lambda token, expert=expert: -float(scores[token][expert].detach()))
        for token in ranked[:room]:
            rows[token][expert] = scores[token][expert]
        if 0 < room < n:
            gap = scores[ranked[room - 1]][expert] - scores[ranked[room]][expert]
            margin = min(margin, float(gap.detach()))
    return rows, margin


def up_to_p(moe: MoEConfig, logits: Tensor, tokens: list[int]) -> tuple[list[dict[int, Tensor]], float]:
    rows, margin = [], math.inf
    for row in logits:
        scores = row.softmax(0)
        values = scores.tolist()
        ranked = sorted(range(E), key=lambda expert, values=values: -values[expert])
        chosen, total = [], 0.0
        for expert in ranked:
            margin = min(margin, abs(total - moe.top_p))
            if total >= moe.top_p or len(chosen) == moe.num_experts_per_tok:
                margin = min(margin, values[chosen[-1]] - values[expert])
                break
            chosen.append(expert)
            total += values[expert]
        norm = torch.stack([scores[expert] for expert in chosen]).sum() if moe.norm_topk_prob else 1.0
        rows.append({expert: scores[expert] / norm for expert in chosen})
    return rows, margin


def above_zero(moe: MoEConfig, logits: Tensor, tokens: list[int]) -> tuple[list[dict[int, Tensor]], float]:
    rows = [{expert: value for expert, value in enumerate(row) if float(value.detach()) > 0} for row in logits]
    return rows, float(logits.detach().abs().min()) if len(logits) else math.inf


DEFINITIONS: dict[str, Definition] = {
    "hash": hashed, "expert_choice": chosen_by_experts, "softmax_top_p": up_to_p, "relu": above_zero,
}  # fmt: skip


def definition(router: Any, moe: MoEConfig, x: Tensor, context: RoutingContext) -> tuple[Tensor, Tensor, float]:
    """x (T, D) -> which experts (T, E), their weights (T, E) and the smallest gap."""
    mask_BL = torch.ones(B, L, dtype=torch.bool) if context.mask is None else context.mask
    logits_BLE = torch.zeros(B, L, E) if moe.router == "hash" else exact_logits(router, x).view(B, L, E)
    chosen_BLE, margin = torch.zeros(B, L, E, dtype=torch.bool), math.inf
    weights: list[list[Tensor]] = [[torch.zeros((), dtype=torch.float64)] * E for _ in range(B * L)]
    for row in range(B):
        places = mask_BL[row].nonzero().flatten().tolist()
        found, gap = DEFINITIONS[moe.router](moe, logits_BLE[row, places], context.tokens[row, places].tolist())
        margin = min(margin, gap)
        for place, experts in zip(places, found, strict=True):
            for expert, weight in experts.items():
                chosen_BLE[row, place, expert] = True
                weights[row * L + place][expert] = weight * moe.routed_scaling_factor
    return chosen_BLE.flatten(0, 1), torch.stack([torch.stack(row) for row in weights]), margin


def draw(router: Any, moe: MoEConfig, context: RoutingContext) -> Tensor:
    """(T, D) float32 whose routing hangs on no gap below a tenth of MARGIN, as there are many gaps."""
    for _ in range(MAX_DRAWS):
        x_TD = torch.randn(B * L, D)
        if definition(router, moe, x_TD, context)[2] > MARGIN / 10:
            return x_TD
    raise AssertionError(f"{MAX_DRAWS} draws have closer gaps")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_choice_weights_and_gradients_follow_the_definition(name: str, padded: bool) -> None:
    moe = make_config(**CASES[name])
    router = make_router(moe)
    context = context_of(B, L, torch.rand(B, L) < 0.7 if padded else None)
    x_TD = draw(router, moe, context)
    routing = router(x_TD, context)
    chosen_TE, weights_TE, _ = definition(router, moe, x_TD, context)
    expected = chosen_TE.nonzero().tolist()
    assert sorted(zip(routing.token_ids.tolist(), routing.expert_ids.tolist(), strict=True)) == [*map(tuple, expected)]
    assert routing.logits.dtype == routing.weights.dtype == torch.float32
    if moe.router == "expert_choice" and context.mask is not None:  # padding is not even asked for
        assert context.mask.flatten()[routing.decision.token_ids].all()
    torch.testing.assert_close(as_matrix(routing).double(), weights_TE, rtol=1e-5, atol=1e-6)

    router.double()
    mix_TE = torch.randn(B * L, E, dtype=torch.float64)
    inputs = [x_TD.double().requires_grad_(), *router.parameters()]
    exact = router(inputs[0], context)
    assert exact.weights.dtype == torch.float64
    if moe.router == "hash":
        assert not exact.weights.requires_grad
        return
    actual = torch.autograd.grad((as_matrix(exact) * mix_TE).sum(), inputs)
    expected = torch.autograd.grad((definition(router, moe, inputs[0], context)[1] * mix_TE).sum(), inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_equal_scores_go_to_the_earlier_tokens() -> None:
    """Expert choice; 0.8 x 10 tokens x 3 / 8 is 3 tokens for each expert."""
    router = make_router(make_config(router="expert_choice", capacity_factor=0.8))
    mask_BL = torch.ones(2, 12, dtype=torch.bool)
    mask_BL[0, :2] = mask_BL[1, 10:] = False
    routing = router(torch.randn(D).expand(24, D), context_of(2, 12, mask_BL))
    assert sorted(set(routing.token_ids.tolist())) == [2, 3, 4, 12, 13, 14]
    assert routing.tokens_per_expert().tolist() == [6] * E


def test_a_hash_depends_on_the_token_alone_and_uses_all_experts_alike() -> None:
    router = make_router(make_config(router="hash"))
    tokens_BL = torch.randint(0, VOCAB_SIZE, (2, 40))
    ids_TK = router(torch.randn(80, D), RoutingContext(tokens_BL)).expert_ids.view(80, 3)
    again_TK = router(torch.randn(80, D), RoutingContext(tokens_BL.flip(1))).expert_ids.view(2, 40, 3).flip(1)
    assert torch.equal(ids_TK, again_TK.flatten(0, 1))
    load_E = router(torch.empty(8000, D), RoutingContext(torch.arange(8000).view(1, -1))).tokens_per_expert()
    deviation = math.sqrt(8000 * 3 / 8 * 5 / 8)
    assert (load_E - 3000).abs().max() < 5 * deviation


def test_the_weight_of_the_l1_loss_is_steered_towards_k_experts_per_token() -> None:
    router = make_router(make_config(router="relu"))
    assert isinstance(router, ReLURouter)
    assert float(router.l1_weight) == pytest.approx(1e-8)
    for mean in (8.0, torch.tensor(3.1), 4.0):
        router.steer(mean)
    assert float(router.l1_weight) == pytest.approx(1e-8 * 1.2**3, rel=1e-5)
    router.steer(3.0)
    assert float(router.l1_weight) == pytest.approx(1e-8 * 1.2**3, rel=1e-5)
    for mean in (2.9, torch.tensor(0.0)):
        router.steer(mean, growth=2.0)
    assert float(router.l1_weight) == pytest.approx(1e-8)  # and not below what it began with
    for mean in (4.0, 4.0, 1.0):
        router.steer(mean, growth=2.0)
    assert float(router.l1_weight) == pytest.approx(2e-8, rel=1e-5)
    assert router.log_l1_weight.dtype == torch.float32
    assert "log_l1_weight" in router.state_dict()


def test_relu_leaves_tokens_that_nobody_wants_without_an_expert() -> None:
    router = make_router(make_config(router="relu", router_bias=True))
    with torch.no_grad():
        router.bias.fill_(-1e3)
    routing = router(torch.randn(6, D), context_of(2, 3))
    assert routing.token_ids.numel() == 0
    assert routing.tokens_per_expert().tolist() == [0] * E
