"""Routers against their definitions. T tokens, E experts, K experts per token, D hidden size."""

import pytest
import torch

from moesaic.config import MoEConfig
from moesaic.errors import UsageError
from moesaic.model.router import ROUTERS, TopKRouter

T, D, E, K = 29, 12, 8, 3


def make_router(name: str = "softmax_topk", **settings: object) -> TopKRouter:
    moe = MoEConfig(num_experts=E, num_experts_per_tok=K, moe_intermediate_size=4, router=name, **settings)  # type: ignore[arg-type]
    router = ROUTERS[name](D, moe)
    torch.nn.init.normal_(router.weight)
    if router.expert_bias is not None:
        router.expert_bias.normal_()
    return router


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_choice_and_weights_follow_the_definition_token_by_token(name: str, normalised: bool) -> None:
    router = make_router(name, norm_topk_prob=normalised, routed_scaling_factor=2.5)
    x = torch.randn(T, D)
    routing = router(x)
    assert routing.top_k == K
    assert routing.token_ids.tolist() == [token for token in range(T) for _ in range(K)]
    for token in range(T):
        logits = router.weight.double() @ x[token].double()
        scores = logits.softmax(0) if name == "softmax_topk" else logits.sigmoid()
        selection = scores if router.expert_bias is None else scores + router.expert_bias.double()
        chosen = set(selection.topk(K).indices.tolist())
        rows = slice(token * K, token * K + K)
        assert set(routing.expert_ids[rows].tolist()) == chosen
        expected = scores[routing.expert_ids[rows]]
        expected = 2.5 * (expected / expected.sum() if normalised else expected)
        torch.testing.assert_close(routing.weights[rows].double(), expected, rtol=1e-5, atol=1e-7)


def test_the_selection_bias_selects_but_never_weighs() -> None:
    router = make_router("sigmoid_topk", norm_topk_prob=False)
    x = torch.randn(T, D)
    assert router.expert_bias is not None
    router.expert_bias.zero_()
    router.expert_bias[5] = 10.0
    routing = router(x)
    chosen = routing.expert_ids == 5
    assert int(chosen.sum()) == T
    torch.testing.assert_close(routing.weights[chosen], (x @ router.weight[5]).sigmoid())


@pytest.mark.parametrize("name", ROUTERS)
def test_logits_are_float32_for_bfloat16_activations_and_under_autocast(name: str) -> None:
    router = make_router(name)
    x = torch.randn(T, D)
    wide = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(x).logits, wide.logits)
    assert router(x.bfloat16()).logits.dtype == torch.float32
    assert torch.equal(router(x.bfloat16()).logits, router(x.bfloat16().float()).logits)


@pytest.mark.parametrize("name", ROUTERS)
def test_padding_owns_no_row_and_changes_nothing_for_the_others(name: str) -> None:
    router = make_router(name)
    x = torch.randn(T, D)
    mask = torch.rand(T) < 0.6
    with_padding, alone = router(x, mask), router(x[mask])
    assert torch.equal(with_padding.expert_ids, alone.expert_ids)
    torch.testing.assert_close(with_padding.weights, alone.weights)
    assert torch.equal(with_padding.tokens_per_expert(), alone.tokens_per_expert())
    assert not mask[with_padding.token_ids].logical_not().any()


@pytest.mark.parametrize("name", ROUTERS)
def test_the_router_learns_from_the_weights_of_its_choice(name: str) -> None:
    router = make_router(name).double()
    x = torch.randn(T, D, dtype=torch.float64)
    mix = torch.randn(T * K, dtype=torch.float64)

    def weighted(weight: torch.Tensor) -> torch.Tensor:
        return (torch.func.functional_call(router, {"weight": weight}, (x,)).weights * mix).sum()

    assert torch.autograd.gradcheck(weighted, router.weight.detach().requires_grad_())


def test_top_1_with_normalised_weights_is_refused_for_softmax() -> None:
    with pytest.raises(UsageError, match="router gets no gradient"):
        MoEConfig(num_experts=4, num_experts_per_tok=1, moe_intermediate_size=8)


@pytest.mark.parametrize("name", ROUTERS)
def test_equal_and_extreme_logits_stay_finite(name: str) -> None:
    router = make_router(name)
    for scale in (0.0, 1e4):
        routing = router(torch.randn(T, D) * scale)
        assert torch.isfinite(routing.weights).all()
        assert routing.tokens_per_expert().sum() == T * K
