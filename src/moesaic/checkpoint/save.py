"""Export: a Hugging Face directory that transformers and its relatives load, with the same logits."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moesaic.checkpoint.families import family_for_export
from moesaic.checkpoint.families.hf_config import eos_as_hf
from moesaic.checkpoint.families.rules import Layout
from moesaic.errors import UsageError
from moesaic.model.transformer import Transformer
from moesaic.tokenizer import Tokenizer
from moesaic.weights_io import MAX_SHARD_BYTES, atomic_directory, write_json, write_sharded


def export_model(
    model: Transformer, tokenizer: Tokenizer | None, directory: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> str:
    """Writes config.json, the weights, generation_config.json and the tokenizer; returns the family's model_type.

    The family follows from the model: dense is qwen3, softmax top-k qwen3_moe, sigmoid top-k glm4_moe.

    Raises UsageError when `directory` holds something, MoesaicError for what the family cannot express, by name.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{directory} exists and is not empty; name a new directory, or remove it: rm -r {directory}")
    config = model.config
    if tokenizer is not None and tokenizer.eos_id is not None and not config.eos_token_ids:
        config = replace(config, eos_token_ids=(tokenizer.eos_id,))
    family = family_for_export(config)
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    values = family.config_to_hf(config) | {"dtype": dtype, "torch_dtype": dtype}
    tensors = _as_on_disk(family.layout(config), model.state_dict(), model.embed_tokens.weight.dtype)
    with atomic_directory(directory, bytes_needed=sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        write_json(temporary / "config.json", values)
        special_tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": eos_as_hf(config.eos_token_ids)}
        write_json(temporary / "generation_config.json", {"_from_model_config": True, **special_tokens})
        write_sharded(temporary, tensors, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(temporary)
    return family.model_type


def _as_on_disk(layout: Layout, ours: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Our tensors under the names of the family. Pieces are views: only what is scaled takes memory."""
    tensors: dict[str, Tensor] = {}
    for rule in layout.rules:
        tensor = ours[rule.ours].detach()
        if rule.scale_on_write != 1.0:
            tensor = tensor * rule.scale_on_write
        if not rule.pieces:
            tensors[rule.whole] = tensor
            continue
        for row, names in zip(tensor, rule.pieces, strict=True):
            tensors |= zip(names, row.chunk(len(names)), strict=True)
    return tensors | {name: torch.zeros(shape, dtype=dtype) for name, shape in layout.zeros.items()}
