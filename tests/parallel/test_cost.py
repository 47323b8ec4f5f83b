"""The cost model beside what drawing experts gives.

T tokens, P ranks, E experts, K experts per token.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moesaic.parallel.cost import (
    ExchangeShape,
    exchange_seconds,
    forward_bytes,
    host_bytes,
    host_rows,
    host_seconds,
    rows_sent,
    visited,
)


def test_expected_rows_agree_with_drawing_them() -> None:
    shape = ExchangeShape(num_experts=10, top_k=4, hidden_size=8, num_ranks=4, ranks_per_host=2)
    bounds = torch.tensor([3, 6, 8])  # ends of the first three ranks' experts
    picks_TK = torch.rand(40_000, 10).argsort(1)[:, :4].contiguous()
    ranks_TK = torch.bucketize(picks_TK, bounds, right=True)
    home_T = torch.randint(0, 4, (len(picks_TK),))
    hits_TP = torch.zeros(len(picks_TK), 4, dtype=torch.bool).scatter(1, ranks_TK, True)
    away_TP = hits_TP & (torch.arange(4) != home_T[:, None])
    assert rows_sent(shape) == pytest.approx(float(away_TP.sum(1).float().mean()), rel=0.02)
    single = replace(shape, deduplicated=False)
    assert rows_sent(single) == pytest.approx(float((ranks_TK != home_T[:, None]).sum(1).float().mean()), rel=0.02)
    other_host_TP = hits_TP & (torch.arange(4) // 2 != (home_T // 2)[:, None])
    assert host_rows(shape, hierarchical=False) == pytest.approx(float(other_host_TP.sum(1).float().mean()), rel=0.02)
    hosts_T = other_host_TP.unflatten(1, (2, 2)).any(2).sum(1)
    assert host_rows(shape, hierarchical=True) == pytest.approx(float(hosts_T.float().mean()), rel=0.02)
    assert visited(10, 10, range(1)) == 1.0


def draw_from_groups(num_tokens: int, num_experts: int, top_k: int, n_group: int, topk_group: int) -> Tensor:
    """(T, K): experts drawn evenly from groups drawn evenly."""
    groups_TG = torch.rand(num_tokens, n_group).argsort(1) < topk_group
    scores_TE = torch.rand(num_tokens, num_experts)
    scores_TE[~groups_TG.repeat_interleave(num_experts // n_group, 1)] = -1.0
    return scores_TE.topk(top_k).indices


@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (2, 1), (4, 2), (6, 3), (3, 3)])
@pytest.mark.parametrize("place", [range(3), range(2, 9), range(6, 12)])
def test_groups_bound_what_is_visited(n_group: int, topk_group: int, place: range) -> None:
    picks_TK = draw_from_groups(40_000, 12, 2, n_group, topk_group)
    expected = ((picks_TK >= place.start) & (picks_TK < place.stop)).any(1).double().mean()
    assert visited(12, 2, place, n_group, topk_group) == pytest.approx(float(expected), abs=0.01)


def test_one_group_for_each_host_is_one_host_for_each_token() -> None:
    shape = ExchangeShape(
        num_experts=64, top_k=8, hidden_size=256, num_ranks=8, ranks_per_host=2, n_group=4, topk_group=1
    )
    assert host_rows(shape, hierarchical=True) == pytest.approx(3 / 4)
    assert host_rows(replace(shape, topk_group=2), hierarchical=True) == pytest.approx(2 * 3 / 4, rel=0.01)


def test_hosts_of_one_rank_are_the_flat_exchange() -> None:
    shape = ExchangeShape(num_experts=10, top_k=4, hidden_size=8, num_ranks=4, ranks_per_host=1)
    assert host_rows(shape, hierarchical=False) == pytest.approx(rows_sent(shape))
    assert host_rows(shape, hierarchical=True) == pytest.approx(rows_sent(shape))
    assert host_bytes(shape, hierarchical=True) == pytest.approx(forward_bytes(shape))
    seconds = host_seconds(shape, 100, 1e6, 0.01, hierarchical=True, inside_rate=1e9)
    assert seconds == pytest.approx(exchange_seconds(shape, 100, 1e6, 0.01))


def test_two_levels_pay_where_the_link_between_is_slower_than_inside() -> None:
    shape = ExchangeShape(num_experts=64, top_k=8, hidden_size=256, num_ranks=4, ranks_per_host=2)
    for inside_rate, is_better in ((1e9, True), (1e8, False)):
        flat, levels = (
            host_seconds(shape, 1000, 1e8, 0.0, hierarchical=hierarchical, inside_rate=inside_rate)
            for hierarchical in (False, True)
        )
        assert (levels < flat) == is_better
