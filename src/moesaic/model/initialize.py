"""Initial weights, in one of two ways, from one seeded stream."""

import torch
from torch import Tensor, nn

from moesaic.config import ModelConfig

_RESIDUAL_WRITERS = ("o_proj", "down_proj", "down", "constants")
_ZEROS = ("bias", "gate_up_bias", "down_bias", "sinks", "noise_weight")
_ONES = ("norm", "scale")


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill all parameters and buffers of `model`, in the order of their names; norms and the scale of soft routers are
    1; biases, attention sinks, the noise of noisy routers and buffers 0. Only the other matrices draw from the stream,
    so the same ones are the same with and without those.

    With `initializer_range` above 0 every matrix has that standard deviation, and those that write to the residual
    stream 1/sqrt(2 x layers) of it, as in GPT-2. With 0 the scale fits the matrix: 1/(2 sqrt(fan_in)) inside a block,
    0.02 for embedding, head, routers, the gate of shared experts and the mix of constant ones, and nothing at all for
    what writes to the residual stream, so that every block starts as the identity; Muon, whose updates have one size
    for all matrices, learns faster from there. Where a norm follows the writer, its zeros would make that norm's
    gradient 1/sqrt(eps), so there it is scaled like the others.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    for name, parameter in model.named_parameters():
        leaf = name.split(".")[-2] if name.endswith(".weight") else name.split(".")[-1]
        if leaf in _ZEROS:
            parameter.zero_()
        elif leaf.endswith(_ONES):
            parameter.fill_(1.0)
        else:
            std = _fixed_std(leaf, config) if config.initializer_range else _fitted_std(leaf, parameter, config)
            values = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
            parameter.copy_(values)
    for _, buffer in model.named_buffers():
        buffer.zero_()


def _fixed_std(leaf: str, config: ModelConfig) -> float:
    depth_scale = (2 * config.num_hidden_layers) ** -0.5 if leaf in _RESIDUAL_WRITERS else 1.0
    return config.initializer_range * depth_scale


def _fitted_std(leaf: str, parameter: Tensor, config: ModelConfig) -> float:
    if leaf in _RESIDUAL_WRITERS and config.norm_placement == "pre":
        return 0.0
    if leaf in ("embed_tokens", "lm_head", "router", "shared_expert_gate", "mix"):
        return 0.02
    return 0.5 * parameter.shape[-1] ** -0.5
