"""Hash layers: a token's experts follow from its id alone.

T tokens, E experts, K experts per token, D hidden size.
"""

import torch
from torch import Tensor

from moesaic.model.noise import combine
from moesaic.model.routers.base import Router
from moesaic.model.routing_context import RoutingContext
from moesaic.ops import Choice


class HashRouter(Router):
    """Every token id has K distinct experts, drawn once and for all, each of weight 1/K (arXiv 2106.04426).

    Nothing is learned: no parameters, no gradient, all logits 0 and all scores 1/E, in every layer the same experts.
    Causal: the id of the token itself decides.
    """

    def logits(self, x: Tensor, context: RoutingContext) -> Tensor:
        """x (T, D) -> zeros (T, E) that take no memory."""
        return x.new_zeros(()).expand(len(x), self.num_experts)

    def scores(self, logits: Tensor) -> Tensor:
        return torch.full_like(logits, 1.0 / self.num_experts)

    def select(self, logits: Tensor, context: RoutingContext) -> Choice:
        experts_E = torch.arange(self.num_experts, device=context.tokens.device)
        drawn_TE = combine(context.tokens.reshape(-1, 1), experts_E)
        return Choice.of_topk(drawn_TE.topk(self.top_k, dim=-1).indices)

    def weigh(self, logits: Tensor, choice: Choice) -> Tensor:
        return logits.new_full(choice.expert_ids.shape, 1.0 / self.top_k)
