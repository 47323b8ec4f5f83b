"""How many tokens of a sequence an expert takes, and which.

B sequences, L positions, T = B x L tokens, E experts, K experts per token.
"""

from dataclasses import replace

import torch
from torch import Tensor

from moesaic.model.routing_context import RoutingContext
from moesaic.ops import Choice


def sequence_capacity(context: RoutingContext, share: float) -> Tensor:
    """(B,) int64: an expert's room in each sequence, `share` of its tokens, rounded up, at most all of them; padding
    makes no room."""
    exact_B = context.lengths().double() * min(share, 1.0)
    return torch.ceil(exact_B - 1e-9).long()  # 0.07 x 100 is 7 and not 8


def choose_within_capacity(
    selection: Tensor, top_k: int, capacity: Tensor, context: RoutingContext, *, another_if_full: bool
) -> Choice:
    """Each token's K best experts by selection (T, E), where experts have room (B,) and take earlier tokens first.

    With `another_if_full` a token that finds an expert full goes on to its next best: tokens propose, experts keep the
    earliest, until nobody is turned away (Gale and Shapley's algorithm; since all experts prefer the same tokens, this
    is what serving one token after the other would give). Later tokens never change what an earlier one gets. Where too
    few experts are left, the best of those that refused it stand in the rows that are not kept. What it asked for first
    is the load, or balance would not know of the queue.
    """
    asked_TK = selection.topk(top_k, dim=-1).indices
    shape_BLE = (*context.tokens.shape, selection.shape[1])
    mask = context.flat_mask
    open_TE = selection if mask is None else selection.masked_fill(~mask.unsqueeze(1), -torch.inf)
    refused_TE = torch.zeros_like(selection, dtype=torch.bool)
    while True:
        best = open_TE.topk(top_k, dim=-1)
        possible_TK = best.values > -torch.inf
        asked_TE = torch.zeros_like(refused_TE).scatter_(1, best.indices, possible_TK)
        place_BLE = asked_TE.view(shape_BLE).cumsum(1)
        over_TE = asked_TE & (place_BLE > capacity.view(-1, 1, 1)).view_as(asked_TE)
        refused_TE |= over_TE
        if not (another_if_full and bool(over_TE.any())):
            break
        open_TE = open_TE.masked_fill(over_TE, -torch.inf)
    kept_TK = possible_TK & ~over_TE.gather(1, best.indices)
    if not another_if_full:
        return Choice.of_topk(best.indices, kept_TK)
    turned_away_TK = selection.masked_fill(~refused_TE, -torch.inf).topk(top_k, dim=-1).indices
    nth_TK = (~kept_TK).cumsum(1).sub(1).clamp_min(0)
    choice = Choice.of_topk(torch.where(kept_TK, best.indices, turned_away_TK.gather(1, nth_TK)), kept_TK)
    return replace(choice, asked_ids=asked_TK.flatten())
