"""Reading the part of a model that one of several ranks holds: some experts of every layer, and on the first rank all
that is not of experts.

One layer's experts are read at a time, and those of other ranks dropped, so a rank takes little more than its part.
"""

import torch

from moesaic.checkpoint.hf_directory import HFDirectory
from moesaic.checkpoint.load_within import Read
from moesaic.model.experts import Experts
from moesaic.model.transformer import Transformer
from moesaic.parallel.inference import ExpertShare


def load_share(
    model: Transformer, stored: HFDirectory, read: Read, dtype: torch.dtype, device: torch.device, share: ExpertShare
) -> None:
    """Fills `model`, on the meta device; `read` gives tensors of it, those that are not packed in type `dtype`.

    Raises MoesaicError when this machine's memory cannot hold the part.
    """
    state, names_by_layer = model.state_dict(), _names_of_experts(model)
    of_experts = {name for names in names_by_layer for name in names}
    others = [name for name in state if name not in of_experts]
    parts = {}
    for layer, names in zip(model.moe_layers, names_by_layer, strict=True):
        bounds = share.bounds(layer.experts.num_experts)
        parts |= {name: layer.experts.part(_leaf(name), state[name], *bounds) for name in names}
    if share.is_first:
        parts |= {name: state[name] for name in others}
    stored.require_memory(parts, dtype, device)

    tensors = dict(read(others)) if share.is_first else {name: state[name] for name in others}
    for layer, names in zip(model.moe_layers, names_by_layer, strict=True):
        bounds, whole = share.bounds(layer.experts.num_experts), dict(read(names))
        for name in names:
            tensors[name] = layer.experts.part(_leaf(name), whole.pop(name), *bounds)
        layer.experts.keep(*bounds)
    model.load_state_dict(tensors, assign=True)
    model.requires_grad_(False)


def keep_share(model: Transformer, share: ExpertShare) -> None:
    """The same of a model in memory. Raises UsageError unless every rank gets an expert."""
    share.require(model.config.moe.num_experts if model.config.moe else None)
    for layer in model.moe_layers:
        layer.experts.keep(*share.bounds(layer.experts.num_experts))
    model.requires_grad_(False)
    if not share.is_first:
        of_experts = {name for names in _names_of_experts(model) for name in names}
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in of_experts}
        model.load_state_dict({name: tensor.to("meta") for name, tensor in state.items()}, assign=True, strict=False)


def _names_of_experts(model: Transformer) -> list[list[str]]:
    """In the model's state, by layer that has experts."""
    return [
        [f"{name}.{leaf}" for leaf in module.state_dict()]
        for name, module in model.named_modules()
        if isinstance(module, Experts)
    ]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
