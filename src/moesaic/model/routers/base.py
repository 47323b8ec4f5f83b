"""What every router is: logits, a choice, weights for what was chosen.

T tokens, E experts to choose among, N assignments, D hidden size.

Logits, scores and weights are float32 whatever the model computes in: in bfloat16 near ties flip, and other experts are
chosen. The choice is made once and can be handed in again: recomputation in the backward pass and replayed traces weigh
the same experts anew, with gradients, and never choose.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from moesaic.config import ModelConfig
from moesaic.model.noise import combine, uniform
from moesaic.model.routing_context import RoutingContext
from moesaic.ops import Choice, Routing


class Router(nn.Module):
    """x (T, D) -> Routing. Subclasses say what a score is, how experts are chosen and what weight they get."""

    looks_ahead: ClassVar[Literal["never", "in training", "always"]] = "never"
    """When what a token gets depends on later tokens of its sequence."""
    expert_bias: Tensor | None
    """(E,) float32, takes part in the choice only; moved by the load, never by a gradient (`balance.py`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe = config.moe
        assert moe is not None
        self.top_k = moe.num_experts_per_tok
        self.num_experts = moe.num_routed
        self.routed_scaling_factor = moe.routed_scaling_factor
        expert_bias = torch.zeros(self.num_experts, dtype=torch.float32) if moe.has_expert_bias else None
        self.register_buffer("expert_bias", expert_bias)

    def logits(self, x: Tensor, context: RoutingContext) -> Tensor:
        """x (T, D) float32 or float64, 0 where padding is -> (T, E)."""
        raise NotImplementedError

    def scores(self, logits: Tensor) -> Tensor:
        """(T, E) logits -> (T, E) scores, not negative, over all experts; balance losses read them too."""
        raise NotImplementedError

    def select(self, logits: Tensor, context: RoutingContext) -> Choice:
        """(T, E) logits without gradient -> the choice; padding need not be looked after."""
        raise NotImplementedError

    def weigh(self, logits: Tensor, choice: Choice) -> Tensor:
        """Weights (N,) of what was chosen, with gradient, before scaling. A row that is not kept still has its part in
        the normalisation of its token's others."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        """x (T, D), T tokens of the context's sequences -> their routing, float64 where x is, else float32."""
        with torch.autocast(x.device.type, enabled=False):
            wide_TD = x if x.dtype == torch.float64 else x.float()
            if context.mask is not None:  # what padding holds, NaN too, must not reach the router's gradient
                wide_TD = wide_TD.masked_fill(~context.mask.view(-1, 1), 0.0)
            logits_TE = self.logits(wide_TD, context)
            choice = self._choice(logits_TE.detach(), context)
            weights_N = self.weigh(logits_TE, choice) * self.routed_scaling_factor
        return self._assemble(choice, weights_N, logits_TE, context)

    def _choice(self, logits: Tensor, context: RoutingContext) -> Choice:
        if context.replay is not None:
            (choice,) = context.replay
        else:
            choice = self.select(logits, context)
        return choice.without_padding(context.flat_mask)

    def _assemble(self, choice: Choice, weights: Tensor, logits: Tensor, context: RoutingContext) -> Routing:
        whole = choice.kept is None
        kept = slice(None) if choice.kept is None else choice.kept
        return Routing(
            token_ids=choice.token_ids[kept],
            expert_ids=choice.expert_ids[kept],
            weights=weights[kept],
            logits=logits,
            num_experts=self.num_experts,
            top_k=choice.top_k if whole else None,
            mask=context.flat_mask,
            choice=None if whole else choice,
        )


class LinearRouter(Router):
    """Logits are a linear function of the token: weight (E, D) and, where the config asks for it, bias (E,)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        moe = config.moe
        assert moe is not None
        self.input_jitter = moe.router_input_jitter
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(self.num_experts)) if moe.router_bias else None

    def logits(self, x: Tensor, context: RoutingContext) -> Tensor:
        """x (T, D) -> (T, E). Jitter touches what the router sees, and nothing else."""
        if self.input_jitter and self.training:
            x = x * (1.0 + self.input_jitter * (2.0 * self._uniform_noise(x, context) - 1.0))
        bias_E = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.weight.to(x.dtype), bias_E)

    def _uniform_noise(self, like: Tensor, context: RoutingContext) -> Tensor:
        if context.noise_keys is None:
            return torch.rand_like(like)
        return uniform(combine(context.noise_keys.flatten(), 1), like.shape[1]).to(like.dtype)
