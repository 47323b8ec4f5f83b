"""The tensors of a run state, whole or in pieces that several ranks wrote, each read by rows.

Beside <group>.safetensors, whole tensors of one process, a state may hold <group>-00002-of-00004.safetensors, rows of
tensors that one rank has, and pieces-00002-of-00004.json: by group and tensor its first row and the shape of the whole
one. torch.distributed.checkpoint would index pieces by a pickle, or, in its safetensors form, cut dimensions evenly,
without checksums; experts are shared out unevenly where their number asks for it.
"""

import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.safetensors_file import SafetensorsFile, Shape
from moesaic.weights_io import FileDigest, read_json, sha256_of, write_json, write_safetensors


class Rows(Protocol):
    """Some rows of a tensor: a `moesaic.parallel.shard.Part`."""

    @property
    def tensor(self) -> Tensor: ...
    @property
    def first(self) -> int: ...
    @property
    def rows(self) -> int: ...


def write_pieces(
    directory: Path, groups: Mapping[str, Mapping[str, Rows]], rank: int, count: int
) -> dict[str, FileDigest]:
    """What rank `rank` of `count` holds, by group and name, to the disk; the digests of all files that this made.

    Raises OSError when it cannot be written, MoesaicError when it does not read back.
    """
    digests, index = {}, {}
    for group, pieces in groups.items():
        if pieces:
            name = _file(group, rank, count)
            digests[name] = write_safetensors(directory / name, {key: each.tensor for key, each in pieces.items()})
            index[group] = {key: [each.first, _whole_shape(each)] for key, each in pieces.items()}
    name = f"pieces-{rank:05d}-of-{count:05d}.json"
    digests[name] = write_json(directory / name, index)
    for name, digest in digests.items():
        with (directory / name).open("rb") as file:
            os.fsync(file.fileno())
        if sha256_of(directory / name) != digest.sha256:
            raise MoesaicError(f"{directory / name} was written but does not read back; check the disk")
    return digests


@dataclass(frozen=True)
class _Piece:
    file: SafetensorsFile
    first: int
    last: int


class StateTensors:
    """The tensors of one group of a state, none of which is read before it is asked for.

    Raises MoesaicError for files that are missing, damaged, or do not hold all rows.
    """

    def __init__(self, directory: Path, group: str) -> None:
        self.directory = directory
        self.shapes: dict[str, Shape] = {}
        """Of whole tensors, by name."""
        self._pieces: dict[str, list[_Piece]] = {}
        with ExitStack() as stack:
            if (path := directory / f"{group}.safetensors").exists():
                file = self._open(path, stack)
                for name, entry in file.entries.items():
                    self._add(name, file, 0, entry.shape)
            for index in sorted(directory.glob("pieces-*.json")):
                tensors = read_json(index).get(group)
                if tensors:
                    file = self._open(directory / f"{group}{index.stem.removeprefix('pieces')}.safetensors", stack)
                    for name, (first, shape) in tensors.items():
                        self._add(name, file, first, tuple(shape))
            self._check()
            self._files = stack.pop_all()

    def __enter__(self) -> "StateTensors":
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    def read(self, name: str) -> Tensor:
        """The whole tensor, in memory of its own."""
        return self.read_rows(name, 0, self._pieces[name][-1].last)

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows `first` to `last`, exclusive; of a scalar 0 to 1, which is itself."""
        shape, pieces = self.shapes[name], self._pieces[name]
        dtype = pieces[0].file.entries[name].dtype
        assert dtype is not None  # checked when it was added
        target = torch.empty((last - first, *shape[1:]) if shape else (), dtype=dtype)
        size = math.prod(shape[1:])
        flat = target.reshape(-1)
        for piece in pieces:
            start, stop = max(first, piece.first), min(last, piece.last)
            if start < stop:
                rows = flat[(start - first) * size : (stop - first) * size]
                piece.file.read_elements(name, (start - piece.first) * size, rows)
        return target

    @staticmethod
    def _open(path: Path, stack: ExitStack) -> SafetensorsFile:
        file = SafetensorsFile(path)
        stack.callback(file.close)
        return file

    def _add(self, name: str, file: SafetensorsFile, first: int, shape: Shape) -> None:
        entry = file.entries.get(name)
        if entry is None or entry.dtype is None or entry.shape[1:] != shape[1:] or len(entry.shape) != len(shape):
            raise MoesaicError(f"{file.path} does not hold {name} as the state says; train on from an older state")
        self.shapes.setdefault(name, shape)
        self._pieces.setdefault(name, []).append(_Piece(file, first, first + (entry.shape[0] if shape else 1)))

    def _check(self) -> None:
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece.first)
            end = 0
            for piece in pieces:
                if piece.first != end:
                    break
                end = piece.last
            shape = self.shapes[name]
            if end != (shape[0] if shape else 1) or piece.last != end:
                raise MoesaicError(f"the pieces of {name} in {self.directory} are not whole: rows to {end} of {shape}")


def _whole_shape(piece: Rows) -> list[int]:
    return [piece.rows, *piece.tensor.shape[1:]] if piece.tensor.ndim else []


def _file(group: str, rank: int, count: int) -> str:
    return f"{group}-{rank:05d}-of-{count:05d}.safetensors"
