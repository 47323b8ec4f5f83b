"""Gradients of a model that is spread over ranks: their sums, their norm, and clipping.

Losses divide by what the whole batch holds, on all ranks, so gradients are summed and never averaged. A rank's experts
have the gradients of all tokens of its ep group already.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesaic.model.transformer import Transformer
from moesaic.parallel.ranks import Ranks

BUCKET_NUMBERS = 1 << 24
"""Gradients that are summed in one collective, at most, unless one alone is larger."""


def local(tensor: Tensor) -> Tensor:
    """The part of it that is here, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_expert(model: Transformer) -> dict[str, bool]:
    """By the name of every parameter: whether ranks of an ep group hold different ones."""
    experts = {parameter for layer in model.moe_layers for parameter in layer.experts.parameters()}
    return {name: parameter in experts for name, parameter in model.named_parameters()}


@torch.no_grad()
def sum_gradients(model: Transformer, ranks: Ranks) -> None:
    """Adds up what the ranks learned, once per optimizer step. Whoever learned nothing counts as 0, on all ranks."""
    if ranks.count == 1:
        return
    of_expert = is_expert(model)
    for expert in (False, True):
        gradients = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or of_expert[name] != expert:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(local(parameter.grad))
        if ranks.replicas(of_expert=expert) > 1:
            for bucket in _buckets(gradients):
                _sum_bucket(bucket, ranks, of_expert=expert)


def gradient_norm(model: Transformer, ranks: Ranks) -> Tensor:
    """() of all gradients as one vector, in which each parameter of the model is once, however many ranks hold it."""
    if ranks.count == 1:
        return nn.utils.get_total_norm([each.grad for each in model.parameters() if each.grad is not None])
    of_expert = is_expert(model)
    squares = torch.zeros((), dtype=torch.float64, device=model.embed_tokens.weight.device)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            square = torch.linalg.vector_norm(local(parameter.grad), dtype=torch.float64).square()
            squares += square / ranks.replicas(of_expert=of_expert[name])
    return ranks.sum(squares).sqrt()


def clip_gradients(model: nn.Module, largest: float, norm: Tensor) -> None:
    """Scales all gradients, which have the norm `norm`, so that it is at most `largest`."""
    if not any(isinstance(each, DTensor) for each in model.parameters()):
        nn.utils.clip_grads_with_norm_(model.parameters(), largest, norm)
        return
    factor = float((largest / (norm + 1e-6)).clamp(max=1.0))  # as torch does, which takes no part for the whole
    for parameter in model.parameters():
        if parameter.grad is not None:
            local(parameter.grad).mul_(factor)


def _buckets(gradients: list[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    size = BUCKET_NUMBERS
    for gradient in gradients:
        if size + gradient.numel() > BUCKET_NUMBERS or buckets[-1][0].dtype != gradient.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(gradient)
        size += gradient.numel()
    return buckets


def _sum_bucket(gradients: list[Tensor], ranks: Ranks, *, of_expert: bool) -> None:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    ranks.sum_replicas(flat, of_expert=of_expert)
    for gradient, summed in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
