"""A nameless file for what was made with effort and does not stay in memory. It is gone when the process is."""

import errno
import os
import tempfile
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

LEFT_FREE = 2**30
"""Bytes of the disk that others shall have."""


class SpillFile:
    """Records of one size, by number, in `folder`. Threads may share it.

    Where the disk is full, or cannot be written to, it warns once and keeps no more; what it has can still be read.
    """

    def __init__(self, folder: Path, record_bytes: int) -> None:
        self._record_bytes = record_bytes
        self._written: set[int] = set()
        self._folder, self._descriptor, self._given_up = folder, -1, False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=folder, prefix="experts-")
        except OSError as error:
            self._give_up(error)
            return
        os.unlink(name)
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    def read(self, number: int, targets: Sequence[Tensor]) -> bool:
        """Fills the targets, uint8, which follow each other in the record; False where that is not there."""
        if number not in self._written:
            return False
        wanted = sum(len(target) for target in targets)
        try:
            return os.preadv(self._descriptor, _memory(targets), number * self._record_bytes) == wanted
        except OSError:  # the original is still there
            return False

    def write(self, number: int, sources: Sequence[Tensor]) -> None:
        if self._given_up or number in self._written:
            return
        wanted = sum(len(source) for source in sources)
        try:
            disk = os.fstatvfs(self._descriptor)
            if disk.f_bavail * disk.f_frsize < wanted + LEFT_FREE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if os.pwritev(self._descriptor, _memory(sources), number * self._record_bytes) == wanted:
                self._written.add(number)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if not self._given_up:
            self._given_up = True
            warnings.warn(
                f"packed experts are not kept in {self._folder} ({error.strerror}); they will be read from the model "
                "and packed each time, which takes longer",
                stacklevel=2,
            )


def _memory(tensors: Sequence[Tensor]) -> list[memoryview]:
    return [tensor.numpy().data for tensor in tensors]


def spill_folder() -> Path:
    """$XDG_CACHE_HOME/moesaic, else ~/.cache/moesaic, else, for a user without a home, a folder for temporary files."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moesaic"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "moesaic"
