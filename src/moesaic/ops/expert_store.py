"""Where a layer's experts live, when that is not simply in tensors of the layer.

E experts of a layer, S slots, N assignments.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moesaic.ops.routing import Routing
from moesaic.ops.weights import ExpertWeights


@dataclass(frozen=True)
class ExpertChunk:
    """Some of a layer's experts, ready to compute: expert `expert_ids[i]` stands in slot `slots[i]` of `weights`."""

    expert_ids: Sequence[int]
    slots: Sequence[int]
    weights: ExpertWeights
    """Of S experts, not all of which are of this layer."""

    def slot_of_expert(self, num_experts: int) -> Tensor:
        """(E,) int64, -1 for experts that are not in the chunk."""
        slots_E = torch.full((num_experts,), -1)
        slots_E[list(self.expert_ids)] = torch.tensor(list(self.slots))
        return slots_E


class ExpertStore(Protocol):
    """The experts of one layer."""

    def chunks(self, expert_ids: Tensor) -> AbstractContextManager[Iterator[ExpertChunk]]:
        """All experts among `expert_ids` (N,), each in one chunk; those in memory first, the others as they come.

        A chunk's weights are there until the next one is asked for.
        Raises MoesaicError where an expert cannot be read.
        """
        ...


def rows_in_slots(slots: Tensor, num_slots: int) -> Routing:
    """A routing of n rows, each a token of its own and of weight 1, to `slots` (n,) in the place of experts."""
    count = len(slots)
    return Routing(
        token_ids=torch.arange(count),
        expert_ids=slots,
        weights=torch.ones(count),
        logits=torch.zeros(()).expand(count, num_slots),
        num_experts=num_slots,
        top_k=1,
    )


def combine_rows(rows: Tensor, routing: Routing) -> Tensor:
    """Rows (N, D) float32, times their weights, summed into tokens (T, D), as the kernels for packed weights do it: in
    the order of the experts, with one rounding for each. So it does not matter in which order the rows were made.

    The product of two float32 is exact in float64, and rounding its sum there first changes next to nothing.
    """
    order_N = torch.argsort(routing.token_ids * routing.num_experts + routing.expert_ids, stable=True)
    token_ids_N = routing.token_ids[order_N]
    rows_per_token_T = torch.bincount(token_ids_N, minlength=routing.num_tokens)
    first_of_token_T = rows_per_token_T.cumsum(0) - rows_per_token_T
    y_TD = rows.new_zeros(routing.num_tokens, rows.shape[1])
    for place in range(int(rows_per_token_T.max()) if len(order_N) else 0):
        tokens = (rows_per_token_T > place).nonzero().squeeze(1)
        chosen = order_N[first_of_token_T[tokens] + place]
        weights = routing.weights[chosen].double().unsqueeze(1)
        y_TD[tokens] = torch.addcmul(y_TD[tokens].double(), weights, rows[chosen].double()).float()
    return y_TD
