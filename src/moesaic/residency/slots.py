"""Which expert stands in which slot of a cache, and which one has to go: bookkeeping alone, no bytes.

An expert is a pair (layer, number).
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Protocol

Expert = tuple[int, int]


class Policy(Protocol):
    """Which expert a cache lets go first."""

    def used(self, expert: Expert) -> None: ...

    def forget(self, expert: Expert) -> None: ...

    def order(self) -> Iterable[Expert]:
        """Those in the cache, the one to go first at the front."""
        ...


class LeastRecentlyUsed:
    """What was not used for the longest time goes first."""

    def __init__(self) -> None:
        self._experts: OrderedDict[Expert, None] = OrderedDict()

    def used(self, expert: Expert) -> None:
        self._experts[expert] = None
        self._experts.move_to_end(expert)

    def forget(self, expert: Expert) -> None:
        self._experts.pop(expert, None)

    def order(self) -> Iterable[Expert]:
        return self._experts


class LeastFrequentlyUsed:
    """What was used least often goes first; of equals what was not used for the longest time. Uses of the past fade:
    after `half_life` of them one counts half."""

    def __init__(self, half_life: int = 4096) -> None:
        self._growth = 2.0 ** (1.0 / half_life)
        self._worth = 1.0
        """Of a use now, relative to one at the start."""
        self._counts: dict[Expert, float] = {}
        self._present: OrderedDict[Expert, None] = OrderedDict()

    def used(self, expert: Expert) -> None:
        self._worth *= self._growth
        if self._worth > 1e12:
            self._counts = {one: count / self._worth for one, count in self._counts.items()}
            self._worth = 1.0
        self._counts[expert] = self._counts.get(expert, 0.0) + self._worth
        self._present[expert] = None
        self._present.move_to_end(expert)

    def forget(self, expert: Expert) -> None:
        self._present.pop(expert, None)

    def order(self) -> Iterable[Expert]:
        return sorted(self._present, key=self._counts.__getitem__)


POLICIES = {"lru": LeastRecentlyUsed, "lfu": LeastFrequentlyUsed}


class SlotTable:
    """Slots 0 .. number - 1. A slot in use is held: its expert stays."""

    def __init__(self, number: int, policy: Policy) -> None:
        self._policy = policy
        self._slot_of: dict[Expert, int] = {}
        self._filled: set[int] = set()
        self._free = list(range(number - 1, -1, -1))
        self._held: dict[int, int] = {}
        self.number = number

    def __contains__(self, expert: Expert) -> bool:
        return expert in self._slot_of

    def hold(self, expert: Expert) -> int:
        """The slot of an expert that is in the cache, until `let_go`."""
        slot = self._slot_of[expert]
        self._held[slot] = self._held.get(slot, 0) + 1
        self._policy.used(expert)
        return slot

    def claim(self) -> int | None:
        """A slot for an expert that is to come, held until `put` and `let_go`; None when all are held."""
        if not self._free:
            leaving = next((one for one in self._policy.order() if self._slot_of[one] not in self._held), None)
            if leaving is None:
                return None
            self._remove(leaving)
        slot = self._free.pop()
        self._held[slot] = 1
        return slot

    def put(self, expert: Expert, slot: int) -> None:
        """`expert` stands in the claimed slot now."""
        self._slot_of[expert] = slot
        self._filled.add(slot)
        self._policy.used(expert)

    def let_go(self, slot: int) -> None:
        self._held[slot] -= 1
        if not self._held[slot]:
            del self._held[slot]
            if slot not in self._filled:  # what was to come did not
                self._free.append(slot)

    def resize(self, number: int) -> None:
        """More slots, or fewer: experts in those that go are forgotten. None may be held."""
        if self._held:
            raise RuntimeError("slots cannot go while experts are computed")
        for expert in [one for one, slot in self._slot_of.items() if slot >= number]:
            self._remove(expert)
        self.number = number
        self._free = [slot for slot in range(number - 1, -1, -1) if slot not in self._filled]

    def _remove(self, expert: Expert) -> None:
        slot = self._slot_of.pop(expert)
        self._filled.remove(slot)
        self._free.append(slot)
        self._policy.forget(expert)
