"""An exchange in two levels does what the flat one does, with fewer rows between hosts.

Four ranks are two hosts of two. T tokens, D hidden size.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from moesaic.config import ModelConfig, ParallelConfig
from moesaic.model.routing_context import RoutingContext
from moesaic.parallel.cost import ExchangeShape, host_bytes, host_rows
from moesaic.parallel.expert_parallel import apply_expert_parallel
from moesaic.parallel.ranks import make_ranks
from moesaic.parallel.two_level import TwoLevelDispatcher

from .processes import on_ranks
from .test_expert_parallel import D, assert_close, build, learn, learn_on_ranks, whole, with_moe

CASES: dict[str, dict[str, Any]] = {
    "plain": {"router": "softmax_topk"},
    "weighs inputs": {"router": "topk_sigmoid_input"},
    "shared experts, groups": {"router": "sigmoid_topk", "n_shared_experts": 1, "n_group": 2, "topk_group": 1},
    "drops": {"router": "softmax_topk", "capacity_factor": 1.0},
}


@pytest.mark.parametrize(
    ("case", "overlap"),
    [(case, "none") for case in CASES] + [("plain", "halves"), ("shared experts, groups", "halves")],
)
def test_four_ranks_of_two_hosts_learn_what_one_process_does(case: str, overlap: str, seed: int) -> None:
    """Six experts on four ranks, of which one has no token."""
    config = with_moe(**CASES[case])
    expected = learn(build(config, seed), seed, slice(None))
    parts = on_ranks(4, lambda: learn_on_ranks(config, seed, [0, 3, 3, 4, 4], overlap=overlap, ranks_per_host=2))
    assert_close(whole([part for part, _ in parts]), expected, 1e-12)


def test_blocks_are_computed_again_on_every_rank(seed: int) -> None:
    config = with_moe(num_experts_per_tok=1, n_shared_experts=1)
    expected = learn(build(config, seed), seed, slice(0, 1), checkpointing=True)
    parts = on_ranks(4, lambda: learn_on_ranks(config, seed, [0, 0, 1, 1, 1], True, ranks_per_host=2, overlap="shared"))
    assert_close(whole([part for part, _ in parts]), expected, 1e-12)


def bytes_between_hosts(config: ModelConfig, tokens: int, seed: int) -> int:
    """That this rank sends to the other host in a forward pass."""
    ranks = make_ranks(ParallelConfig(ep=4, ranks_per_host=2))
    assert ranks.mesh is not None
    model = build(config, seed)
    apply_expert_parallel(model, ranks.mesh, ranks_per_host=2)
    (layer,) = model.moe_layers
    assert isinstance(layer.dispatcher, TwoLevelDispatcher)
    generator = torch.Generator().manual_seed(seed + ranks.index)
    x_1TD = torch.randn(1, tokens, D, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        layer(x_1TD, RoutingContext(tokens=torch.zeros(1, tokens, dtype=torch.int64)))
    exchange = layer.dispatcher.between.exchange
    assert exchange.num_ranks == layer.dispatcher.inside.exchange.num_ranks == 2
    return exchange.bytes_sent


@pytest.mark.parametrize("topk_group", [1, 2])
def test_a_token_travels_once_to_each_host_that_it_may_visit(topk_group: int, seed: int) -> None:
    """Half of all tokens cross with one group for each host and one of them chosen; all with both, and all experts."""
    groups = {"router": "sigmoid_topk", "n_group": 2, "topk_group": topk_group}
    config = replace(with_moe(num_experts=8, num_experts_per_tok=4 * topk_group, **groups), num_hidden_layers=1)
    tokens = 500
    sent = on_ranks(4, bytes_between_hosts, config, tokens, seed)
    shape = ExchangeShape(
        num_experts=8, top_k=4 * topk_group, hidden_size=D, num_ranks=4, ranks_per_host=2, itemsize=8,
        weight_itemsize=8, n_group=2, topk_group=topk_group,
    )  # fmt: skip
    assert host_rows(shape, hierarchical=True) == pytest.approx(topk_group / 2)
    counts = 4 * 16
    predicted = 4 * tokens * host_bytes(shape, hierarchical=True) + counts
    # Which group a token prefers depends on the weights; what crosses in one direction, the other one does not.
    assert sum(sent) == pytest.approx(predicted, rel=0.15 if topk_group == 1 else 1e-6)


def test_ep_ranks_that_do_not_fill_hosts_are_refused_by_name() -> None:
    with pytest.raises(AssertionError, match=r"parallel.ep is 3, .* not a multiple of parallel.ranks_per_host, 2; set"):
        on_ranks(3, lambda: learn_on_ranks(with_moe(), 0, [0, 1, 2, 4], ranks_per_host=2))
