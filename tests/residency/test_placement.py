"""Experts that stay in memory because a record used them most."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moesaic
from moesaic.errors import UsageError
from moesaic.model.transformer import Transformer
from moesaic.residency.placement import read_record, read_uses
from moesaic.residency.residency import place_experts, residency_of
from moesaic.residency.slots import SlotTable

from .test_residency import quantized, with_slots  # noqa: F401

LAYERS, EXPERTS = 3, 8


def record(file: Path, counts: Any) -> Path:
    file.write_text(json.dumps({"tokens_per_expert": counts}))
    return file


def random_counts() -> list[list[int]]:
    return np.random.default_rng(random.randrange(2**31)).permuted(
        np.arange(1, LAYERS * EXPERTS + 1).reshape(LAYERS, EXPERTS), axis=None
    ).tolist()  # fmt: skip


@pytest.mark.parametrize("slots", [1, 5, 12, 24])
@torch.inference_mode()
def test_the_most_used_are_there_from_the_start_and_change_no_number(
    tmp_path: Path,
    slots: int,
    with_slots: Callable[[Path, int], Transformer],  # noqa: F811
) -> None:
    directory, counts = quantized(tmp_path), random_counts()
    in_memory, on_disk = moesaic.load(directory), with_slots(directory, slots)
    place_experts(on_disk, record(tmp_path / "uses.json", counts))
    residency = residency_of(on_disk)
    assert residency is not None
    shares = np.array(counts) / np.sum(counts, axis=1, keepdims=True)
    best = sorted(((layer, number) for layer in range(LAYERS) for number in range(EXPERTS)), key=lambda e: -shares[e])
    there = {expert for expert in best if expert in residency.cache.table}
    assert len(there) == slots
    assert min(shares[expert] for expert in there) >= shares[best[slots - 1]] - 1e-12
    assert residency.statistics.misses == residency.statistics.hits == 0
    tokens = torch.randint(0, 257, (2, 9))
    assert torch.equal(on_disk(tokens), in_memory(tokens))
    assert residency.statistics.misses <= LAYERS * EXPERTS - slots if slots == 24 else residency.statistics.misses > 0


def test_who_leaves_is_who_the_record_used_least() -> None:
    shares = np.random.default_rng(random.randrange(2**31)).random((LAYERS, EXPERTS))
    table, there, size = SlotTable(9, LAYERS, EXPERTS), set[tuple[int, int]](), 9
    table.follow(shares)
    for _ in range(60):
        layer, numbers = random.randrange(LAYERS), random.sample(range(EXPERTS), 3)
        needed = {(layer, number) for number in numbers}
        assert {expert for expert in needed if expert in table} == needed & there
        table.begin_pass(layer, numbers)
        for expert in needed & there:
            table.hold(expert)
        for expert in sorted(needed - there):
            slot = table.claim()
            assert slot is not None
            table.put(expert, slot)
            if len(there) == size:
                there.remove(min(there - needed, key=lambda each: shares[each]))
            there.add(expert)
        table.end_pass()


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([[1] * EXPERTS] * 2, "of 2 x 8 layers and experts, and this model has 3 x 8"),
        ([[1] * EXPERTS, [1], [2]], "has no tokens_per_expert, a list of counts"),
        ("many", "has no tokens_per_expert, a list of counts"),
        ([[0] * EXPERTS] * LAYERS, "counts that are negative, or none"),
        ([[-1, 3, *[0] * 6]] * LAYERS, "counts that are negative, or none"),
        ([[float("nan")] * EXPERTS] * LAYERS, "counts that are negative, or none"),
    ],
)
def test_records_that_do_not_fit(tmp_path: Path, counts: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_uses(record(tmp_path / "uses.json", counts), LAYERS, EXPERTS)


@pytest.mark.parametrize("hits", [[[0] * EXPERTS] * LAYERS, [[float("inf")] * (EXPERTS + 1)] * LAYERS, "many", 3])
def test_curves_that_do_not_fit(tmp_path: Path, hits: Any) -> None:
    (tmp_path / "trace.json").write_text(json.dumps({"tokens_per_expert": random_counts(), "cache_hits": hits}))
    with pytest.raises(UsageError, match="record the trace anew"):
        read_record(tmp_path, LAYERS, EXPERTS)


def test_a_record_without_curves_foretells_the_most_used_alone(tmp_path: Path) -> None:
    counts = random_counts()
    found = read_record(record(tmp_path / "uses.json", counts), LAYERS, EXPERTS)
    assert found.lru_hits(5) is None
    assert found.forecast(24) == "the 24 experts used most take 100% of the trace"


def test_what_is_no_record(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no trace; record one: moesaic inspect"):
        read_uses(tmp_path, LAYERS, EXPERTS)
    (tmp_path / "uses.json").write_text("{")
    with pytest.raises(UsageError, match="record the trace anew"):
        read_uses(tmp_path / "uses.json", LAYERS, EXPERTS)
    with pytest.raises(UsageError, match="without memory all do"):
        moesaic.load(quantized(tmp_path), placement=tmp_path / "uses.json")
