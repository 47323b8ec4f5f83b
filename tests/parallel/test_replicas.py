"""Copies of busy experts and their places. E experts."""

import pytest
import torch

from moesaic.errors import UsageError
from moesaic.parallel.replicas import place_replicas

LOAD = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]


def test_the_published_example() -> None:
    """From the README of deepseek-ai/EPLB: 16 places, 4 groups, 2 nodes, 8 GPUs."""
    places = place_replicas(torch.tensor(LOAD), 16, 4, 2, 8)
    assert places[0].tolist() == [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]


def test_every_expert_has_a_place_and_the_busiest_gpu_has_less_to_do() -> None:
    load_ME = torch.rand(3, 16).pow(4) + 0.01
    places_MR = place_replicas(load_ME, 32, 4, 2, 8)
    for load_E, places_R in zip(load_ME, places_MR, strict=True):
        copies_E = torch.bincount(places_R, minlength=16)
        assert int(copies_E.min()) >= 1
        busiest = (load_E / copies_E)[places_R].view(8, 4).sum(1).max()
        assert busiest <= load_E.view(8, 2).sum(1).max() + 1e-6
        for group in range(4):  # a group stays on its node
            nodes = (torch.isin(places_R, torch.arange(4 * group, 4 * group + 4)).nonzero() // 16).unique()
            assert len(nodes) == 1


@pytest.mark.parametrize("sizes", [(16, 5, 1, 8), (16, 4, 3, 9), (15, 4, 2, 8), (8, 4, 2, 8)])
def test_what_does_not_divide_is_refused(sizes: tuple[int, int, int, int]) -> None:
    with pytest.raises(UsageError, match=r"choose a multiple|fewer than the 12 experts"):
        place_replicas(torch.tensor(LOAD), *sizes)
