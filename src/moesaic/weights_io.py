"""Bytes on disk: directories that appear whole, safetensors written with a checksum, tensors read lazily.

A directory is written under a hidden name beside its target, flushed to the disk and renamed: a reader sees the old one
or the new one, and a full disk or a killed process leaves the old one as it was. Tensors are stored as safetensors and
everything else as JSON, so nothing here can run code from a file.
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moesaic.errors import MoesaicError

WRITING = ".writing-"
REPLACED = ".replaced-"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # from linux/fs.h and fcntl.h
MAX_JSON_BYTES = 64 * 2**20
MAX_SHARD_BYTES = 5 * 10**9
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
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
        except FileNotFoundError:
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
    return MoesaicError(
        f"cannot write {target}: {str(error.strerror).lower()}, {bytes_needed:,} bytes needed and {free:,} free; "
        f"nothing was changed; free at least {max(bytes_needed - free, 0):,} bytes or choose another disk"
    )


def write_json(path: Path, value: Mapping[str, Any]) -> FileDigest:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> FileDigest:
    path.write_bytes(data)
    return FileDigest(len(data), hashlib.sha256(data).hexdigest())


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> FileDigest:
    """Writes one safetensors file, hashing what it writes.

    Not the library's own writer, because that one writes through a memory map, where a full disk kills the process.
    """
    # Wide types first, so that every tensor stays aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in SAFETENSORS_DTYPES:
            raise MoesaicError(f"cannot write tensor {name} to {path}: {tensor.dtype} has no safetensors type here")
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    digest = hashlib.sha256()
    size = 0
    with path.open("wb", buffering=0) as file:
        for chunk in (len(encoded).to_bytes(8, "little"), encoded, *(_raw_bytes(tensors[name]) for name in names)):
            _write_all(file, chunk)
            digest.update(chunk)
            size += len(chunk)
    return FileDigest(size, digest.hexdigest())


def write_sharded(directory: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes model.safetensors, or model-0000i-of-0000n.safetensors and its index when that is too large."""
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        write_safetensors(directory / "model.safetensors", shards[0], {"format": "pt"})
        return
    weight_map = {}
    for index, shard in enumerate(shards, start=1):
        file_name = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file_name, shard, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))},
    )


def _raw_bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_all(file: Any, chunk: bytes | memoryview) -> None:
    """Unbuffered writes may stop short, at 2 GiB or where the disk ends; the next call then says why."""
    rest = memoryview(chunk)
    while len(rest):
        rest = rest[file.write(rest) :]


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Raises MoesaicError, naming the file, when it is missing, too large or not a JSON object."""
    try:
        if (size := path.stat().st_size) > max_bytes:
            raise MoesaicError(f"{path} has {size:,} bytes; a file of this kind has at most {max_bytes:,}")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise MoesaicError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise MoesaicError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise MoesaicError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one file, in memory of their own."""
    with _open_safetensors(path) as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118, not a dict


class WeightDirectory:
    """The safetensors of one directory, opened lazily: shapes and types are known, data is read when asked for."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._stack = ExitStack()
        self._file_of: dict[str, Any] = {}
        file_names, expected = _weight_files(directory)
        for file_name in file_names:
            file = self._stack.enter_context(_open_safetensors(directory / file_name))
            for name in file.keys():  # noqa: SIM118, not a dict
                if name in self._file_of:
                    raise MoesaicError(f"tensor {name} lies in two files of {directory}; keep one of them")
                self._file_of[name] = file
        for name in expected:
            if name not in self._file_of:
                raise MoesaicError(f"{directory}/model.safetensors.index.json lists tensor {name}, which no file holds")

    def __enter__(self) -> "WeightDirectory":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Raises MoesaicError for types that are not plain floating point."""
        stored = self._file_of[name].get_slice(name).get_dtype()
        for dtype, label in SAFETENSORS_DTYPES.items():
            if label == stored and dtype.is_floating_point:
                return dtype
        raise MoesaicError(
            f"tensor {name} in {self.directory} has type {stored}; "
            "weights must be F32, BF16, F16 or F64: use the checkpoint that is not quantised"
        )

    def read(self, name: str) -> Tensor:
        """The tensor as stored. It may share memory with the file: copy it before keeping it."""
        return self._file_of[name].get_tensor(name)


def _weight_files(directory: Path) -> tuple[list[str], list[str]]:
    """File names of the checkpoint in `directory`, and the tensor names that its index, if there is one, promises."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise MoesaicError(f"{index} has no weight_map")
        for tensor_name, file_name in weight_map.items():
            if not isinstance(file_name, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", file_name):
                raise MoesaicError(
                    f"{index} places tensor {tensor_name} in {file_name!r}; only .safetensors files beside it are read"
                )
        return sorted(set(weight_map.values())), list(weight_map)
    if (directory / "model.safetensors").exists():
        return ["model.safetensors"], []
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        raise MoesaicError(
            f"{directory} holds pickled weights, which can run code when opened, and no safetensors; convert them: "
            f"transformers.AutoModelForCausalLM.from_pretrained({str(directory)!r}).save_pretrained('converted')"
        )
    raise MoesaicError(f"{directory} holds neither model.safetensors nor model.safetensors.index.json")


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    """The library checks the header: its length, types, shapes, and that offsets cover the file without gaps."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise MoesaicError(f"{path} is not a readable safetensors file: {error}") from error
