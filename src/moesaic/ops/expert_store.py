"""Where a layer's experts live, when that is not simply in tensors of the layer.

T tokens, N assignments, n of them, D hidden size.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from moesaic.ops.routing import Routing
from moesaic.ops.weights import ExpertWeights


class ExpertStore(Protocol):
    """The experts of one layer."""

    def chunks(self, expert_ids: Tensor) -> AbstractContextManager[Iterator[ExpertWeights]]:
        """All experts among `expert_ids` (N,), each in one chunk: weights whose `slots` say who is there, until the
        next chunk is asked for. Of several chunks what is in memory comes first, the others as they come.

        Raises MoesaicError where an expert cannot be read.
        """
        ...


def routing_of_rows(routing: Routing, rows: Tensor) -> Routing:
    """The routing's `rows` (n,) as tokens of their own, of weight 1."""
    count = len(rows)
    return Routing(
        token_ids=torch.arange(count),
        expert_ids=routing.expert_ids[rows],
        weights=torch.ones(count),
        logits=torch.zeros(()).expand(count, routing.num_experts),
        num_experts=routing.num_experts,
        top_k=1,
    )


def combine_rows(rows: Tensor, routing: Routing) -> Tensor:
    """Rows (N, D) float32, times their weights, summed into tokens (T, D), as the kernels for packed weights do it: in
    the order of the experts, with one rounding for each. So it does not matter in which order the rows were made.

    The product of two float32 is exact in float64, and rounding its sum there first changes next to nothing.
    """
    order_N = torch.argsort(routing.token_ids * routing.num_experts + routing.expert_ids, stable=True)
    rows_per_token_T = torch.bincount(routing.token_ids, minlength=routing.num_tokens)
    first_of_token_T = rows_per_token_T.cumsum(0) - rows_per_token_T
    y_TD = rows.new_zeros(routing.num_tokens, rows.shape[1])
    for place in range(int(rows_per_token_T.max()) if len(order_N) else 0):
        tokens = (rows_per_token_T > place).nonzero().squeeze(1)
        chosen = order_N[first_of_token_T[tokens] + place]
        weights = routing.weights[chosen].double().unsqueeze(1)
        y_TD[tokens] = torch.addcmul(y_TD[tokens].double(), weights, rows[chosen].double()).float()
    return y_TD
