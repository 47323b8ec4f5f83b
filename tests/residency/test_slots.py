"""Which expert stays and which goes: against a plain list."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.residency.slots import Expert, SlotTable


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


@given(st.lists(st.integers(0, 9), max_size=80), st.integers(1, 4))
def test_no_slot_has_two_experts_and_what_is_held_stays(numbers: list[int], size: int) -> None:
    table, held = SlotTable(size, 2, 10, "lru"), dict[Expert, int]()
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
