"""Initial weights, in one of two ways, from one seeded stream."""

import torch
from torch import Tensor, nn

from moesaic.config import ModelConfig

_RESIDUAL_WRITERS = ("o_proj", "down_proj", "down")


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill all parameters and buffers of `model`, in the order of their names; norms are 1, biases and buffers 0.

    With `initializer_range` above 0 every matrix has that standard deviation, and those that write to the residual
    stream 1/sqrt(2 x layers) of it, as in GPT-2. With 0 the scale fits the matrix: 1/(2 sqrt(fan_in)) inside a block,
    0.02 for embedding, head and routers, and nothing at all for what writes to the residual stream, so that every block
    starts as the identity; Muon, whose updates have one size for all
    matrices, learns faster from there.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    for name, parameter in model.named_parameters():
        leaf = name.split(".")[-2] if name.endswith(".weight") else name.split(".")[-1]
        if leaf == "bias":
            parameter.zero_()
        elif leaf.endswith("norm"):
            parameter.fill_(1.0)
        else:
            std = _fixed_std(leaf, config) if config.initializer_range else _fitted_std(leaf, parameter)
            values = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
            parameter.copy_(values)
    for _, buffer in model.named_buffers():
        buffer.zero_()


def _fixed_std(leaf: str, config: ModelConfig) -> float:
    depth_scale = (2 * config.num_hidden_layers) ** -0.5 if leaf in _RESIDUAL_WRITERS else 1.0
    return config.initializer_range * depth_scale


def _fitted_std(leaf: str, parameter: Tensor) -> float:
    if leaf in _RESIDUAL_WRITERS:
        return 0.0
    if leaf in ("embed_tokens", "lm_head", "router"):
        return 0.02
    return 0.5 * parameter.shape[-1] ** -0.5
