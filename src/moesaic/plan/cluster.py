"""The cluster that a user names: `8xH100`, `256xH800:ib400`, `laptop:32GiB:ddr5`, or a TOML file of one's own."""

import difflib
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moesaic.checks import require, require_not_negative, require_positive
from moesaic.config_io import from_mapping
from moesaic.errors import UsageError
from moesaic.plan.hardware import DEVICES, DISKS, GB, MEMORY_KINDS, Device
from moesaic.residency.memory_plan import parse_bytes

MAX_DEVICES = 1_000_000
POWER_OVERHEAD = (1.1, 1.5)
"""Of a machine and its building, over the devices alone: cooling, hosts, network."""
DOLLARS_PER_KWH = (0.05, 0.30)
BETWEEN_NODES = 2
"""Times the latency inside of a node."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal devices in equal nodes."""

    name: str
    device: Device
    count: int
    host_memory: float = 0.0
    """Bytes beside the device's own that hold experts, where the user says so; per device."""
    host_bandwidth: float = 64 * GB
    """Bytes/s of that memory."""
    disk: float = DISKS["nvme"]
    """Bytes/s of reading experts from disk."""
    latency: float = 10e-6
    """Seconds that a collective takes with nothing to send, inside a node; twice that between nodes."""

    def __post_init__(self) -> None:
        require(
            0 < self.count <= MAX_DEVICES,
            f"cluster {self.name!r} has {self.count:,} devices; give from 1 to {MAX_DEVICES:,}",
        )
        require_positive(self, "host_bandwidth", "disk", "latency")

    @property
    def node_size(self) -> int:
        return min(self.device.node_size, self.count)

    def delay(self, group: int) -> float:
        return self.latency * (1 if group <= self.node_size else BETWEEN_NODES)


def parse_cluster(text: str) -> Cluster:
    """Raises UsageError for a device, option or file that is not known; the nearest name is told."""
    if text.endswith(".toml"):
        return _read_toml(Path(text))
    head, *options = text.strip().split(":")
    match = re.fullmatch(r"(?:(\d{1,9})\s*[xX×]\s*)?([A-Za-z][\w.-]*)", head.strip())
    if match is None:
        raise UsageError(f"cluster {text!r} is not understood; write it like 8xH100, 256xH800:ib400, laptop:32GiB:ddr5")
    cluster = Cluster(name=text.strip(), device=find_device(match[2]), count=int(match[1] or 1))
    for option in options:
        cluster = _with_option(cluster, option.strip())
    return cluster


def find_device(name: str) -> Device:
    """By name, in any case, with or without dashes."""
    plain = {_plain(known): device for known, device in DEVICES.items()}
    if _plain(name) in plain:
        return plain[_plain(name)]
    nearest = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.5)
    hint = f"did you mean {plain[nearest[0]].name}?" if nearest else f"known are {', '.join(DEVICES)}"
    raise UsageError(f"unknown device {name!r}; {hint} A TOML file describes one that is not listed")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _network(cluster: Cluster, option: re.Match[str]) -> Cluster:
    return replace(cluster, device=replace(cluster.device, network=float(option[1]) * GB / 8))


def _link(cluster: Cluster, option: re.Match[str]) -> Cluster:
    return replace(cluster, device=replace(cluster.device, link=float(option[1]) * GB))


def _node(cluster: Cluster, option: re.Match[str]) -> Cluster:
    return replace(cluster, device=replace(cluster.device, node_size=int(option[1])))


def _host(cluster: Cluster, option: re.Match[str]) -> Cluster:
    return replace(cluster, host_memory=parse_bytes(option[1], "host memory"))


def _memory(cluster: Cluster, option: re.Match[str]) -> Cluster:
    return replace(cluster, device=replace(cluster.device, memory=parse_bytes(option[1], "cluster memory")))


def _memory_kind(cluster: Cluster, option: re.Match[str]) -> Cluster:
    rate = MEMORY_KINDS[option[1].lower()]
    if cluster.device.kind in ("cpu", "server"):
        return replace(cluster, device=replace(cluster.device, bandwidth=rate))
    return replace(cluster, host_bandwidth=rate)


def _disk(cluster: Cluster, option: re.Match[str]) -> Cluster:
    return replace(cluster, disk=DISKS[option[1].lower()])


_OPTIONS: tuple[tuple[str, Callable[[Cluster, re.Match[str]], Cluster]], ...] = (
    (r"(?:ib|eth|net)([1-9]\d{0,4})", _network),
    (r"nvlink([1-9]\d{0,4})", _link),
    (r"node([1-9]\d{0,4})", _node),
    (r"host(\d[\w.]*)", _host),
    (f"({'|'.join(MEMORY_KINDS)})", _memory_kind),
    (f"({'|'.join(DISKS)})", _disk),
    (r"(\d[\d.]*\s*[KMGT]i?B?)", _memory),
)


def _with_option(cluster: Cluster, option: str) -> Cluster:
    for pattern, change in _OPTIONS:
        match = re.fullmatch(pattern, option, re.IGNORECASE)
        if match is not None:
            return change(cluster, match)
    raise UsageError(
        f"cluster option {option!r} is not understood; there are ib400 (network, Gbit/s a device), nvlink450 (GB/s), "
        f"node8, 32GiB (memory), host256GiB, {', '.join(MEMORY_KINDS)}, {', '.join(DISKS)}"
    )


@dataclass(frozen=True, kw_only=True)
class _DeviceTable:
    """[device] of a TOML file, in units that datasheets use."""

    name: str
    like: str = "desktop"
    """The listed device that it loses like."""
    measured: bool = False
    """Rates are what programs here reach, as `moesaic plan --calibrate` writes them, and not those of a datasheet."""
    tflops: float
    tflops_8bit: float = 0.0
    tflops_float32: float = 0.0
    memory: str
    bandwidth_gb: float
    link_gb: float = 0.0
    network_gbit: float = 0.0
    node_size: int = 1
    watts: float = 0.0
    dollars_per_hour: tuple[float, float] = (0.0, 0.0)
    source: str = "a file of the user's own"


@dataclass(frozen=True, kw_only=True)
class _ClusterFile:
    cluster: str = ""
    """A cluster as on the command line, where the device is a listed one."""
    count: int = 1
    device: _DeviceTable | None = None
    host_memory: str = ""
    host_bandwidth_gb: float = 64.0
    disk_gb: float = DISKS["nvme"] / GB
    latency_us: float = 10.0


def _read_toml(path: Path) -> Cluster:
    try:
        mapping = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the cluster {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} does not parse: {error}") from error
    file = from_mapping(_ClusterFile, mapping)
    require_positive(file, "count", "host_bandwidth_gb", "disk_gb", "latency_us")
    require(
        bool(file.cluster) != (file.device is not None),
        f"{path} needs either cluster = '8xH100' or a table [device], and not both",
    )
    cluster = parse_cluster(file.cluster) if file.device is None else _own_device(path, file, file.device)
    changes: dict[str, Any] = {"host_bandwidth": file.host_bandwidth_gb * GB, "disk": file.disk_gb * GB,
                               "latency": file.latency_us * 1e-6}  # fmt: skip
    if file.host_memory:
        changes["host_memory"] = parse_bytes(file.host_memory, "host_memory")
    return replace(cluster, name=path.stem, **changes)


def _own_device(path: Path, file: _ClusterFile, table: _DeviceTable) -> Cluster:
    require_positive(table, "tflops", "bandwidth_gb", "node_size")
    require_not_negative(table, "tflops_8bit", "tflops_float32", "link_gb", "network_gbit", "watts")
    like = find_device(table.like)
    flops: Mapping[str, float] = {"bfloat16": table.tflops * 1e12}
    if table.tflops_8bit:
        flops = {**flops, "float8": table.tflops_8bit * 1e12, "int8": table.tflops_8bit * 1e12}
    if table.tflops_float32:
        flops = {**flops, "float32": table.tflops_float32 * 1e12}
    low, high = table.dollars_per_hour
    require(0 <= low <= high, f"{path}: dollars_per_hour is {[low, high]}; give the low one first, 0 or above")
    device = replace(
        like, name=table.name, flops=flops, memory=parse_bytes(table.memory, "memory"),
        bandwidth=table.bandwidth_gb * GB, link=table.link_gb * GB or like.link,
        network=table.network_gbit * GB / 8 or like.network, node_size=table.node_size,
        watts=table.watts or like.watts, dollars_per_hour=(low, high), source=table.source,
        kind="calibrated" if table.measured else like.kind,
    )  # fmt: skip
    return Cluster(name=path.stem, device=device, count=file.count)
