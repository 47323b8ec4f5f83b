"""A run that starts from a model: which one, whether the config fits it, and what of it is trained."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moesaic.checkpoint.adapters import BASE, base_of, base_record, start_values
from moesaic.checkpoint.load import empty_model, load, load_tokenizer
from moesaic.checkpoint.resolve import ModelSource, require_weights, resolve_model
from moesaic.checkpoint.run_state import RunState
from moesaic.config import TrainConfig
from moesaic.config_io import to_mapping
from moesaic.errors import UsageError
from moesaic.model.depth import DepthRouter
from moesaic.model.lora import add_adapters, chosen_places
from moesaic.model.routers import Router
from moesaic.model.transformer import Transformer
from moesaic.tokenizer import byte_tokenizer
from moesaic.tokenizer import load_tokenizer as read_tokenizer


@dataclass(frozen=True)
class Start:
    """What a run started from."""

    record: Mapping[str, str]
    """As its states keep it."""
    source: ModelSource | None
    """Where its weights are read; None where those of a state take their place."""


def find_start(config: TrainConfig, state: RunState | None) -> Start | None:
    """The model that a new run, or one that goes on from `state`, starts from; None: from random weights.

    Raises UsageError for an unknown MODEL, one with packed weights, one that [model] or data.tokenizer contradict, or
    one that cannot have such adapters, MoesaicError when the model under a run's adapters is not there any more or has
    changed.
    """
    if not config.init_from:
        return None
    if state is not None:
        return Start(state.value(BASE), base_of(state) if config.lora else None)
    source = resolve_model(config.init_from)
    require_weights(source)
    _require_model(config, start_values(config.init_from)["model"])
    _require_tokenizer(config, source)
    if config.lora is not None:
        chosen_places(empty_model(config.model), config.lora)
    return Start(base_record(source), source)


def read_start(config: TrainConfig, start: Start, device: torch.device) -> Transformer | None:
    """The model that `start` names, in float32; None where a state holds all of it."""
    if start.source is None:
        return None
    return load(start.source, dtype="float32", device=str(device), backend=config.backend)


def choose_trained(model: Transformer, config: TrainConfig) -> None:
    """Freezes what the config leaves as it is, and adds the adapters that it asks for.

    Raises UsageError for adapters that this model cannot have.
    """
    if config.lora is not None:
        add_adapters(model, config.lora, config.seed)
    if config.freeze_router:
        for module in model.modules():
            if isinstance(module, Router | DepthRouter):
                module.requires_grad_(False)


def trained_part(model: Transformer, config: TrainConfig) -> str | None:
    """How many parameters are trained, of how many; None where nothing is said in advance because all are."""
    if not config.init_from and not config.freeze_router:
        return None
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained)
    start = f"starts from {config.init_from}, " if config.init_from else ""
    if config.lora is not None:
        frozen = sum(size for size, is_trained in sizes if not is_trained)
        what = f"{trained:,} parameters of adapters, rank {config.lora.rank} on {', '.join(config.lora.targets)}"
        return f"{start}trains {what}: {trained / frozen:.2%} of the {frozen:,} that stay as they are"
    total = sum(size for size, _ in sizes)
    rest = "; the routers stay as they are" if config.freeze_router else ""
    return f"{start}trains {trained:,} of {total:,} parameters{rest}"


def _require_model(config: TrainConfig, base: Mapping[str, Any]) -> None:
    given = to_mapping(config.model)
    for key, ours, theirs in _differences(given, base):
        raise UsageError(
            f"model.{key} is {ours}, but {config.init_from} has {theirs}; leave [model] out, since init_from gives it"
        )


def _differences(one: Mapping[str, Any], other: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in sorted(one.keys() | other.keys()):
        ours, theirs = one.get(key), other.get(key)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from _differences(ours, theirs, f"{where}{key}.")
        elif ours != theirs:
            yield f"{where}{key}", ours, theirs


def _require_tokenizer(config: TrainConfig, source: ModelSource) -> None:
    own, spec = load_tokenizer(source), config.data.tokenizer
    given = byte_tokenizer() if spec == "bytes" else read_tokenizer(spec)
    if given.fingerprint != own.fingerprint:
        raise UsageError(
            f"data.tokenizer {spec} has {given.vocab_size:,} entries and is not that of {config.init_from} "
            f"({own.vocab_size:,}), whose weights know its own tokens only; leave data.tokenizer out"
        )
