"""One safetensors file: its header, checked, and parts of its data, read where memory already is."""

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.weights_io import SAFETENSORS_DTYPES, unique_keys

MAX_HEADER_BYTES = 100 * 10**6  # the limit of the safetensors library
DTYPES = {label: dtype for dtype, label in SAFETENSORS_DTYPES.items()}
TYPE_BITS = {label: 8 * dtype.itemsize for label, dtype in DTYPES.items()} | {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "U16": 16, "U32": 32, "U64": 64, "C64": 64,
}  # fmt: skip

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its safetensors type, its shape, and where in the file its first byte lies."""

    type: str
    shape: Shape
    offset: int

    @property
    def dtype(self) -> torch.dtype | None:
        return DTYPES.get(self.type)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * TYPE_BITS[self.type] // 8


@dataclass(frozen=True)
class Extent:
    """Some bytes of a file."""

    path: Path
    offset: int
    nbytes: int

    def part(self, index: int, parts: int) -> "Extent":
        """Number `index` of so many equal parts."""
        size = self.nbytes // parts
        return Extent(self.path, self.offset + index * size, size)

    def elements(self, first: int, count: int, itemsize: int) -> "Extent":
        """So many of its numbers, of `itemsize` bytes each."""
        return Extent(self.path, self.offset + first * itemsize, count * itemsize)


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

    def extent(self, name: str) -> Extent:
        entry = self.entries[name]
        return Extent(self.path, entry.offset, entry.nbytes)

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


def _unreadable(path: Path, reason: str) -> MoesaicError:
    return MoesaicError(f"{path} is not a readable safetensors file: {one_line(reason)}")


def one_line(text: str) -> str:
    """What a file says about itself, made fit for a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)[:300]
