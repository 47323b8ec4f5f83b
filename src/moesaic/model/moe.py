"""The mixture-of-experts feed-forward in four verbs: route, dispatch, compute, combine.

B batch, L positions, T = B x L tokens, R rows of the local experts, D hidden size.
"""

import torch
from torch import Tensor, nn

from moesaic.config import ModelConfig
from moesaic.model.dispatch import Dispatcher, LocalDispatcher
from moesaic.model.experts import Experts
from moesaic.model.mlp import MLP
from moesaic.model.router import make_router
from moesaic.ops import Routing


class MoE(nn.Module):
    """x (B, L, D) -> (B, L, D) and the routing that was used.

    Shared experts, one MLP that every token visits (DeepSeekMoE, arXiv 2401.06066), add to the routed ones; with
    `shared_expert_gate` a sigmoid of the token weighs what they add (Qwen2-MoE, arXiv 2407.10671).
    """

    def __init__(self, config: ModelConfig, backend: str = "auto") -> None:
        super().__init__()
        assert config.moe is not None
        self.router = make_router(config)
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.experts = Experts(config, backend)
        hidden_size, shared_size = config.hidden_size, config.moe.shared_intermediate_size
        self.shared_experts = MLP(hidden_size, shared_size, config.mlp_bias) if shared_size else None
        self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False) if config.moe.shared_expert_gate else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Routing]:
        """`mask` (B, L) is False for padding, which no routed expert sees."""
        x_TD = x.flatten(0, 1)
        routing = self.router(x_TD, None if mask is None else mask.flatten())
        x_RD, local_routing, handle = self.dispatcher.dispatch(x_TD, routing)
        y_RD = self.experts(x_RD, local_routing)
        y_TD = self.dispatcher.combine(y_RD, handle)
        if self.shared_experts is not None:
            y_TD = y_TD + self._shared(x_TD)
        return y_TD.view_as(x), routing

    def _shared(self, x: Tensor) -> Tensor:
        assert self.shared_experts is not None
        shared_TD = self.shared_experts(x)
        if self.shared_expert_gate is None:
            return shared_TD
        return torch.sigmoid(self.shared_expert_gate(x)) * shared_TD
