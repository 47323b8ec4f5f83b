"""Moving rows between ranks, so that each token reaches the rank that holds its experts.

T tokens, R received rows, D hidden size.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from moesaic.ops import Routing


class Trip(Protocol):
    """Rows of some tokens on their way to the ranks of their experts, and back."""

    def arrive(self) -> tuple[Tensor, Routing]:
        """Waits for the rows (R, D) of the local experts, and their routing."""
        ...

    def send_back(self, rows: Tensor) -> None:
        """Outputs (R, D), for which nobody waits yet."""
        ...

    def come_home(self) -> Tensor:
        """Waits for the sums of these tokens."""
        ...


class Dispatcher(Protocol):
    """dispatch sends rows to their experts' ranks; combine brings the outputs home."""

    overlaps_shared: bool
    """Whether shared experts compute while rows travel."""

    def dispatch(self, x: Tensor, routing: Routing) -> Sequence[Trip]:
        """x (T, D) -> trips of neighbouring tokens, in their order, that may be under way at the same time."""
        ...

    def combine(self, trips: Sequence[Trip]) -> Tensor:
        """Trips that were sent back -> y (T, D)."""
        ...


class LocalDispatcher:
    """All experts are here: nothing moves."""

    overlaps_shared = False

    def dispatch(self, x: Tensor, routing: Routing) -> Sequence[Trip]:
        return (_Stay(x, routing),)

    def combine(self, trips: Sequence[Trip]) -> Tensor:
        return trips[0].come_home()


class _Stay:
    def __init__(self, x: Tensor, routing: Routing) -> None:
        self.rows, self.routing = x, routing

    def arrive(self) -> tuple[Tensor, Routing]:
        return self.rows, self.routing

    def send_back(self, rows: Tensor) -> None:
        self.rows = rows

    def come_home(self) -> Tensor:
        return self.rows


class Aside:
    """Work on the same tokens that waits for no other rank, done in two halves while rows travel there and back."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        """`function` takes x (T, D), or some of its rows, row by row."""
        self.function = function
        self.waiting = list(x.split([len(x) // 2, len(x) - len(x) // 2]))
        self.done: list[Tensor] = []

    def advance(self) -> None:
        """Does the next half, if there is one."""
        if self.waiting:
            self.done.append(self.function(self.waiting.pop(0)))

    def result(self) -> Tensor:
        """(T, D)."""
        while self.waiting:
            self.advance()
        return torch.cat(self.done)
