"""Which expert stands in which slot of a cache, and which one has to go: bookkeeping alone, no bytes.

An expert is a pair (layer, number). The one that was not used for the longest time goes first.
"""

from collections import OrderedDict
from collections.abc import Iterable

Expert = tuple[int, int]


class SlotTable:
    """Slots 0 .. number - 1, for one pass at a time: what it holds stays until it lets go, or ends."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._slot_of: OrderedDict[Expert, int] = OrderedDict()
        self._empty = set(range(number))
        self._held: set[int] = set()
        self._awaited: set[int] = set()

    def __contains__(self, expert: Expert) -> bool:
        return expert in self._slot_of

    def hold(self, expert: Expert) -> int:
        """The slot of an expert that is in the cache."""
        self._slot_of.move_to_end(expert)
        self._held.add(self._slot_of[expert])
        return self._slot_of[expert]

    def claim(self) -> int | None:
        """A slot, held, for an expert that is to come; None when all are held."""
        leaving = None
        if not self._empty:
            leaving = next((expert for expert, slot in self._slot_of.items() if slot not in self._held), None)
            if leaving is None:
                return None
        slot = min(self._empty) if leaving is None else self._slot_of[leaving]
        self._awaited.add(slot)  # first, so that no interruption loses it
        self._held.add(slot)
        self._empty.discard(slot)
        if leaving is not None:
            del self._slot_of[leaving]
        return slot

    def put(self, expert: Expert, slot: int) -> None:
        """`expert` stands in the claimed slot now."""
        self._slot_of[expert] = slot
        self._awaited.discard(slot)

    def let_go(self, slots: Iterable[int]) -> None:
        self._held.difference_update(slots)

    def end_pass(self) -> None:
        """Nothing is held any more, and what was to come did not."""
        self._held.clear()
        if self._awaited:
            self._awaited.clear()
            self._find_empty()

    def resize(self, number: int) -> None:
        """More slots, or fewer: experts in those that go are forgotten. Between passes."""
        assert not self._held
        for expert in [one for one, slot in self._slot_of.items() if slot >= number]:
            del self._slot_of[expert]
        self.number = number
        self._find_empty()

    def _find_empty(self) -> None:
        self._empty = set(range(self.number)).difference(self._slot_of.values())
