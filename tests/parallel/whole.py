"""Whole tensors of a model that is spread over ranks, by gathering them: the oracle of states in pieces."""

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moesaic.model.transformer import Transformer
from moesaic.parallel.expert_parallel import expert_bounds
from moesaic.parallel.gradients import is_expert
from moesaic.parallel.ranks import Ranks


@torch.no_grad()
def whole_tensors(model: Transformer, tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """`tensors` by name of a parameter or buffer, or NAME/MOMENT, as one process would have them, on every rank."""
    if ranks.count == 1:
        return dict(tensors)
    of_expert = is_expert(model)
    return {
        key: _whole_experts(value, model, ranks) if _is_split(key, value, of_expert) and ranks.ep > 1 else _whole(value)
        for key, value in tensors.items()
    }


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
