"""Soft mixtures of experts: experts compute mixtures of a sequence's tokens, and nothing is chosen.

B sequences, L positions, T = B x L tokens, E experts, S slots of one expert, M = E x S slots, R = B x M rows, D hidden
size.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from moesaic.config import ModelConfig
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.dispatch import Aside
from moesaic.model.moe import ExpertLayer
from moesaic.model.routers import Router
from moesaic.model.routing_context import RoutingContext
from moesaic.ops import Choice, Routing


class SoftRouter(Router):
    """Logits of tokens and slots: scale x cosine of the token and the slot's vector (arXiv 2308.00951, section 2.3).

    It mixes where the others choose, so it makes no `Routing`; `SoftMoE` does.
    """

    looks_ahead: ClassVar[Literal["never", "in training", "always"]] = "always"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        assert config.moe is not None
        self.slots_per_expert = config.moe.slots_per_expert
        self.weight = nn.Parameter(torch.empty(self.num_experts * self.slots_per_expert, config.hidden_size))
        self.scale = nn.Parameter(torch.empty(1))

    def scores(self, logits: Tensor) -> Tensor:
        """(T, E) logits of experts -> (T, E): the share of each expert in what a token gets."""
        return logits.softmax(-1)

    def logits(self, x: Tensor, context: RoutingContext) -> Tensor:
        """x (T, D) float32 or float64 -> (T, M), the slots of one expert after those of the one before."""
        slots_MD = functional.normalize(self.weight.to(x.dtype), dim=-1)
        return functional.linear(functional.normalize(x, dim=-1), self.scale.to(x.dtype) * slots_MD)

    def select(self, logits: Tensor, context: RoutingContext) -> Choice:
        raise MoesaicError("the router soft chooses no experts, it mixes tokens; call the layer, not its router")


class SoftMoE(ExpertLayer):
    """Soft MoE (arXiv 2308.00951): every slot is a weighted mean of the tokens of a sequence, by a softmax over them;
    every expert computes its S slots; every token gets a weighted mean of all results, by a softmax over the slots.

    A token depends on later ones, always. Padding neither gives nor gets. K plays no part, and the number of slots does
    not grow with the sequence.
    """

    def __init__(self, config: ModelConfig, backend: str = "auto") -> None:
        super().__init__(config, SoftRouter(config), backend)
        assert config.moe is not None
        self.slots_per_expert = config.moe.slots_per_expert
        self.routed_scaling_factor = config.moe.routed_scaling_factor

    def routed(self, x: Tensor, context: RoutingContext, aside: Aside | None = None) -> tuple[Tensor, Routing]:
        """The routing is for analysis: a row for each slot of each sequence, with the slot's expert, the token that
        weighs most in it, and that weight; the logit of an expert is the logsumexp of those of its slots."""
        if context.replay:
            raise UsageError("the router soft chooses no experts, so that nothing can be replayed; pass no replay")
        if context.mask is not None:
            x = x.masked_fill(~context.mask.view(-1, 1), 0.0)  # a NaN there must not spread
        with torch.autocast(x.device.type, enabled=False):
            logits_TM = self.router.logits(x if x.dtype == torch.float64 else x.float(), context)
        logits_BLM = logits_TM.unflatten(0, context.tokens.shape)
        dispatch_BLM, combine_BLM = self._mixing(logits_BLM, context.mask)
        slots_BMD = dispatch_BLM.mT.to(x.dtype) @ x.unflatten(0, context.tokens.shape)
        y_BMD = self._computed(slots_BMD, logits_TM, aside)
        y_BLD = (combine_BLM * self.routed_scaling_factor).to(y_BMD.dtype) @ y_BMD
        return y_BLD.flatten(0, 1), self._routing(logits_TM, dispatch_BLM, context)

    def _mixing(self, logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, L, M) logits -> each slot's softmax over the tokens, each token's over the slots; 0 for padding."""
        if mask is None:
            return logits.softmax(1), logits.softmax(2)
        padding_BL1 = ~mask.unsqueeze(2)
        dispatch_BLM = logits.masked_fill(padding_BL1, -torch.inf).softmax(1)
        # Again, because in a sequence of padding alone a softmax over nothing is NaN.
        return dispatch_BLM.masked_fill(padding_BL1, 0.0), logits.softmax(2).masked_fill(padding_BL1, 0.0)

    def _computed(self, slots: Tensor, logits: Tensor, aside: Aside | None) -> Tensor:
        """(B, M, D) -> (B, M, D): each slot through its expert, as a token that visits this one with weight 1."""
        rows_RD = slots.flatten(0, 1)
        num_experts = self.router.num_experts
        row_routing = Routing(
            token_ids=torch.arange(len(rows_RD), device=slots.device),
            expert_ids=self._expert_of_slot(slots.device).repeat(len(slots)),
            weights=logits.new_ones(len(rows_RD)),
            logits=logits.new_zeros(()).expand(len(rows_RD), num_experts),  # none of their own, no memory
            num_experts=num_experts,
            top_k=1,
        )
        return self.compute(rows_RD, row_routing, aside).view_as(slots)

    def _routing(self, logits: Tensor, dispatch: Tensor, context: RoutingContext) -> Routing:
        batch_size, length, num_slots = dispatch.shape
        if length == 0:  # no maximum then
            dispatch, batch_size = dispatch.new_zeros(0, 1, num_slots), 0
        weights_BM, positions_BM = dispatch.max(1)
        firsts_B1 = torch.arange(batch_size, device=logits.device).unsqueeze(1) * length
        filled_B1 = context.lengths().unsqueeze(1) > 0  # a sequence of padding fills no slot
        filled_R = filled_B1.expand(-1, num_slots).flatten()
        return Routing(
            token_ids=(firsts_B1 + positions_BM).flatten()[filled_R],
            expert_ids=self._expert_of_slot(logits.device).repeat(batch_size)[filled_R],
            weights=weights_BM.flatten()[filled_R],
            logits=logits.unflatten(1, (-1, self.slots_per_expert)).logsumexp(2),
            num_experts=self.router.num_experts,
            top_k=None,
            mask=context.flat_mask,
        )

    def _expert_of_slot(self, device: torch.device) -> Tensor:
        """(M,)."""
        slots_M = torch.arange(self.router.num_experts * self.slots_per_expert, device=device)
        return slots_M // self.slots_per_expert
