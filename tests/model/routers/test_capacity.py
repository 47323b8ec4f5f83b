"""Experts with limited room against serving one token after the other.

B sequences, L positions, n tokens of a sequence, T = B x L, D hidden size, E experts, K experts per token.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.model.routers.capacity import choose_within_capacity, sequence_capacity
from moesaic.ops import Choice

from .helpers import D, E, as_matrix, context_of, make_config, make_router

B, L = 3, 12
POLICIES = pytest.mark.parametrize("policy", ["drop", "next_choice", "pad"])


def served(selection: Tensor, mask: Tensor, top_k: int, capacity: list[int], another: bool) -> list[list[list[int]]]:
    """selection (B, L, E), mask (B, L) -> the experts of each token, best first, one token after the other."""
    result = []
    for row, room in enumerate(capacity):
        left, sequence = [room] * selection.shape[2], []
        for values, is_token in zip(selection[row].tolist(), mask[row].tolist(), strict=True):
            wishes = sorted((e for e, value in enumerate(values) if value > -math.inf), key=lambda e: -values[e])
            wishes = wishes if another else wishes[:top_k]
            got = [expert for expert in wishes if left[expert] > 0][:top_k] if is_token else []
            for expert in got:
                left[expert] -= 1
            sequence.append(got)
        result.append(sequence)
    return result


def kept_experts(choice: Choice, top_k: int) -> list[list[int]]:
    assert choice.kept is not None
    rows = zip(choice.expert_ids.view(-1, top_k).tolist(), choice.kept.view(-1, top_k).tolist(), strict=True)
    return [[expert for expert, kept in zip(*row, strict=True) if kept] for row in rows]


@pytest.mark.parametrize("another", [False, True])
@settings(max_examples=40)
@given(data=st.data())
def test_earlier_tokens_are_served_first(another: bool, data: st.DataObject) -> None:
    batch_size, length = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 9))
    num_experts = data.draw(st.integers(1, 6))
    top_k = data.draw(st.integers(1, num_experts))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    mask_BL = torch.rand(batch_size, length) < data.draw(st.sampled_from([0.5, 1.1]))
    selection_BLE = torch.randn(batch_size, length, num_experts) + 2 * torch.randn(num_experts)
    capacity_B = torch.randint(0, max(length, 1) + 1, (batch_size,))
    choice = choose_within_capacity(
        selection_BLE.flatten(0, 1), top_k, capacity_B, context_of(batch_size, length, mask_BL), another_if_full=another
    )
    expected = served(selection_BLE, mask_BL, top_k, capacity_B.tolist(), another)
    assert kept_experts(choice, top_k) == [experts for sequence in expected for experts in sequence]
    ids_TK = choice.expert_ids.view(-1, top_k)
    assert all(len(set(ids)) == top_k for ids in ids_TK[mask_BL.flatten()].tolist())


def test_where_all_are_full_the_best_of_those_that_refused_stand_in_the_rows_that_are_not_kept() -> None:
    selection = torch.tensor([[1.0, 3.0, 2.0], [3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    choice = choose_within_capacity(selection, 2, torch.tensor([1]), context_of(1, 3), another_if_full=True)
    assert kept_experts(choice, 2) == [[1, 2], [0], []]
    assert choice.expert_ids.view(3, 2).tolist() == [[1, 2], [0, 2], [2, 1]]


def test_experts_outside_the_groups_of_a_token_are_no_next_choice() -> None:
    groups = {"n_group": 4, "topk_group": 2, "group_score": "max"}
    moe = make_config(router="softmax_topk", capacity_factor=0.3, drop_policy="next_choice", **groups)
    router = make_router(moe).train()
    x_TD = torch.randn(B * L, D)
    context = context_of(B, L)
    routing = router(x_TD, context)
    selection_TE = router.selection(routing.logits, context)
    assert (selection_TE[routing.token_ids, routing.expert_ids] > -torch.inf).all()
    assert int(routing.num_dropped()) > 0


@pytest.mark.parametrize(
    ("share", "length", "expected"), [(0.07, 100, 7), (0.1, 30, 3), (0.1, 31, 4), (1.25 * 2 / 8, 16, 5), (1.0, 0, 0)]
)
def test_the_room_is_a_share_of_the_tokens_rounded_up(share: float, length: int, expected: int) -> None:
    assert sequence_capacity(context_of(2, length), share).tolist() == [expected] * 2
    mask_BL = torch.zeros(1, length + 7, dtype=torch.bool)
    mask_BL[0, torch.randperm(length + 7)[:length]] = True
    assert sequence_capacity(context_of(1, length + 7, mask_BL), share).tolist() == [expected]


def limited(policy: str, **more: Any) -> Any:
    return make_router(make_config(router="softmax_topk", capacity_factor=0.6, drop_policy=policy, **more)).train()


@POLICIES
def test_no_expert_is_over_capacity_and_evaluation_drops_nothing(policy: str) -> None:
    router = limited(policy)
    mask_BL = torch.rand(B, L) < 0.8
    context = context_of(B, L, mask_BL)
    x_TD = torch.randn(B * L, D)
    routing = router(x_TD, context)
    capacity_B = [math.ceil(0.6 * n * 3 / E - 1e-9) for n in mask_BL.sum(1).tolist()]
    weighed = routing.weights > 0
    for row, capacity in enumerate(capacity_B):
        here = weighed & (routing.token_ids // L == row)
        assert int(torch.bincount(routing.expert_ids[here], minlength=E).max()) <= capacity
    assert int(routing.load().sum()) == 3 * int(mask_BL.sum())
    assert int(routing.num_dropped()) == 3 * int(mask_BL.sum()) - int(weighed.sum())
    router.eval()
    assert int(router(x_TD, context).num_dropped()) == 0
    assert len(router(x_TD, context).expert_ids) == 3 * int(mask_BL.sum())


@POLICIES
def test_the_load_is_what_tokens_asked_for_whatever_becomes_of_it(policy: str) -> None:
    router = limited(policy)
    mask_BL = torch.rand(B, L) < 0.8
    routing = router(torch.randn(B * L, D), context_of(B, L, mask_BL))
    wishes_NK = routing.logits.detach().topk(3).indices[mask_BL.flatten()]
    assert torch.equal(routing.load(), torch.bincount(wishes_NK.flatten(), minlength=E))


@POLICIES
def test_more_room_than_tokens_drops_none(policy: str) -> None:
    router = make_router(make_config(router="softmax_topk", capacity_factor=1e30, drop_policy=policy)).train()
    routing = router(torch.randn(B * L, D), context_of(B, L))
    assert int(routing.num_dropped()) == 0
    assert len(routing.expert_ids) == (E * B * L if policy == "pad" else B * L * router.top_k)


def test_dropping_does_not_change_the_weights_of_what_stays() -> None:
    router = limited("drop")
    x_TD, context = torch.randn(B * L, D), context_of(B, L)
    dropped_TE = as_matrix(router(x_TD, context))
    whole_TE = as_matrix(router.eval()(x_TD, context))
    assert bool((dropped_TE == 0).sum() > (whole_TE == 0).sum())
    assert torch.equal(dropped_TE, whole_TE * (dropped_TE != 0))


def test_pad_fills_every_expert_up_with_rows_that_weigh_nothing() -> None:
    router, dropping = limited("pad"), limited("drop")
    dropping.load_state_dict(router.state_dict())
    mask_BL = torch.rand(B, L) < 0.7
    mask_BL[:, 0] = True
    context = context_of(B, L, mask_BL)
    x_TD = torch.randn(B * L, D).masked_fill(~mask_BL.view(-1, 1), torch.nan)
    padded, dropped = router(x_TD, context), dropping(x_TD, context)
    capacity = sum(math.ceil(0.6 * n * 3 / E - 1e-9) for n in mask_BL.sum(1).tolist())
    assert padded.tokens_per_expert().tolist() == [capacity] * E
    assert torch.equal(as_matrix(padded), as_matrix(dropped))
    assert torch.equal(padded.load(), dropped.load())
    assert torch.equal(padded.num_dropped(), dropped.num_dropped())
    assert mask_BL.flatten()[padded.token_ids].all()
    assert int((padded.weights == 0).sum()) == capacity * E - len(dropped.weights)

    mix_N = torch.randn(len(padded.weights))
    first = len(dropped.weights)  # the rows that fill up come last, and send nothing back
    assert torch.equal(padded.token_ids[:first], dropped.token_ids)
    (padded.weights * mix_N).sum().backward()
    (dropped.weights * mix_N[:first]).sum().backward()
    assert torch.isfinite(router.weight.grad).all()
    assert torch.equal(router.weight.grad, dropping.weight.grad)
