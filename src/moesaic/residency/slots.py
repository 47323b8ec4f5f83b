"""Which expert stands in which slot of a cache, and which one has to go: bookkeeping alone, no bytes.

An expert is a pair (layer, number). S slots, L layers, E experts of a layer.
"""

from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Expert = tuple[int, int]

MEMORY_OF_PASSES = 32
"""Over so many passes, about, the use of an expert is averaged."""
EXPECTED = 1e12
"""More than any worth."""


class SlotTable:
    """Slots 0 .. number - 1, for one pass at a time: what it holds stays until it lets go, or ends.

    `policy` is a name in POLICIES, and says who leaves when a slot is needed.
    """

    def __init__(self, number: int, num_layers: int, num_experts: int, policy: str = "next_use") -> None:
        self.number = number
        self.layer = 0
        """That is computed."""
        self.uses = np.zeros((num_layers, num_experts), np.float32)
        """Share of passes that used the expert, of late."""
        self.recorded_uses = np.zeros((num_layers, num_experts))
        """Of each layer the shares of its experts, for the policy `recorded`."""
        self.last_use = np.zeros((num_layers, num_experts), np.int64)
        self.expert_at = np.full((number, 2), -1)
        """(S, 2): who stands there; layer -1 for nobody."""
        self._worth = POLICIES[policy]
        self._time = 0
        self._slot_of: dict[Expert, int] = {}
        self._empty = set(range(number))
        self._held = np.zeros(number, bool)
        self._expected = np.zeros(number, bool)
        self._awaited: set[int] = set()

    def follow(self, uses: NDArray[np.float64]) -> None:
        """From now on those stay that have the highest of these shares (L, E)."""
        self.recorded_uses, self._worth = uses, POLICIES["recorded"]

    def __contains__(self, expert: Expert) -> bool:
        return expert in self._slot_of

    def begin_pass(self, layer: int, numbers: Sequence[int]) -> None:
        """A layer needs these experts."""
        self.layer, self._time = layer, self._time + 1
        self.uses[layer] *= 1 - 1 / MEMORY_OF_PASSES
        self.uses[layer, numbers] += 1 / MEMORY_OF_PASSES
        self.last_use[layer, numbers] = self._time

    def expect(self, experts: Iterable[Expert]) -> None:
        """These are needed next; those that are in the cache leave after all others."""
        self._expected[:] = False
        self._expected[[self._slot_of[expert] for expert in experts if expert in self._slot_of]] = True

    def hold(self, expert: Expert) -> int:
        """The slot of an expert that is in the cache."""
        slot = self._slot_of[expert]
        self._held[slot] = True
        return slot

    def claim(self) -> int | None:
        """A slot, held, for an expert that is to come; None when all are held."""
        slot = min(self._empty, default=None)
        if slot is None:
            worth_S = np.where(self._held, np.inf, self._worth(self) + EXPECTED * self._expected)
            slot = int(worth_S.argmin()) if self.number else 0
            if not self.number or worth_S[slot] == np.inf:
                return None
        self._awaited.add(slot)  # first, so that no interruption loses it
        self._held[slot], self._expected[slot] = True, False
        self._empty.discard(slot)
        leaving = tuple(self.expert_at[slot].tolist())
        if leaving[0] >= 0:
            self.expert_at[slot] = -1
            del self._slot_of[leaving]
        return slot

    def put(self, expert: Expert, slot: int) -> None:
        """`expert` stands in the claimed slot now."""
        self._slot_of[expert] = slot
        self.expert_at[slot] = expert
        self._awaited.discard(slot)

    def give_back(self, slot: int) -> None:
        """A claimed slot whose expert did not come."""
        self._awaited.discard(slot)
        self._held[slot] = False
        self._empty.add(slot)

    def let_go(self, slots: Iterable[int]) -> None:
        self._held[list(slots)] = False

    def end_pass(self, still_awaited: Collection[int] = ()) -> None:
        """Nothing is held any more but slots that are `still_awaited`; what else was to come did not."""
        self._held[:] = False
        self._held[list(still_awaited)] = True
        if self._awaited != set(still_awaited):
            self._awaited = set(still_awaited)
            self._find_empty()

    def resize(self, number: int) -> None:
        """More slots, or fewer: experts in those that go are forgotten. Between passes."""
        assert not self._held.any()
        for expert in [one for one, slot in self._slot_of.items() if slot >= number]:
            del self._slot_of[expert]
        expert_at = np.full((number, 2), -1)
        kept = min(number, self.number)
        expert_at[:kept] = self.expert_at[:kept]
        self.expert_at, self.number = expert_at, number
        self._held, self._expected = np.zeros(number, bool), np.zeros(number, bool)
        self._find_empty()

    def _find_empty(self) -> None:
        self._empty = set(range(self.number)).difference(self._slot_of.values(), self._awaited)


def least_recent(table: SlotTable) -> NDArray[np.float64]:
    """LRU: who was not used for the longest time leaves."""
    layer_S, number_S = table.expert_at.T
    return table.last_use[layer_S, number_S].astype(np.float64)


def least_frequent(table: SlotTable) -> NDArray[np.float64]:
    """LFU: who is used most rarely leaves, of late; of equals as LRU."""
    layer_S, number_S = table.expert_at.T
    recency_S = table.last_use[layer_S, number_S] / (table.last_use.max() + 1.0)
    return table.uses[layer_S, number_S] + 1e-6 * recency_S


def latest_next_use(table: SlotTable) -> NDArray[np.float64]:
    """Who is expected to be used again last leaves: Belady's rule with a guess in the place of the future.

    An expert has a chance once in a pass, when its layer is computed. With the probability p that it takes it, that
    will be after 1 / p - 1 passes that it misses, and the way to the layer.
    """
    layer_S, number_S = table.expert_at.T
    num_layers = len(table.uses)
    way_S = ((layer_S - table.layer - 1) % num_layers + 1) / num_layers
    probability_S = np.maximum(table.uses[layer_S, number_S], 1e-3)
    return -(way_S + 1 / probability_S - 1)


def recorded(table: SlotTable) -> NDArray[np.float64]:
    """Who was used most rarely in a record leaves; of equals as LRU."""
    layer_S, number_S = table.expert_at.T
    recency_S = table.last_use[layer_S, number_S] / (table.last_use.max() + 1.0)
    return table.recorded_uses[layer_S, number_S] + 1e-9 * recency_S


POLICIES: dict[str, Callable[[SlotTable], NDArray[np.float64]]] = {
    "lru": least_recent,
    "lfu": least_frequent,
    "next_use": latest_next_use,
    "recorded": recorded,
}
"""What an expert in a slot is worth; the one of the least worth leaves."""
