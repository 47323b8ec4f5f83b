"""Moving rows between ranks, so that each token reaches the rank that holds its experts.

T tokens, R received rows, D hidden size.
"""

from typing import Protocol

from torch import Tensor

from moesaic.ops import Routing


class Dispatcher(Protocol):
    """dispatch brings rows to their experts' rank and renames the routing; combine brings the outputs home."""

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Routing, object]:
        """x (T, D) -> rows (R, D) of the local experts, their routing, and a handle for combine."""
        ...

    def combine(self, rows: Tensor, handle: object) -> Tensor:
        """Outputs (R, D) -> y (T, D)."""
        ...


class LocalDispatcher:
    """All experts are here: nothing moves."""

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Routing, object]:
        return x, routing, None

    def combine(self, rows: Tensor, handle: object) -> Tensor:
        return rows
