"""The mixture-of-experts feed-forward in four verbs: route, dispatch, compute, combine.

B batch, L positions, T = B x L tokens, R rows of the local experts, D hidden size.
"""

import torch
from torch import Tensor, nn

from moesaic.config import ModelConfig
from moesaic.model.dispatch import Aside, Dispatcher, LocalDispatcher
from moesaic.model.experts import Experts
from moesaic.model.free_experts import FreeExperts
from moesaic.model.linear import Linear
from moesaic.model.mlp import MLP
from moesaic.model.routers import Router, make_router
from moesaic.model.routing_context import RoutingContext
from moesaic.ops import Routing


class ExpertLayer(nn.Module):
    """x (B, L, D) -> (B, L, D) and the routing that was used: what is common to all layers of experts.

    Shared experts, one MLP that every token visits (DeepSeekMoE, arXiv 2401.06066), add to the routed ones; with
    `shared_expert_gate` a sigmoid of the token weighs what they add (Qwen2-MoE, arXiv 2407.10671).
    """

    def __init__(self, config: ModelConfig, router: Router, backend: str) -> None:
        super().__init__()
        moe = config.moe
        assert moe is not None
        self.router = router
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.experts = Experts(config, backend)
        has_outputs = moe.num_copy_experts + moe.num_constant_experts > 0
        self.free_experts = FreeExperts(config.hidden_size, moe) if has_outputs else None
        shared_size = moe.shared_intermediate_size
        self.shared_experts = MLP(config.hidden_size, shared_size, config.mlp_bias) if shared_size else None
        self.shared_expert_gate = Linear(config.hidden_size, 1, bias=False) if moe.shared_expert_gate else None

    def forward(self, x: Tensor, context: RoutingContext) -> tuple[Tensor, Routing]:
        """No routed expert sees what the context calls padding."""
        x_TD = x.flatten(0, 1)
        has_shared = self.shared_experts is not None
        aside = Aside(self._shared, x_TD) if has_shared and self.dispatcher.overlaps_shared else None
        y_TD, routing = self.routed(x_TD, context, aside)
        if has_shared:
            y_TD = y_TD + (self._shared(x_TD) if aside is None else aside.result())
        return y_TD.view_as(x), routing

    def routed(self, x: Tensor, context: RoutingContext, aside: Aside | None = None) -> tuple[Tensor, Routing]:
        """x (T, D) -> what the routed experts add (T, D), and the routing; `aside` may be done on the way."""
        raise NotImplementedError

    def compute(self, x: Tensor, routing: Routing, aside: Aside | None = None) -> Tensor:
        """x (T, D) -> the weighted sum of each token's experts (T, D), on whatever ranks these are."""
        trips = self.dispatcher.dispatch(x, routing)
        if aside is not None:
            aside.advance()
        for trip in trips:
            x_RD, local_routing = trip.arrive()
            trip.send_back(self.experts(x_RD, local_routing))
        if aside is not None:
            aside.advance()
        return self.dispatcher.combine(trips)

    def _shared(self, x: Tensor) -> Tensor:
        assert self.shared_experts is not None
        shared_TD = self.shared_experts(x)
        if self.shared_expert_gate is None:
            return shared_TD
        return torch.sigmoid(self.shared_expert_gate(x)) * shared_TD


class MoE(ExpertLayer):
    """Each token visits the experts that the router chooses; those that compute nothing get no row of work."""

    def __init__(self, config: ModelConfig, backend: str = "auto") -> None:
        super().__init__(config, make_router(config), backend)
        assert config.moe is not None
        self.num_experts = config.moe.num_experts

    @property
    def is_plainly_packed(self) -> bool:
        """Whether it is a router, packed experts that the C++ kernels compute, and nothing else."""
        return (
            self.shared_experts is None
            and self.router.num_experts == self.num_experts
            and isinstance(self.dispatcher, LocalDispatcher)
            and self.experts.is_plainly_packed
        )

    def routed(self, x: Tensor, context: RoutingContext, aside: Aside | None = None) -> tuple[Tensor, Routing]:
        routing = self.router(x, context)
        if routing.num_experts == self.num_experts:
            return self.compute(x, routing, aside), routing
        y_TD = self.compute(x, routing.of_first_experts(self.num_experts), aside)
        if self.free_experts is not None:
            y_TD = y_TD + self.free_experts(x, routing)
        return y_TD, routing
