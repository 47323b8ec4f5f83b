"""Routing statistics against loops over single tokens, and against themselves when the batch is cut otherwise.

B sequences, L positions, T tokens, E experts, M layers.
"""

import json
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.config import ModelConfig, MoEConfig
from moesaic.model.routers import ROUTERS
from moesaic.model.transformer import Transformer
from moesaic.moe_config import UNLEARNED_ROUTERS, RouterName
from moesaic.ops import Routing
from moesaic.train.routing_statistics import RoutingStatistics, _relative_entropy, load_statistics

LAYERS, EXPERTS, LENGTH = 2, 6, 8
LOGIT_KEYS = ("router_entropy", "router_logit_rms", "router_logit_max")


def make_model(**moe: Any) -> Transformer:
    fields: dict[str, Any] = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 8, **moe}
    config = ModelConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.5,
        moe=MoEConfig(**fields),
    )
    model = Transformer(config).double()
    model.init_weights(random.randrange(2**31))
    return model


def route(model: Transformer, tokens: Tensor, positions: Tensor | None = None) -> list[Routing]:
    routings: list[Routing] = []
    model(tokens, positions, routings=routings)
    return routings


def statistics_of(model: Transformer, passes: list[list[Routing]]) -> RoutingStatistics:
    statistics = RoutingStatistics(LAYERS)
    for routings in passes:
        statistics.add(routings, model)
    return statistics


def padded(tokens: Tensor, where: str) -> tuple[Tensor, Tensor | None]:
    """tokens (B, L) with up to 5 positions of padding on one side, and their positions."""
    if where == "none":
        return tokens, None
    B, L = tokens.shape
    extra = random.randint(1, 5)
    filling = torch.randint(0, 40, (B, extra))
    positions, outside = torch.arange(L).expand(B, L), torch.full((B, extra), -1)
    if where == "left":
        return torch.cat((filling, tokens), 1), torch.cat((outside, positions), 1)
    return torch.cat((tokens, filling), 1), torch.cat((positions, outside), 1)


def test_a_row_is_what_a_loop_over_tokens_finds() -> None:
    model = make_model()
    routings = route(model, torch.randint(0, 40, (3, LENGTH)))
    entropies, squares, largest = [], [], 0.0
    load = [[0] * EXPERTS for _ in range(LAYERS)]
    for layer, routing in enumerate(routings):
        for expert in routing.expert_ids.tolist():
            load[layer][expert] += 1
        for logits in routing.logits.tolist():
            total = sum(math.exp(logit) for logit in logits)
            shares = [math.exp(logit) / total for logit in logits]
            entropies.append(-sum(share * math.log(share) for share in shares) / math.log(EXPERTS))
            squares += [logit**2 for logit in logits]
            largest = max(largest, *map(abs, logits))
    row = statistics_of(model, [routings]).row()
    vio = [max(layer) / (sum(layer) / EXPERTS) - 1 for layer in load]
    assert row["max_vio_layers"] == pytest.approx(vio, abs=1e-4)
    assert row["max_vio"] == pytest.approx(sum(vio) / LAYERS, abs=1e-4)
    assert row["load"] == [pytest.approx([count / sum(layer) for count in layer], abs=1e-4) for layer in load]
    assert row["dead_experts"] == sum(count == 0 for layer in load for count in layer)
    assert row["dropped"] == 0
    assert row["experts_per_token"] == 2
    assert row["router_entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert row["router_logit_rms"] == pytest.approx(math.sqrt(sum(squares) / len(squares)), rel=1e-5)
    assert row["router_logit_max"] == pytest.approx(largest, rel=1e-5)
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_neither_micro_batches_nor_their_order_nor_padding_change_anything(size: int, padding: str) -> None:
    model = make_model(router="sigmoid_topk", capacity_factor=1.0)
    tokens = torch.randint(0, 40, (4, LENGTH))
    whole = statistics_of(model, [route(model, tokens)])
    parts = [route(model, *padded(part, padding)) for part in tokens.split(size)]
    random.shuffle(parts)
    cut = statistics_of(model, parts)
    assert torch.equal(cut.load, whole.load)
    ours, theirs = cut.row(), whole.row()
    assert ours["dropped"] > 0
    for key in LOGIT_KEYS:
        assert ours.pop(key) == pytest.approx(theirs.pop(key), rel=2e-5)  # six digits are kept
    assert ours == theirs


def test_the_sums_behind_a_row_agree_to_ten_digits_and_more() -> None:
    model = make_model()
    tokens = torch.randint(0, 40, (4, LENGTH))
    whole, cut = RoutingStatistics(LAYERS), RoutingStatistics(LAYERS)
    whole.add(route(model, tokens), model)
    for part in tokens.split(1):
        cut.add(route(model, *padded(part, "left")), model)
    for name, value in whole._logits.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(cut._logits[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("policy", ["drop", "pad"])
def test_dropped_is_the_share_of_what_was_asked_for(policy: str) -> None:
    model = make_model(capacity_factor=0.5, drop_policy=policy)
    routings = route(model, torch.randint(0, 40, (3, LENGTH)))
    capacity, kept, asked = math.ceil(0.5 * LENGTH * 2 / EXPERTS), 0, 3 * LENGTH * 2 * LAYERS
    for routing in routings:
        for sequence in routing.logits.split(LENGTH):
            wanted = [0] * EXPERTS
            for logits in sequence.tolist():
                for expert in sorted(range(EXPERTS), key=lambda expert: -logits[expert])[:2]:
                    wanted[expert] += 1
            kept += sum(min(capacity, count) for count in wanted)
    row = statistics_of(model, [routings]).row()
    assert 0 < kept < asked
    assert row["dropped"] == pytest.approx(1 - kept / asked, abs=1e-6)
    assert row["experts_per_token"] == pytest.approx(kept / (3 * LENGTH * LAYERS), abs=1e-4)


def test_experts_per_token_is_a_mean_over_tokens_without_padding() -> None:
    model = make_model(router="softmax_top_p", top_p=0.7, num_experts_per_tok=EXPERTS)
    tokens = torch.randint(0, 40, (3, LENGTH))
    rows = sum(len(routing.expert_ids) for routing in route(model, tokens))
    row = statistics_of(model, [route(model, *padded(tokens, "right"))]).row()
    assert row["experts_per_token"] == pytest.approx(rows / (3 * LENGTH * LAYERS), abs=1e-4)


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_has_a_row_of_finite_numbers(router: RouterName) -> None:
    model = make_model(router=router)
    row = statistics_of(model, [route(model, *padded(torch.randint(0, 40, (3, LENGTH)), "left"))]).row()
    assert json.loads(json.dumps(row)) == row
    values = [row[key] for key in LOGIT_KEYS]
    if router in UNLEARNED_ROUTERS:
        assert values == [None] * 3
    else:
        assert all(math.isfinite(value) for value in values)
        assert 0 <= row["router_entropy"] <= 1
        assert row["router_logit_rms"] <= row["router_logit_max"] * (1 + 1e-5)
    assert row["max_vio"] >= 0


def test_entropy_is_one_where_scores_are_even_and_zero_where_one_takes_all() -> None:
    model = make_model(router="softmax_topk")
    tokens = torch.randint(0, 40, (2, LENGTH))
    even = [replace(routing, logits=torch.full_like(routing.logits, -3.0)) for routing in route(model, tokens)]
    row = statistics_of(model, [even]).row()
    assert [row[key] for key in LOGIT_KEYS] == pytest.approx([1.0, 3.0, 3.0])
    alone = torch.full((2 * LENGTH, EXPERTS), -1e4, dtype=torch.float64)
    alone[:, 2] = 1e4
    one = [replace(routing, logits=alone) for routing in even]
    row = statistics_of(model, [one]).row()
    assert (row["router_entropy"], row["router_logit_rms"], row["router_logit_max"]) == (0.0, 1e4, 1e4)


def test_nothing_is_known_of_a_dense_model_or_of_padding_alone() -> None:
    empty = RoutingStatistics(0)
    assert empty.load.shape == (0, 0)
    assert set(empty.row().values()) == {None}
    model = make_model()
    tokens = torch.randint(0, 40, (2, LENGTH))
    row = statistics_of(model, [route(model, tokens, torch.full((2, LENGTH), -1))]).row()
    assert json.loads(json.dumps(row)) == row
    assert row["router_entropy"] is None
    assert (row["experts_per_token"], row["dead_experts"]) == (0.0, LAYERS * EXPERTS)


def test_what_is_not_finite_becomes_null() -> None:
    model = make_model()
    routings = route(model, torch.randint(0, 40, (2, LENGTH)))
    broken = [replace(routing, logits=routing.logits * math.inf) for routing in routings]
    row = statistics_of(model, [broken]).row()
    assert [row[key] for key in LOGIT_KEYS] == [None] * 3


def test_no_graph_is_kept() -> None:
    statistics = statistics_of(model := make_model(), [route(model, torch.randint(0, 40, (2, LENGTH)))])
    assert not any(value.requires_grad for value in statistics._logits.values())


@pytest.mark.parametrize("logit", [-60.0, -75.0, -85.0, -120.0])
def test_entropy_of_tiny_scores_stays_a_share(logit: float) -> None:
    even = _relative_entropy(torch.full((1, 8), logit).sigmoid())
    assert 0.0 <= float(even) <= 1.0
    if logit > -87:
        torch.testing.assert_close(even, torch.ones(1), rtol=1e-3, atol=0)


def test_max_vio_of_layers_and_their_mean() -> None:
    row = load_statistics(torch.tensor([[6, 3, 3], [12, 0, 0]]))
    assert (row["max_vio_layers"], row["max_vio"], row["dead_experts"]) == ([0.5, 2.0], 1.25, 2)
    assert row["load"] == [[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]
    assert set(load_statistics(torch.zeros(0, 0)).values()) == {None}
