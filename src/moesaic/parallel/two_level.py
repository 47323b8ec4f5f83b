"""An exchange in two levels: a token travels once to each host that has one of its experts, and is handed on inside.

H hosts of m ranks; rank p = h x m + l is the one with index l on host h. Between hosts it talks to the ranks with its
own index alone; the one that gets a token passes it on to the ranks of its host, adds up what comes back, and returns
that.
After the hierarchical all-to-all of Tutel (arXiv 2206.03382), with a token once to each host as in DeepSeek-V3 (arXiv
2412.19437, section 3.2.2).
"""

from collections.abc import Sequence

from torch import Tensor

from moesaic.model.dispatch import Trip
from moesaic.ops import Routing
from moesaic.parallel.all_to_all import AllToAllDispatcher, AllToAllTrip, Line
from moesaic.parallel.exchange import Exchange


class TwoLevelDispatcher:
    """The dispatcher of a rank that holds the experts `bounds[rank]` to `bounds[rank + 1]` of a layer."""

    def __init__(self, between: Exchange, inside: Exchange, bounds: Sequence[int], overlap: str = "none") -> None:
        """`between` is over the ranks of the same index on all hosts, `inside` over those of this host."""
        size = inside.num_ranks
        first = between.rank * size
        own = bounds[first : first + size + 1]
        self.between = AllToAllDispatcher(between, bounds[::size], overlap)
        self.inside = AllToAllDispatcher(inside, [bound - own[0] for bound in own])
        self.overlaps_shared = self.between.overlaps_shared

    def dispatch(self, x: Tensor, routing: Routing) -> list[Trip]:
        line = Line(x)
        return [_TwoLevelTrip(trip, self.inside, line) for trip in self.between.start(x, routing, line)]

    def combine(self, trips: Sequence[Trip]) -> Tensor:
        return self.between.combine(trips)


class _TwoLevelTrip:
    def __init__(self, between: AllToAllTrip, dispatcher: AllToAllDispatcher, line: Line) -> None:
        self.between, self.dispatcher, self.line = between, dispatcher, line
        self.inside: AllToAllTrip | None = None

    def arrive(self) -> tuple[Tensor, Routing]:
        (self.inside,) = self.dispatcher.start(*self.between.arrive(), self.line)
        return self.inside.arrive()

    def send_back(self, rows: Tensor) -> None:
        assert self.inside is not None
        self.inside.send_back(rows)
        self.between.send_back(self.inside.come_home())

    def come_home(self) -> Tensor:
        return self.between.come_home()
