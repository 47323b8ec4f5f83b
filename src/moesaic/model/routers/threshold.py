"""Dynamic k: a token takes as many experts as it needs.

T tokens, E experts, K experts per token, N assignments. Both routers are causal: a token decides for itself.
"""

import math

import torch
from torch import Tensor

from moesaic.config import ModelConfig
from moesaic.model.routers.base import LinearRouter
from moesaic.model.routing_context import RoutingContext
from moesaic.ops import Choice

L1_START = 1e-8
"""The first weight of ReMoE's L1 loss, and by what the paper multiplies or divides it after a step."""
L1_GROWTH = 1.2


class TopPRouter(LinearRouter):
    """Softmax over all experts, of which a token takes the best until their probabilities sum to `top_p`: at least 1,
    at most K (arXiv 2403.07652). With `norm_topk_prob` its weights are divided by their sum.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        assert config.moe is not None
        self.top_p = config.moe.top_p
        self.norm_topk_prob = config.moe.norm_topk_prob

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def select(self, logits: Tensor, context: RoutingContext) -> Choice:
        best = self.scores(logits).topk(self.top_k, dim=-1)
        reached_TK = best.values.cumsum(-1) >= self.top_p
        needed_TK = torch.ones_like(reached_TK)
        needed_TK[:, 1:] = ~reached_TK[:, :-1]
        return Choice.of_mask(torch.zeros_like(logits, dtype=torch.bool).scatter_(1, best.indices, needed_TK))

    def weigh(self, logits: Tensor, choice: Choice) -> Tensor:
        weights_N = self.scores(logits)[choice.token_ids, choice.expert_ids]
        if not self.norm_topk_prob:
            return weights_N
        sum_T = weights_N.new_zeros(len(logits)).index_add(0, choice.token_ids, weights_N)
        return weights_N / sum_T[choice.token_ids]


class ReLURouter(LinearRouter):
    """A token takes every expert whose logit is above 0, with the logit as weight (ReMoE, arXiv 2412.14711).

    Nothing here makes the choice sparse: an L1 loss on the weights does, and `steer` moves its weight until a token
    takes K experts on average. A token may take none.
    """

    log_l1_weight: Tensor
    """() float32: the natural logarithm of the L1 loss's weight, over that of L1_START; 0 in a new model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.register_buffer("log_l1_weight", torch.zeros((), dtype=torch.float32))

    @property
    def l1_weight(self) -> Tensor:
        """()."""
        return L1_START * self.log_l1_weight.exp()

    @torch.no_grad()
    def steer(self, mean_experts_per_token: Tensor | float, growth: float = L1_GROWTH) -> None:
        """Multiplies the L1 loss's weight by `growth` where tokens take more than K experts, divides it where they take
        fewer, but never below L1_START: from far below it would take many steps to act again. Call once per optimizer
        step, with the mean over the whole batch, padding left out."""
        excess = torch.as_tensor(mean_experts_per_token, device=self.log_l1_weight.device) - self.top_k
        self.log_l1_weight += math.log(growth) * torch.sign(excess).to(self.log_l1_weight.dtype)
        self.log_l1_weight.clamp_(min=0.0)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.relu()

    def select(self, logits: Tensor, context: RoutingContext) -> Choice:
        return Choice.of_mask(logits > 0)

    def weigh(self, logits: Tensor, choice: Choice) -> Tensor:
        return logits[choice.token_ids, choice.expert_ids].relu()
