"""The routed experts of one layer: their weights, and the backend that computes them.

T tokens, N assignments, E experts, D hidden size, F expert intermediate size.
"""

import torch
from torch import Tensor, nn

from moesaic.config import ModelConfig
from moesaic.ops import BACKENDS, Activation, ExpertShape, ExpertWeights, Routing, pick
from moesaic.ops.permute import rows_with_weighted_inputs, sum_rows_of_tokens


class Experts(nn.Module):
    """E stacked gated experts. x (T, D) and a routing -> the sum of each token's experts (T, D).

    The routing's weights multiply what comes out of an expert, or what goes in where the router says so.
    """

    def __init__(self, config: ModelConfig, backend: str = "auto") -> None:
        super().__init__()
        assert config.moe is not None
        moe = config.moe
        E, D, F = moe.num_experts, config.hidden_size, moe.moe_intermediate_size
        self.backend = backend
        self.activation = Activation(moe.activation, limit=moe.swiglu_limit, alpha=moe.swiglu_alpha)
        self.weighs_inputs = moe.router == "topk_sigmoid_input"
        self.gate_up = nn.Parameter(torch.empty(E, 2 * F, D))
        self.down = nn.Parameter(torch.empty(E, D, F))
        self.gate_up_bias = nn.Parameter(torch.empty(E, 2 * F)) if moe.projection_bias else None
        self.down_bias = nn.Parameter(torch.empty(E, D)) if moe.projection_bias else None

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        weights = ExpertWeights(
            gate_up=self.gate_up.to(dtype),
            down=self.down.to(dtype),
            gate_up_bias=None if self.gate_up_bias is None else self.gate_up_bias.to(dtype),
            down_bias=None if self.down_bias is None else self.down_bias.to(dtype),
            activation=self.activation,
        )
        shape = ExpertShape(
            hidden_size=x.shape[1],
            moe_intermediate_size=self.down.shape[2],
            device=x.device.type,
            dtype=dtype,
            activation=self.activation.name,
            has_bias=weights.has_bias,
        )
        run = BACKENDS[pick(self.backend, shape)].run
        if not self.weighs_inputs:
            return run(x.to(dtype), routing, weights)
        rows_ND, routing_of_rows = rows_with_weighted_inputs(x.to(dtype), routing)
        return sum_rows_of_tokens(run(rows_ND, routing_of_rows, weights), routing)
