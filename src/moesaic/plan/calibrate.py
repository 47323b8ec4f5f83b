"""What this machine does: its memory, its matrix products, its disk and, under torchrun, the links between ranks.

Measured rates are what programs reach, so the losses of a calibrated machine are those of our own kernels over measured
limits and not over a datasheet.
"""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from moesaic.ops.device import device_name, measured_matmul_peak, memory_bytes, resolve_device
from moesaic.plan.cluster import Cluster
from moesaic.plan.hardware import DEVICES, Device

DISK_BYTES = 256 * 2**20
LINK_BYTES = 32 * 2**20
READ_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Calibration:
    """Bytes/s and FLOP/s, measured."""

    name: str
    bandwidth: float
    flops_float32: float
    flops_bfloat16: float
    flops_int8: float
    disk: float
    link: float | None
    """Bytes/s between ranks; None with one rank."""
    ranks: int
    memory: int


def calibrate(folder: Path | None = None) -> Calibration:
    """Takes some seconds. `folder` lies on the disk that is measured; None takes the one of temporary files."""
    device = resolve_device("auto")
    link, ranks = _link_rate()
    return Calibration(
        name=device_name(device),
        bandwidth=_read_rate(device),
        flops_float32=measured_matmul_peak(device.type, torch.float32),
        flops_bfloat16=measured_matmul_peak(device.type, torch.bfloat16),
        flops_int8=_int8_rate(device),
        disk=_disk_rate(folder),
        link=link,
        ranks=ranks,
        memory=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else memory_bytes(),
    )


def _read_rate(device: torch.device) -> float:
    """Bytes/s of summing up numbers that no cache holds, the best of several."""
    numbers = torch.ones(READ_BYTES // 4, device=device)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        total = numbers.sum()
        if device.type == "cuda":
            torch.cuda.synchronize()
        assert float(total) > 0
        best = min(best, time.perf_counter() - start)
    return READ_BYTES / best


def _int8_rate(device: torch.device, size: int = 1536) -> float:
    """Operations/s of products of 8-bit integers."""
    a = torch.ones(size, size, dtype=torch.int8, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.ops.aten._int_mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _disk_rate(folder: Path | None) -> float:
    """Bytes/s of reading a fresh file in large pieces, past the page cache where the system can be told so."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(np.random.default_rng(0).bytes(DISK_BYTES))
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        with open(file.name, "rb", buffering=0) as again:
            while again.read(2**22):
                pass
        return DISK_BYTES / (time.perf_counter() - start)


def _link_rate() -> tuple[float | None, int]:
    """Bytes/s that each rank sends in an all-to-all, under torchrun."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        return None, 1
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo")
    rows = torch.ones(ranks, LINK_BYTES // 4 // ranks)
    received = torch.empty_like(rows)
    best = float("inf")
    for _ in range(4):
        dist.barrier()
        start = time.perf_counter()
        dist.all_to_all_single(received, rows)
        best = min(best, time.perf_counter() - start)
    if started:
        dist.destroy_process_group()
    return LINK_BYTES * (ranks - 1) / ranks / best, ranks


def calibrated_cluster(found: Calibration) -> Cluster:
    """This machine, as measured, for each rank."""
    like = DEVICES["desktop"]
    flops = {"bfloat16": found.flops_bfloat16, "float32": found.flops_float32, "int8": found.flops_int8,
             "float8": found.flops_bfloat16}  # fmt: skip
    device = Device(
        name="this machine", flops=flops, memory=found.memory, bandwidth=found.bandwidth,
        link=found.link or like.link, network=found.link or like.network, node_size=found.ranks, watts=like.watts,
        dollars_per_hour=(0.0, 0.0), kind="calibrated", source=f"measured on {found.name}",
    )  # fmt: skip
    return Cluster(name="this machine", device=device, count=found.ranks, disk=found.disk)


def to_toml(found: Calibration) -> str:
    """A cluster file that `--cluster` reads."""
    return "\n".join(
        (
            f"count = {found.ranks}",
            f"disk_gb = {found.disk / 1e9:.3f}",
            "[device]",
            'name = "this machine"',
            "measured = true",
            f"tflops = {found.flops_bfloat16 / 1e12:.4f}",
            f"tflops_8bit = {found.flops_int8 / 1e12:.4f}",
            f'memory = "{found.memory}B"',
            f"bandwidth_gb = {found.bandwidth / 1e9:.2f}",
            *([f"link_gb = {found.link / 1e9:.3f}"] if found.link else []),
            f"source = {found.name!r}".replace("'", '"'),
        )
    )
