"""A model's directory with packed weights, written one tensor at a time, and what packing cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moesaic.checkpoint.load import empty_model
from moesaic.checkpoint.packing import PackingReader, quantization_to_config
from moesaic.checkpoint.plain_model import PlainModel, Progress, open_plain, reporting
from moesaic.checkpoint.resolve import CONFIG, require_weights, resolve_model
from moesaic.checkpoint.save import new_directory, require_outside
from moesaic.checks import require
from moesaic.config import ModelConfig
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.mixed_precision import HotBudget
from moesaic.model.quantize import (
    HOT_KIND,
    KINDS,
    Quantization,
    make_quantization,
    quantize_model,
    require_hot_scheme,
    require_scheme,
)
from moesaic.ops import DTYPES
from moesaic.ops.quantize import DEFAULT_GROUP_SIZE, PackedWeight, squared_error
from moesaic.residency.placement import read_uses
from moesaic.weights_io import MAX_SHARD_BYTES, PlannedTensor, atomic_directory, write_json, write_sharded


@dataclass
class PackedKind:
    """What became of the weights of one kind."""

    format: str
    weights: int = 0
    nbytes: int = 0
    errors: list[float] = field(default_factory=list)
    """Of each tensor: the norm of what packing changed, relative to the tensor's."""

    @property
    def relative_error(self) -> float:
        return sum(self.errors) / len(self.errors)

    def add(self, weight: Tensor, packed: PackedWeight) -> None:
        error, total = squared_error(weight, packed)
        self.weights += weight.numel()
        self.nbytes += packed.data.nbytes
        self.errors.append(math.sqrt(error / total) if total else 0.0)


@dataclass(frozen=True)
class Quantized:
    """What was made; sizes in bytes."""

    quantization: Quantization
    dtype: torch.dtype
    """Of the weights that stayed plain, and of all of them in `plain_nbytes`."""
    kinds: dict[str, PackedKind]
    plain_weights: int
    """Numbers that stayed plain."""
    nbytes: int
    plain_nbytes: int
    """Of the model before, its weights in `dtype`."""
    packed_share: float
    """Of these bytes before, those that are packed now."""
    num_experts: int
    """Of a layer."""
    hot_uses: float
    """Share of the record's assignments that the hot experts took."""

    @property
    def expert_bits(self) -> float:
        """Per weight of all routed experts, on average."""
        experts = [self.kinds[name] for name in ("experts", HOT_KIND) if name in self.kinds]
        return 8 * sum(kind.nbytes for kind in experts) / sum(kind.weights for kind in experts)

    @property
    def weights(self) -> int:
        return self.plain_weights + sum(kind.weights for kind in self.kinds.values())


def quantize(
    model: str | Path,
    directory: str | Path,
    scheme: str,
    *,
    group_size: int = DEFAULT_GROUP_SIZE,
    hot: HotBudget | None = None,
    dtype: str = "auto",
    offline: bool = False,
    revision: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = lambda label, done, total: None,
) -> Quantized:
    """Writes `directory`, which `load` reads, from MODEL; `dtype` (of what stays plain), `offline` and `revision` as
    for `load`. A run is held in memory as a whole, anything else one tensor at a time. With `hot`, experts that were
    used most are packed as int8 beside others as int4.

    Raises UsageError when `directory` holds something or lies inside MODEL, when MODEL is quantised already, for an
    unknown scheme or group size, and for hot experts without a record of such a model; MoesaicError for files without
    the model they promise, weights to pack that are not finite, and experts that no kind of packing took.
    """
    require_scheme(scheme)
    if hot is not None:
        require_hot_scheme(scheme)
    directory = new_directory(directory)
    require(dtype in ("auto", *DTYPES), f"dtype {dtype!r} is not known; choose auto, {' or '.join(DTYPES)}")
    source = resolve_model(model, revision, offline)
    require_outside(directory, source)
    require_weights(source, offline)
    with open_plain(source, dtype) as plain:
        quantization, hot_uses = _chosen(plain.config, scheme, group_size, hot)
        packing = _Packing(plain, quantization)
        tensors = reporting(packing.planned(), progress)
        with atomic_directory(directory, bytes_needed=sum(tensor.nbytes for tensor in tensors)) as temporary:
            name = str(plain.dtype).removeprefix("torch.")
            added = {"dtype": name, "torch_dtype": name, "quantization_config": quantization_to_config(quantization)}
            write_json(temporary / CONFIG, plain.hf_config() | added)
            write_sharded(temporary, tensors, max_shard_bytes)
            plain.carry(temporary)
        return packing.report(tensors, hot_uses)


def _chosen(config: ModelConfig, scheme: str, group_size: int, hot: HotBudget | None) -> tuple[Quantization, float]:
    """And the share of the record's assignments that the hot experts took."""
    quantization = make_quantization(scheme, config, group_size)
    if hot is None:
        return quantization, 0.0
    if config.moe is None:
        raise UsageError("hot experts need a model with experts, and this one is dense; leave --hot out")
    uses_LE = read_uses(hot.record, config.num_moe_layers, config.moe.num_experts)
    plan = hot.plan(uses_LE, config, group_size)
    taken = sum(float(uses_E[list(numbers)].sum()) for uses_E, numbers in zip(uses_LE, plan, strict=True))
    return make_quantization(scheme, config, group_size, plan), taken / len(plan)


class _Packing:
    """The tensors of the quantised model, made one by one, and what is noted meanwhile."""

    def __init__(self, plain: PlainModel, quantization: Quantization) -> None:
        self._dtype, self._quantization = plain.dtype, quantization
        self._num_experts = plain.config.moe.num_experts if plain.config.moe else 0
        model = empty_model(plain.config)
        self._plain_numbers = {name: tensor.numel() for name, tensor in model.state_dict().items()}
        quantize_model(model, quantization)
        self._state = model.state_dict()
        self._dtypes = plain.dtypes
        self._reader = PackingReader(model, plain.read, plain.joined)
        self._kinds = {kind: PackedKind(quantization.formats[kind]) for kind in KINDS if kind in quantization.formats}
        self._require_all_experts()

    def planned(self) -> list[PlannedTensor]:
        return [
            PlannedTensor(name, tuple(like.shape), self._dtypes.get(name, like.dtype), partial(self._made, name))
            if name not in self._reader.packed
            else PlannedTensor(name, tuple(like.shape), like.dtype, partial(self._made_packed, name))
            for name, like in self._state.items()
        ]

    def report(self, tensors: Sequence[PlannedTensor], hot_uses: float) -> Quantized:
        packed = self._reader.packed.keys() & self._plain_numbers.keys()  # a tied head was no tensor of its own
        plain_nbytes = {name: number * self._dtypes[name].itemsize for name, number in self._plain_numbers.items()}
        return Quantized(
            quantization=self._quantization,
            dtype=self._dtype,
            kinds={name: kind for name, kind in self._kinds.items() if kind.weights},
            plain_weights=sum(number for name, number in self._plain_numbers.items() if name not in packed),
            nbytes=sum(tensor.nbytes for tensor in tensors),
            plain_nbytes=sum(plain_nbytes.values()),
            packed_share=sum(plain_nbytes[name] for name in packed) / sum(plain_nbytes.values()),
            num_experts=self._num_experts,
            hot_uses=hot_uses,
        )

    def _made(self, name: str) -> Tensor:
        return self._reader.plain(name)

    def _made_packed(self, name: str) -> Tensor:
        weight = self._reader.plain(name)
        data = self._reader.pack(name, weight)
        kind, like = self._reader.packed[name]
        self._kinds[kind].add(weight, replace(like, data=data))
        return data

    def _require_all_experts(self) -> None:
        left = [
            name
            for name, number in self._plain_numbers.items()
            if ".experts." in name and number and "bias" not in name and name not in self._reader.packed
        ]
        if left:
            raise MoesaicError(f"the experts {left[0]} would stay as they are, and {len(left) - 1} tensors more")
