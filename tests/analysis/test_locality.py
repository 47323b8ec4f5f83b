"""The curve of a cache equals simulating each cache. E experts, K experts per token."""

import numpy as np
import pytest

from moesaic.analysis import locality
from moesaic.analysis.locality import CacheCurve, hit_curve

from .traces import random_ids


def simulated_hits(ids: np.ndarray, size: int) -> int:
    """One LRU cache: a list of experts, the one used last in front. A token visits all of its experts at once."""
    cache: list[int] = []
    hits = 0
    for row in ids.tolist():
        visited = [expert for expert in row if expert >= 0]
        hits += sum(expert in cache for expert in visited)
        for expert in visited:
            if expert in cache:
                cache.remove(expert)
            cache.insert(0, expert)
        # What the token needs is in front, so that what leaves was not needed.
        del cache[size:]
    return hits


@pytest.mark.parametrize("stickiness", [0.0, 0.7])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (5, 1), (8, 3), (16, 4), (6, 6)])
def test_the_curve_equals_simulated_caches(
    num_experts: int, top_k: int, stickiness: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locality, "_CELLS_AT_ONCE", np.random.randint(1, 50 * num_experts))
    ids = random_ids(200, num_experts, top_k, stickiness)
    curve = hit_curve(ids, num_experts)
    assert curve.tolist() == [simulated_hits(ids, size) for size in range(num_experts + 1)]
    assert curve[-1] == ids.size - len(np.unique(ids))


def test_tokens_without_some_experts_count_for_those_they_have() -> None:
    ids = random_ids(300, 7, 3, 0.4)
    ids[np.random.rand(*ids.shape) < 0.4] = -1
    assert hit_curve(ids, 7).tolist() == [simulated_hits(ids, size) for size in range(8)]
    assert hit_curve(np.full((4, 2), -1), 3).tolist() == [0, 0, 0, 0]


def test_one_expert_for_all_hits_from_the_second_token_on() -> None:
    assert hit_curve(np.full((10, 1), 2), 4).tolist() == [0, 9, 9, 9, 9]


def test_tokens_that_come_in_parts_give_the_same_curve() -> None:
    ids, caches = random_ids(300, 9, 3, 0.5), CacheCurve(9)
    for part in np.array_split(ids, np.sort(np.random.randint(0, 300, 12))):
        caches.add(part)
    assert caches.hits.tolist() == hit_curve(ids, 9).tolist()
