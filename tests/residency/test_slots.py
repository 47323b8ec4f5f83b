"""Which expert stays and which goes: against a plain list."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.residency.slots import POLICIES, Expert, LeastFrequentlyUsed, LeastRecentlyUsed, SlotTable


def use(table: SlotTable, expert: Expert) -> bool:
    """As a layer of one expert does; whether it was there."""
    if expert in table:
        table.let_go(table.hold(expert))
        return True
    slot = table.claim()
    assert slot is not None
    table.put(expert, slot)
    table.let_go(slot)
    return False


@given(st.lists(st.integers(0, 7), max_size=60), st.integers(1, 5))
def test_least_recently_used_is_a_list_in_the_order_of_use(numbers: list[int], size: int) -> None:
    table, recent = SlotTable(size, LeastRecentlyUsed()), list[int]()
    for number in numbers:
        assert use(table, (0, number)) == (number in recent[-size:])
        recent = [one for one in recent if one != number] + [number]


def test_least_frequently_used_keeps_what_is_asked_for_often() -> None:
    table = SlotTable(2, LeastFrequentlyUsed())
    for number in (1, 1, 1, 2, 3, 4, 5):
        use(table, (0, number))
    assert (0, 1) in table
    assert (0, 5) in table


def test_what_was_asked_for_often_long_ago_goes_at_last() -> None:
    table = SlotTable(2, LeastFrequentlyUsed(half_life=2))
    for number in (1, 1, 1, 1, *([2, 3] * 20)):
        use(table, (0, number))
    assert (0, 1) not in table


@given(st.sampled_from(sorted(POLICIES)), st.lists(st.integers(0, 9), max_size=80), st.integers(1, 4))
def test_no_slot_has_two_experts_and_what_is_held_stays(policy: str, numbers: list[int], size: int) -> None:
    table, held = SlotTable(size, POLICIES[policy]()), dict[Expert, int]()
    for number in numbers:
        expert = (number % 2, number)
        if expert in held:
            table.let_go(held.pop(expert))
        elif expert in table:
            held[expert] = table.hold(expert)
        elif (slot := table.claim()) is not None:
            assert slot not in held.values()
            table.put(expert, slot)
            held[expert] = slot
        else:
            assert len(held) == size
        for one, slot in held.items():
            assert table.hold(one) == slot
            table.let_go(slot)


def test_a_slot_whose_expert_did_not_come_is_free_again() -> None:
    table = SlotTable(1, LeastRecentlyUsed())
    slot = table.claim()
    assert slot == 0
    assert table.claim() is None
    table.let_go(slot)
    assert table.claim() == 0


def test_fewer_slots_forget_those_at_the_end_and_more_come_back_empty() -> None:
    table = SlotTable(4, LeastRecentlyUsed())
    for number in range(4):
        use(table, (0, number))
    slots = {number: table.hold((0, number)) for number in range(4)}
    with pytest.raises(RuntimeError, match="while experts are computed"):
        table.resize(2)
    for slot in slots.values():
        table.let_go(slot)
    table.resize(2)
    assert {number for number in range(4) if (0, number) in table} == {n for n, slot in slots.items() if slot < 2}
    table.resize(3)
    assert not use(table, (1, 0))
    assert sum((0, number) in table for number in range(4)) == 2
