"""Balance terms against their definitions, and the traps they are known for.

B sequences, L positions, T = B x L tokens, E experts, K experts per token.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.config import ModelConfig, MoEConfig
from moesaic.model.balance import (
    HISTOGRAM_BINS,
    BiasHistogram,
    max_vio,
    move_expert_bias,
    relu_l1_loss,
    sequence_switch_loss,
    switch_loss,
    update_expert_bias,
    z_loss,
)
from moesaic.model.routers import Router, make_router
from moesaic.model.routing_context import RoutingContext
from moesaic.ops import Choice, Routing

B, L, E, K, D = 5, 7, 6, 2, 8
T = B * L


def route(logits: Tensor, mask: Tensor | None = None, dropped: Tensor | None = None) -> Routing:
    """The K highest logits; rows (T, K) that are `dropped` were asked for and are not computed."""
    choice = Choice.of_topk(logits.topk(K).indices, None if dropped is None else ~dropped).without_padding(mask)
    kept = slice(None) if choice.kept is None else choice.kept
    return Routing(
        token_ids=choice.token_ids[kept],
        expert_ids=choice.expert_ids[kept],
        weights=torch.ones(len(choice.token_ids[kept])),
        logits=logits,
        num_experts=E,
        top_k=K if choice.kept is None else None,
        mask=mask,
        choice=choice,
    )


def draw_logits(num_tokens: int = T) -> Tensor:
    return torch.randn(num_tokens, E, dtype=torch.float64, requires_grad=True)


def draw_mask() -> Tensor:
    mask = torch.rand(T) < 0.6
    mask[0] = True
    return mask


def published_loss(logits: Tensor, groups: list[list[int]] | None = None) -> Tensor:
    """Group by group and token by token, of tokens that are all there; differentiable."""
    groups = groups or [[expert] for expert in range(E)]
    chosen = logits.topk(K).indices.tolist()
    total = logits.new_zeros(())
    for group in groups:
        share = sum(expert in row for row in chosen for expert in group) / (len(logits) * K)
        probability = sum((row.softmax(0)[group].sum() for row in logits), logits.new_zeros(())) / len(logits)
        total = total + len(groups) * share * probability
    return total


def assert_same_with_gradient(got: Tensor, expected: Tensor, logits: Tensor) -> None:
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (got, expected)]
    torch.testing.assert_close(*gradients)


def test_switch_loss_is_the_published_sum_and_k_does_not_enter() -> None:
    logits = draw_logits()
    assert_same_with_gradient(switch_loss(route(logits), logits.softmax(-1)), published_loss(logits), logits)


def test_switch_loss_counts_what_was_asked_for_before_rows_are_dropped() -> None:
    logits = draw_logits()
    routing = route(logits, dropped=torch.rand(T, K) < 0.5)
    torch.testing.assert_close(switch_loss(routing, logits.softmax(-1)), published_loss(logits))


@pytest.mark.parametrize("num_devices", [2, 3])
def test_device_groups_are_pooled_before_share_and_probability(num_devices: int) -> None:
    logits = draw_logits()
    size = E // num_devices
    groups = [list(range(first, first + size)) for first in range(0, E, size)]
    got = switch_loss(route(logits), logits.softmax(-1), num_devices=num_devices)
    assert_same_with_gradient(got, published_loss(logits, groups), logits)


@pytest.mark.parametrize("is_padded", [False, True])
def test_the_sequence_loss_is_the_mean_of_the_losses_of_sequences(is_padded: bool) -> None:
    logits = draw_logits()
    mask = draw_mask() if is_padded else torch.ones(T, dtype=torch.bool)
    parts = [
        published_loss(part[real])
        for part, real in zip(logits.view(B, L, E), mask.view(B, L), strict=True)
        if real.any()
    ]
    got = sequence_switch_loss(route(logits, mask if is_padded else None), logits.softmax(-1), B)
    assert_same_with_gradient(got, torch.stack(parts).mean(), logits)


def even_logits() -> Tensor:
    """Each expert first once and second once, in B sequences of E tokens."""
    return (2 * torch.eye(E) + torch.eye(E).roll(1, 1)).repeat(B, 1)


@pytest.mark.parametrize("score", [torch.softmax, lambda logits, dim: logits.sigmoid()], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("num_devices", [0, 1, 2, 3])
def test_every_scope_is_1_at_balance(score: Any, num_devices: int) -> None:
    """Sigmoid scores too, which are normalised first."""
    logits = even_logits()
    routing, scores = route(logits), score(logits, -1)
    assert float(switch_loss(routing, scores, num_devices=num_devices)) == pytest.approx(1)
    assert float(sequence_switch_loss(routing, scores, B, num_devices=num_devices)) == pytest.approx(1)


def test_switch_loss_is_e_over_k_at_collapse() -> None:
    collapsed = torch.full((12, E), -100.0)
    collapsed[:, :K] = 100.0
    torch.testing.assert_close(float(switch_loss(route(collapsed), collapsed.softmax(-1))), E / K)


def test_padding_counts_in_no_term() -> None:
    logits, mask = draw_logits(), draw_mask()
    padded, alone = route(logits, mask), route(logits[mask])
    torch.testing.assert_close(switch_loss(padded, logits.softmax(-1)), switch_loss(alone, logits[mask].softmax(-1)))
    torch.testing.assert_close(z_loss(padded), z_loss(alone))
    torch.testing.assert_close(relu_l1_loss(padded, K), relu_l1_loss(alone, K))


def test_terms_of_micro_batches_add_up_to_that_of_the_batch() -> None:
    """However unequally padding divides the tokens among them."""
    logits, mask = draw_logits(), draw_mask()
    whole = route(logits, mask)
    num_tokens, num_sequences = int(mask.sum()), int(mask.view(B, L).any(1).sum())
    sums = dict.fromkeys(("switch", "sequence", "z", "relu"), torch.zeros((), dtype=torch.float64))
    for start, stop in ((0, 1), (1, 3), (3, B)):
        rows = slice(start * L, stop * L)
        part, scores = route(logits[rows], mask[rows]), logits[rows].softmax(-1)
        terms = {
            "switch": switch_loss(part, scores, load=whole.load(), num_tokens=num_tokens),
            "sequence": sequence_switch_loss(part, scores, stop - start, num_sequences=num_sequences),
            "z": z_loss(part, num_tokens),
            "relu": relu_l1_loss(part, K, load=whole.load(), num_tokens=num_tokens),
        }
        sums = {name: value + terms[name] for name, value in sums.items()}
    assert_same_with_gradient(sums["switch"], switch_loss(whole, logits.softmax(-1)), logits)
    assert_same_with_gradient(sums["sequence"], sequence_switch_loss(whole, logits.softmax(-1), B), logits)
    assert_same_with_gradient(sums["z"], z_loss(whole), logits)
    assert_same_with_gradient(sums["relu"], relu_l1_loss(whole, K), logits)


def test_nothing_but_padding_gives_terms_of_0() -> None:
    logits, mask = draw_logits(), torch.zeros(T, dtype=torch.bool)
    routing, scores = route(logits, mask), logits.softmax(-1)
    terms = (switch_loss(routing, scores), sequence_switch_loss(routing, scores, B), z_loss(routing))
    assert [float(term.detach()) for term in (*terms, relu_l1_loss(routing, K))] == [0.0] * 4


def test_z_loss_is_the_mean_squared_log_partition() -> None:
    logits = draw_logits()
    expected = torch.stack([row.exp().sum().log() ** 2 for row in logits]).mean()
    assert_same_with_gradient(z_loss(route(logits)), expected, logits)


def test_the_l1_loss_weighs_positive_logits_by_the_load() -> None:
    """With a load of K / E of the tokens on every expert it is the mean over tokens of the sum of positive logits."""
    logits = draw_logits()
    load = route(logits).load().tolist()
    expected = logits.new_zeros(())
    for expert in range(E):
        weight = E * load[expert] / (K * T)
        expected = expected + weight * sum((row[expert].clamp_min(0) for row in logits), logits.new_zeros(())) / T
    assert_same_with_gradient(relu_l1_loss(route(logits), K), expected, logits)


def make_biased(name: str, form: str = "add") -> Router:
    moe = MoEConfig(
        num_experts=E, num_experts_per_tok=K, moe_intermediate_size=4, router=name, expert_bias=True,  # type: ignore[arg-type]
        expert_bias_form=form,  # type: ignore[arg-type]
    )  # fmt: skip
    config = ModelConfig(
        vocab_size=9, hidden_size=D, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8,
        moe=moe,
    )  # fmt: skip
    return make_router(config)


def bias_of(router: Router) -> Tensor:
    assert router.expert_bias is not None
    return router.expert_bias


def routed(router: Router, x: Tensor) -> Routing:
    return router(x, RoutingContext(tokens=torch.zeros(1, len(x), dtype=torch.int64)))


@pytest.mark.parametrize("name", ["softmax_topk", "sigmoid_topk"])
def test_bias_moves_against_the_load_and_stays_centred(name: str) -> None:
    router, load = make_biased(name), torch.tensor([9, 3, 3, 1, 1, 1])
    update_expert_bias(router, load, 0.01)
    torch.testing.assert_close(bias_of(router), torch.tensor([-0.01, 0.0, 0.0, 0.01, 0.01, 0.01]) - 0.02 / 6)
    router = make_biased(name)
    update_expert_bias(router, load, 0.01, proportional=True)
    torch.testing.assert_close(bias_of(router), torch.tensor([-0.02, 0.0, 0.0, 0.02 / 3, 0.02 / 3, 0.02 / 3]))


def test_an_empty_batch_moves_no_bias() -> None:
    for proportional in (False, True):
        router = make_biased("sigmoid_topk")
        update_expert_bias(router, torch.zeros(E, dtype=torch.int64), 0.01, proportional=proportional)
        assert bias_of(router).abs().max() == 0
    move_expert_bias(router, BiasHistogram(router), 1.0)
    assert bias_of(router).abs().max() == 0


@pytest.mark.parametrize("form", ["add", "multiply"])
@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize("name", ["softmax_topk", "sigmoid_topk"])
def test_the_bias_update_balances_a_skewed_router(name: str, proportional: bool, form: str) -> None:
    router = make_biased(name, form)
    torch.nn.init.normal_(router.weight, std=0.3)  # type: ignore[arg-type]
    x = torch.randn(512, D) + 1.0
    before = max_vio(routed(router, x).load())
    for rate in [0.01] * 300 + [0.001] * 100:  # a fixed step ends in an oscillation of its own size
        update_expert_bias(router, routed(router, x).load(), rate, proportional=proportional)
    assert max_vio(routed(router, x).load()) < max(0.2, 0.25 * before)


def exact_need(router: Router, logits: Tensor) -> Tensor:
    """(T, E): the bias that each expert needs at each token, token by token."""
    need = torch.empty(logits.shape, dtype=torch.float64)
    for token, scores in enumerate(router.scores(logits)):
        cutoff = sorted((scores + bias_of(router)).tolist(), reverse=True)[K]
        need[token] = cutoff - scores.double()
    return need


@pytest.mark.parametrize("name", ["softmax_topk", "sigmoid_topk"])
def test_the_quantile_is_that_of_the_needed_biases_to_3_percent_of_the_way(name: str) -> None:
    router = make_biased(name)
    bias_of(router).normal_(std=0.2)
    logits = torch.randn(300, E)
    histogram = BiasHistogram(router)
    for part in logits.split(77):
        histogram.add(router, route(part))
    assert histogram.counts.shape == (E, HISTOGRAM_BINS)
    need_TE = exact_need(router, logits).sort(0).values
    for share in (K / E, 0.5, 1.0):
        place = math.ceil(share * 300 - 1e-9) - 1
        move_E = need_TE[place] - bias_of(router).double()
        error_E = (histogram.quantile(share) - need_TE[place]).abs()
        assert bool((error_E <= 0.032 * move_E.abs() + 1e-7).all())


@pytest.mark.parametrize("name", ["softmax_topk", "sigmoid_topk"])
def test_quantile_balancing_balances_a_skewed_router_in_few_steps(name: str) -> None:
    router = make_biased(name)
    torch.nn.init.normal_(router.weight, std=0.3)  # type: ignore[arg-type]
    x = torch.randn(2000, D) + 1.0
    before = max_vio(routed(router, x).load())
    for _ in range(12):
        histogram = BiasHistogram(router)
        histogram.add(router, routed(router, x))
        move_expert_bias(router, histogram, 1.0)
    assert max_vio(routed(router, x).load()) < max(0.1, 0.2 * before)
    assert float(bias_of(router).mean().abs()) < 1e-6


def test_the_rate_is_the_part_of_the_way_that_the_quantile_bias_goes() -> None:
    logits = torch.randn(100, E)
    whole, half = make_biased("sigmoid_topk"), make_biased("sigmoid_topk")
    for router, rate in ((whole, 1.0), (half, 0.5)):
        histogram = BiasHistogram(router)
        histogram.add(router, route(logits))
        move_expert_bias(router, histogram, rate)
    torch.testing.assert_close(bias_of(half), bias_of(whole) / 2)


def test_padding_needs_no_bias() -> None:
    logits, mask = draw_logits().detach(), draw_mask()
    router = make_biased("softmax_topk")
    padded, alone = BiasHistogram(router), BiasHistogram(router)
    padded.add(router, route(logits, mask))
    alone.add(router, route(logits[mask]))
    assert torch.equal(padded.counts, alone.counts)


def test_max_vio_is_relative_to_the_mean_and_averaged_over_layers() -> None:
    assert max_vio(torch.tensor([4, 4, 4])) == 0.0
    assert abs(max_vio(torch.tensor([[6, 3, 3], [12, 0, 0]])) - (0.5 + 2.0) / 2) < 1e-12
