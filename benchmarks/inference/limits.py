"""What this machine can do at most, measured: reading memory, 8-bit products, float32 and bfloat16 products."""

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moesaic.ops.device import measured_matmul_peak

SOURCE = Path(__file__).with_name("limits.cpp")
READ_BYTES = 2**30
"""Larger than any cache."""
REPEATS = 10
"""Short ones, of which the best counts: others may be at work on the machine."""


@dataclass(frozen=True)
class Limits:
    """Rates of all threads together."""

    read: float
    """Bytes per second."""
    int8: float
    """Operations per second; a multiply-add counts as two. So do the others."""
    float32: float
    bfloat16: float
    """Of torch's product, at least that of float32, which bfloat16 can always be computed in."""


def measure_limits(threads: int, seconds: float = 0.05) -> Limits:
    """The best of some repeats of each. Without a C++ compiler torch's own kernels stand in, which are slower."""
    bfloat16 = measured_matmul_peak("cpu", torch.bfloat16, seconds=REPEATS * seconds)
    with tempfile.TemporaryDirectory() as folder:
        library = _compiled(Path(folder))
        if library is None:
            float32 = measured_matmul_peak("cpu", torch.float32, seconds=REPEATS * seconds)
            return Limits(_torch_read(seconds), _torch_int8(seconds), float32, max(float32, bfloat16))
        read = max(library.read_bandwidth(threads, READ_BYTES, seconds) for _ in range(REPEATS))
        int8 = max(library.int8_peak(threads, seconds) for _ in range(REPEATS))
        float32 = max(library.float32_peak(threads, seconds) for _ in range(REPEATS))
    return Limits(read, int8 or _torch_int8(seconds), float32, max(float32, bfloat16))


def _compiled(folder: Path) -> ctypes.CDLL | None:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        return None
    target = folder / "limits.so"
    flags = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")
    result = subprocess.run([compiler, *flags, str(SOURCE), "-o", str(target)], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{SOURCE.name} does not compile: {result.stderr[-2000:]}")
    library = ctypes.CDLL(str(target))
    library.read_bandwidth.argtypes = (ctypes.c_int, ctypes.c_uint64, ctypes.c_double)
    library.int8_peak.argtypes = library.float32_peak.argtypes = (ctypes.c_int, ctypes.c_double)
    for function in (library.read_bandwidth, library.int8_peak, library.float32_peak):
        function.restype = ctypes.c_double
    return library


def _torch_read(seconds: float) -> float:
    numbers = torch.ones(READ_BYTES // 4)
    return _best_rate(lambda: numbers.sum(), READ_BYTES, seconds)


def _torch_int8(seconds: float, size: int = 1024) -> float:
    a = torch.ones(size, size, dtype=torch.int8)
    return _best_rate(lambda: torch.ops.aten._int_mm(a, a), 2 * size**3, seconds)


def _best_rate(work: Callable[[], object], amount: float, seconds: float) -> float:
    best, stop = 0.0, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        work()
        now = time.perf_counter()
        best = max(best, amount / (now - start))
        if now > stop:
            return best
