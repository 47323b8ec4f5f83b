"""The routed experts of one layer: their weights, and the backend that computes them.

T tokens, E experts, D hidden size, F expert intermediate size.
"""

import torch
from torch import Tensor, nn

from moesaic.config import ModelConfig
from moesaic.ops import BACKENDS, ExpertShape, ExpertWeights, Routing, pick


class Experts(nn.Module):
    """E stacked SwiGLU experts. x (T, D) and a routing -> the weighted sum of each token's experts (T, D)."""

    def __init__(self, config: ModelConfig, backend: str = "auto") -> None:
        super().__init__()
        assert config.moe is not None
        moe = config.moe
        self.backend = backend
        self.gate_up = nn.Parameter(torch.empty(moe.num_experts, 2 * moe.moe_intermediate_size, config.hidden_size))
        self.down = nn.Parameter(torch.empty(moe.num_experts, config.hidden_size, moe.moe_intermediate_size))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        weights = ExpertWeights(gate_up=self.gate_up.to(dtype), down=self.down.to(dtype))
        shape = ExpertShape(
            hidden_size=x.shape[1], moe_intermediate_size=self.down.shape[2], device=x.device.type, dtype=dtype
        )
        return BACKENDS[pick(self.backend, shape)].run(x.to(dtype), routing, weights)
