"""Which expert stays and which goes: against a plain list."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.residency.slots import POLICIES, Expert, SlotTable


def use(table: SlotTable, *numbers: int) -> list[int]:
    """As one pass does; those that were not there."""
    experts = [(0, number) for number in numbers]
    table.begin_pass(0, numbers)
    for expert in experts:
        if expert in table:
            table.hold(expert)
    missing = [expert for expert in experts if expert not in table]
    for expert in missing:
        slot = table.claim()
        assert slot is not None
        table.put(expert, slot)
    table.end_pass()
    return [number for _, number in missing]


@given(st.lists(st.integers(0, 7), max_size=60), st.integers(1, 5))
def test_what_was_not_used_for_the_longest_time_goes_first(numbers: list[int], size: int) -> None:
    table, recent = SlotTable(size, 2, 10, "lru"), list[int]()
    for number in numbers:
        assert use(table, number) == ([] if number in recent[-size:] else [number])
        recent = [one for one in recent if one != number] + [number]


@given(st.lists(st.integers(0, 9), max_size=80), st.integers(1, 4), st.sampled_from(list(POLICIES)))
def test_no_slot_has_two_experts_and_what_is_held_stays(numbers: list[int], size: int, policy: str) -> None:
    table, held = SlotTable(size, 2, 10, policy), dict[Expert, int]()
    for number in numbers:
        expert = (number % 2, number)
        if expert in held:
            table.let_go([held.pop(expert)])
        elif expert in table:
            held[expert] = table.hold(expert)
        elif (slot := table.claim()) is not None:
            assert slot not in held.values()
            table.put(expert, slot)
            held[expert] = slot
        else:
            assert len(held) == size
        assert {one: table.hold(one) for one in held} == held


def test_a_slot_whose_expert_did_not_come_is_free_after_the_pass() -> None:
    table = SlotTable(2, 1, 10)
    use(table, 1, 2)
    assert {table.claim(), table.claim()} == {0, 1}
    assert table.claim() is None
    table.end_pass()
    assert use(table, 3, 4) == [3, 4]
    assert use(table, 3, 4) == []


def test_fewer_slots_forget_those_at_the_end_and_more_come_back_empty() -> None:
    table = SlotTable(4, 1, 10)
    use(table, 0, 1, 2, 3)
    slots = {number: table.hold((0, number)) for number in range(4)}
    with pytest.raises(AssertionError):
        table.resize(2)
    table.end_pass()
    table.resize(2)
    assert {number for number in range(4) if (0, number) in table} == {n for n, slot in slots.items() if slot < 2}
    table.resize(3)
    assert use(table, 9) == [9]
    assert sum((0, number) in table for number in range(4)) == 2


def test_who_is_used_more_often_stays_longer_by_frequency() -> None:
    table = SlotTable(2, 1, 10, "lfu")
    for numbers in ([0], [0], [1], [2]):
        use(table, *numbers)
    assert use(table, 0) == []
    assert use(table, 1) == [1]


def test_the_layer_that_comes_next_keeps_its_experts() -> None:
    """Of three layers with equal experts, the one that has just been computed waits longest for its next use."""
    table = SlotTable(2, 3, 1)
    for layer in (0, 1):
        table.begin_pass(layer, [0])
        slot = table.claim()
        assert slot is not None
        table.put((layer, 0), slot)
        table.end_pass()
    table.begin_pass(2, [0])
    assert table.claim() is not None
    assert (0, 0) in table
    assert (1, 0) not in table


def test_what_is_expected_leaves_last() -> None:
    table = SlotTable(2, 1, 10, "lru")
    use(table, 0, 1)
    table.expect([(0, 0)])
    use(table, 2)
    assert (0, 0) in table
    table.expect([])
    assert use(table, 0) == []
