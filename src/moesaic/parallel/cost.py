"""What expert parallelism sends, from sizes alone: expected bytes per token where routing is even and random.

E experts, K experts per token, P ranks, D hidden size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from moesaic.parallel.all_to_all import ID_BYTES
from moesaic.parallel.expert_parallel import expert_bounds
from moesaic.parallel.transport import TRANSPORTS


@dataclass(frozen=True, kw_only=True)
class ExchangeShape:
    """A layer of experts over ranks."""

    num_experts: int
    top_k: int
    hidden_size: int
    num_ranks: int
    ranks_per_host: int = 0
    """0: all on one host."""
    itemsize: int = 4
    """Bytes of a number of x."""
    weight_itemsize: int = 4
    transport: str = "exact"
    gradient_transport: str = "exact"
    deduplicated: bool = True
    """A token travels once to each rank, as `AllToAllDispatcher` sends it; else once to each expert."""

    def places(self, size: int) -> list[int]:
        """Experts in each group of `size` neighbouring ranks."""
        bounds = expert_bounds(self.num_experts, self.num_ranks)
        ends = [*range(0, self.num_ranks, size), self.num_ranks]
        return [bounds[end] - bounds[first] for first, end in pairwise(ends)]


def visited(num_experts: int, top_k: int, place: int) -> float:
    """Probability that at least one of K different experts, drawn evenly, is among `place` of the E."""
    return 1.0 - math.comb(num_experts - place, top_k) / math.comb(num_experts, top_k)


def rows_sent(shape: ExchangeShape) -> float:
    """Rows of a token that leave its rank, mean over ranks."""
    places = shape.places(1)
    if not shape.deduplicated:
        return _others(places, lambda place: shape.top_k * place / shape.num_experts)
    return _others(places, lambda place: visited(shape.num_experts, shape.top_k, place))


def forward_bytes(shape: ExchangeShape) -> float:
    """Bytes per token that a rank sends in the forward pass of a layer, and receives: rows there and back, and on the
    way there the expert and weight of every assignment. Without the counts, 16 bytes per rank and pass."""
    row = TRANSPORTS[shape.transport].row_bytes(shape.hidden_size, shape.itemsize)
    return 2 * rows_sent(shape) * row + _assignments_sent(shape) * (ID_BYTES + shape.weight_itemsize)


def backward_bytes(shape: ExchangeShape) -> float:
    """The same of the backward pass: gradients of rows there and back, and of weights back."""
    row = TRANSPORTS[shape.gradient_transport].row_bytes(shape.hidden_size, shape.itemsize)
    return 2 * rows_sent(shape) * row + _assignments_sent(shape) * shape.weight_itemsize


def host_rows(shape: ExchangeShape, *, hierarchical: bool) -> float:
    """Rows of a token that leave its host: one to each rank with one of its experts; or, in an exchange of two levels,
    one to each host, which hands it on inside."""
    size = shape.ranks_per_host or shape.num_ranks
    hosts = shape.places(size)
    if hierarchical:
        return _others(hosts, lambda place: visited(shape.num_experts, shape.top_k, place))
    ranks = shape.places(1)
    by_host = [
        sum(visited(shape.num_experts, shape.top_k, place) for place in ranks[first : first + size])
        for first in range(0, shape.num_ranks, size)
    ]
    return sum(by_host) * (len(hosts) - 1) / len(hosts)


def exchange_seconds(shape: ExchangeShape, tokens: int, rate: float, delay: float) -> float:
    """One way of the rows of `tokens` tokens of each rank, over links of `rate` bytes/s each way with that delay."""
    row = TRANSPORTS[shape.transport].row_bytes(shape.hidden_size, shape.itemsize)
    return tokens * rows_sent(shape) * row / rate + (delay if shape.num_ranks > 1 else 0.0)


def _assignments_sent(shape: ExchangeShape) -> float:
    return _others(shape.places(1), lambda place: shape.top_k * place / shape.num_experts)


def _others(places: Sequence[int], value: Callable[[int], float]) -> float:
    """The sum of `value` over the places that are not one's own, mean over whose own that is."""
    return sum(value(place) for place in places) * (len(places) - 1) / len(places)
