"""What this machine does: its memory, its matrix products, its disk and, under torchrun, the links between ranks.

Measured rates are what programs reach. Products are those of our own kernels, disk and links are used as our own reads
and exchanges use them, so the losses of a calibrated machine are what a whole model takes beside them.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from moesaic.errors import UsageError
from moesaic.ops.device import device_name, measured_matmul_peak, memory_bytes, resolve_device
from moesaic.ops.native_packed import packed_linear
from moesaic.ops.quantize import pack
from moesaic.plan.cluster import BETWEEN_NODES, Cluster
from moesaic.plan.hardware import DEVICES, Device
from moesaic.residency.expert_cache import READERS
from moesaic.residency.file_reader import FileReader
from moesaic.safetensors_file import Extent

DISK_BYTES, PIECE_BYTES = 256 * 2**20, 4 * 2**20
"""A file, and what is read of it at once: about an expert of 4 bits."""
LINK_BYTES = 8 * 2**20
READ_BYTES = 512 * 2**20
WIDTH, TOKENS = 2048, 512
"""Of the packed product."""
REPEATS = 6


@dataclass(frozen=True)
class Calibration:
    """Bytes/s and FLOP/s, measured."""

    name: str
    bandwidth: float
    flops_float32: float
    flops_bfloat16: float
    flops_int8: float
    """Of our product of packed weights, for all formats: codes of 4 bits are computed as 8."""
    disk: float
    link: float | None
    """Bytes/s between ranks; None with one rank."""
    latency: float | None
    """Seconds of an exchange of next to nothing."""
    ranks: int
    memory: int


def calibrate(folder: Path | None = None) -> Calibration:
    """Takes some seconds. `folder` lies on the disk that is measured; None takes the one of temporary files.

    Under torchrun every rank measures at the same time, and the slowest counts.

    Raises UsageError where that folder cannot hold a file of DISK_BYTES.
    """
    device = resolve_device("auto")
    ranks, started = int(os.environ.get("WORLD_SIZE", "1")), False
    if ranks > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
        started = True
    link, latency = link_rate(ranks) if ranks > 1 else (None, None)
    rates = torch.tensor(
        [
            _read_rate(device),
            measured_matmul_peak(device.type, torch.float32),
            measured_matmul_peak(device.type, torch.bfloat16),
            _packed_rate(device),
            _disk_rate(folder),
            torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else memory_bytes(),
        ],
        dtype=torch.float64,
    )
    if ranks > 1:
        dist.all_reduce(rates, dist.ReduceOp.MIN)
    if started:
        dist.destroy_process_group()
    bandwidth, float32, bfloat16, int8, disk, memory = rates.tolist()
    if device.type == "cpu":
        memory /= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # ranks of a machine share it
    return Calibration(
        name=device_name(device), bandwidth=bandwidth, flops_float32=float32, flops_bfloat16=bfloat16, flops_int8=int8,
        disk=disk, link=link, latency=latency, ranks=ranks, memory=int(memory),
    )  # fmt: skip


def _least_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of several repeats: others may be at work on the machine."""
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def _read_rate(device: torch.device) -> float:
    """Bytes/s of summing up numbers that no cache holds."""
    numbers = torch.ones(READ_BYTES // 4, device=device)
    return READ_BYTES / _least_seconds(numbers.sum, device)


@torch.inference_mode()
def _packed_rate(device: torch.device) -> float:
    """Operations/s of many tokens through a matrix of 4 bits."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    weight = pack(torch.linspace(-1, 1, WIDTH * WIDTH, device=device).view(WIDTH, WIDTH), "int4")
    x = torch.linspace(-1, 1, TOKENS * WIDTH, device=device, dtype=dtype).view(TOKENS, WIDTH)
    return 2 * TOKENS * WIDTH**2 / _least_seconds(lambda: packed_linear(x, weight), device)


def _disk_rate(folder: Path | None) -> float:
    """Bytes/s of the threads that read experts from a fresh file, past the page cache where the system lets them."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(np.random.default_rng(0).bytes(DISK_BYTES))
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            extents = [Extent(Path(file.name), first, PIECE_BYTES) for first in range(0, DISK_BYTES, PIECE_BYTES)]
            targets = [torch.zeros(PIECE_BYTES, dtype=torch.uint8) for _ in extents]
            reader = FileReader(direct=True)
            with ThreadPoolExecutor(READERS) as pool:
                start = time.perf_counter()
                list(pool.map(reader.read_into, extents, targets))
                return DISK_BYTES / (time.perf_counter() - start)
    except OSError as error:
        where = folder or tempfile.gettempdir()
        raise UsageError(
            f"the disk cannot be measured: {DISK_BYTES / 2**20:.0f} MiB cannot be written to {where}: "
            f"{error.strerror}; name a folder elsewhere: TMPDIR=DIR"
        ) from error


def link_rate(ranks: int) -> tuple[float, float]:
    """Bytes/s that each rank sends in a large all-to-all, and the seconds of a tiny one. The process group is there."""
    large = torch.ones(ranks, LINK_BYTES // 4 // ranks)
    tiny = torch.ones(ranks, 1)
    latency, whole = exchange_seconds(tiny), exchange_seconds(large)
    return LINK_BYTES * (ranks - 1) / ranks / max(whole - latency, 1e-9), latency


def exchange_seconds(rows: torch.Tensor) -> float:
    """Of an all-to-all of `rows`, the median of several, the mean over ranks."""
    received, seconds = torch.empty_like(rows), []
    dist.all_to_all_single(received, rows)
    for _ in range(REPEATS + 1):
        dist.barrier()
        start = time.perf_counter()
        dist.all_to_all_single(received, rows)
        seconds.append(time.perf_counter() - start)
    mean = torch.tensor(sorted(seconds)[REPEATS // 2], dtype=torch.float64)
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


def calibrated_cluster(found: Calibration) -> Cluster:
    """This machine, as measured, for each rank.

    Each rank counts as a node: as between nodes, our exchanges send a token once to each rank, and nothing is tensor
    parallel.
    """
    like = DEVICES["desktop"]
    flops = {"bfloat16": found.flops_bfloat16, "float32": found.flops_float32, "int8": found.flops_int8,
             "float8": found.flops_bfloat16}  # fmt: skip
    device = Device(
        name="this machine", flops=flops, memory=found.memory, bandwidth=found.bandwidth,
        link=found.link or like.link, network=found.link or like.network, node_size=1, watts=like.watts,
        dollars_per_hour=(0.0, 0.0), kind="calibrated", source=f"measured on {found.name}",
    )  # fmt: skip
    cluster = Cluster(name="this machine", device=device, count=found.ranks, disk=found.disk)
    return cluster if found.latency is None else replace(cluster, latency=found.latency / BETWEEN_NODES)


def to_toml(found: Calibration) -> str:
    """A cluster file that `--cluster` reads."""
    links = () if found.link is None or found.latency is None else (
        f"network_gbit = {found.link * 8 / 1e9:.3f}",
        f"link_gb = {found.link / 1e9:.4f}",
    )  # fmt: skip
    latency = () if found.latency is None else (f"latency_us = {found.latency / BETWEEN_NODES * 1e6:.1f}",)
    return "\n".join(
        (
            f"count = {found.ranks}",
            f"disk_gb = {found.disk / 1e9:.3f}",
            *latency,
            "[device]",
            'name = "this machine"',
            "measured = true",
            f"tflops = {found.flops_bfloat16 / 1e12:.4f}",
            f"tflops_8bit = {found.flops_int8 / 1e12:.4f}",
            f"tflops_float32 = {found.flops_float32 / 1e12:.4f}",
            f'memory = "{found.memory}B"',
            f"bandwidth_gb = {found.bandwidth / 1e9:.2f}",
            *links,
            f"source = {json.dumps('measured on ' + found.name)}",
        )
    )
