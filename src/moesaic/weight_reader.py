"""Safetensors, read into memory that is already there.

Data is read with `preadv`, never mapped: mapped pages count as memory of the process, and a file that is cut short
while it is mapped kills it. What has the type and the layout of the file goes straight from the kernel into its tensor;
the rest passes a small buffer. Reading needs no lock, and threads may share one directory.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.safetensors_file import Extent, SafetensorsFile, Shape, one_line
from moesaic.weights_io import read_json

BUFFER_BYTES = 2**20  # stays in a core's cache between the kernel's copy and the conversion
DEVICE_BUFFER_BYTES = 8 * 2**20  # each copy to a GPU has a fixed cost
PART_BYTES = 32 * 2**20  # how finely one tensor is divided among threads

PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
Read = Callable[[], None]


class Weights(Protocol):
    """What loading needs of a directory of weights, stored plain (WeightDirectory) or packed (UnpackedWeights)."""

    directory: Path

    @property
    def names(self) -> list[str]: ...

    def __contains__(self, name: object) -> bool: ...

    def shape(self, name: str) -> Shape: ...

    def stored_type(self, name: str) -> str: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> Tensor: ...

    def read_into(self, name: str, target: Tensor) -> None: ...

    def reads(self, name: str, target: Tensor) -> Iterator[Read]: ...


def fill(weights: Weights, targets: Iterable[tuple[str, Tensor]], threads: int = 1) -> None:
    """`read_into` for each pair (name, target), on `threads` threads; a large tensor is divided among them.

    Raises the first MoesaicError that a read raised, after the reads under way have ended.
    """
    reads = (read for name, target in targets for read in weights.reads(name, target))
    if threads == 1:
        for read in reads:
            read()
        return
    with ThreadPoolExecutor(threads) as pool:
        try:
            for future in [pool.submit(read) for read in reads]:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one file, in memory of their own."""
    file = SafetensorsFile(path)
    try:
        return {name: _read_whole(file, name) for name in sorted(file.entries)}
    finally:
        file.close()


class WeightDirectory:
    """The safetensors of one directory: shapes and types are known, data is read when asked for.

    Raises MoesaicError for files that are missing, damaged or contradict their index.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._file_of: dict[str, SafetensorsFile] = {}
        with ExitStack() as stack:
            files = {}
            file_names, weight_map = _weight_files(directory)
            for file_name in file_names:
                files[file_name] = file = SafetensorsFile(directory / file_name)
                stack.callback(file.close)
                for name in file.entries:
                    if name in self._file_of:
                        raise MoesaicError(f"tensor {name} lies in two files of {directory}; keep one of them")
                    self._file_of[name] = file
            for name, file_name in weight_map.items():
                if self._file_of.get(name) is not files[file_name]:
                    raise MoesaicError(
                        f"{directory}/model.safetensors.index.json lists tensor {name} in {file_name}, which does not "
                        "hold it; copy or download both again"
                    )
            self._files = stack.pop_all()

    def __enter__(self) -> "WeightDirectory":
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> Shape:
        return self._file_of[name].entries[name].shape

    def stored_type(self, name: str) -> str:
        """The type's name in the safetensors format, such as BF16 or F8_E4M3."""
        return self._file_of[name].entries[name].type

    def dtype(self, name: str) -> torch.dtype:
        """Raises MoesaicError for types that are not plain floating point."""
        dtype = self._file_of[name].entries[name].dtype
        if dtype not in PLAIN_DTYPES:
            raise MoesaicError(
                f"tensor {name} in {self.directory} has type {self.stored_type(name)}; "
                "weights must be F32, BF16, F16 or F64: use the checkpoint that is not quantised"
            )
        return dtype

    def extent(self, name: str) -> Extent:
        """Where the tensor lies."""
        return self._file_of[name].extent(name)

    def read(self, name: str) -> Tensor:
        """The whole tensor as stored, in memory of its own."""
        return _read_whole(self._file_of[name], name)

    def read_elements(self, name: str, start: int, target: Tensor) -> None:
        """Fills the contiguous CPU tensor `target`, of the stored type, with elements from `start` on, row-major."""
        self._file_of[name].read_elements(name, start, target)

    def read_into(self, name: str, target: Tensor) -> None:
        """Fills `target`, a view of any strides, float type and device, with tensor `name`, element by element.

        `target` has the stored shape, or one that the stored tensor can be reshaped to; both are taken in row-major
        order. Needs no memory but a buffer of 8 MiB for a device, of 1 MiB else, and none where `target` is
        contiguous, on the CPU and of the stored type.

        Raises MoesaicError when the numbers of elements differ, the type has no counterpart or the file was cut short.
        """
        for read in self.reads(name, target):
            read()

    def reads(self, name: str, target: Tensor) -> Iterator[Read]:
        """`read_into`, divided into independent calls of at most PART_BYTES, for several threads."""
        check_fits(self, name, target)
        dtype = _readable_type(self._file_of[name], name)
        for start, part in pieces(target.detach(), PART_BYTES // dtype.itemsize):
            yield partial(_fill, self._file_of[name], name, start, part, dtype)


def check_fits(weights: Weights, name: str, target: Tensor) -> None:
    if math.prod(weights.shape(name)) != target.numel():
        raise MoesaicError(
            f"tensor {name} in {weights.directory} has shape {list(weights.shape(name))}, "
            f"which does not fit {list(target.shape)}; config.json and weights belong to different models"
        )


def pieces(target: Tensor, limit: int, start: int = 0) -> Iterator[tuple[int, Tensor]]:
    """`target` as views of at most `limit` elements that follow each other in row-major order, each with the number of
    its first element."""
    if target.numel() <= limit:
        yield start, target
        return
    row = target[0].numel()
    step = max(1, limit // row)
    for first in range(0, len(target), step):
        part = target[first : first + step]
        yield from pieces(part if row <= limit else part[0], limit, start + first * row)


def _fill(file: SafetensorsFile, name: str, start: int, target: Tensor, dtype: torch.dtype) -> None:
    if target.dtype == dtype and target.device.type == "cpu" and target.is_contiguous():
        file.read_elements(name, start, target)
        return
    buffer_bytes = BUFFER_BYTES if target.device.type == "cpu" else DEVICE_BUFFER_BYTES
    buffer = torch.empty(min(buffer_bytes // dtype.itemsize, target.numel()), dtype=dtype)
    for first, part in pieces(target, max(len(buffer), 1), start):
        stored = buffer[: part.numel()]
        file.read_elements(name, first, stored)
        part.copy_(stored.view(part.shape))


def _read_whole(file: SafetensorsFile, name: str) -> Tensor:
    dtype = _readable_type(file, name)
    tensor = torch.empty(file.entries[name].shape, dtype=file.entries[name].dtype)
    _fill(file, name, 0, tensor, dtype)
    return tensor


def _readable_type(file: SafetensorsFile, name: str) -> torch.dtype:
    """The type to read as: bytes for truth values, because torch counts on 0 and 1 there and a file may hold more."""
    dtype = file.entries[name].dtype
    if dtype is None:
        raise MoesaicError(
            f"tensor {name} in {file.path} has type {file.entries[name].type}, which is not supported; "
            "use the checkpoint that is not quantised"
        )
    return torch.uint8 if dtype == torch.bool else dtype


def _weight_files(directory: Path) -> tuple[list[str], dict[str, str]]:
    """File names of the checkpoint in `directory`, and where its index, if there is one, places each tensor."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index, unique=True).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise MoesaicError(f"{index} has no weight_map")
        for tensor_name, file_name in weight_map.items():
            if (
                not isinstance(file_name, str)
                or not re.fullmatch(r"[^/\\\0]+\.safetensors", file_name)
                or not (file_name + tensor_name).isprintable()
            ):
                raise MoesaicError(
                    f"{index} places tensor {one_line(tensor_name)} in {one_line(repr(file_name))}; "
                    "only .safetensors files beside it are read"
                )
        return sorted(set(weight_map.values())), weight_map
    if (directory / "model.safetensors").exists():
        return ["model.safetensors"], {}
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        raise MoesaicError(
            f"{directory} holds pickled weights, which can run code when opened, and no safetensors; convert them: "
            f"transformers.AutoModelForCausalLM.from_pretrained({str(directory)!r}).save_pretrained('converted')"
        )
    raise MoesaicError(f"{directory} holds neither model.safetensors nor model.safetensors.index.json")
