"""A Hugging Face directory: its config, and its tensors under our names, read in place and in parallel.

A directory with packed weights of ours is one of them, with another layout (see moesaic.checkpoint.packing).
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from moesaic.accounting import count_parameters
from moesaic.checkpoint.families import Family, family_of
from moesaic.checkpoint.families.hf_config import shortened
from moesaic.checkpoint.families.keys import token_ids
from moesaic.checkpoint.families.layout import Alternatives, Layout, Shape, StoredTensor
from moesaic.checkpoint.packed import UnpackedWeights
from moesaic.checkpoint.packing import packed_layout, quantization_from_config
from moesaic.checkpoint.resolve import CONFIG
from moesaic.config import ModelConfig
from moesaic.errors import MoesaicError
from moesaic.ops import DTYPES
from moesaic.ops.device import memory_bytes
from moesaic.weight_reader import WeightDirectory, fill
from moesaic.weights_io import read_json

PACKED = torch.uint8
"""The type of packed weights (moesaic.ops.quantize)."""
READERS = min(4, os.cpu_count() or 1)
"""Threads that read."""
FLOAT32_BUFFERS = ("router.expert_bias", "router.log_l1_weight")
ROUTER_TENSORS = ("router.weight", "router.bias", "router.noise_weight", "router.scale")


class HFDirectory:
    """Context manager. Opening it reads the config and the headers of the weights, and checks one against the other.

    Raises MoesaicError, naming keys, tensors and shapes, for what we cannot do or what does not fit.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.values = read_json(directory / CONFIG)
        quantization_values = self.values.get("quantization_config")
        try:
            self.family: Family = family_of(self.values.get("model_type"))
            self.config: ModelConfig = self.family.config_from_hf(self.values)
            self.config = replace(self.config, eos_token_ids=self._generation_eos() or self.config.eos_token_ids)
            self.quantization = quantization_from_config(quantization_values)
        except MoesaicError as error:
            raise MoesaicError(f"{directory}: {error}") from error
        stored = WeightDirectory(directory)
        self.weights = stored if self.quantization else UnpackedWeights(stored, quantization_values)
        try:
            self._check_size()  # before anything is made that is as large as the config says
            self.layout: Layout = self.family.layout(self.config)
            if self.quantization:
                self.layout = packed_layout(self.layout, self.config, self.quantization)
        except BaseException:
            self.weights.__exit__()
            raise

    def __enter__(self) -> "HFDirectory":
        return self

    def __exit__(self, *exception: object) -> None:
        self.weights.__exit__(*exception)

    @property
    def dtype(self) -> torch.dtype:
        """What config.json says the weights are, else what the embedding is stored as; float16 is read as float32."""
        name = self.values.get("dtype") or self.values.get("torch_dtype")
        if name is None:
            stored = self.weights.dtype(self.layout.tensors[0][0][0].name)
            return stored if stored in DTYPES.values() else torch.float32
        dtypes = DTYPES | {"float16": torch.float32}
        if not isinstance(name, str) or name not in dtypes:
            raise MoesaicError(
                f"{self.directory}: config.json: dtype = {shortened(name)} is not supported, only {', '.join(dtypes)}"
            )
        return dtypes[name]

    def dtypes(self, like: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The types that tensors like those of a model on the meta device will have, when `dtype` is wanted.

        The selection bias is always float32; routers never lose precision, because near ties would flip.
        """
        stored_as = {
            region.ours: self.weights.dtype(stored.name)
            for stored in self.stored(like)
            for region in stored.regions
            if region.ours.endswith(ROUTER_TENSORS)
        }
        return {
            name: tensor.dtype if tensor.dtype == PACKED else final_dtype(name, stored_as.get(name, dtype), dtype)
            for name, tensor in like.items()
        }

    def require_memory(self, like: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
        """Raises MoesaicError when this machine's memory cannot hold such tensors."""
        dtypes = self.dtypes(like, dtype)
        needed = sum(tensor.numel() * dtypes[name].itemsize for name, tensor in like.items())
        if device.type == "cpu" and needed > memory_bytes():
            raise MoesaicError(
                f"{self.directory}: the model takes {needed / 2**30:.1f} GiB as {dtype} and this machine has "
                f"{memory_bytes() / 2**30:.1f} GiB; take a smaller type or a smaller model"
            )

    def allocate(self, like: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Empty tensors like those of a model on the meta device, of the types of `dtypes`.

        Raises MoesaicError when this machine's memory cannot hold them.
        """
        self.require_memory(like, dtype, device)
        dtypes = self.dtypes(like, dtype)
        return {name: torch.empty(tensor.shape, dtype=dtypes[name], device=device) for name, tensor in like.items()}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Reads `tensors`, a model's state or whole layers of it, from disk into the memory that they have."""
        alone: list[tuple[str, Tensor]] = []
        for stored in self.stored(tensors):
            views = stored.views(tensors)
            if len(views) == 1:
                alone.append((stored.name, views[0]))
                continue
            parts = self.weights.read(stored.name).split([len(view) for view in views])
            for view, part in zip(views, parts, strict=True):
                view.copy_(part)
        fill(self.weights, alone, READERS)

    def read(self, like: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """`allocate` and `fill`."""
        tensors = self.allocate(like, dtype, device)
        self.fill(tensors)
        return tensors

    def stored(self, ours: Iterable[str]) -> list[StoredTensor]:
        """The tensors on disk that hold these tensors of ours, in the layout that this directory has."""
        return [
            stored
            for name in ours
            for alternatives in self._beginning_with.get(name, ())
            for stored in self._present(alternatives)
        ]

    def joined(self, name: str) -> list[str]:
        """Our tensors that lie in one tensor on disk with this one, itself included."""
        return next((names for names in self._joined_names if name in names), [name])

    @cached_property
    def _beginning_with(self) -> dict[str, list[Alternatives]]:
        """What is stored, by the first of our tensors in it."""
        found: dict[str, list[Alternatives]] = {}
        for alternatives in self.layout.tensors:
            found.setdefault(alternatives[0][0].regions[0].ours, []).append(alternatives)
        return found

    @cached_property
    def _joined_names(self) -> list[list[str]]:
        together = [
            list(dict.fromkeys(region.ours for region in stored.regions))
            for alternatives in self.layout.tensors
            for stored in self._present(alternatives)
        ]
        return [names for names in together if len(names) > 1]

    def _present(self, alternatives: tuple[tuple[StoredTensor, ...], ...]) -> tuple[StoredTensor, ...]:
        """The alternative that this directory has; the published one when it has none, which is then missed by name."""
        return next((one for one in alternatives if one[0].name in self.weights), alternatives[0])

    def check(self, like: Mapping[str, Tensor]) -> None:
        """Raises MoesaicError unless the files hold exactly the tensors that a model on the meta device needs."""
        stored_as_ours = [name for name in like if name in self.weights and self.weights.stored_type(name) == "U8"]
        if self.quantization is None and stored_as_ours:
            raise MoesaicError(
                f"{self.directory} holds packed weights of moesaic, such as {stored_as_ours[0]}, but its config.json "
                "has no quantization_config that says so; copy the config.json that was written with them"
            )
        layout = self.layout
        expected = {stored.name: stored.shape(like) for one in layout.tensors for stored in self._present(one)}
        packed = {name for name in expected if name in like and like[name].dtype == PACKED}
        expected |= {name: shape for name, shape in layout.fillers.items() if name in self.weights}
        names = [name for name in self.weights.names if name in expected or not layout.ignored(name)]
        check_shapes(expected, {name: self.weights.shape(name) for name in names}, self.directory)
        for name in expected.keys() - packed:
            self.weights.dtype(name)
        for name in packed:
            if self.weights.stored_type(name) != "U8":
                raise MoesaicError(
                    f"tensor {name} in {self.directory} has type {self.weights.stored_type(name)}, but packed weights "
                    "are U8; quantise the model again"
                )

    def _check_size(self) -> None:
        promised = count_parameters(self.config).total
        held = sum(math.prod(self.weights.shape(name)) for name in self.weights.names)
        if promised > 2 * held:  # what is short of less is named tensor by tensor
            raise MoesaicError(
                f"{self.directory}: config.json promises {promised:,} parameters and the files hold {held:,}; "
                "complete the files, or take the config.json that belongs to them"
            )

    def _generation_eos(self) -> tuple[int, ...]:
        generation = self.directory / "generation_config.json"
        return token_ids(read_json(generation).get("eos_token_id")) if generation.exists() else ()


def final_dtype(name: str, stored: torch.dtype, wanted: torch.dtype) -> torch.dtype:
    """The type in which a tensor of ours is kept: the one that is wanted, but for routers."""
    if name.endswith(FLOAT32_BUFFERS):
        return torch.float32
    return torch.promote_types(stored, wanted) if name.endswith(ROUTER_TENSORS) else wanted


def check_shapes(expected: Mapping[str, Shape], found: Mapping[str, Shape], where: Path) -> None:
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
