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
    n_group: int = 1
    topk_group: int = 1
    """A token visits experts of so many of the groups alone, which bounds the hosts that it travels to."""

    def places(self, size: int) -> list[range]:
        """Experts of each group of `size` neighbouring ranks."""
        bounds = expert_bounds(self.num_experts, self.num_ranks)
        ends = [*range(0, self.num_ranks, size), self.num_ranks]
        return [range(bounds[first], bounds[end]) for first, end in pairwise(ends)]

    def visited(self, place: range) -> float:
        """Probability that a token has an expert in that place."""
        return visited(self.num_experts, self.top_k, place, self.n_group, self.topk_group)


def visited(num_experts: int, top_k: int, place: range, n_group: int = 1, topk_group: int = 1) -> float:
    """Probability that at least one of K different experts, drawn evenly from `topk_group` groups of the E, which are
    drawn evenly too, is among those of `place`."""
    size = num_experts // n_group
    # (groups drawn, experts of the place in them) -> ways to draw them.
    ways = {(0, 0): 1}
    for group in range(n_group):
        inside = len(range(max(place.start, group * size), min(place.stop, (group + 1) * size)))
        for (drawn, found), count in list(ways.items()):
            if drawn < topk_group:
                key = (drawn + 1, found + inside)
                ways[key] = ways.get(key, 0) + count
    total = topk_group * size
    missed = sum(
        count * math.comb(total - found, top_k) for (drawn, found), count in ways.items() if drawn == topk_group
    )
    return 1.0 - missed / (math.comb(n_group, topk_group) * math.comb(total, top_k))


def rows_sent(shape: ExchangeShape) -> float:
    """Rows of a token that leave its rank, mean over ranks."""
    places = shape.places(1)
    if not shape.deduplicated:
        return _assignments_sent(shape)
    return _others(places, shape.visited)


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
        return _others(hosts, shape.visited)
    visits = sum(shape.visited(place) for place in shape.places(1))
    return visits * (len(hosts) - 1) / len(hosts)


def host_bytes(shape: ExchangeShape, *, hierarchical: bool) -> float:
    """Bytes per token that leave its host in the forward pass of a layer: rows there and back, and on the way there the
    expert and weight of every assignment. Without the counts."""
    row = TRANSPORTS[shape.transport].row_bytes(shape.hidden_size, shape.itemsize)
    hosts = shape.places(shape.ranks_per_host or shape.num_ranks)
    assignments = _others(hosts, lambda place: shape.top_k * len(place) / shape.num_experts)
    return 2 * host_rows(shape, hierarchical=hierarchical) * row + assignments * (ID_BYTES + shape.weight_itemsize)


def host_seconds(
    shape: ExchangeShape, tokens: int, rate: float, delay: float, *, hierarchical: bool, inside_rate: float
) -> float:
    """One way of the rows of `tokens` tokens of each rank, where the ranks of a host share a link of `rate` bytes/s
    each way with that delay, and inside a host all of them together `inside_rate`. In two levels, what is inside comes
    after what is between."""
    size = shape.ranks_per_host or shape.num_ranks
    row = TRANSPORTS[shape.transport].row_bytes(shape.hidden_size, shape.itemsize)
    between = tokens * size * host_rows(shape, hierarchical=hierarchical) * row / rate + delay
    hosts = shape.num_ranks // size
    visits = sum(shape.visited(place) for place in shape.places(1)) / hosts  # ranks that a token visits on a host
    inside = tokens * size * visits * (size - 1) / size * row / inside_rate
    return between + inside * hosts if hierarchical else max(between, inside)


def exchange_seconds(shape: ExchangeShape, tokens: int, rate: float, delay: float) -> float:
    """One way of the rows of `tokens` tokens of each rank, over links of `rate` bytes/s each way with that delay."""
    row = TRANSPORTS[shape.transport].row_bytes(shape.hidden_size, shape.itemsize)
    return tokens * rows_sent(shape) * row / rate + (delay if shape.num_ranks > 1 else 0.0)


def _assignments_sent(shape: ExchangeShape) -> float:
    return _others(shape.places(1), lambda place: shape.top_k * len(place) / shape.num_experts)


def _others(places: Sequence[range], value: Callable[[range], float]) -> float:
    """The sum of `value` over the places that are not one's own, mean over whose own that is."""
    return sum(value(place) for place in places) * (len(places) - 1) / len(places)
