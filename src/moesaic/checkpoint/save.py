"""Export: a Hugging Face directory that transformers and its relatives load, with the same logits."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moesaic.checkpoint.families import family_for_export
from moesaic.checkpoint.families.family import Family
from moesaic.checkpoint.families.keys import eos_as_hf
from moesaic.checkpoint.families.layout import Layout, StoredTensor
from moesaic.checkpoint.resolve import ModelSource
from moesaic.checks import require
from moesaic.config import ModelConfig
from moesaic.errors import UsageError
from moesaic.model.quantize import is_quantized
from moesaic.model.transformer import Transformer
from moesaic.tokenizer import Tokenizer
from moesaic.weights_io import MAX_SHARD_BYTES, PlannedTensor, atomic_directory, write_json, write_sharded


def export_model(
    model: Transformer, tokenizer: Tokenizer | None, directory: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> str:
    """Writes config.json, the weights, generation_config.json and the tokenizer; returns the family's model_type.

    A model that was read from a family is written as that family; one that was made here as the first that can express
    it: dense is qwen3, softmax top-k qwen3_moe, sigmoid top-k glm4_moe. What the family stores joined or scaled is
    made one stored tensor at a time.

    Raises UsageError when `directory` cannot be new or the model is quantised, MoesaicError for what the family
    cannot express, by name.
    """
    directory = new_directory(directory)
    require(
        not is_quantized(model),
        "the model is quantised, and an exported one has plain weights; export the one that it was made from",
    )
    config = with_eos_of(model.config, tokenizer)
    family = family_for_export(config)
    ours = model.state_dict()
    tensors = plan(family.layout(config), ours, partial(_stored, family, config, ours))
    with atomic_directory(directory, bytes_needed=sum(tensor.nbytes for tensor in tensors)) as temporary:
        write_configs(temporary, family, config, model.embed_tokens.weight.dtype)
        write_sharded(temporary, tensors, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(temporary)
    return family.model_type


def new_directory(path: str | Path) -> Path:
    """Where a model may be written: `path`, absolute and without links in it.

    Raises UsageError when it holds something, or cannot become a directory of its own.
    """
    try:
        directory = Path(os.path.expanduser(path)).resolve()
    except RuntimeError as error:
        raise UsageError(f"{path} is a symbolic link that leads to itself; name a new directory") from error
    existing = next(one for one in (directory, *directory.parents) if one.exists())
    if not existing.is_dir():
        raise UsageError(f"{path} cannot be a directory, because {existing} is a file; name a new directory")
    # No advice to remove it: what is there may be the model itself.
    if directory.exists() and any(directory.iterdir()):
        raise UsageError(f"{path} exists and is not empty; name a new directory")
    if directory.is_mount():
        raise UsageError(f"{path} is a mount point, which cannot be replaced; name a directory in it: {path}/model")
    return directory


def require_no_model(directory: Path) -> None:
    """Raises UsageError where a run would be written over a model's configuration."""
    weights = sorted(path.name for path in directory.glob("*.safetensors")) if directory.is_dir() else []
    if weights:
        raise UsageError(f"{directory} holds a model ({weights[0]}); name another directory with --out")


def require_outside(directory: Path, source: ModelSource) -> None:
    """Raises UsageError when a new directory would lie in that of a model, which stays as it is."""
    if directory.is_relative_to(source.directory.resolve()):
        raise UsageError(f"{directory} lies inside the model {source.directory}; name a directory outside of it")


def with_eos_of(config: ModelConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """A model made here does not say which token ends a text; its tokenizer does."""
    if tokenizer is None or tokenizer.eos_id is None or config.eos_token_ids:
        return config
    return replace(config, eos_token_ids=(tokenizer.eos_id,))


def write_configs(directory: Path, family: Family, config: ModelConfig, dtype: torch.dtype) -> None:
    """config.json and generation_config.json."""
    name = str(dtype).removeprefix("torch.")
    write_json(directory / "config.json", family.config_to_hf(config) | {"dtype": name, "torch_dtype": name})
    special_tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": eos_as_hf(config.eos_token_ids)}
    write_json(directory / "generation_config.json", {"_from_model_config": True, **special_tokens})


def plan(layout: Layout, ours: Mapping[str, Tensor], data: Callable[[StoredTensor], Tensor]) -> Sequence[PlannedTensor]:
    """What a family's files hold, in the order of its layout. `ours`, a model's state, gives shapes and types only, and
    may be on the meta device; `data` makes one stored tensor when it is its turn."""
    stored = [one for alternatives in layout.tensors for one in alternatives[0]]
    dtype = ours["embed_tokens.weight"].dtype
    return [
        *(
            PlannedTensor(one.name, one.shape(ours), ours[one.regions[0].ours].dtype, partial(data, one))
            for one in stored
        ),
        *(
            PlannedTensor(name, shape, dtype, partial(torch.zeros, shape, dtype=dtype))
            for name, shape in layout.fillers.items()
        ),
    ]


def _stored(family: Family, config: ModelConfig, ours: Mapping[str, Tensor], stored: StoredTensor) -> Tensor:
    """A view where it can be: only what is joined or scaled takes memory."""
    views = stored.views(ours)
    tensor = views[0] if len(views) == 1 else torch.cat(views)
    folds = family.folds_into_experts and stored.regions[0].ours.endswith("experts.down")
    scale = config.moe.routed_scaling_factor if folds and config.moe else 1.0
    return tensor if scale == 1.0 else tensor * scale
