"""Bytes on disk: directories that appear whole, safetensors written with a checksum, JSON read with care.

A directory is written under a hidden name beside its target, flushed to the disk and renamed: a reader sees the old one
or the new one, and a full disk or a killed process leaves the old one as it was. Tensors are stored as safetensors and
everything else as JSON, so nothing here can run code from a file.
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from moesaic.errors import MoesaicError

WRITING = ".writing-"
REPLACED = ".replaced-"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # from linux/fs.h and fcntl.h
MAX_JSON_BYTES = 64 * 2**20
MAX_SHARD_BYTES = 5 * 10**9
PART_BYTES = 8 * 2**20
PAGE = 4096
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class FileDigest:
    """Size in bytes and hexadecimal SHA-256 of one file."""

    size: int
    sha256: str


@contextmanager
def atomic_directory(target: Path, *, bytes_needed: int = 0) -> Iterator[Path]:
    """Yields an empty directory to fill; when the block ends it becomes `target`, durably, in one rename.

    An existing `target` is replaced. If the block fails, nothing has changed. `bytes_needed` is what the error message
    about a full disk says.

    Raises MoesaicError when the disk is full or cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target.parent)
        with _locked_temporary(target) as temporary:
            yield temporary
            _flush(temporary)
            _put_in_place(temporary, target)
    except OSError as error:
        raise _write_error(target, error, bytes_needed) from error


def remove_abandoned(parent: Path) -> None:
    """Removes what killed processes left half-written in `parent`. What is being written is locked: it stays."""
    for leftover in [*parent.glob(f".*{WRITING}*"), *parent.glob(f".*{REPLACED}*")]:
        try:
            descriptor = os.open(leftover, os.O_RDONLY)
        except (FileNotFoundError, PermissionError):  # gone meanwhile, or somebody else's
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)


@contextmanager
def _locked_temporary(target: Path) -> Iterator[Path]:
    """A hidden sibling of `target`, removed at the end, and locked: the lock goes when its process does."""
    temporary = target.with_name(f".{target.name}{WRITING}{secrets.token_hex(4)}")
    temporary.mkdir()
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)


def _flush(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.rename(temporary, target)
    elif not _exchange(temporary, target):
        replaced = target.with_name(f".{target.name}{REPLACED}{secrets.token_hex(4)}")
        os.rename(target, replaced)
        os.rename(temporary, target)
        shutil.rmtree(replaced, ignore_errors=True)
    _fsync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, so that a reader (or a kill) sees the old directory or the new one. Linux only."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    here = (_AT_FDCWD, os.fsencode(one)), (_AT_FDCWD, os.fsencode(other))
    return renameat2(*here[0], *here[1], _RENAME_EXCHANGE) == 0


def _write_error(target: Path, error: OSError, bytes_needed: int) -> MoesaicError:
    if error.errno not in DISK_FULL:
        return MoesaicError(f"cannot write {target}: {error.strerror or error}; choose a directory that you may write")
    free = shutil.disk_usage(next(parent for parent in target.absolute().parents if parent.exists())).free
    short = bytes_needed - free
    fix = (
        f"free at least {short:,} bytes or choose another disk" if short > 0 else "raise the limit on files or disk use"
    )
    return MoesaicError(
        f"cannot write {target}: {str(error.strerror).lower()}, {bytes_needed:,} bytes needed and {free:,} free; "
        f"nothing was changed; {fix}"
    )


def write_json(path: Path, value: Mapping[str, Any]) -> FileDigest:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> FileDigest:
    path.write_bytes(data)
    return FileDigest(len(data), hashlib.sha256(data).hexdigest())


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written: all that headers say of it, and how to make its numbers when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    data: Callable[[], Tensor]
    """Gives the elements in row-major order, in whatever shape, strides and device they have."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


ToWrite = Mapping[str, Tensor] | Iterable[PlannedTensor]
"""Tensors by name, or planned ones, of which only the one that is being written exists."""


def write_safetensors(path: Path, tensors: ToWrite, metadata: Mapping[str, str] | None = None) -> FileDigest:
    """Writes one safetensors file, hashing what it writes. Each tensor is made when its turn comes, and then let go.

    Not the library's own writer, because that one wants all tensors at once, and writes through a memory map, where a
    full disk kills the process.
    """
    # Whole pages first, which can then be read past the page cache into their place; then wide types, so that every
    # tensor stays aligned.
    planned = sorted(
        _planned(tensors), key=lambda tensor: (tensor.nbytes % PAGE > 0, -tensor.dtype.itemsize, tensor.name)
    )
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in planned:
        if tensor.dtype not in SAFETENSORS_DTYPES:
            raise MoesaicError(
                f"cannot write tensor {tensor.name} to {path}: {tensor.dtype} has no safetensors type here"
            )
        header[tensor.name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % PAGE)
    with path.open("wb", buffering=0) as file:
        written = _HashedFile(file)
        written.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in planned:
            _write_tensor(written, tensor)
    return FileDigest(written.size, written.digest.hexdigest())


def write_sharded(directory: Path, tensors: ToWrite, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes model.safetensors, or model-0000i-of-0000n.safetensors and its index when that is too large."""
    shards: list[list[PlannedTensor]] = [[]]
    room, total_size = max_shard_bytes, 0
    for tensor in _planned(tensors):
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
        total_size += tensor.nbytes
    if len(shards) == 1:
        write_safetensors(directory / "model.safetensors", shards[0], {"format": "pt"})
        return
    weight_map = {}
    for index, shard in enumerate(shards, start=1):
        file_name = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file_name, shard, {"format": "pt"})
        weight_map |= {tensor.name: file_name for tensor in shard}
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))},
    )


def _planned(tensors: ToWrite) -> Iterable[PlannedTensor]:
    if not isinstance(tensors, Mapping):
        return tensors
    return [
        PlannedTensor(name, tuple(tensor.shape), tensor.dtype, partial(_itself, tensor))
        for name, tensor in cast(Mapping[str, Tensor], tensors).items()
    ]


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _write_tensor(file: "_HashedFile", planned: PlannedTensor) -> None:
    """In parts, where the tensor does not lie in memory as it does in the file: then only a part of it is copied."""
    tensor = planned.data().detach()
    if tensor.numel() != math.prod(planned.shape) or tensor.dtype != planned.dtype:
        raise ValueError(
            f"tensor {planned.name} was planned as {planned.dtype} {list(planned.shape)}, "
            f"but is {tensor.dtype} {list(tensor.shape)}"
        )
    in_place = tensor.device.type == "cpu" and tensor.is_contiguous()
    parts = [tensor] if in_place or tensor.ndim == 0 else tensor.split(max(1, PART_BYTES // max(1, tensor[0].nbytes)))
    for part in parts:
        file.write(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


class _HashedFile:
    """What is written to an unbuffered file, counted and hashed."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, chunk: bytes | memoryview) -> None:
        """Unbuffered writes may stop short, at 2 GiB or where the disk ends; the next call then says why."""
        rest = memoryview(chunk)
        while len(rest):
            rest = rest[self._file.write(rest) :]
        self.digest.update(chunk)
        self.size += len(chunk)


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES, *, unique: bool = False) -> dict[str, Any]:
    """The object in a JSON file. With `unique`, a key may not appear twice in one object.

    Raises MoesaicError, naming the file, when it is missing, too large or not a JSON object.
    """
    try:
        if (size := path.stat().st_size) > max_bytes:
            raise MoesaicError(f"{path} has {size:,} bytes; a file of this kind has at most {max_bytes:,}")
        value = json.loads(path.read_bytes(), object_pairs_hook=unique_keys if unique else None)
    except OSError as error:
        raise MoesaicError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise MoesaicError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise MoesaicError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads, which otherwise lets the last of two equal keys win. Raises ValueError."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = set()
        twice = next(key for key, _ in pairs if key in keys or keys.add(key))
        raise ValueError(f"the key {twice!r} appears twice")
    return values


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
