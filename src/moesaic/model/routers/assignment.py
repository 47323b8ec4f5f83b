"""Balance by assignment: in training a sequence's tokens share out the experts evenly.

B sequences, L positions, T = B x L tokens, E experts, K experts per token, n tokens of a sequence.

In training what a token gets depends on the later tokens of its sequence; in evaluation each token takes its K best
logits, so that generation is causal. The two differ, which is the price of these routers.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from moesaic.model.routers.matching import balanced_assignment, sinkhorn_potentials
from moesaic.model.routers.topk import TopKRouter
from moesaic.model.routing_context import RoutingContext

_LEFT = 1e-3


class AssignmentRouter(TopKRouter):
    """Each weight is the sigmoid of its logit, so that an expert which was not a token's wish can be turned down."""

    looks_ahead: ClassVar[Literal["never", "in training", "always"]] = "in training"

    def scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def weights(self, logits: Tensor, topk_ids: Tensor) -> Tensor:
        return logits.gather(1, topk_ids).sigmoid()

    def selection(self, logits: Tensor, context: RoutingContext) -> Tensor:
        if not self.training:
            return logits
        mask_BL = torch.ones_like(context.tokens, dtype=torch.bool) if context.mask is None else context.mask
        return self.balanced(logits.view(*mask_BL.shape, self.num_experts), mask_BL).view_as(logits)

    def balanced(self, logits: Tensor, mask: Tensor) -> Tensor:
        """logits (B, L, E), mask (B, L), False for padding -> what takes the place of the logits in the choice."""
        raise NotImplementedError


class SinkhornRouter(AssignmentRouter):
    """In training the K best of Sinkhorn's normalisation of the logits' exponentials, in which every token has 1 and
    every expert n / E: S-BASE (arXiv 2202.01169). The load is nearly balanced; equal tokens still go the same way.
    """

    def balanced(self, logits: Tensor, mask: Tensor) -> Tensor:
        # The normalisation of a row changes no order within it. Where the potentials undo the logits, as those of a
        # single token do, a part of the logits is left to decide, and not rounding.
        return logits + (1 - _LEFT) * sinkhorn_potentials(logits, mask).unsqueeze(1)


class BaseRouter(AssignmentRouter):
    """BASE layers (arXiv 2103.16188), for any K: in training the tokens of a sequence go to K distinct experts each, so
    that every expert has n K / E of them, rounded down or up, of a nearly maximal sum of logits (`matching.py`).
    """

    def balanced(self, logits: Tensor, mask: Tensor) -> Tensor:
        return logits.masked_fill(~balanced_assignment(logits, mask, self.top_k), -torch.inf)
