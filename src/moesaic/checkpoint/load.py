"""Model and tokenizer from a run directory, a Hugging Face directory or a hub id.

The model is made without memory and then filled tensor by tensor, each read straight from the file in its final type.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moesaic.checkpoint.families import family_of
from moesaic.checkpoint.families.hf_config import token_ids
from moesaic.checkpoint.families.rules import Layout, TensorRule
from moesaic.checkpoint.resolve import ModelSource, resolve_model
from moesaic.checkpoint.run_state import newest_run_state
from moesaic.config import ModelConfig, TrainConfig
from moesaic.config_io import from_mapping
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.transformer import Transformer
from moesaic.ops import DTYPES
from moesaic.ops.device import resolve_device
from moesaic.tokenizer import Tokenizer
from moesaic.tokenizer import load_tokenizer as read_tokenizer
from moesaic.weights_io import WeightDirectory, read_json

Shape = tuple[int, ...]


def load(
    path: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantization: str | None = None,
    memory: str | None = None,
    backend: str = "auto",
) -> Transformer:
    """The model that MODEL (a run directory, a Hugging Face directory or a hub id) names, ready to run.

    Args:
        dtype: `auto` is float32 for a run and what config.json says for a Hugging Face directory (float16 is read as
            float32). Routers keep float32 weights when they are stored so.
        device: `auto` is cuda where there is one.
        quantization, memory: not there yet; anything but None is refused.
        backend: how experts are computed, see `moesaic.ops.BACKENDS`.

    Warns when a damaged state of a run was passed over for an older one.
    Raises UsageError for an unknown MODEL, dtype or device, MoesaicError for files without the model they promise.
    """
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"dtype {dtype!r} is not known; choose auto, {' or '.join(DTYPES)}")
    for name, value in (("quantization", quantization), ("memory", memory)):
        if value is not None:
            raise UsageError(
                f"{name}={value!r} is not supported yet; leave it out, or use dtype='bfloat16' to halve the bytes"
            )
    target = resolve_device(device)
    source = resolve_model(path)
    read = {"run": _load_run, "hf": _load_hf}[source.kind]
    return read(source, DTYPES.get(dtype), target, backend).eval()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer that belongs to MODEL.

    Raises MoesaicError when it is not the one that a run was trained with.
    """
    source = resolve_model(path)
    tokenizer = read_tokenizer(source.directory)
    if source.kind == "run":
        trained_with = newest_run_state(source.directory).value("tokenizer")
        if tokenizer.fingerprint != trained_with:
            raise MoesaicError(
                f"{source.directory / 'tokenizer.json'} or tokenizer_config.json is damaged: the run was trained with "
                f"another; remove both and resume the run, which writes them again"
            )
    return tokenizer


def load_config(source: ModelSource) -> ModelConfig:
    """The config of a Hugging Face directory; MoesaicError, naming config.json, for what we cannot do."""
    values = read_json(source.config_path)
    try:
        config = family_of(values["model_type"]).config_from_hf(values)
        generation = source.directory / "generation_config.json"
        eos_token_ids = token_ids(read_json(generation).get("eos_token_id")) if generation.exists() else ()
        return replace(config, eos_token_ids=eos_token_ids or config.eos_token_ids)
    except MoesaicError as error:
        raise MoesaicError(f"{source.directory}: {error}") from error


def _load_run(source: ModelSource, dtype: torch.dtype | None, device: torch.device, backend: str) -> Transformer:
    state = newest_run_state(source.directory)
    for warning in state.warnings:
        warnings.warn(f"{source.directory}: {warning}", stacklevel=3)
    stored = state.load_tensors("model")
    # The config inside the state is under its checksums; RUN/config.json is only what started the run.
    model = _empty_model(from_mapping(TrainConfig, state.value("config")).model, backend)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _check_shapes(expected, {name: tuple(tensor.shape) for name, tensor in stored.items()}, state.directory)
    wanted = dtype or torch.float32
    tensors = {name: tensor.to(device, _final_dtype(name, tensor.dtype, wanted)) for name, tensor in stored.items()}
    model.load_state_dict(tensors, assign=True)
    return model


def _load_hf(source: ModelSource, dtype: torch.dtype | None, device: torch.device, backend: str) -> Transformer:
    config = load_config(source)
    values = read_json(source.config_path)
    wanted = dtype or _stored_dtype(values)
    layout = family_of(values["model_type"]).layout(config)
    model = _empty_model(config, backend)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with WeightDirectory(source.directory) as weights:
        _check_layout(layout, shapes, weights)
        tensors = {rule.ours: _read(rule, shapes[rule.ours], weights, wanted, device) for rule in layout.rules}
    model.load_state_dict(tensors, assign=True)
    return model


def _empty_model(config: ModelConfig, backend: str) -> Transformer:
    with torch.device("meta"):
        return Transformer(config, backend)


def _read(rule: TensorRule, shape: Shape, weights: WeightDirectory, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One tensor of ours, from one on disk or from the pieces of each of its rows."""
    whole = rule.whole in weights or not rule.pieces
    stored = weights.dtype(rule.whole if whole else rule.pieces[0][0])
    tensor = torch.empty(shape, dtype=_final_dtype(rule.ours, stored, dtype), device=device)
    if whole:
        return tensor.copy_(weights.read(rule.whole))
    for row, names in zip(tensor, rule.pieces, strict=True):
        for part, name in zip(row.chunk(len(names)), names, strict=True):
            part.copy_(weights.read(name))
    return tensor


def _check_layout(layout: Layout, shapes: Mapping[str, Shape], weights: WeightDirectory) -> None:
    """Raises MoesaicError unless the files hold exactly the tensors that the config promises, in plain types."""
    expected: dict[str, Shape] = {}
    for rule in layout.rules:
        shape = shapes[rule.ours]
        if rule.whole in weights or not rule.pieces:
            expected[rule.whole] = shape
        else:
            rows = shape[1] // len(rule.pieces[0])
            expected |= {name: (rows, *shape[2:]) for names in rule.pieces for name in names}
    expected |= {name: shape for name, shape in layout.zeros.items() if name in weights}
    found = {name: weights.shape(name) for name in weights.names if name in expected or not layout.ignored(name)}
    _check_shapes(expected, found, weights.directory)
    for name in expected:
        weights.dtype(name)
    for name in layout.zeros:
        if name in weights and weights.read(name).count_nonzero():
            raise MoesaicError(f"tensor {name} in {weights.directory} is not zero; this bias is not supported")


def _check_shapes(expected: Mapping[str, Shape], found: Mapping[str, Shape], where: Path) -> None:
    problems = [f"{name} is missing (expected {list(shape)})" for name, shape in expected.items() if name not in found]
    problems += [f"{name} {list(shape)} is unknown" for name, shape in found.items() if name not in expected]
    problems += [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise MoesaicError(f"weights in {where} do not fit its config.json: {'; '.join(problems[:3])}{more}")


def _final_dtype(name: str, stored: torch.dtype, wanted: torch.dtype) -> torch.dtype:
    """The selection bias is always float32; routers never lose precision, because near ties would flip."""
    if name.endswith("router.expert_bias"):
        return torch.float32
    return torch.promote_types(stored, wanted) if name.endswith("router.weight") else wanted


def _stored_dtype(values: Mapping[str, object]) -> torch.dtype:
    name = values.get("dtype") or values.get("torch_dtype") or "float32"
    dtypes = DTYPES | {"float16": torch.float32}
    if not isinstance(name, str) or name not in dtypes:
        raise MoesaicError(f"config.json: dtype = {name!r} is not supported, only {', '.join(dtypes)}")
    return dtypes[name]
