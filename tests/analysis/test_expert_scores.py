"""Scores against a plain loop in float64, whatever computes the experts; choices against brute force."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moesaic.analysis.expert_scores import best_experts, nearest_leads, random_scores, score_experts
from moesaic.checkpoint.load import load
from moesaic.checkpoint.save import export_model
from moesaic.config import ModelConfig, MoEConfig
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.transformer import Transformer
from moesaic.ops import Routing

BASE = ModelConfig(
    vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    intermediate_size=40, max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip
MOE = MoEConfig(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32)
CASES = {
    "softmax": replace(MOE, first_k_dense_replace=1),
    "sigmoid, shared, scaled": replace(MOE, router="sigmoid_topk", routed_scaling_factor=2.5, n_shared_experts=1),
    "gpt-oss": replace(
        MOE, router="topk_softmax", router_bias=True, projection_bias=True, activation="clamped_swiglu"
    ),
    "weighted inputs": replace(MOE, router="topk_sigmoid_input"),
    "a varying number": replace(MOE, router="softmax_top_p"),
}  # fmt: skip


def random_model(moe: MoEConfig | None) -> Transformer:
    model = Transformer(replace(BASE, moe=moe)).eval()
    for name, tensor in model.state_dict().items():
        tensor.normal_(1.0 if "norm" in name else 0.0, 0.1 if "bias" in name else 0.25)
    return model


def expert_function(model: Transformer, layer: int, expert: int) -> Callable[[Tensor], Tensor]:
    """x (D,) float64 -> (D,), written out."""
    experts, moe = model.moe_layers[layer].experts, model.config.moe
    assert moe is not None
    gate_up, down = experts.gate_up[expert].double(), experts.down[expert].double()

    def apply(x: Tensor) -> Tensor:
        hidden = gate_up @ x
        if experts.gate_up_bias is not None:
            hidden = hidden + experts.gate_up_bias[expert].double()
        gate, up = hidden.chunk(2)
        if moe.activation == "swiglu":
            inner = gate * torch.sigmoid(gate) * up
        else:
            gate, up = gate.clamp(max=moe.swiglu_limit), up.clamp(-moe.swiglu_limit, moe.swiglu_limit)
            inner = gate * torch.sigmoid(moe.swiglu_alpha * gate) * (up + 1)
        y = down @ inner
        return y if experts.down_bias is None else y + experts.down_bias[expert].double()

    return apply


@torch.no_grad()
def recorded(model: Transformer, batches: list[Tensor]) -> list[list[tuple[Tensor, Routing]]]:
    """By layer, what its experts were given in each pass."""
    seen: list[list[tuple[Tensor, Routing]]] = [[] for _ in model.moe_layers]

    def keep(into: list[Any], module: nn.Module, given: Any) -> None:
        into.append(given)

    handles = [
        block.experts.register_forward_pre_hook(partial(keep, seen[layer]))
        for layer, block in enumerate(model.moe_layers)
    ]
    for batch in batches:
        model(batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_scores_are_those_of_a_plain_loop(name: str) -> None:
    moe = CASES[name]
    model = random_model(moe)
    batches = [torch.randint(0, 97, shape) for shape in ((2, 9), (1, 5))]
    scores = score_experts(model, batches, sampled_tokens=4)
    for layer, passes in enumerate(recorded(model, batches)):
        functions = [expert_function(model, layer, expert) for expert in range(6)]
        added: list[list[float]] = [[] for _ in range(6)]
        squares = torch.zeros(6, 6, dtype=torch.float64)
        for x, routing in passes:
            rows = zip(routing.token_ids.tolist(), routing.expert_ids.tolist(), routing.weights.double(), strict=True)
            for token, expert, weight in rows:
                x_D = x[token].double()
                weighs_input = moe.router == "topk_sigmoid_input"
                y_D = functions[expert](weight * x_D) if weighs_input else weight * functions[expert](x_D)
                added[expert].append(float(y_D.norm()))
            for sample in range(4):
                outputs = [function(x[sample * len(x) // 4].double()) for function in functions]
                squares += torch.stack([torch.stack([(a - b).square().sum() for b in outputs]) for a in outputs])
        reap = [sum(each) / len(each) if each else 0.0 for each in added]
        assert torch.allclose(scores[layer].by("reap"), torch.tensor(reap, dtype=torch.float64), rtol=1e-4, atol=1e-6)
        assert scores[layer].by("frequency").tolist() == [len(each) for each in added]
        assert torch.allclose(scores[layer].distance, (squares / 8).sqrt(), rtol=1e-4, atol=1e-5)
        assert scores[layer].distance.diagonal().count_nonzero() == 0


def test_nothing_of_the_model_changes() -> None:
    model = random_model(CASES["sigmoid, shared, scaled"]).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = score_experts(model, [torch.randint(0, 97, (2, 9))])
    assert model.training
    assert not any(block.experts._forward_hooks for block in model.moe_layers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert plain[0].distance.count_nonzero() == 0


def test_equal_experts_are_at_no_distance_and_unvisited_ones_are_worth_nothing() -> None:
    model = random_model(CASES["gpt-oss"])
    experts, router = model.moe_layers[1].experts, model.moe_layers[1].router
    with torch.no_grad():
        for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
            stack = experts.get_parameter(name)
            stack[4] = stack[1]
        router.get_parameter("bias")[3] = -1e4
    scores = score_experts(model, [torch.randint(0, 97, (2, 20))], sampled_tokens=8)[1]
    assert float(scores.distance[1, 4]) == 0.0
    assert (scores.distance + torch.eye(6)).count_nonzero() == 34
    assert (scores.tokens[3], scores.by("reap")[3]) == (0, 0.0)
    assert int(scores.tokens.sum()) == 2 * 20 * 2


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_experts_on_disk_and_packed_ones_are_scored_too(tmp_path: Path, quantization: str | None) -> None:
    model = random_model(MOE)
    export_model(model, None, tmp_path / "plain")
    batches = [torch.randint(0, 97, (2, 30))]
    expected = score_experts(load(tmp_path / "plain", quantization=quantization), batches, sampled_tokens=8)
    on_disk = load(tmp_path / "plain", memory="1GiB", quantization=quantization)
    for one, other in zip(score_experts(on_disk, batches, sampled_tokens=8), expected, strict=True):
        assert torch.allclose(one.by("reap"), other.by("reap"), rtol=1e-4)
        assert torch.allclose(one.distance, other.distance, rtol=1e-4)
        assert torch.equal(one.tokens, other.tokens)


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(UsageError, match="this model is dense; name a model with experts"):
        score_experts(random_model(None), [torch.zeros(1, 4, dtype=torch.int64)])
    with pytest.raises(UsageError, match="the router soft mixes tokens and chooses no experts"):
        score_experts(random_model(replace(MOE, router="soft")), [torch.zeros(1, 4, dtype=torch.int64)])
    with pytest.raises(MoesaicError, match="there is no text to score the experts on"):
        score_experts(random_model(MOE), [])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_best_of_each_group_stay(groups: int) -> None:
    scores = torch.randint(0, 6, (12,)).double()  # with ties
    for keep in range(groups, 13, groups):
        kept = best_experts(scores, keep, groups)
        assert len(kept) == keep
        assert kept == sorted(set(kept))
        for group in range(groups):
            members = range(group * 12 // groups, (group + 1) * 12 // groups)
            by_score = sorted(members, key=lambda expert: (-float(scores[expert]), expert))
            assert [each for each in kept if each in members] == sorted(by_score[: keep // groups])


def test_random_scores_follow_from_seed_and_layer() -> None:
    drawn = [random_scores(8, seed=seed, layer=layer).tolist() for seed in (0, 1) for layer in (0, 1)]
    assert drawn[0] == random_scores(8, seed=0, layer=0).tolist()
    assert len({tuple(each) for each in drawn}) == 4


@pytest.mark.parametrize("groups", [1, 2])
def test_the_others_join_the_nearest_lead_of_their_group(groups: int) -> None:
    points = torch.randn(10, 3, dtype=torch.float64)
    distance = torch.cdist(points, points)
    leads = sorted(random.sample(range(5), 2) + random.sample(range(5, 10), 2))
    clusters = nearest_leads(distance, leads, groups)
    assert [cluster[0] for cluster in clusters] == leads
    assert sorted(expert for cluster in clusters for expert in cluster) == list(range(10))
    for cluster in clusters:
        for expert in cluster[1:]:
            near = [lead for lead in leads if groups == 1 or lead // 5 == expert // 5]
            assert float(distance[expert, cluster[0]]) == min(float(distance[expert, lead]) for lead in near)
            assert cluster[0] in near
