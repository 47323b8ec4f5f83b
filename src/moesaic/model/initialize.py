"""Initial weights: normal matrices of one scale, unit norms, zero biases."""

import torch
from torch import nn

from moesaic.config import ModelConfig


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill all parameters and buffers of `model` from one seeded stream, in the order of their names in the model.

    Projections that write to the residual stream (`o_proj`, `down_proj`, `down`) shrink with 1/sqrt(2 x layers), as in
    GPT-2, so that the stream's variance does not grow with depth.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    depth_scale = (2 * config.num_hidden_layers) ** -0.5
    for name, parameter in model.named_parameters():
        leaf = name.split(".")[-2] if name.endswith(".weight") else name.split(".")[-1]
        if leaf == "bias":
            parameter.zero_()
        elif leaf.endswith("norm"):
            parameter.fill_(1.0)
        else:
            std = config.initializer_range or parameter.shape[-1] ** -0.5
            if leaf in ("o_proj", "down_proj", "down"):
                std *= depth_scale
            values = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
            parameter.copy_(values)
    for _, buffer in model.named_buffers():
        buffer.zero_()
