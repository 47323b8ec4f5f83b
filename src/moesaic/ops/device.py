"""Where tensors live, and how fast that place multiplies matrices."""

import time

import torch

from moesaic.errors import UsageError


def resolve_device(name: str) -> torch.device:
    """`auto` is a CUDA device when there is one, else the CPU.

    Raises:
        UsageError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        present = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise UsageError(f"device '{name}' is not here; this machine has {', '.join(present)}") from None
    return device


def measured_matmul_peak(device: str, dtype: torch.dtype, size: int = 1536, seconds: float = 0.3) -> float:
    """FLOP/s of the fastest of several square matrix products of this size, within about `seconds`."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
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
