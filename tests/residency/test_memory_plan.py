"""Budgets: what is understood, what fits, and what the refusal says."""

import pytest

from moesaic.errors import UsageError
from moesaic.residency.memory_plan import make_plan, parse_bytes

MIB = 2**20


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GiB", 8 * 2**30), ("8 gib", 8 * 2**30), ("8G", 8 * 2**30), ("8GB", 8 * 10**9), ("2.5GiB", 5 * 2**29),
        ("512MiB", 512 * MIB), ("700MB", 700 * 10**6), ("1T", 2**40), ("1048576", MIB), (MIB, MIB), ("64 kB", 64000),
    ],
)  # fmt: skip
def test_sizes(text: str | int, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "8 GiB RAM", "0", "0GiB", "1e3", "8PiB", "nan", "9" * 400])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size; write it like 8GiB"):
        parse_bytes(text)


def test_what_is_left_beside_the_parts_is_for_experts() -> None:
    plan = make_plan(100 * MIB, {"weights": 30 * MIB, "process": 20 * MIB}, 4 * MIB, 64)
    assert plan.slots == 12
    assert str(plan) == "100 MiB: 30 MiB weights, 20 MiB process, 48 MiB for 12 experts"
    assert make_plan(2**30, {"weights": 0}, 4 * MIB, 64).slots == 64


def test_too_little_is_refused_with_the_numbers_and_a_budget_that_works() -> None:
    parts = {"weights": 1100 * MIB, "process": 200 * MIB}
    with pytest.raises(UsageError) as refused:
        make_plan(2**30, parts, 5 * MIB, 64)
    assert str(refused.value) == (
        "memory 1.00 GiB is too little: the model needs at least 1.28 GiB: 1.07 GiB weights + 200 MiB process + 10 MiB "
        "for 2 experts; try memory 1344MiB, fewer bits per weight, or less text at a time"
    )
    assert make_plan(parse_bytes("1344MiB"), parts, 5 * MIB, 64).slots >= 2
