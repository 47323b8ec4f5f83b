"""Expert choice: every expert takes the tokens that suit it best.

B sequences, L positions, T = B x L tokens, E experts, C tokens per expert and sequence.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from moesaic.config import ModelConfig
from moesaic.model.routers.base import LinearRouter
from moesaic.model.routers.capacity import sequence_capacity
from moesaic.model.routing_context import RoutingContext
from moesaic.ops import Choice


class ExpertChoiceRouter(LinearRouter):
    """Softmax over the experts, then each expert takes the C tokens of a sequence with the highest score for it, of
    equal ones the earlier (arXiv 2202.09368): perfect balance, and any number of experts for a token, or none.

    Of n tokens C = capacity_factor x n x K / E, rounded up, at most n. The weight is the score. Not causal: whether an
    expert takes a token depends on the scores of later ones, in evaluation too.
    """

    looks_ahead: ClassVar[Literal["never", "in training", "always"]] = "always"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        assert config.moe is not None
        self.capacity_factor = 1.0 if config.moe.capacity_factor is None else config.moe.capacity_factor

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def select(self, logits: Tensor, context: RoutingContext) -> Choice:
        batch_size, length = context.tokens.shape
        capacity_B = sequence_capacity(context, self.capacity_factor * self.top_k / self.num_experts)
        scores_BLE = self.scores(logits).view(batch_size, length, self.num_experts)
        if context.mask is not None:
            scores_BLE = scores_BLE.masked_fill(~context.mask.unsqueeze(-1), -1.0)
        order_BLE = scores_BLE.argsort(dim=1, descending=True, stable=True)
        has_room_BL1 = (torch.arange(length, device=logits.device) < capacity_B.unsqueeze(1)).unsqueeze(-1)
        taken_BLE = torch.zeros_like(scores_BLE, dtype=torch.bool).scatter_(
            1, order_BLE, has_room_BL1.expand_as(order_BLE)
        )
        return Choice.of_mask(taken_BLE.view_as(logits))

    def weigh(self, logits: Tensor, choice: Choice) -> Tensor:
        return self.scores(logits)[choice.token_ids, choice.expert_ids]
