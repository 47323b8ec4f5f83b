"""Routers that choose exactly K experts against their definitions, token by token in float64.

T tokens, E experts, K experts per token, D hidden size.
"""

import pytest
import torch

from moesaic.model.routers import ROUTERS, limit_to_groups

from .helpers import D, E, exact_logits, make_config, make_router, route, rows_of
from .topk_oracle import CASES, Oracle, draw_tokens

T = 29


@pytest.mark.parametrize("name", CASES)
def test_choice_and_weights_follow_the_definition_token_by_token(name: str) -> None:
    moe = make_config(**CASES[name])
    router = make_router(moe)
    x_TD = draw_tokens(router, moe, T)
    routing = route(router, x_TD)
    assert routing.top_k == moe.num_experts_per_tok
    assert routing.token_ids.tolist() == [token for token in range(T) for _ in range(moe.num_experts_per_tok)]
    assert routing.logits.dtype == routing.weights.dtype == torch.float32
    for token in range(T):
        expected = Oracle(moe, router.expert_bias).route(exact_logits(router, x_TD[token]))
        actual = rows_of(routing, token)
        assert actual.keys() == expected.keys()
        for expert, weight in expected.items():
            assert actual[expert] == pytest.approx(float(weight.detach()), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_definition(name: str) -> None:
    moe = make_config(**CASES[name])
    router = make_router(moe)
    x_TD = draw_tokens(router, moe, T)
    router.double()
    mix_TE = torch.randn(T, E, dtype=torch.float64)
    inputs = [router.weight, *([router.bias] if router.bias is not None else []), x_TD.double().requires_grad_()]

    routing = route(router, inputs[-1])
    assert routing.weights.dtype == torch.float64
    loss = (routing.weights * mix_TE[routing.token_ids, routing.expert_ids]).sum()
    actual = torch.autograd.grad(loss, inputs)

    expected_loss = torch.zeros((), dtype=torch.float64)
    for token in range(T):
        weights = Oracle(moe, router.expert_bias).route(exact_logits(router, inputs[-1][token]))
        expected_loss = expected_loss + sum(mix_TE[token, expert] * weight for expert, weight in weights.items())
    expected = torch.autograd.grad(expected_loss, inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_groups_of_negative_scores_still_win() -> None:
    selection = torch.tensor([[-1.0, -2.0, -9.0, -9.0, -0.5, -8.0]])
    by_two = limit_to_groups(selection, n_group=3, topk_group=1, group_score="top2_sum")
    by_best = limit_to_groups(selection, n_group=3, topk_group=1, group_score="max")
    assert by_two.topk(2).indices.tolist() == [[0, 1]]
    assert by_best.topk(2).indices.tolist() == [[4, 5]]


@pytest.mark.parametrize("name", ["softmax_topk", "sigmoid_topk"])
def test_the_selection_bias_selects_but_never_weighs(name: str) -> None:
    router = make_router(make_config(router=name, norm_topk_prob=False, expert_bias=True))
    x_TD = torch.randn(T, D)
    assert router.expert_bias is not None
    router.expert_bias.zero_()
    router.expert_bias[5] = 10.0
    routing = route(router, x_TD)
    chosen = routing.expert_ids == 5
    assert int(chosen.sum()) == T
    torch.testing.assert_close(routing.weights[chosen], router.scores(x_TD @ router.weight.T)[:, 5])


def test_only_the_routers_that_ask_for_it_have_a_selection_bias() -> None:
    found = {name for name in ROUTERS if make_router(make_config(router=name)).expert_bias is not None}
    assert found == {"sigmoid_topk"}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_float32_for_bfloat16_activations_and_under_autocast(name: str) -> None:
    router = make_router(make_config(**CASES[name]))
    x_TD = torch.randn(T, D)
    wide = route(router, x_TD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = route(router, x_TD)
    assert torch.equal(under_autocast.logits, wide.logits)
    assert torch.equal(under_autocast.weights, wide.weights)
    narrow = route(router, x_TD.bfloat16())
    assert narrow.logits.dtype == narrow.weights.dtype == torch.float32
    assert torch.equal(narrow.logits, route(router, x_TD.bfloat16().float()).logits)


@pytest.mark.parametrize("name", CASES)
def test_padding_owns_no_row_and_changes_nothing_for_the_others(name: str) -> None:
    moe = make_config(**CASES[name])
    router = make_router(moe)
    x_TD = draw_tokens(router, moe, T)
    mask_T = torch.rand(T) < 0.6
    with_padding, alone = route(router, x_TD, mask_T), route(router, x_TD[mask_T])
    assert with_padding.top_k is None
    assert torch.equal(with_padding.expert_ids, alone.expert_ids)
    torch.testing.assert_close(with_padding.weights, alone.weights)
    assert torch.equal(with_padding.tokens_per_expert(), alone.tokens_per_expert())
    assert bool(mask_T[with_padding.token_ids].all())


@pytest.mark.parametrize("name", CASES)
def test_equal_and_extreme_logits_stay_finite(name: str) -> None:
    moe = make_config(**CASES[name])
    router = make_router(moe)
    for scale in (0.0, 1e4):
        x_TD = (torch.randn(T, D) * scale).requires_grad_()
        routing = route(router, x_TD)
        routing.weights.sum().backward()
        assert torch.isfinite(routing.weights).all()
        assert x_TD.grad is not None
        assert torch.isfinite(x_TD.grad).all()
        assert all(len(rows_of(routing, token)) == moe.num_experts_per_tok for token in range(T))
