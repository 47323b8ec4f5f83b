"""Bring the rows of one expert together, and sum a token's rows again.

T tokens, N assignments, E experts, K experts per token, D hidden size.

When every token owns exactly K rows in token order, both directions (and both gradients) are gathers: fast on any
device and bitwise repeatable. Otherwise the sum is an `index_add`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moesaic.ops.routing import Routing


@dataclass(frozen=True)
class Permutation:
    """The assignments of a routing in expert order."""

    order: Tensor
    """(N,) int64: position n of the sorted rows holds assignment `order[n]`."""
    token_ids: Tensor
    """(N,) int64: the token of each sorted row."""
    expert_offsets: Tensor
    """(E,) int32: where each expert's rows end."""
    num_tokens: int
    rows_of_token: Tensor | None
    """(T, K) int64: the sorted rows of each token, when every token has K; else None."""


def sort_by_expert(routing: Routing) -> Permutation:
    """Stable sort of the assignments by expert, so that equal routings give equal row orders."""
    # A radix sort takes time for every byte of a key; a stable order does not depend on the width.
    narrow = torch.uint8 if routing.num_experts <= 256 else torch.int32
    order_N = torch.argsort(routing.expert_ids.to(narrow), stable=True)
    rows_of_token_TK = None
    if routing.top_k is not None:
        places_N = torch.arange(order_N.numel(), device=order_N.device)
        row_of_assignment_N = torch.empty_like(order_N).scatter_(0, order_N, places_N)
        rows_of_token_TK = row_of_assignment_N.view(-1, routing.top_k)
    return Permutation(
        order=order_N,
        token_ids=routing.token_ids.index_select(0, order_N),
        expert_offsets=routing.tokens_per_expert().cumsum(0).to(torch.int32),
        num_tokens=routing.num_tokens,
        rows_of_token=rows_of_token_TK,
    )


def permute(x: Tensor, permutation: Permutation) -> Tensor:
    """Gather x (T, D) into expert order (N, D)."""
    return x.index_select(0, permutation.token_ids)


def unpermute(rows: Tensor, permutation: Permutation) -> Tensor:
    """Sum rows (N, D) in expert order into tokens (T, D); tokens without a row get zeros."""
    if permutation.rows_of_token is not None:
        rows_of_token_TK = permutation.rows_of_token
        if rows.device.type == "cpu" and rows.dtype == torch.float32 and rows.numel():
            # One pass over the rows where the loop makes K; it adds them in the same order, to the same bits.
            return functional.embedding_bag(rows_of_token_TK, rows, mode="sum")
        y_TD = rows.index_select(0, rows_of_token_TK[:, 0])
        for k in range(1, rows_of_token_TK.shape[1]):
            y_TD += rows.index_select(0, rows_of_token_TK[:, k])
        return y_TD
    y_TD = rows.new_zeros(permutation.num_tokens, rows.shape[1])
    return y_TD.index_add_(0, permutation.token_ids, rows)


def rows_with_weighted_inputs(x: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
    """For routers whose weights scale what goes into an expert, not what comes out (Llama 4).

    Returns x (T, D) as one row per assignment (N, D), already times its weight, in x's dtype, and the routing of these
    rows, in which each is a token of weight 1. So no backend has to know. `sum_rows_of_tokens` takes the way back.
    """
    if routing.top_k is not None:
        weights_TK1 = routing.weights.view(routing.num_tokens, routing.top_k, 1)
        rows_ND = (x.unsqueeze(1) * weights_TK1).flatten(0, 1)
    else:
        rows_ND = x.index_select(0, routing.token_ids) * routing.weights.unsqueeze(1)
    num_rows = rows_ND.shape[0]
    return rows_ND.to(x.dtype), Routing(
        token_ids=torch.arange(num_rows, device=x.device),
        expert_ids=routing.expert_ids,
        weights=torch.ones_like(routing.weights, requires_grad=False),
        logits=routing.logits.new_zeros(()).expand(num_rows, routing.num_experts),  # none of their own, no memory
        num_experts=routing.num_experts,
        top_k=1,
    )


def sum_rows_of_tokens(rows: Tensor, routing: Routing) -> Tensor:
    """Sum rows (N, D) in the order of the assignments into tokens (T, D); tokens without a row get zeros."""
    if routing.top_k is not None:
        return rows.view(routing.num_tokens, routing.top_k, rows.shape[1]).sum(1)
    y_TD = rows.new_zeros(routing.num_tokens, rows.shape[1])
    return y_TD.index_add(0, routing.token_ids, rows)
