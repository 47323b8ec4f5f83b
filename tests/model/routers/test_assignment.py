"""Balanced assignments against all that there are, and the two routers that use them.

B sequences, L positions, n tokens of a sequence, T = B x L, D hidden size, E experts, K experts per token.
"""

from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.model.routers.matching import GAP, balanced_assignment, sinkhorn_potentials

from .helpers import D, E, as_matrix, context_of, exact_logits, make_config, make_router

B, L = 3, 16


def assert_balanced(chosen: Tensor, mask: Tensor, top_k: int) -> None:
    """chosen (B, L, E), mask (B, L)."""
    assert not chosen[~mask].any()
    assert (chosen.sum(-1)[mask] == top_k).all()
    for tokens_nE in (row[here] for row, here in zip(chosen, mask, strict=True)):
        even = len(tokens_nE) * top_k / chosen.shape[2]
        assert ((tokens_nE.sum(0) - even).abs() < 1).all()


def best_sum(logits: Tensor, top_k: int) -> float:
    """logits (n, E) -> the greatest sum of any balanced assignment, by looking at all of them."""
    n, num_experts = logits.shape
    rows = [list(combinations(range(num_experts), top_k))] * n
    values, best = logits.tolist(), -float("inf")
    for assignment in product(*rows):
        load = [0] * num_experts
        for experts in assignment:
            for expert in experts:
                load[expert] += 1
        if max(load) - min(load) <= 1:
            best = max(best, sum(values[token][e] for token, experts in enumerate(assignment) for e in experts))
    return best


@pytest.mark.parametrize(
    ("n", "num_experts", "top_k"), [(6, 3, 1), (5, 3, 1), (4, 4, 1), (2, 4, 1), (4, 4, 2), (5, 3, 2)]
)
def test_the_sum_is_within_the_stated_gap_of_the_greatest(n: int, num_experts: int, top_k: int) -> None:
    for _ in range(3):
        logits = torch.randn(1, n, num_experts, dtype=torch.float64) + torch.randn(num_experts)
        mask = torch.ones(1, n, dtype=torch.bool)
        chosen = balanced_assignment(logits, mask, top_k)
        assert_balanced(chosen, mask, top_k)
        far = float((logits.amax(-1, keepdim=True) - logits).max())
        places = num_experts * -(-n * top_k // num_experts)
        assert float(logits[chosen].sum()) >= best_sum(logits[0], top_k) - GAP * far * places


def test_many_tokens_find_their_places_in_the_auction_alone() -> None:
    """With twice the rounds nothing changes, so nothing was placed without a bid."""
    for bias in (0.0, 2.0):
        logits = torch.randn(2, 128, E) + bias * torch.randn(E)
        mask = torch.rand(2, 128) < 0.9
        chosen = balanced_assignment(logits, mask, 1)
        assert torch.equal(chosen, balanced_assignment(logits, mask, 1, rounds=4096))
        assert_balanced(chosen, mask, 1)


@settings(max_examples=80)
@given(data=st.data())
def test_tokens_and_experts_get_what_they_should_whenever_the_auction_ends(data: st.DataObject) -> None:
    batch_size, length = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 12))
    num_experts = data.draw(st.integers(1, 7))
    top_k = data.draw(st.integers(1, num_experts))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    scale = data.draw(st.sampled_from([0.0, 1e-9, 1.0, 30.0, 1e30]))
    logits = torch.randn(batch_size, length, num_experts) * scale
    logits = logits + torch.randn(num_experts) * data.draw(st.sampled_from([0.0, 1.0, 1e30]))
    if data.draw(st.booleans()):
        logits = logits.round()
    mask = torch.rand(batch_size, length) < data.draw(st.sampled_from([0.5, 1.1]))
    chosen = balanced_assignment(logits, mask, top_k, rounds=data.draw(st.sampled_from([0, 1, 3, 256])))
    assert_balanced(chosen, mask, top_k)
    assert bool(sinkhorn_potentials(logits, mask).isfinite().all())


def test_sinkhorn_shares_the_tokens_of_each_sequence_out_evenly() -> None:
    logits = torch.randn(B, 64, E, dtype=torch.float64) + torch.randn(E)
    mask = torch.rand(B, 64) < 0.8
    for row, potentials_E in enumerate(sinkhorn_potentials(logits, mask)):
        tokens_nE = logits[row, mask[row]]
        load_E = (tokens_nE + potentials_E).softmax(-1).sum(0)
        torch.testing.assert_close(load_E, torch.full_like(load_E, len(tokens_nE) / E), rtol=0.02, atol=0.0)


def sinkhorn_of_loops(logits: Tensor) -> Tensor:
    """logits (n, E) -> exp(logits) with rows that sum to 1 and columns that sum to n / E, without any logarithm."""
    plan = (logits - logits.max()).exp()
    for _ in range(200):
        plan = plan / plan.sum(0, keepdim=True) * len(plan) / E
        plan = plan / plan.sum(1, keepdim=True)
    return plan


def test_the_sinkhorn_router_takes_the_best_of_the_normalised_matrix() -> None:
    router = make_router(make_config(router="sinkhorn")).double().train()
    x_TD = torch.randn(B * 64, D, dtype=torch.float64) + torch.randn(D).sign()  # favourites
    routing = router(x_TD, context_of(B, 64))
    chosen_TE = as_matrix(routing) != 0
    agree = 0
    for row in range(B):
        plan_nE = sinkhorn_of_loops(exact_logits(router, x_TD[row * 64 : row * 64 + 64]))
        for token in range(64):
            best = plan_nE[token].topk(4)
            chosen = chosen_TE[row * 64 + token].nonzero().flatten().tolist()
            clear = bool(best.values[2] > 1.02 * best.values[3])
            assert not clear or chosen == sorted(best.indices[:3].tolist())
            agree += clear
    assert agree > 64
    load_BE = chosen_TE.view(B, 64, E).sum(1)
    plain_BE = as_matrix(router.eval()(x_TD, context_of(B, 64))).ne(0).view(B, 64, E).sum(1)
    assert int(load_BE.amax(1).sum()) < int(plain_BE.amax(1).sum())


@pytest.mark.parametrize("name", ["sinkhorn", "base"])
def test_weights_are_sigmoids_and_evaluation_takes_the_best_logits(name: str) -> None:
    router = make_router(make_config(router=name, routed_scaling_factor=1.5, router_bias=True)).double()
    mask_BL = torch.rand(B, L) < 0.8
    context = context_of(B, L, mask_BL)
    x_TD = torch.randn(B * L, D, dtype=torch.float64, requires_grad=True)
    mix_TE = torch.randn(B * L, E, dtype=torch.float64)
    for training in (True, False):
        routing = router.train(training)(x_TD, context)
        chosen_TE = torch.zeros(B * L, E, dtype=torch.bool)
        chosen_TE[routing.token_ids, routing.expert_ids] = True
        assert (chosen_TE.sum(1) == 3 * mask_BL.flatten()).all()
        logits_TE = exact_logits(router, x_TD)
        if not training:
            best_TE = torch.zeros_like(chosen_TE).scatter_(1, logits_TE.topk(3).indices, True)
            assert torch.equal(chosen_TE, best_TE & mask_BL.view(-1, 1))
        expected_TE = 1.5 * chosen_TE / (1 + torch.exp(-logits_TE))
        torch.testing.assert_close(as_matrix(routing), expected_TE)
        leaves = [x_TD, router.weight, router.bias]
        actual = torch.autograd.grad((as_matrix(routing) * mix_TE).sum(), leaves)
        expected = torch.autograd.grad((expected_TE * mix_TE).sum(), leaves)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_base_router_balances_every_sequence(top_k: int) -> None:
    router = make_router(make_config(router="base", num_experts_per_tok=top_k)).train()
    mask_BL = torch.rand(B, L) < 0.8
    routing = router(torch.randn(B * L, D) + torch.randn(D), context_of(B, L, mask_BL))
    assert_balanced((as_matrix(routing) != 0).view(B, L, E), mask_BL, top_k)
