"""Reads parts of files into memory that is already there: through the page cache, or past it.

Neither is faster everywhere. Through the cache a part that was read before may still be in memory; past it (O_DIRECT)
the disk writes straight into the target, and nothing else has to leave. So `FileReader.probe` measures.
"""

import errno
import mmap
import os
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.safetensors_file import Extent

PAGE = 4096
"""Offsets, lengths and addresses are multiples of it where the page cache is passed by."""
STAGING_BYTES = 2**20


class FileReader:
    """Files stay open from `open` or the first read on, and threads may share a reader.

    Raises MoesaicError for files that cannot be read, were cut short, or changed since they were opened.
    """

    def __init__(self, *, direct: bool = False) -> None:
        self.direct = direct
        self._files: dict[Path, _File] = {}
        self._opening = threading.Lock()

    def open(self, extent: Extent) -> None:
        """From now on the file has to stay what it is, wherever its name leads."""
        self._file(extent.path)

    def read_into(self, extent: Extent, target: Tensor) -> None:
        """Fills the contiguous uint8 CPU tensor `target`, as long as the extent."""
        file = self._file(extent.path)
        file.require_unchanged()
        if not (self.direct and file.read_past_cache(extent, target)):
            file.read_through_cache(extent.offset, target.numpy().data)

    def probe(self, extents: Sequence[Extent]) -> None:
        """Chooses the faster way, from reading half of the extents in each."""
        for extent in extents:
            self._file(extent.path).drop_from_cache(extent)  # a file just written would look fast
        speeds = {}
        for direct in (False, True):
            self.direct = direct
            start, read = time.perf_counter(), 0
            for extent in extents[int(direct) :: 2]:
                self.read_into(extent, _at_page(extent.nbytes))
                read += extent.nbytes
            speeds[direct] = read / max(time.perf_counter() - start, 1e-9)
        self.direct = speeds[True] > speeds[False]

    def _file(self, path: Path) -> "_File":
        with self._opening:
            if path not in self._files:
                self._files[path] = _File(path)
            return self._files[path]


class _File:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise MoesaicError(f"cannot read {path}: {error.strerror}") from error
        self.direct: int | None = None
        if hasattr(os, "O_DIRECT"):
            try:
                self.direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            except OSError:  # some file systems have no such thing
                self.direct = None
        for descriptor in (self._descriptor, self.direct):
            if descriptor is not None:
                weakref.finalize(self, os.close, descriptor)
        self._seen = self._state()

    def drop_from_cache(self, extent: Extent) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, extent.offset, extent.nbytes, os.POSIX_FADV_DONTNEED)

    def require_unchanged(self) -> None:
        size, modified = self._state()
        if (size, modified) != self._seen:
            what = f"has {size:,} bytes in place of {self._seen[0]:,}" if size != self._seen[0] else "was written to"
            raise MoesaicError(f"{self.path} {what} while it was in use; load the model again")

    def read_through_cache(self, offset: int, memory: memoryview) -> None:
        self._fill(self._descriptor, offset, memory)

    def read_past_cache(self, extent: Extent, target: Tensor) -> bool:
        """False where this file system does not do so."""
        try:
            self._read_past_cache(extent, target)
        except _NotPossible:
            self.direct = None
        return self.direct is not None

    def _read_past_cache(self, extent: Extent, target: Tensor) -> None:
        if self.direct is None:
            raise _NotPossible
        to = target.numpy()
        if extent.offset % PAGE == extent.nbytes % PAGE == target.data_ptr() % PAGE == 0:
            self._fill(self.direct, extent.offset, to.data)
            return
        staging, done = _staging(), 0
        while done < extent.nbytes:
            offset = extent.offset + done
            first = offset % PAGE
            count = min(extent.nbytes - done, STAGING_BYTES - first)
            wanted = -(-(first + count) // PAGE) * PAGE
            self._fill(self.direct, offset - first, staging[:wanted], enough=first + count)
            read = np.frombuffer(staging, np.uint8, count, first)
            np.copyto(to[done : done + count], read)  # as it holds no lock, other threads go on
            done += count

    def _fill(self, descriptor: int, offset: int, memory: memoryview, enough: int | None = None) -> None:
        """`enough` bytes at least: past the cache the last page of a file is read as a whole, and is shorter."""
        done, enough = 0, len(memory) if enough is None else enough
        while done < enough:
            try:
                count = os.preadv(descriptor, [memory[done:]], offset + done)
            except OSError as error:
                if error.errno == errno.EINVAL and descriptor != self._descriptor:
                    raise _NotPossible from error
                raise MoesaicError(f"cannot read {self.path} at byte {offset + done:,}: {error.strerror}") from error
            if count == 0:
                raise MoesaicError(
                    f"{self.path} ends at byte {offset + done:,}, and more was there when it was opened; "
                    "load the model again"
                )
            done += count

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns


class _NotPossible(Exception):
    """The page cache cannot be passed by."""


def _at_page(nbytes: int) -> Tensor:
    """New memory that starts at a page, as slots do."""
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]


_OF_THREAD = threading.local()


def _staging() -> memoryview:
    """Memory of this thread that starts at a page."""
    if not hasattr(_OF_THREAD, "staging"):
        _OF_THREAD.staging = memoryview(mmap.mmap(-1, STAGING_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    return _OF_THREAD.staging
