"""A finished model over the ranks of a mesh: experts over ep, then every parameter over fsdp by FSDP2; and its tensors,
or those of its optimizer, between the parts of the ranks and the whole ones that a single process has.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from moesaic.config import ParallelConfig
from moesaic.model.transformer import Transformer
from moesaic.parallel.expert_parallel import apply_expert_parallel, expert_bounds
from moesaic.parallel.gradients import is_expert
from moesaic.parallel.ranks import Ranks


def spread(model: Transformer, ranks: Ranks, config: ParallelConfig) -> None:
    """Leaves this rank its part of the model; make optimizers afterwards.

    Raises UsageError when there are more ranks in an ep group than experts.
    """
    if ranks.mesh is None:
        return
    apply_expert_parallel(
        model, ranks.mesh, transport=config.transport, gradient_transport=config.gradient_transport
    )  # fmt: skip
    if ranks.fsdp > 1:
        _cut(model, ranks)


def _cut(model: Transformer, ranks: Ranks) -> None:
    assert ranks.mesh is not None
    mesh = ranks.mesh["fsdp"]
    for layer in model.moe_layers:
        fully_shard(layer.experts, mesh=mesh)  # alone, so that the largest part is not gathered before its turn
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Sums: the wrapper would divide by its ranks, and the loss has divided by the tokens of all ranks already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def whole_tensors(model: Transformer, tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """`tensors` by name of a parameter or buffer, or NAME/MOMENT, as one process would have them.

    All ranks take part; the first one gets them, the others only those that need no exchange.
    """
    if ranks.count == 1:
        return dict(tensors)
    of_expert = is_expert(model)
    return {
        key: _whole_experts(value, model, ranks) if _is_split(key, value, of_expert) and ranks.ep > 1 else _whole(value)
        for key, value in tensors.items()
    }


@torch.no_grad()
def keep_parts(model: Transformer, tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The way back: this rank's parts of whole tensors."""
    if ranks.count == 1:
        return dict(tensors)
    of_expert, parameters = is_expert(model), dict(model.named_parameters())
    parts = {}
    for key, value in tensors.items():
        if _is_split(key, value, of_expert) and ranks.ep > 1:
            bounds = expert_bounds(len(value), ranks.ep)
            rank = ranks.group("ep").rank()
            value = value[bounds[rank] : bounds[rank + 1]]
        like = parameters.get(key.split("/")[0])
        if isinstance(like, DTensor) and value.ndim:
            value = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
        parts[key] = value
    return parts


def _is_split(key: str, value: Tensor, of_expert: Mapping[str, bool]) -> bool:
    """Whether it has a row for each expert; the step that AdamW counts has not."""
    return value.ndim > 0 and of_expert.get(key.split("/")[0], False)


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _whole_experts(value: Tensor, model: Transformer, ranks: Ranks) -> Tensor:
    """(e, ...) -> (E, ...) on every rank of the ep group."""
    assert model.config.moe is not None
    mine = _whole(value).contiguous()
    bounds = expert_bounds(model.config.moe.num_experts, ranks.ep)
    parts = [mine.new_empty(last - first, *mine.shape[1:]) for first, last in pairwise(bounds)]
    largest = max(len(part) for part in parts)
    padded = mine.new_zeros(largest, *mine.shape[1:])
    padded[: len(mine)] = mine
    gathered = [torch.empty_like(padded) for _ in parts]
    dist.all_gather(gathered, padded, group=ranks.group("ep"))
    return torch.cat([one[: len(part)] for one, part in zip(gathered, parts, strict=True)])
