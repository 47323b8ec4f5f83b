"""Routers with random weights and something to route, for the tests of this folder.

B sequences, L positions, T = B x L tokens, D hidden size, E experts.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moesaic.config import ModelConfig, MoEConfig
from moesaic.model.routers import ROUTERS, Router
from moesaic.model.routers import make_router as make_bare_router
from moesaic.model.routing_context import RoutingContext
from moesaic.ops import Routing

D, E = 12, 8
MARGIN = 1e-3
MAX_DRAWS = 1000
"""Inputs without close gaps are common, so more would mean that something is wrong."""
"""Where a choice hangs on less, two correct float32 programs may choose differently."""
VOCAB_SIZE = 50

SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"router": name} for name in ROUTERS},
    "softmax_topk, drop": {"router": "softmax_topk", "capacity_factor": 0.8},
    "sigmoid_topk, next choice": {"router": "sigmoid_topk", "capacity_factor": 0.9, "drop_policy": "next_choice"},
    "topk_softmax, pad": {"router": "topk_softmax", "capacity_factor": 0.7, "drop_policy": "pad"},
    "noisy_topk, drop": {"router": "noisy_topk", "capacity_factor": 0.8},
    "softmax_topk, jitter": {"router": "softmax_topk", "router_input_jitter": 0.1},
    "expert_choice, much": {"router": "expert_choice", "capacity_factor": 1.7, "router_bias": True},
}
"""All routers, and what else changes a choice."""


def make_config(**settings: Any) -> MoEConfig:
    top_k = 2 if settings["router"] == "sparsemixer" else 3
    fields: dict[str, Any] = {"num_experts": E, "num_experts_per_tok": top_k, "moe_intermediate_size": 4}
    return MoEConfig(**fields | settings)


def make_router(moe: MoEConfig, bias_scale: float = 0.5) -> Any:
    """In evaluation mode."""
    model = ModelConfig(
        vocab_size=VOCAB_SIZE, hidden_size=D, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=6, moe=moe,
    )  # fmt: skip
    router = make_bare_router(model)
    for name, parameter in router.named_parameters():
        nn.init.normal_(parameter, std=1.0 if name == "bias" else D**-0.5)
    if router.expert_bias is not None:
        router.expert_bias.normal_(std=bias_scale)
    return router.eval()


def context_of(batch_size: int, length: int, mask: Tensor | None = None) -> RoutingContext:
    """Random tokens and keys; mask (B, L)."""
    return RoutingContext(
        tokens=torch.randint(0, VOCAB_SIZE, (batch_size, length)),
        mask=mask,
        noise_keys=torch.randint(0, 2**60, (batch_size, length)),
    )


def route(router: Router, x: Tensor, mask: Tensor | None = None) -> Routing:
    """x (T, D), mask (T,) of one sequence."""
    return router(x, context_of(1, len(x), None if mask is None else mask.view(1, -1)))


def exact_logits(router: Any, x: Tensor) -> Tensor:
    return nn.functional.linear(
        x.double(), router.weight.double(), None if router.bias is None else router.bias.double()
    )


def rows_of(routing: Routing, token: int) -> dict[int, float]:
    rows = routing.token_ids == token
    return dict(zip(routing.expert_ids[rows].tolist(), routing.weights[rows].tolist(), strict=True))


def as_matrix(routing: Routing) -> Tensor:
    """(T, E): the weight of each expert for each token, with gradient; 0 where it has none."""
    zeros_TE = routing.weights.new_zeros(routing.num_tokens, routing.num_experts)
    return zeros_TE.index_put((routing.token_ids, routing.expert_ids), routing.weights, accumulate=True)
