"""What a run starts from, and runs that hold adapters alone: which model these belong to, and the two as one.

A state of such a run names its base by place and by the SHA-256 of its weights; with any other weights it would be
another model, so it is then not loaded.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoint.hf_directory import HFDirectory, final_dtype
from moesaic.checkpoint.resolve import CONFIG, ModelSource, resolve_model
from moesaic.checkpoint.run_state import MANIFEST, RunState, newest_run_state
from moesaic.config import TrainConfig
from moesaic.config_io import from_mapping, to_mapping
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.lora import add_adapters, load_adapted_state, merge_adapters
from moesaic.model.transformer import Transformer
from moesaic.weights_io import sha256_of

BASE = "base"
"""Where a state says what its run started from."""


def base_record(source: ModelSource) -> dict[str, str]:
    """What finds a model again, and tells whether it is the same: its directory, name on the hub, and SHA-256."""
    record = {"directory": str(source.directory.resolve()), "sha256": _sha256(source)}
    if source.hub_id is not None:  # a directory of the cache is named by the commit
        record |= {"hub_id": source.hub_id, "revision": source.directory.name}
    return record


def base_of(state: RunState) -> ModelSource:
    """The model that a run with adapters started from.

    Raises MoesaicError when it is not there any more, or not what it was.
    """
    record: Mapping[str, Any] = state.value(BASE)
    directory = Path(record["directory"])
    if not directory.is_dir() and "hub_id" in record:
        source = resolve_model(record["hub_id"], record["revision"])
    else:
        try:
            source = resolve_model(directory)
        except UsageError as error:
            raise MoesaicError(
                f"{state.directory} holds adapters of the model {directory}, which is not there ({error}); put it back"
            ) from error
    if _sha256(source) != record["sha256"]:
        raise MoesaicError(
            f"{state.directory} holds adapters of {directory}, whose weights have changed since; put the old ones "
            "back, or train the adapters anew"
        )
    return source


def merge_state(base: Transformer, config: TrainConfig, state: RunState, dtype: torch.dtype | None) -> Transformer:
    """`base`, with the adapters of a run's state added to its weights in their type, then all in `dtype` if given."""
    assert config.lora is not None
    device = base.embed_tokens.weight.device
    add_adapters(base, config.lora)
    tensors = state.load_tensors("model")
    load_adapted_state(base, {name: tensor.to(device) for name, tensor in tensors.items()})
    merge_adapters(base)
    if dtype is not None:
        tensors = base.state_dict()
        final = {name: value.to(final_dtype(name, value.dtype, dtype)) for name, value in tensors.items()}
        base.load_state_dict(final, assign=True)
    return base


def start_values(init_from: str) -> dict[str, Any]:
    """[model] and data.tokenizer of a run that starts from MODEL, without reading its weights.

    Raises UsageError for an unknown MODEL and for one with packed weights, MoesaicError for a damaged one.
    """
    source = resolve_model(init_from)
    if source.kind == "run":
        config = from_mapping(TrainConfig, newest_run_state(source.directory).value("config")).model
    else:
        with HFDirectory(source.directory) as stored:
            if stored.quantization is not None:
                raise UsageError(
                    f"{init_from} is quantised ({stored.quantization.scheme}), and packed weights cannot be trained; "
                    "name the model that it was made from in init_from"
                )
            config = stored.config
    return {"model": to_mapping(config), "tokenizer": str(source.directory)}


def _sha256(source: ModelSource) -> str:
    """Of the config and the weights; of a run, of its newest state, which names the SHA-256 of all that is in it."""
    if source.kind == "run":
        return sha256_of(newest_run_state(source.directory).directory / MANIFEST)
    files = [source.directory / CONFIG, *sorted(source.directory.glob("*.safetensors"))]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()
