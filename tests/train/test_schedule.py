"""Schedules: their corners and their shape."""

from itertools import pairwise

import pytest

from moesaic.config import ScheduleConfig
from moesaic.train.schedule import rate_factor

TOTAL = 200


def factors(**settings: object) -> list[float]:
    config = ScheduleConfig(**settings)  # type: ignore[arg-type]
    return [rate_factor(step, TOTAL, config) for step in range(TOTAL)]


@pytest.mark.parametrize("name", ["wsd", "cosine", "constant"])
def test_warm_up_is_linear_and_ends_at_the_peak(name: str) -> None:
    values = factors(name=name, warmup_fraction=0.1)
    assert values[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert max(values) == pytest.approx(1.0)


def test_wsd_stays_and_then_falls_linearly() -> None:
    values = factors(name="wsd", warmup_fraction=0.1, decay_fraction=0.25, final_factor=0.2)
    assert values[20:151] == pytest.approx([1.0] * 131)
    steps = [before - after for before, after in pairwise(values[150:])]
    assert steps == pytest.approx([0.8 / 50] * 49)
    assert values[-1] == pytest.approx(0.2 + 0.8 / 50)


def test_cosine_falls_to_the_final_factor_and_is_halfway_in_the_middle() -> None:
    values = factors(name="cosine", warmup_fraction=0.0, final_factor=0.1)
    assert values == sorted(values, reverse=True)
    assert values[TOTAL // 2] == pytest.approx(0.55)
    assert 0.1 < values[-1] < 0.101


def test_constant_stays() -> None:
    assert factors(name="constant", warmup_fraction=0.0) == [1.0] * TOTAL
