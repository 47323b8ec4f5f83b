"""A merged directory holds the means of its clusters, their hidden units in one order, here and in transformers."""

import os
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic.checkpoint.load import load
from moesaic.checkpoint.merge import Cluster, match, merge
from moesaic.checkpoint.prune import prune
from moesaic.checkpoint.reduce_experts import fewest_experts
from moesaic.checkpoint.save import export_model
from moesaic.config import ModelConfig, MoEConfig
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.transformer import Transformer

from .family_cases import FAMILY_CASES
from .helpers import BASE, CONFIGS, load_theirs, logit_difference, random_model, random_tokens, save_hf_model

FAMILIES = ["olmoe", "qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3", "gpt_oss", "dbrx",
            "llama4_text"]  # fmt: skip


def random_clusters(config: ModelConfig, keep: int | None = None) -> dict[int, list[Cluster]]:
    """Of each layer, as many in each group, whose members and weights are drawn."""
    moe = config.moe
    assert moe is not None
    size = moe.num_experts // moe.n_group
    count = (keep or random.randrange(fewest_experts(moe), moe.num_experts, moe.n_group)) // moe.n_group
    clusters: dict[int, list[Cluster]] = {}
    for layer in range(config.num_hidden_layers):
        if not config.is_moe_layer(layer):
            continue
        clusters[layer] = []
        for group in range(moe.n_group):
            experts = random.sample(range(group * size, (group + 1) * size), size)
            members = [experts[place::count] for place in range(count)]
            for each in members:
                weights = torch.rand(len(each), dtype=torch.float64) + 0.1
                clusters[layer].append(Cluster(tuple(each), tuple((weights / weights.sum()).tolist())))
    return clusters


def matched(likeness: list[list[float]]) -> list[int]:
    """The most alike pair first, by a plain loop."""
    size = len(likeness)
    pairs = sorted((-likeness[row][column], row, column) for row in range(size) for column in range(size))
    found: dict[int, int] = {}
    for _, row, column in pairs:
        if row not in found and column not in found.values():
            found[row] = column
    return [found[row] for row in range(size)]


def merged_by_hand(state: dict[str, Tensor], layer: int, cluster: Cluster) -> dict[str, Tensor]:
    """gate_up, down and their biases of one cluster, in float64."""
    prefix = f"layers.{layer}.feed_forward.experts."
    parts = {name.removeprefix(prefix): tensor.double() for name, tensor in state.items() if name.startswith(prefix)}
    width = parts["down"].shape[2]
    lead, total = cluster.lead, {}
    for expert, weight in zip(cluster.experts, cluster.weights, strict=True):
        likeness = [
            [
                float(
                    parts["gate_up"][lead, i] @ parts["gate_up"][expert, j]
                    + parts["gate_up"][lead, width + i] @ parts["gate_up"][expert, width + j]
                    + parts["down"][lead, :, i] @ parts["down"][expert, :, j]
                )
                for j in range(width)
            ]
            for i in range(width)
        ]
        order = list(range(width)) if expert == lead else matched(likeness)
        rows = order + [width + unit for unit in order]
        for name, tensor in parts.items():
            own = tensor[expert]
            own = own[:, order] if name == "down" else own if name == "down_bias" else own[rows]
            total[name] = total.get(name, 0) + weight * own
    return total


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_experts_are_the_means_of_their_members(tmp_path: Path, name: str) -> None:
    save_hf_model(FAMILY_CASES[name], tmp_path / "plain")
    model = load(tmp_path / "plain")
    clusters = random_clusters(model.config)
    made = merge(tmp_path / "plain", tmp_path / "merged", clusters, max_shard_bytes=20_000)
    loaded, state = load(tmp_path / "merged"), model.state_dict()
    assert loaded.config.moe is not None
    assert loaded.config.moe.num_experts == len(next(iter(clusters.values())))
    layer = random.choice(list(clusters))
    ordered = sorted(clusters[layer], key=lambda cluster: cluster.lead)
    largest = max(range(len(ordered)), key=lambda index: len(ordered[index].experts))
    assert len(ordered[largest].experts) > 1
    for index, cluster in enumerate(ordered):
        if len(cluster.experts) == 1 or index == largest:
            for part, expected in merged_by_hand(state, layer, cluster).items():
                found = loaded.state_dict()[f"layers.{layer}.feed_forward.experts.{part}"][index]
                assert torch.allclose(found.double(), expected, atol=1e-6), part
    leads = [cluster.lead for cluster in ordered]
    for part, tensor in loaded.state_dict().items():
        if part.startswith(f"layers.{layer}.feed_forward.router."):
            assert torch.equal(tensor, state[part][leads])
        elif ".feed_forward.experts." not in part and ".feed_forward.router." not in part:
            assert torch.equal(tensor, state[part])
    assert logit_difference(loaded, load_theirs(tmp_path / "merged")) < 1e-4
    assert made.nbytes < made.nbytes_before


def with_copy(model: Transformer, original: int, copy: int) -> None:
    """In every layer expert `copy` becomes `original` with its hidden units shuffled, and nobody visits it."""
    with torch.no_grad():
        for block in model.moe_layers:
            experts, width = block.experts, block.experts.intermediate_size
            order = torch.randperm(width)
            rows = torch.cat((order, width + order))
            experts.gate_up[copy] = experts.gate_up[original][rows]
            experts.down[copy] = experts.down[original][:, order]
            if experts.gate_up_bias is not None and experts.down_bias is not None:
                experts.gate_up_bias[copy] = experts.gate_up_bias[original][rows]
                experts.down_bias[copy] = experts.down_bias[original]
            hidden = block.router.get_buffer("expert_bias") if block.router.expert_bias is not None else None
            (block.router.get_parameter("bias") if hidden is None else hidden)[copy] = -1e4


@pytest.mark.parametrize("name", ["glm4_moe", "gpt_oss"])
def test_merging_two_identical_experts_changes_nothing(tmp_path: Path, name: str) -> None:
    save_hf_model(FAMILY_CASES[name], tmp_path / "random")
    model = load(tmp_path / "random")
    with_copy(model, 2, 4)
    export_model(model, None, tmp_path / "plain")
    cluster = Cluster((2, 4), (0.3, 0.7))
    alone = [Cluster((expert,), (1.0,)) for expert in (0, 1, 3, 5)]
    clusters = {layer: [*alone, cluster] for layer in random_clusters(model.config)}
    merge(tmp_path / "plain", tmp_path / "merged", clusters)
    tokens = random_tokens()
    with torch.no_grad():
        assert torch.allclose(load(tmp_path / "merged")(tokens), model(tokens), atol=1e-4)


def test_members_of_no_weight_are_pruned(tmp_path: Path) -> None:
    model = random_model(CONFIGS["sigmoid"])
    export_model(model, None, tmp_path / "plain")
    clusters = {layer: [Cluster((3, 1), (1.0, 0.0)), Cluster((0, 2, 4), (1.0, 0.0, 0.0))] for layer in range(3)}
    merge(tmp_path / "plain", tmp_path / "merged", clusters)
    prune(tmp_path / "plain", tmp_path / "pruned", {layer: [0, 3] for layer in range(3)})
    merged, pruned = load(tmp_path / "merged").state_dict(), load(tmp_path / "pruned").state_dict()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in pruned.items())


@pytest.mark.parametrize("size", [1, 2, 17])
def test_units_are_matched_as_by_a_plain_loop(size: int) -> None:
    likeness = torch.randn(size, size)
    assert match(likeness).tolist() == matched(likeness.tolist())
    tied = torch.randint(0, 3, (size, size)).float()
    assert sorted(match(tied).tolist()) == list(range(size))


def test_a_shuffled_noisy_expert_is_brought_back_into_order() -> None:
    units = torch.randn(200, 32)
    order = torch.randperm(200)
    others = (units + 0.3 * torch.randn(200, 32))[order]
    assert torch.equal(order[match(units @ others.T)], torch.arange(200))


def test_weights_are_those_of_the_loads() -> None:
    loads = torch.tensor([5, 0, 3, 0, 2])
    assert Cluster.of([2, 0, 4], loads) == Cluster((2, 0, 4), (0.3, 0.5, 0.2))
    assert Cluster.of([3, 1], loads) == Cluster((3, 1), (1.0, 0.0))


def test_clusters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    moe = MoEConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=8, router="sigmoid_topk", n_group=2)
    config = replace(ModelConfig(**BASE), num_hidden_layers=1, moe=moe)
    model = random_model(config)
    export_model(model, None, tmp_path / "plain")

    def clusters(*members: tuple[int, ...]) -> dict[int, list[Cluster]]:
        return {0: [Cluster(each, (1 / len(each),) * len(each)) for each in members]}

    for wrong, message in (
        (clusters((0, 1), (2, 3), (4, 5), (6,)), "layer 0 have 7 members, 7 of them distinct, and the layer 8 experts"),
        (clusters((0, 1), (2, 3), (4, 5), (6, 1)), "layer 0 have 8 members, 7 of them distinct"),
        (
            clusters((0, 1), (2, 4), (5, 3), (6, 7)),
            "layer 0 is to merge the experts 2, 4, which are of different groups",
        ),
        (clusters((0, 1), (2,), (3,), (4, 5, 6, 7)), "layer 0 is to keep 3, 1 experts of its 2 groups of 4"),
        ({0: clusters((0, 1))[0], 1: []}, "keep is 1, but a token visits 2 experts of 1 of 2 groups; keep 4 or more"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            merge(tmp_path / "plain", tmp_path / "out", wrong)
    with torch.no_grad():
        model.moe_layers[0].experts.down[2, 1, 1] = torch.nan
    export_model(model, None, tmp_path / "broken")
    with pytest.raises(MoesaicError, match="weights that are not finite cannot be merged"):
        merge(tmp_path / "broken", tmp_path / "out", clusters((0, 1), (2, 3), (4, 5), (6, 7)))
    assert sorted(os.listdir(tmp_path)) == ["broken", "plain"]
