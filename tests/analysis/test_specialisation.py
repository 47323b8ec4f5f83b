"""Planted specialisation is found exactly, and what only hangs together is not called meaning."""

import numpy as np
import pytest

from moesaic.analysis.specialisation import (
    Blocks,
    Units,
    entropy_bits,
    information_of_tokens,
    information_of_units,
    mutual_information,
    overlap,
)


def rows_of(experts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One expert for each token."""
    return np.arange(len(experts)), experts


def test_mutual_information_is_its_definition() -> None:
    counts = np.random.randint(0, 20, (5, 7))
    joint = counts / counts.sum()
    expected = 0.0
    for c in range(5):
        for e in range(7):
            if joint[c, e]:
                expected += joint[c, e] * np.log2(joint[c, e] / (joint[c].sum() * joint[:, e].sum()))
    assert mutual_information(counts) == pytest.approx(expected, rel=1e-12)
    assert mutual_information(np.outer([1, 2, 5], [3, 4])) == pytest.approx(0, abs=1e-12)
    assert mutual_information(np.zeros((2, 2))) == 0


def test_experts_wired_to_classes_tell_all_of_them() -> None:
    labels = np.random.randint(0, 4, 5000)
    wiring = np.random.permutation(9)[:4]
    _, found = information_of_tokens(labels, 4, rows_of(wiring[labels]), 9, Blocks.of_text(np.zeros(5000, int)), 0)
    assert found.bits == pytest.approx(entropy_bits(np.bincount(labels)), rel=1e-12)
    assert found.label_bits == pytest.approx(found.bits, rel=1e-12)
    assert found.p == 0.01
    assert found.z is not None
    assert found.z > 50


def test_half_of_the_wiring_tells_half() -> None:
    """Two pairs of classes share an expert each: one of two bits is told."""
    labels = np.repeat(np.arange(4), 600)[np.random.permutation(2400)]
    counts, found = information_of_tokens(labels, 4, rows_of(labels // 2), 2, Blocks.of_text(np.zeros(2400, int)), 0)
    assert found.bits == pytest.approx(1.0, rel=1e-12)
    assert counts.tolist() == [[600, 0], [600, 0], [0, 600], [0, 600]]


def lasting(num_tokens: int, number: int, stay: int) -> np.ndarray:
    """Values that last for about `stay` tokens."""
    changes = np.random.rand(num_tokens) < 1 / stay
    values = np.random.randint(0, number, num_tokens)
    return values[np.maximum.accumulate(np.where(changes, np.arange(num_tokens), 0))]


def test_what_only_lasts_is_not_called_meaning() -> None:
    """Labels and experts that last, independently of each other: shuffled tokens would find them far above chance."""
    naive, judged = [], []
    for attempt in range(12):
        labels, experts = lasting(6000, 3, 40), lasting(6000, 8, 40)
        _, found = information_of_tokens(labels, 3, rows_of(experts), 8, Blocks.of_text(np.zeros(6000, int)), attempt)
        shuffled = [
            mutual_information(np.histogram2d(np.random.permutation(labels), experts, [3, 8])[0]) for _ in range(20)
        ]
        naive.append((found.bits - np.mean(shuffled)) / np.std(shuffled))
        judged.append(found.p)
    assert np.median(naive) > 5
    # Of twelve true nulls more than five below 0.05 come with a probability of 1e-5.
    assert sum(p <= 0.05 for p in judged) <= 5


def test_documents_exchange_their_domains() -> None:
    """Each document has experts of its own, whatever its domain: many bits, and no more than chance."""
    documents = np.repeat(np.arange(40), 50)
    sequences = np.repeat(np.arange(400), 5)
    units = Units.of_text(documents, sequences)
    assert units.name == "40 documents"
    chance = []
    for attempt in range(10):
        domains = np.random.permutation(np.arange(40) % 2)[documents]
        experts = np.random.randint(0, 8, 40)[documents]
        _, found = information_of_units(domains, 2, rows_of(experts), 8, units, attempt)
        assert found.chance_bits is not None
        assert found.chance_bits > 0.01
        chance.append(found.p)
    assert sum(p <= 0.05 for p in chance) <= 5
    domains = (np.arange(40) % 2)[documents]
    counts, found = information_of_units(domains, 2, rows_of(3 * domains), 8, units, 0)
    assert found.bits == pytest.approx(1.0, rel=1e-12)
    assert found.p == 0.01
    assert counts[1, 3] == 1000
    few = Units.of_text(np.repeat(np.arange(4), 500), sequences)
    assert few.name == "400 sequences"


def test_one_domain_has_no_baseline() -> None:
    units = Units.of_text(np.arange(100), np.arange(100))
    _, found = information_of_units(np.zeros(100, int), 1, rows_of(np.arange(100) % 3), 3, units, 0)
    assert (found.bits, found.chance_bits, found.z, found.p) == (0.0, None, None, None)


def test_positions_are_turned_round_in_their_blocks() -> None:
    positions = np.arange(4000) % 50
    early = (positions < 10).astype(int)
    blocks = Blocks.of_text(np.zeros(4000, int), turned=True)
    _, found = information_of_tokens(early, 2, rows_of(early), 2, blocks, 0)
    assert found.p == 0.01
    _, noise = information_of_tokens(early, 2, rows_of(np.random.randint(0, 2, 4000)), 2, blocks, 0)
    assert noise.chance_bits is not None
    assert noise.bits < 0.01


@pytest.mark.parametrize("turned", [False, True])
def test_orders_stay_within_a_source_and_lose_nothing(turned: bool) -> None:
    sources = np.repeat(np.arange(3), [400, 130, 1000])
    blocks = Blocks.of_text(sources, turned=turned)
    orders = list(blocks.orders(0))
    assert len(orders) == 99
    for order in orders[:5]:
        assert sorted(order) == list(range(1530))
        assert np.array_equal(sources[blocks.kept][order], sources[blocks.kept])
    assert not np.array_equal(orders[0], orders[1])


def test_overlap_is_the_shared_part() -> None:
    shares = overlap(np.array([[10, 0, 0], [5, 5, 0], [0, 0, 3]]))
    np.testing.assert_allclose(shares, [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]])
