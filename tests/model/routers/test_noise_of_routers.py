"""Noise in training: where it enters, and that it follows its keys. T tokens, D hidden size, E experts."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from moesaic.model.noise import combine, normal

from .helpers import D, E, context_of, make_config, make_router

T = 24
NOISY = pytest.mark.parametrize("settings", [{"router": "noisy_topk"}, {"router": "relu", "router_input_jitter": 0.3}])


@NOISY
def test_noise_follows_its_keys_in_training_and_is_absent_from_evaluation(settings: dict) -> None:
    router = make_router(make_config(**settings))
    x_TD, context = torch.randn(T, D), context_of(2, T // 2)
    assert context.noise_keys is not None
    plain_TE = functional.linear(x_TD, router.weight)
    assert torch.equal(router(x_TD, context).logits, plain_TE)
    router.train()
    noisy_TE = router(x_TD, context).logits
    assert torch.equal(router(x_TD, context).logits, noisy_TE)
    assert bool((noisy_TE != plain_TE).all(1).all())
    other = replace(context, noise_keys=context.noise_keys + 1)
    assert bool((router(x_TD, other).logits != noisy_TE).all(1).all())
    order_T = torch.randperm(T)
    moved = replace(context, noise_keys=context.noise_keys.flatten()[order_T].view(2, -1))
    torch.testing.assert_close(router(x_TD[order_T], moved).logits, noisy_TE[order_T])


@NOISY
def test_without_keys_the_generator_of_torch_draws_the_noise(settings: dict) -> None:
    router = make_router(make_config(**settings)).train()
    x_TD, context = torch.randn(T, D), replace(context_of(1, T), noise_keys=None)
    state = torch.get_rng_state()
    first_TE = router(x_TD, context).logits
    assert not torch.equal(router(x_TD, context).logits, first_TE)
    torch.set_rng_state(state)
    assert torch.equal(router(x_TD, context).logits, first_TE)


def test_the_learned_noise_has_the_deviation_that_its_weight_gives() -> None:
    router = make_router(make_config(router="noisy_topk")).double().train()
    context = context_of(1, T)
    assert context.noise_keys is not None
    x_TD = torch.randn(T, D, dtype=torch.float64)
    routing = router(x_TD, context)
    noise_TE = normal(combine(context.noise_keys.flatten(), 2), E)
    deviation_TE = torch.log1p(torch.exp(x_TD @ router.noise_weight.T))
    expected_TE = x_TD @ router.weight.T + noise_TE * deviation_TE
    torch.testing.assert_close(routing.logits, expected_TE)
    best = expected_TE.topk(3, dim=-1)
    assert torch.equal(routing.expert_ids.view(T, 3), best.indices)
    torch.testing.assert_close(routing.weights.view(T, 3), best.values.softmax(-1))
    (actual,) = torch.autograd.grad(routing.weights.square().sum(), router.noise_weight)
    (expected,) = torch.autograd.grad(best.values.softmax(-1).square().sum(), router.noise_weight)
    torch.testing.assert_close(actual, expected)
    assert bool(actual.abs().sum() > 0)


def test_jitter_stays_within_its_bounds_and_touches_what_the_router_sees_alone() -> None:
    router = make_router(make_config(router="relu", router_input_jitter=0.1)).train()
    with torch.no_grad():
        router.weight.copy_(torch.eye(E, D))
    x_TD = torch.rand(T, D) + 1.0
    before_TD = x_TD.clone()
    factor_TE = router(x_TD, context_of(1, T)).logits.detach() / x_TD[:, :E]
    assert torch.equal(x_TD, before_TD)
    assert 0.9 - 1e-6 <= float(factor_TE.min()) < 0.95
    assert 1.05 < float(factor_TE.max()) <= 1.1 + 1e-6
