"""Permutation of rows by expert, against plain loops. T tokens, E experts, K per token, D hidden size."""

from dataclasses import replace

import pytest
import torch

from moesaic.ops import Routing
from moesaic.ops.permute import permute, rows_with_weighted_inputs, sort_by_expert, sum_rows_of_tokens, unpermute


def random_routing(T: int, E: int, K: int, *, ragged: bool) -> Routing:
    expert_ids = torch.rand(T, E).topk(K).indices
    keep = torch.rand(T, K) < 0.6 if ragged else torch.ones(T, K, dtype=torch.bool)
    token_ids = torch.arange(T)[:, None].expand(T, K)
    return Routing(
        token_ids=token_ids[keep],
        expert_ids=expert_ids[keep],
        weights=torch.rand(int(keep.sum())),
        logits=torch.zeros(T, E),
        num_experts=E,
        top_k=None if ragged else K,
    )


def test_rows_of_an_expert_stand_together_in_token_order() -> None:
    for ragged in (False, True):
        routing = random_routing(23, 6, 3, ragged=ragged)
        permutation = sort_by_expert(routing)
        x = torch.randn(23, 4)
        rows = permute(x, permutation)
        start = 0
        for expert, end in enumerate(permutation.expert_offsets.tolist()):
            tokens = routing.token_ids[routing.expert_ids == expert]
            assert torch.equal(rows[start:end], x[tokens])
            start = end
        assert start == routing.expert_ids.numel()


def test_unpermute_sums_the_rows_of_each_token() -> None:
    for ragged in (False, True):
        routing = random_routing(23, 6, 3, ragged=ragged)
        permutation = sort_by_expert(routing)
        rows = torch.randn(routing.expert_ids.numel(), 4)
        expected = torch.zeros(23, 4)
        for row, token in zip(rows, permutation.token_ids.tolist(), strict=True):
            expected[token] += row
        torch.testing.assert_close(unpermute(rows, permutation), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 4, 37, 512])
def test_unpermute_adds_to_the_same_bits_whatever_way_it_takes(dtype: torch.dtype, width: int) -> None:
    permutation = sort_by_expert(random_routing(23, 6, 3, ragged=False))
    assert permutation.rows_of_token is not None
    rows = (torch.randn(69, width) * torch.randn(69, 1).exp()).to(dtype).requires_grad_()
    expected = torch.zeros(23, width, dtype=dtype)
    for k in range(3):
        expected = expected + rows.detach()[permutation.rows_of_token[:, k]]
    y = unpermute(rows, permutation)
    assert torch.equal(y, expected)
    grad_y = torch.randn(23, width).to(dtype)
    (grad_rows,) = torch.autograd.grad(y, rows, grad_y)
    assert torch.equal(grad_rows, grad_y[permutation.token_ids])


@pytest.mark.parametrize("num_experts", [1, 256, 257, 3000])
def test_the_sort_is_stable_for_any_number_of_experts(num_experts: int) -> None:
    routing = random_routing(500, num_experts, 1, ragged=False)
    keys = sorted(range(500), key=lambda n: (int(routing.expert_ids[n]), n))
    assert sort_by_expert(routing).order.tolist() == keys


@pytest.mark.parametrize("num_tokens", [0, 23])
@pytest.mark.parametrize("ragged", [False, True], ids=["every token has K rows", "tokens have 0 to K rows"])
def test_weighted_inputs_are_one_row_per_assignment(num_tokens: int, ragged: bool) -> None:
    routing = random_routing(num_tokens, 6, 3, ragged=ragged)
    x = torch.randn(num_tokens, 4, dtype=torch.bfloat16)
    rows, routing_of_rows = rows_with_weighted_inputs(x, routing)
    assert rows.dtype == x.dtype
    assert torch.equal(rows, (x[routing.token_ids].float() * routing.weights[:, None]).bfloat16())
    assert torch.equal(routing_of_rows.token_ids, torch.arange(len(rows)))
    assert torch.equal(routing_of_rows.expert_ids, routing.expert_ids)
    assert torch.equal(routing_of_rows.weights, torch.ones(len(rows)))
    assert routing_of_rows.num_tokens == len(rows)
    assert (routing_of_rows.num_experts, routing_of_rows.top_k) == (6, 1)


@pytest.mark.parametrize("ragged", [False, True], ids=["every token has K rows", "tokens have 0 to K rows"])
def test_weighted_inputs_and_their_sum_have_the_gradients_of_a_loop(ragged: bool) -> None:
    routing = random_routing(23, 6, 3, ragged=ragged)
    x = torch.randn(23, 4, dtype=torch.float64, requires_grad=True)
    weights = routing.weights.double().requires_grad_()
    routing = replace(routing, weights=weights)
    expected = torch.zeros(23, 4, dtype=torch.float64)
    for n, token in enumerate(routing.token_ids.tolist()):
        expected = expected.index_add(0, torch.tensor([token]), (weights[n] * x[token]).sin()[None])
    y = sum_rows_of_tokens(rows_with_weighted_inputs(x, routing)[0].sin(), routing)
    torch.testing.assert_close(y, expected)
    grad_y = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, weights), grad_y)
    oracle = torch.autograd.grad(expected, (x, weights), grad_y)
    torch.testing.assert_close(ours, oracle)
