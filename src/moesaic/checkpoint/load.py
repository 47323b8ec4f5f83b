"""Model and tokenizer from a run directory, a Hugging Face directory or a hub id.

The model is made without memory and then filled tensor by tensor, each read straight from the file in its final type.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moesaic.checkpoint.adapters import base_of, merge_state
from moesaic.checkpoint.hf_directory import HFDirectory, check_shapes, final_dtype
from moesaic.checkpoint.load_share import keep_share, load_share
from moesaic.checkpoint.load_within import Read, load_within
from moesaic.checkpoint.packing import PackingReader
from moesaic.checkpoint.resolve import ModelSource, require_weights, resolve_model
from moesaic.checkpoint.run_state import newest_run_state
from moesaic.config import ModelConfig, TrainConfig
from moesaic.config_io import from_mapping
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.quantize import SCHEMES, make_quantization, quantize_model
from moesaic.model.transformer import Transformer
from moesaic.ops import DTYPES
from moesaic.ops.device import resolve_device
from moesaic.parallel.inference import ExpertShare
from moesaic.residency.memory_plan import parse_bytes
from moesaic.residency.residency import place_experts
from moesaic.tokenizer import Tokenizer
from moesaic.tokenizer import load_tokenizer as read_tokenizer


def load(
    path: str | Path | ModelSource,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    quantization: str | None = None,
    memory: str | None = None,
    placement: str | Path | None = None,
    backend: str = "auto",
    offline: bool = False,
    revision: str | None = None,
    share: ExpertShare | None = None,
) -> Transformer:
    """The model that MODEL (a run directory, a Hugging Face directory or a hub id) names, ready to run.

    Args:
        dtype: `float32` or `bfloat16`, by name or as torch's; `auto` is float32 for a run (for one of adapters, what
            the model under them has) and what config.json says for a Hugging Face directory, or, where it says nothing,
            what the weights are stored as (float16 is read as float32). Routers keep float32 weights when they are
            stored so. Of a quantised model on a CPU `auto` keeps in float32 what is not packed: it is little, and the
            small operators are faster so.
        device: `auto` is cuda where there is one.
        quantization: packs the weights while they are read: `int8`, `int4`, or `mxfp4` for experts published so
            (moesaic.model.quantize.SCHEMES). A quantised directory needs none. The model is then for inference.
        memory: what the process may take, such as "2GiB", on a CPU. The experts then stay on disk, are read when tokens
            need them, and packed while they are read where `quantization` is given. For inference.
        placement: with `memory`, a trace of `moesaic inspect --trace`: the experts that it used most are read at once
            and stay in memory. None: who stays follows from what is used.
        backend: how experts are computed, see `moesaic.ops.BACKENDS`.
        offline: take a model of the hub from the local cache, and ask nobody.
        revision: branch, tag or commit of a model on the hub; None is its main branch.
        share: take these experts of each layer alone, and nothing else but on the first rank: the rest is on the meta
            device. For moesaic.parallel.inference.

    Warns when a damaged state of a run was passed over for an older one.
    Raises UsageError for an unknown MODEL, revision, dtype or device, MoesaicError for files without the model they
    promise and for a hub that cannot be reached.
    """
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"dtype {dtype!r} is not known; choose auto, {' or '.join(DTYPES)}")
    if quantization is not None and quantization not in SCHEMES:
        raise UsageError(f"quantization {quantization!r} is not known; choose {', '.join(SCHEMES)}")
    budget = _budget(memory, placement, share)
    target = resolve_device(device)
    source = resolve_model(path, revision, offline)
    require_weights(source, offline)
    wanted = DTYPES.get(dtype)
    with torch.inference_mode(False):  # the threads that read are in no such mode, and write into the tensors
        if budget is not None:
            model = _load_within(source, wanted, target, backend, quantization, budget).eval()
            if placement is not None:
                place_experts(model, placement)
            return model
        if share is not None:
            return _load_share(source, wanted, target, backend, quantization, share).eval()
        read = {"run": _load_run, "hf": _load_hf}[source.kind]
        return read(source, wanted, target, backend, quantization).eval()


def _budget(memory: str | None, placement: str | Path | None, share: ExpertShare | None) -> int | None:
    """In bytes; None where memory is not limited."""
    if memory is None:
        if placement is not None:
            raise UsageError("placement says which experts stay in memory, and without memory all do; give both")
        return None
    if share is not None:
        raise UsageError(
            f"memory is for one process, and there are {share.count} ranks, each with a share of the experts in "
            "memory; leave it out"
        )
    return parse_bytes(memory)


def load_tokenizer(path: str | Path | ModelSource, *, offline: bool = False, revision: str | None = None) -> Tokenizer:
    """The tokenizer that belongs to MODEL; `offline` and `revision` as for `load`.

    Raises UsageError when there is none that can be read, MoesaicError when it is not the one that a run was trained
    with.
    """
    source = resolve_model(path, revision, offline)
    tokenizer = read_tokenizer(source.directory)
    if source.kind == "run":
        trained_with = newest_run_state(source.directory).value("tokenizer")
        if tokenizer.fingerprint != trained_with:
            raise MoesaicError(
                f"{source.directory / 'tokenizer.json'} or tokenizer_config.json is damaged: the run was trained with "
                f"another; remove both and resume the run, which writes them again"
            )
    return tokenizer


def _load_run(
    source: ModelSource, dtype: torch.dtype | None, device: torch.device, backend: str, scheme: str | None
) -> Transformer:
    state = newest_run_state(source.directory)
    for warning in state.warnings:
        warnings.warn(f"{source.directory}: {warning}", stacklevel=3)
    config = from_mapping(TrainConfig, state.value("config"))
    if config.lora is not None:
        wide = "float32" if dtype == torch.float32 else "auto"  # so that bfloat16 is rounded to once, at the end
        base = load(base_of(state), dtype=wide, device=str(device), backend=backend)
        model = merge_state(base, config, state, dtype)
        if scheme is not None:
            quantize_model(model, make_quantization(scheme, model.config))
        return model
    stored = state.load_tensors("model")
    # The config inside the state is under its checksums; RUN/config.json is only what started the run.
    model = empty_model(config.model, backend)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_shapes(expected, {name: tuple(tensor.shape) for name, tensor in stored.items()}, state.directory)
    wanted = dtype or torch.float32
    tensors = {name: tensor.to(device, final_dtype(name, tensor.dtype, wanted)) for name, tensor in stored.items()}
    model.load_state_dict(tensors, assign=True)
    if scheme is not None:
        quantize_model(model, make_quantization(scheme, model.config))
    return model


def _load_hf(
    source: ModelSource, dtype: torch.dtype | None, device: torch.device, backend: str, scheme: str | None
) -> Transformer:
    with HFDirectory(source.directory) as stored:
        model = empty_model(stored.config, backend)
        wanted = dtype or _automatic_dtype(stored, scheme, device)
        if stored.quantization is not None:
            _require_no_other_scheme(source, stored, scheme)
            quantize_model(model, stored.quantization)
            stored.check(model.state_dict())
            tensors = stored.read(model.state_dict(), wanted, device)
        elif scheme is not None:
            tensors = _pack_while_reading(model, scheme, stored, wanted, device)
        else:
            stored.check(model.state_dict())
            tensors = stored.read(model.state_dict(), wanted, device)
    model.load_state_dict(tensors, assign=True)
    return model


def _load_within(
    source: ModelSource,
    dtype: torch.dtype | None,
    device: torch.device,
    backend: str,
    scheme: str | None,
    budget: int,
) -> Transformer:
    if device.type != "cpu":
        raise UsageError(f"memory is for models on a CPU, and the device is {device}; add --device cpu")
    if source.kind == "run":
        raise UsageError("with memory experts stay in the files of a model; write them with `moesaic export RUN OUT`")
    with HFDirectory(source.directory) as stored:
        if stored.config.moe is None:
            raise UsageError(f"{source.directory} has no experts, which alone can stay on disk; leave memory out")
        model, plain, read, wanted = _to_be_read(source, stored, dtype, device, backend, scheme)
        load_within(model, stored, plain, read, wanted, budget)
    return model


def _load_share(
    source: ModelSource,
    dtype: torch.dtype | None,
    device: torch.device,
    backend: str,
    scheme: str | None,
    share: ExpertShare,
) -> Transformer:
    if source.kind == "run":
        model = _load_run(source, dtype, device, backend, scheme)
        keep_share(model, share)
        return model
    with HFDirectory(source.directory) as stored:
        share.require(stored.config.moe.num_experts if stored.config.moe else None)
        model, _, read, wanted = _to_be_read(source, stored, dtype, device, backend, scheme)
        load_share(model, stored, read, wanted, device, share)
    return model


def _to_be_read(
    source: ModelSource,
    stored: HFDirectory,
    dtype: torch.dtype | None,
    device: torch.device,
    backend: str,
    scheme: str | None,
) -> tuple[Transformer, Mapping[str, Tensor], Read, torch.dtype]:
    """The model on the meta device, its state before it was quantised, if it was, how to read tensors of it, and the
    type of those that are not packed."""
    model = empty_model(stored.config, backend)
    plain = model.state_dict()
    if stored.quantization is not None:
        _require_no_other_scheme(source, stored, scheme)
        quantize_model(model, stored.quantization)
        plain = model.state_dict()
    elif scheme is not None:
        quantize_model(model, make_quantization(scheme, model.config))
    stored.check(plain)
    wanted = dtype or _automatic_dtype(stored, scheme, device)

    def read(names: Sequence[str]) -> Mapping[str, Tensor]:
        if stored.quantization is None and scheme is not None:
            return _packed_while_read(model, names, stored, plain, wanted, device)
        return stored.read({name: plain[name] for name in names}, wanted, device)

    return model, plain, read, wanted


def _automatic_dtype(stored: HFDirectory, scheme: str | None, device: torch.device) -> torch.dtype:
    """Of what is not packed."""
    packed = scheme is not None or stored.quantization is not None
    return torch.float32 if packed and device.type == "cpu" else stored.dtype


def _require_no_other_scheme(source: ModelSource, stored: HFDirectory, scheme: str | None) -> None:
    assert stored.quantization is not None
    if scheme not in (None, stored.quantization.scheme):
        raise UsageError(
            f"{source.directory} is quantised as {stored.quantization.scheme} already; leave quantization out, "
            f"or name the model that it was made from"
        )


def _pack_while_reading(
    model: Transformer, scheme: str, stored: HFDirectory, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """`model`, on the meta device, becomes a quantised one."""
    plain = model.state_dict()
    stored.check(plain)
    quantize_model(model, make_quantization(scheme, model.config))
    packed = model.state_dict()
    stored.require_memory(packed, dtype, device)
    return _packed_while_read(model, list(packed), stored, plain, dtype, device)


def _packed_while_read(
    model: Transformer,
    names: Sequence[str],
    stored: HFDirectory,
    plain: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    """These tensors of a model that was quantised on the meta device; one plain tensor in memory at a time."""

    def read(some: Sequence[str]) -> dict[str, Tensor]:
        return stored.read({name: plain[name] for name in some}, stored.dtype, device)

    reader = PackingReader(model, read, stored.joined)

    def final(name: str, tensor: Tensor) -> Tensor:
        return tensor.to(final_dtype(name, tensor.dtype, dtype)) if tensor.is_floating_point() else tensor

    return {name: final(name, reader.tensor(name)) for name in names}


def empty_model(config: ModelConfig, backend: str = "auto") -> Transformer:
    """On the meta device: names, shapes and no memory."""
    with torch.device("meta"):
        return Transformer(config, backend)
