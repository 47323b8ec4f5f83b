"""Tokens to the ranks of their experts and back, by all-to-all exchanges.

T tokens, N assignments, S rows sent, R rows received, M assignments received, P ranks, E experts, e local experts, D
hidden size.

A token travels once to each rank that has one of its experts, with the ids and weights of all of them there; what these
add up to travels back once. So at most min(K, P) rows of a token are sent where K would be without.

Every exchange is started at one node of the graph and waited for at another, so that whatever is computed between them
overlaps with it; backward the two change places, and what lies between overlaps again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moesaic.model.dispatch import Trip
from moesaic.ops import Routing
from moesaic.parallel.exchange import Exchange, Pending

ID_BYTES = 4


class Line:
    """The exchanges of one pass through a layer, one behind the other.

    Each takes the tether and leaves a new one, so backward they come in exactly the reverse order, on every rank, also
    on one without rows.
    """

    def __init__(self, x: Tensor) -> None:
        self.tether = x.new_zeros((), requires_grad=False)


@dataclass(frozen=True)
class _Plan:
    """Who goes where."""

    num_tokens: int
    token_ids: Tensor
    """(S,) the token of each row sent, rows in the order of their ranks."""
    order: Tensor
    """(N,) the assignments in the order in which they are sent: those of a row side by side."""
    ids: Tensor
    """(N,) int32, in that order: twice the local id of the expert, plus 1 where the next row begins."""
    rows: list[int]
    """(P,) rows sent to each rank."""
    assignments: list[int]
    """(P,)."""


class AllToAllTrip:
    """The tokens of a plan on their way."""

    def __init__(self, plan: _Plan, received: Tensor, num_local: int, exchange: Exchange, line: Line) -> None:
        """`received` (P, 2): rows and assignments that come from each rank."""
        self.plan, self.num_local, self.exchange, self.line = plan, num_local, exchange, line
        self.received_rows, self.received_assignments = received.T.tolist()
        self.rows: Pending | None = None
        self.labels: Pending | None = None
        self.weights_dtype = torch.float32

    def leave(self, x: Tensor, weights: Tensor) -> None:
        """x (T, D) and the weights of all assignments, also of those that the plan leaves out."""
        self.weights_dtype = weights.dtype
        self.line.tether = _Leave.apply(x, weights, self.line.tether, self)

    def arrive(self) -> tuple[Tensor, Routing]:
        """No token is in the rows twice for one rank, and those of low ranks come first."""
        x_RD, weights_M, ids_M, self.line.tether = _Arrive.apply(self.line.tether, self)
        return x_RD, Routing(
            token_ids=(ids_M % 2).cumsum(0) - 1,
            expert_ids=ids_M // 2,
            weights=weights_M,
            logits=weights_M.new_zeros((), requires_grad=False).expand(len(x_RD), self.num_local),
            num_experts=self.num_local,
            top_k=None,
        )

    def send_back(self, rows: Tensor) -> None:
        self.line.tether = _SendBack.apply(rows, self.line.tether, self)

    def come_home(self) -> Tensor:
        y_TD, self.line.tether = _ComeHome.apply(self.line.tether, self)
        return y_TD

    def start_rows(self, rows: Tensor, *, there: bool, backward: bool) -> None:
        """Rows (S, D) to the experts, or (R, D) away from them."""
        exchange = self.exchange
        here, away = (self.plan.rows, self.received_rows) if there else (self.received_rows, self.plan.rows)
        transport = exchange.backward_transport if backward else exchange.forward_transport
        self.rows = exchange.start(rows, here, away, transport)
        if not backward:
            exchange.unawaited.append(self.rows)

    def wait_rows(self) -> Tensor:
        assert self.rows is not None
        pending, self.rows = self.rows, None
        self.exchange.unawaited = [other for other in self.exchange.unawaited if other is not pending]
        return pending.wait()

    def start_labels(self, labels: Tensor, *, there: bool) -> None:
        """What belongs to assignments: (N, bytes) to the experts, or (M, 1) away from them."""
        sent, received = self.plan.assignments, self.received_assignments
        self.labels = self.exchange.start(labels, *((sent, received) if there else (received, sent)))

    def wait_labels(self) -> Tensor:
        assert self.labels is not None
        labels, self.labels = self.labels.wait(), None
        return labels

    def sum_home(self, rows: Tensor) -> Tensor:
        """(S, D) -> (T, D)."""
        return rows.new_zeros(self.plan.num_tokens, rows.shape[1]).index_add_(0, self.plan.token_ids, rows)


class AllToAllDispatcher:
    """The dispatcher of a rank that holds the experts `bounds[rank]` to `bounds[rank + 1]` of a layer."""

    def __init__(self, exchange: Exchange, bounds: Sequence[int], overlap: str = "none") -> None:
        """`bounds` (P + 1,), from 0 to E; `overlap` as in `ParallelConfig`."""
        self.exchange = exchange
        self.bounds = torch.tensor(bounds)
        self.num_local = bounds[exchange.rank + 1] - bounds[exchange.rank]
        self.overlaps_shared = overlap != "none"
        self.num_trips = 2 if overlap == "halves" else 1

    def dispatch(self, x: Tensor, routing: Routing) -> list[AllToAllTrip]:
        """x (T, D) -> trips under way: of all tokens, or of each half."""
        return self.start(x, routing, Line(x))

    def start(self, x: Tensor, routing: Routing, line: Line) -> list[AllToAllTrip]:
        """The same, behind the exchanges that are in the line already."""
        ends = [len(x) * trip // self.num_trips for trip in range(self.num_trips + 1)]
        shares = list(pairwise(ends))
        plans = [self._plan(routing, first, last) for first, last in shares]
        counts = [count for plan in plans for count in (plan.rows, plan.assignments)]
        received = self.exchange.counts(torch.tensor(counts, device=x.device).T.contiguous()).split(2, dim=1)
        trips = []
        for plan, counts_P2, (first, last) in zip(plans, received, shares, strict=True):
            trip = AllToAllTrip(plan, counts_P2, self.num_local, self.exchange, line)
            trip.leave(x if self.num_trips == 1 else x[first:last], routing.weights)
            trips.append(trip)
        return trips

    def combine(self, trips: Sequence[Trip]) -> Tensor:
        """The sums (T, D) of what came home for each token."""
        homes = [trip.come_home() for trip in trips]
        return homes[0] if len(homes) == 1 else torch.cat(homes)

    def _plan(self, routing: Routing, first: int, last: int) -> _Plan:
        """Of the tokens `first` to `last`."""
        bounds = self.bounds.to(routing.expert_ids.device)
        num_ranks, num_tokens = self.exchange.num_ranks, last - first
        token_ids_N, expert_ids_N, chosen_N = routing.token_ids, routing.expert_ids, None
        if self.num_trips > 1:
            chosen_N = torch.nonzero((token_ids_N >= first) & (token_ids_N < last)).squeeze(1)
            token_ids_N, expert_ids_N = token_ids_N[chosen_N] - first, expert_ids_N[chosen_N]
        rank_N = torch.searchsorted(bounds, expert_ids_N, right=True) - 1
        key_N = rank_N * max(num_tokens, 1) + token_ids_N
        key_S, row_of_N = torch.unique(key_N, return_inverse=True)  # sorted: by rank, then by token
        order_N = torch.argsort(row_of_N, stable=True)
        row_N = row_of_N[order_N]
        begins_N = torch.ones_like(row_N)
        begins_N[1:] = (row_N[1:] != row_N[:-1]).long()
        local_ids_N = (expert_ids_N - bounds[rank_N])[order_N]
        return _Plan(
            num_tokens=num_tokens,
            token_ids=key_S % max(num_tokens, 1),
            order=order_N if chosen_N is None else chosen_N[order_N],
            ids=(2 * local_ids_N + begins_N).int(),
            rows=torch.bincount(key_S // max(num_tokens, 1), minlength=num_ranks).tolist(),
            assignments=torch.bincount(rank_N, minlength=num_ranks).tolist(),
        )


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, tether: Tensor, trip: AllToAllTrip) -> Tensor:
        plan = trip.plan
        weights_N1 = weights.index_select(0, plan.order).unsqueeze(1)
        labels = torch.cat((plan.ids.unsqueeze(1).view(torch.uint8), weights_N1.view(torch.uint8)), dim=1)
        trip.start_labels(labels, there=True)
        trip.start_rows(x.index_select(0, plan.token_ids), there=True, backward=False)
        ctx.trip, ctx.num_weights = trip, len(weights)
        return tether.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        trip = ctx.trip
        weight_gradients = trip.wait_labels()
        grad_weights_N = weight_gradients.new_zeros(ctx.num_weights)
        grad_weights_N[trip.plan.order] = weight_gradients[:, 0]
        return trip.sum_home(trip.wait_rows()), grad_weights_N, gradients[0], None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tether: Tensor, trip: AllToAllTrip) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        labels, weights_dtype = trip.wait_labels(), trip.weights_dtype
        ids_M = labels[:, :ID_BYTES].clone(memory_format=torch.contiguous_format).view(torch.int32).squeeze(1).long()
        weights_M = labels[:, ID_BYTES:].clone(memory_format=torch.contiguous_format).view(weights_dtype).squeeze(1)
        x_RD = trip.wait_rows()
        ctx.trip = trip
        ctx.save_for_backward(tether)
        ctx.mark_non_differentiable(ids_M)
        return x_RD, weights_M, ids_M, tether.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # A checkpointed block is computed again, with its exchanges, when the first saved tensor is asked for. Asking
        # here puts that before the gradients' exchange on every rank, also where no expert got a row and saved one.
        (tether,) = ctx.saved_tensors
        ctx.trip.exchange.wait_for_abandoned()
        grad_x_RD, grad_weights_M, _, _ = gradients
        ctx.trip.start_labels(grad_weights_M.unsqueeze(1), there=False)
        ctx.trip.start_rows(grad_x_RD, there=False, backward=True)
        return torch.zeros_like(tether), None


class _SendBack(torch.autograd.Function):
    """Saves no tensor, so a checkpointed block is computed again without sending its outputs again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, tether: Tensor, trip: AllToAllTrip) -> Tensor:
        trip.start_rows(rows, there=False, backward=False)
        ctx.trip = trip
        return tether.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.trip.wait_rows(), gradients[0], None


class _ComeHome(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tether: Tensor, trip: AllToAllTrip) -> tuple[Tensor, Tensor]:
        ctx.trip = trip
        return trip.sum_home(trip.wait_rows()), tether.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_y_TD, grad_tether = gradients
        ctx.trip.start_rows(grad_y_TD.index_select(0, ctx.trip.plan.token_ids), there=True, backward=True)
        return grad_tether, None
