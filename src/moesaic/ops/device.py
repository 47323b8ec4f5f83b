"""Where tensors live, and how fast that place multiplies matrices."""

import contextlib
import ctypes
import functools
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from moesaic.errors import UsageError

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
# From Linux's mman.h, and the size of such a page on most machines.
_MADV_HUGEPAGE, _HUGE_PAGE = 14, 2 * 2**20


def resolve_device(name: str) -> torch.device:
    """`auto` is a CUDA device when there is one, else the CPU.

    Raises:
        UsageError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with contextlib.suppress(RuntimeError, AssertionError):
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type != "meta":
            return device
    present = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    raise UsageError(f"device '{name}' is not here; this machine has {', '.join(present)}")


def device_name(device: torch.device) -> str:
    """What its maker calls the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def cpu_set_up_for_training() -> Iterator[None]:
    """Keep what a step has freed for the next one, in huge pages, and round denormal numbers to zero.

    glibc gives large blocks back to the kernel as soon as they are freed, so a training step on a CPU faults in and
    clears all its activations again: about a quarter of the time of a small model's step. Pages of 4 KB cost large
    experts 3 % more. Memory stays so for the process, denormals come back at the end; C libraries other than
    glibc are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        _keep_memory()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@functools.cache
def _keep_memory() -> None:
    libc = ctypes.CDLL("libc.so.6")
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 2**28)):
        libc.mallopt(option, value)
    # The heap becomes as large as training may need, of addresses alone: memory comes when it is touched.
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = memory_bytes() // 2
    heap = libc.malloc(size)
    if heap:
        first = -(-heap // _HUGE_PAGE) * _HUGE_PAGE
        libc.madvise(first, (heap + size - first) // _HUGE_PAGE * _HUGE_PAGE, _MADV_HUGEPAGE)
        libc.free(heap)


def measured_matmul_peak(device: str, dtype: torch.dtype, size: int = 1536, seconds: float = 0.3) -> float:
    """FLOP/s of the fastest of several square matrix products of this size, within about `seconds`."""
    # Made without the global random generator, whose state belongs to the run.
    a = torch.linspace(-1, 1, size * size, device=device).view(size, size).to(dtype)
    b = a.mT.contiguous()
    best = float("inf")
    stop = time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > stop:
            return 2 * size**3 / best


def memory_bytes() -> int:
    """Main memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_bytes() -> int:
    """Largest resident set of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_bytes(device: torch.device) -> int:
    """Memory that is free on the device, or that the system would free for us."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 * 2**30  # what a small machine may spare; it is not known


def resident_bytes() -> int:
    """Resident set of this process now; where the system does not tell, the largest so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_bytes()
    return pages * resource.getpagesize()
