"""Pruning: a model's directory with some experts of each layer left out, and their part of the router with them.

What stays is what it was. A router then chooses the best of the experts that are left; weights that are a softmax over
all experts, and not normalised after the choice, grow by what the others had.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moesaic.checkpoint.plain_model import Progress
from moesaic.checkpoint.reduce_experts import Read, Reduced, open_reducible, require_kept
from moesaic.checkpoint.resolve import ModelSource
from moesaic.weights_io import MAX_SHARD_BYTES


def prune(
    model: str | Path | ModelSource,
    directory: str | Path,
    kept: Mapping[int, Sequence[int]],
    *,
    dtype: str = "auto",
    offline: bool = False,
    revision: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = lambda label, done, total: None,
) -> Reduced:
    """Writes `directory`, a Hugging Face directory of MODEL's family, in which layer number i has the experts `kept[i]`
    of MODEL, in ascending order. All layers keep as many, since no family has a number of experts for each layer.

    Raises UsageError for lists that do not fit MODEL, and like `open_reducible`.
    """
    by_layer = {layer: sorted(experts) for layer, experts in kept.items()}
    keep = len(next(iter(by_layer.values()), ()))
    with open_reducible(model, directory, keep, dtype=dtype, offline=offline, revision=revision) as reducible:
        require_kept(reducible.moe, reducible.layers, by_layer)

        def reduce(layer: int, parts: Sequence[str], read: Read) -> Mapping[str, Tensor]:
            rows = torch.tensor(by_layer[layer])
            return {part: read(part)[rows] for part in parts}

        return reducible.write(reduce, progress, max_shard_bytes)
