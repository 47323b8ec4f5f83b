"""Tokens to the ranks of their experts and back, by all-to-all exchanges.

T tokens, N assignments, S rows sent, R rows received, M assignments received, P ranks, E experts, e local experts, D
hidden size.

A token travels once to each rank that has one of its experts, with the ids and weights of all of them there; what these
add up to travels back once. So at most min(K, P) rows of a token are sent where K would be without.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.ops import Routing
from moesaic.parallel.transport import TRANSPORTS, Transport

ID_BYTES = 4


@dataclass(frozen=True)
class Handle:
    """What combine has to know of a dispatch."""

    num_tokens: int
    token_ids: Tensor
    """(S,) the token of each row sent."""
    sent: list[int]
    """(P,) rows sent to each rank."""
    received: list[int]
    """(P,) rows received from each rank."""
    tether: Tensor
    """Ties combine to dispatch in the graph, so that a rank without rows takes part in the backward exchange too."""


@dataclass(frozen=True)
class _Plan:
    """Who goes where."""

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


class Exchange:
    """All-to-all over the ranks of a group; counts the bytes that leave this rank."""

    def __init__(self, group: dist.ProcessGroup, transport: str = "exact", gradient_transport: str = "exact") -> None:
        """Rows travel by `transport` in the forward pass and by `gradient_transport` in the backward pass."""
        self.group = group
        self.num_ranks = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.forward_transport = TRANSPORTS[transport]
        self.backward_transport = TRANSPORTS[gradient_transport]
        self.bytes_sent = 0

    def counts(self, sent: Tensor) -> Tensor:
        """(P, ...) int64, of which row p goes to rank p -> what the others sent here, in the same shape."""
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        self.bytes_sent += sent.nbytes // self.num_ranks * (self.num_ranks - 1)
        return received

    def rows(
        self, rows: Tensor, sent: Sequence[int], received: Sequence[int], transport: Transport = TRANSPORTS["exact"]
    ) -> Tensor:
        """Rows in the order of their ranks, so many to each, to those that come from each rank."""
        message = transport.encode(rows).contiguous()
        answer = message.new_empty(sum(received), message.shape[1])
        dist.all_to_all_single(answer, message, list(received), list(sent), group=self.group)
        self.bytes_sent += (len(message) - sent[self.rank]) * message.shape[1] * message.itemsize
        return transport.decode(answer, rows.dtype)


class AllToAllDispatcher:
    """The dispatcher of a rank that holds the experts `bounds[rank]` to `bounds[rank + 1]` of a layer."""

    def __init__(self, exchange: Exchange, bounds: Sequence[int]) -> None:
        """`bounds` (P + 1,), from 0 to E."""
        self.exchange = exchange
        self.bounds = torch.tensor(bounds)
        self.num_local = bounds[exchange.rank + 1] - bounds[exchange.rank]

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Routing, Handle]:
        """x (T, D) -> the rows (R, D) that the experts here compute, and the routing of these; no token is in it twice
        for one rank, and those of low ranks come first."""
        plan = self._plan(routing)
        counts_P2 = torch.tensor([plan.rows, plan.assignments], device=x.device).T.contiguous()
        received_rows, received_assignments = self.exchange.counts(counts_P2).T.tolist()
        x_RD, weights_M, ids_M, tether = _Dispatch.apply(
            x, routing.weights, plan, received_rows, received_assignments, self.exchange
        )
        local_routing = Routing(
            token_ids=(ids_M % 2).cumsum(0) - 1,
            expert_ids=ids_M // 2,
            weights=weights_M,
            logits=weights_M.new_zeros((), requires_grad=False).expand(len(x_RD), self.num_local),
            num_experts=self.num_local,
            top_k=None,
        )
        return x_RD, local_routing, Handle(len(x), plan.token_ids, plan.rows, received_rows, tether)

    def combine(self, rows: Tensor, handle: object) -> Tensor:
        """Outputs (R, D) -> the sum (T, D) of what came home for each token."""
        assert isinstance(handle, Handle)
        return _Combine.apply(rows, handle.tether, handle, self.exchange)  # type: ignore[no-any-return]

    def _plan(self, routing: Routing) -> _Plan:
        bounds = self.bounds.to(routing.expert_ids.device)
        num_ranks = self.exchange.num_ranks
        rank_N = torch.searchsorted(bounds, routing.expert_ids, right=True) - 1
        key_N = rank_N * max(routing.num_tokens, 1) + routing.token_ids
        key_S, row_of_N = torch.unique(key_N, return_inverse=True)  # sorted: by rank, then by token
        order_N = torch.argsort(row_of_N, stable=True)
        row_N = row_of_N[order_N]
        begins_N = torch.ones_like(row_N)
        begins_N[1:] = (row_N[1:] != row_N[:-1]).long()
        local_ids_N = (routing.expert_ids - bounds[rank_N])[order_N]
        rank_S = key_S // max(routing.num_tokens, 1)
        return _Plan(
            token_ids=key_S % max(routing.num_tokens, 1),
            order=order_N,
            ids=(2 * local_ids_N + begins_N).int(),
            rows=torch.bincount(rank_S, minlength=num_ranks).tolist(),
            assignments=torch.bincount(rank_N, minlength=num_ranks).tolist(),
        )


class _Dispatch(torch.autograd.Function):
    """One node for rows and weights, so that all ranks exchange their gradients in the same order."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        plan: _Plan,
        received_rows: list[int],
        received_assignments: list[int],
        exchange: Exchange,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weights_N1 = weights.index_select(0, plan.order).unsqueeze(1)
        labels = torch.cat((plan.ids.unsqueeze(1).view(torch.uint8), weights_N1.view(torch.uint8)), dim=1)
        labels = exchange.rows(labels, plan.assignments, received_assignments)
        ids_M = labels[:, :ID_BYTES].clone(memory_format=torch.contiguous_format).view(torch.int32).squeeze(1).long()
        weights_M = labels[:, ID_BYTES:].clone(memory_format=torch.contiguous_format).view(weights.dtype).squeeze(1)
        x_SD = x.index_select(0, plan.token_ids)
        x_RD = exchange.rows(x_SD, plan.rows, received_rows, exchange.forward_transport)
        ctx.plan, ctx.received_rows, ctx.received_assignments = plan, received_rows, received_assignments
        ctx.exchange, ctx.num_tokens = exchange, len(x)
        ctx.mark_non_differentiable(ids_M)
        return x_RD, weights_M, ids_M, x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_x_RD, grad_weights_M, _, _ = gradients
        plan, exchange = ctx.plan, ctx.exchange
        grad_x_SD = exchange.rows(grad_x_RD, ctx.received_rows, plan.rows, exchange.backward_transport)
        grad_x_TD = grad_x_SD.new_zeros(ctx.num_tokens, grad_x_SD.shape[1])
        grad_x_TD.index_add_(0, plan.token_ids, grad_x_SD)
        grad_weights_N1 = exchange.rows(grad_weights_M.unsqueeze(1), ctx.received_assignments, plan.assignments)
        grad_weights_N = torch.empty_like(grad_weights_N1[:, 0])
        grad_weights_N[plan.order] = grad_weights_N1[:, 0]
        return grad_x_TD, grad_weights_N, None, None, None, None


class _Combine(torch.autograd.Function):
    """Saves no tensor, so a checkpointed block is computed again without sending its outputs again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, tether: Tensor, handle: Handle, exchange: Exchange) -> Tensor:
        y_SD = exchange.rows(rows, handle.received, handle.sent, exchange.forward_transport)
        ctx.token_ids, ctx.sent, ctx.received = handle.token_ids, handle.sent, handle.received
        ctx.exchange = exchange
        return y_SD.new_zeros(handle.num_tokens, y_SD.shape[1]).index_add_(0, handle.token_ids, y_SD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y_TD,) = gradients
        exchange = ctx.exchange
        grad_y_SD = grad_y_TD.index_select(0, ctx.token_ids)
        grad_y_RD = exchange.rows(grad_y_SD, ctx.sent, ctx.received, exchange.backward_transport)
        return grad_y_RD, grad_y_TD.new_zeros(()), None, None
