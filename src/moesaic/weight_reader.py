"""Safetensors, read into memory that is already there.

Data is read with `preadv`, never mapped: mapped pages count as memory of the process, and a file that is cut short
while it is mapped kills it. What has the type and the layout of the file goes straight from the kernel into its tensor;
the rest passes a small buffer. Reading needs no lock, and threads may share one directory.
"""

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.weights_io import SAFETENSORS_DTYPES, read_json, unique_keys

MAX_HEADER_BYTES = 100 * 10**6  # the limit of the safetensors library
BUFFER_BYTES = 2**20  # stays in a core's cache between the kernel's copy and the conversion
DEVICE_BUFFER_BYTES = 8 * 2**20  # each copy to a GPU has a fixed cost
PART_BYTES = 32 * 2**20  # how finely one tensor is divided among threads

DTYPES = {label: dtype for dtype, label in SAFETENSORS_DTYPES.items()}
PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TYPE_BITS = {label: 8 * dtype.itemsize for label, dtype in DTYPES.items()} | {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "U16": 16, "U32": 32, "U64": 64, "C64": 64,
}  # fmt: skip

Shape = tuple[int, ...]
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


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its safetensors type, its shape, and where in the file its first byte lies."""

    type: str
    shape: Shape
    offset: int

    @property
    def dtype(self) -> torch.dtype | None:
        return DTYPES.get(self.type)


class SafetensorsFile:
    """One open file whose header was checked: entries are known, data is read when asked for.

    Raises MoesaicError, naming the file, when it cannot be read or is not valid.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            # Without O_NONBLOCK, opening a pipe in the place of a file waits for ever.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise MoesaicError(f"{path} is missing; download or copy it again") from error
        except OSError as error:
            raise _unreadable(path, error.strerror or str(error)) from error
        try:
            self.entries = self._read_header()
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            size = os.fstat(self._descriptor).st_size
            self.close()
            raise _unreadable(path, f"{error}; it holds {size:,} bytes; download or copy it again") from error

    def close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1  # the number may soon belong to another file

    def read_elements(self, name: str, start: int, target: Tensor) -> None:
        """Fills the contiguous CPU tensor `target`, of the stored type, with elements from `start` on."""
        # Contiguous with one element, a tensor may still have any stride.
        memory = target.detach().as_strided((target.numel(),), (1,)).view(torch.uint8).numpy().data
        offset = self.entries[name].offset + start * target.element_size()
        while len(memory):
            try:
                count = os.preadv(self._descriptor, [memory], offset)
            except OSError as error:
                raise MoesaicError(f"cannot read tensor {name} from {self.path}: {error.strerror}") from error
            if count == 0:
                raise MoesaicError(
                    f"{self.path} now ends at byte {offset:,}, inside tensor {name}: it was cut short while it was "
                    "read; copy or download it again"
                )
            memory = memory[count:]
            offset += count

    def _read_header(self) -> dict[str, Entry]:
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        # The library first: it refuses what is not a header at all without building Python objects from it.
        with safe_open(self.path, framework="numpy"):
            pass
        prefix = os.pread(self._descriptor, 8, 0)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_bytes > min(MAX_HEADER_BYTES, status.st_size - 8):
            raise ValueError(f"a header of {header_bytes:,} bytes does not fit a file of {status.st_size:,}")
        header = os.pread(self._descriptor, header_bytes, 8)
        return parse_header(header, status.st_size)


def parse_header(header: bytes, file_bytes: int) -> dict[str, Entry]:
    """Entries of a file of `file_bytes` bytes by name, in the order of their data.

    Raises ValueError, with the reason, unless every entry has a known type and exactly the bytes of its shape, and the
    entries fill the rest of the file without gap or overlap.
    """
    values = json.loads(header.decode(), object_pairs_hook=unique_keys)
    if not isinstance(values, dict):
        raise ValueError("the header is not a JSON object")
    values.pop("__metadata__", None)
    ranges = []
    for name, value in values.items():
        if not name.isprintable():
            raise ValueError(f"the tensor name {name!r} is not printable")
        kind, shape, start, stop = _fields(name, value)
        bits = math.prod(shape) * TYPE_BITS[kind]
        if not 0 <= start <= stop or bits != 8 * (stop - start):
            raise ValueError(f"tensor {name}, {kind} {list(shape)}, cannot be the bytes {start:,} to {stop:,}")
        ranges.append((start, stop, name, kind, shape))
    data_start = end = 8 + len(header)
    entries = {}
    for start, stop, name, kind, shape in sorted(ranges):
        if data_start + start != end:
            raise ValueError(f"tensor {name} starts at byte {start:,} of the data, not at {end - data_start:,}")
        end = data_start + stop
        entries[name] = Entry(kind, shape, data_start + start)
    if end != file_bytes:
        raise ValueError(f"its tensors end at byte {end:,} of {file_bytes:,}")
    return entries


def _fields(name: str, value: Any) -> tuple[str, Shape, int, int]:
    try:
        kind, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
        whole = isinstance(shape, list) and all(type(number) is int for number in (*shape, start, stop))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"the entry of tensor {name} lacks dtype, shape or data_offsets") from None
    if not isinstance(kind, str) or kind not in TYPE_BITS:
        raise ValueError(f"tensor {name} has the unknown type {kind!r}")
    # Tensors without elements may have any shape in the file, but torch counts strides in 64 bits.
    sizes = [max(size, 1) for size in shape] if whole else []
    if not whole or min(shape, default=0) < 0 or len(shape) > 64 or math.prod(sizes) >= 2**60:
        raise ValueError(f"tensor {name} has an impossible shape or place")
    return kind, tuple(shape), start, stop


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
                    f"{index} places tensor {_one_line(tensor_name)} in {_one_line(repr(file_name))}; "
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


def _unreadable(path: Path, reason: str) -> MoesaicError:
    return MoesaicError(f"{path} is not a readable safetensors file: {_one_line(reason)}")


def _one_line(text: str) -> str:
    """What a file says about itself, made fit for a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)[:300]
