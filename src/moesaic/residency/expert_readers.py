"""How an expert comes from disk into its slot: as it is stored, or put together from parts and packed on the way.

R rows, C columns of one of an expert's matrices.
"""

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.ops.quantize import PackedWeight, pack_into
from moesaic.residency.file_reader import FileReader
from moesaic.residency.spill_file import SpillFile
from moesaic.safetensors_file import Extent

Slot = Mapping[str, PackedWeight | Tensor]
"""gate_up and down of one expert, to be filled."""


class ExpertReader(Protocol):
    """Of the experts of one layer. Threads share it."""

    def read(self, number: int, slot: Slot) -> int:
        """Fills the slot; -> bytes that came from disk. Raises MoesaicError where that fails."""
        ...

    def extents(self) -> Iterable[Extent]:
        """All that it may read."""
        ...

    def single_reads(self) -> Iterable[Extent]:
        """Such as it makes."""
        ...


@dataclass(frozen=True)
class StoredExperts:
    """Experts that lie on disk as they are used: all of gate_up one after another, and all of down."""

    reader: FileReader
    stacks: Mapping[str, Extent]
    num_experts: int

    def read(self, number: int, slot: Slot) -> int:
        parts = {name: stack.part(number, self.num_experts) for name, stack in self.stacks.items()}
        for name, part in parts.items():
            self.reader.read_into(part, _bytes_of(slot[name]))
        return sum(part.nbytes for part in parts.values())

    def extents(self) -> Iterable[Extent]:
        return self.stacks.values()

    def single_reads(self) -> Iterable[Extent]:
        numbers = range(self.num_experts)
        return (stack.part(number, self.num_experts) for stack in self.stacks.values() for number in numbers)


@dataclass(frozen=True)
class Part:
    """Numbers on disk and their place in a matrix."""

    extent: Extent
    dtype: torch.dtype
    shape: tuple[int, ...]
    """As they lie on disk."""
    strides: tuple[int, ...]
    """In the matrix (R, C), contiguous."""
    offset: int
    """Of the first, likewise."""


@dataclass(frozen=True)
class AssembledExperts:
    """Experts whose matrices lie on disk in parts, of other types or in another order than they are used."""

    reader: FileReader
    parts: Mapping[str, Sequence[Sequence[Part]]]
    """Of gate_up and down, by expert."""
    dtype: torch.dtype
    """That of the numbers before they are packed."""
    spilled: SpillFile | None = None
    """Where packed experts are kept, so that they need not be packed again."""
    first_record: int = 0
    """That of expert 0 there."""

    def read(self, number: int, slot: Slot) -> int:
        record = self.first_record + number
        whole = [_bytes_of(matrix) for matrix in slot.values()]
        if self.spilled is not None and self.spilled.read(record, whole):
            return sum(len(each) for each in whole)
        for name, matrix in slot.items():
            self._assemble(name, number, matrix)
        if self.spilled is not None:
            self.spilled.write(record, whole)
        return sum(part.extent.nbytes for parts in self.parts.values() for part in parts[number])

    def extents(self) -> Iterable[Extent]:
        return (part.extent for experts in self.parts.values() for parts in experts for part in parts)

    single_reads = extents

    @property
    def buffer_bytes(self) -> int:
        """That a thread reads with: a matrix before it is packed, and a part of it before it is in its place."""
        numbers = [[math.prod(part.shape) for part in parts] for experts in self.parts.values() for parts in experts]
        widest = max(part.dtype.itemsize for experts in self.parts.values() for parts in experts for part in parts)
        return max(map(sum, numbers)) * self.dtype.itemsize + max(map(max, numbers)) * widest

    def _assemble(self, name: str, number: int, matrix: PackedWeight | Tensor) -> None:
        parts = self.parts[name][number]
        if isinstance(matrix, Tensor):
            self._fill(parts, matrix)
            return
        plain_RC = _buffer("matrix", (matrix.rows, matrix.columns), self.dtype)
        self._fill(parts, plain_RC)
        try:
            pack_into(plain_RC, matrix, threads=1)
        except MoesaicError as error:
            raise MoesaicError(f"{name} of expert {number} in {parts[0].extent.path}: {error}") from error

    def _fill(self, parts: Sequence[Part], matrix: Tensor) -> None:
        for part in parts:
            target = matrix.as_strided(part.shape, part.strides, matrix.storage_offset() + part.offset)
            if part.dtype == matrix.dtype and target.is_contiguous():
                self.reader.read_into(part.extent, target.view(-1).view(torch.uint8))
            else:
                stored = _buffer("part", part.shape, part.dtype)
                self.reader.read_into(part.extent, stored.view(-1).view(torch.uint8))
                target.copy_(stored)


def _bytes_of(matrix: PackedWeight | Tensor) -> Tensor:
    return (matrix.data if isinstance(matrix, PackedWeight) else matrix).view(-1).view(torch.uint8)


_OF_THREAD = threading.local()


def _buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory of this thread, which is kept: new memory would have to be cleared by the system each time."""
    nbytes = math.prod(shape) * dtype.itemsize
    kept = getattr(_OF_THREAD, name, None)
    if kept is None or len(kept) < nbytes:
        kept = torch.empty(nbytes, dtype=torch.uint8)
        setattr(_OF_THREAD, name, kept)
    return kept[:nbytes].view(dtype).view(shape)
