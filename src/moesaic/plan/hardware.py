"""What devices can do on paper: public datasheets, each with its source. What they do in practice: efficiency.py.

Rates are dense (no structured sparsity), in FLOP/s and bytes/s; links count one direction. Prices are what clouds asked
for an hour, on demand, in US dollars, and only as good as their date.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

T, G, GB, GIB = 1e12, 1e9, 1e9, 2.0**30
PRICES_OF = "list and market prices seen in 2024 and 2025"

Class = Literal["datacenter", "geforce", "apple", "unified", "cpu", "server", "calibrated"]


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator, or one machine whose processor does the work."""

    name: str
    flops: Mapping[str, float]
    """FLOP/s by the type of the factors; a type that is not named runs as bfloat16."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes/s of that memory."""
    link: float
    """Bytes/s to another device of the same node, one direction."""
    network: float
    """Bytes/s to a device of another node, as such nodes are usually built."""
    node_size: int
    watts: float
    """Thermal design power of the device alone."""
    dollars_per_hour: tuple[float, float]
    """Low and high; zeros where nobody rents it."""
    kind: Class
    """Devices of a kind lose alike (efficiency.py)."""
    source: str

    def peak(self, dtype: str) -> float:
        """FLOP/s of matrix products in `dtype`."""
        return self.flops.get(dtype, self.flops["bfloat16"])


def _device(
    name: str, kind: Class, flops: tuple[float, float | None], memory: float, bandwidth: float,
    links: tuple[float, float, int], watts: float, price: tuple[float, float], source: str,
) -> Device:  # fmt: skip
    """`flops` are those of bfloat16 and 8 bits, in TFLOP/s; `links` are GB/s inside, outside, and the node's size."""
    rates = {"bfloat16": flops[0] * T} | ({} if flops[1] is None else {"float8": flops[1] * T, "int8": flops[1] * T})
    return Device(
        name=name, flops=rates, memory=memory, bandwidth=bandwidth * GB, link=links[0] * GB, network=links[1] * GB,
        node_size=links[2], watts=watts, dollars_per_hour=price, kind=kind, source=source,
    )  # fmt: skip


_APPLE = "Apple's technical specifications; FLOP/s from GPU cores and clock"
_GEFORCE = "NVIDIA architecture whitepaper, bfloat16 with float32 sums"
DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        # data centre
        _device("V100", "datacenter", (125, None), 32 * GIB, 900, (150, 12.5, 8), 300, (0.5, 3.0),
                "NVIDIA V100 SXM2 datasheet, 2020 (float16)"),
        _device("A100", "datacenter", (312, None), 80 * GIB, 2039, (300, 25, 8), 400, (1.0, 4.1),
                "NVIDIA A100 80GB SXM datasheet, 2021"),
        _device("A100-40GB", "datacenter", (312, None), 40 * GIB, 1555, (300, 25, 8), 400, (0.9, 3.7),
                "NVIDIA A100 40GB SXM datasheet, 2021"),
        _device("H100", "datacenter", (989, 1979), 80 * GIB, 3352, (450, 50, 8), 700, (1.9, 6.9),
                "NVIDIA H100 SXM datasheet, 2023"),
        _device("H100-PCIe", "datacenter", (756, 1513), 80 * GIB, 2039, (64, 25, 8), 350, (1.7, 4.0),
                "NVIDIA H100 PCIe datasheet, 2023"),
        _device("H800", "datacenter", (989, 1979), 80 * GIB, 3352, (200, 50, 8), 700, (1.5, 3.0),
                "DeepSeek-V3 (arXiv 2412.19437): H100 with NVLink of 400 GB/s in both directions; 2 $ an hour there"),
        _device("H200", "datacenter", (989, 1979), 141 * GB, 4800, (450, 50, 8), 700, (2.3, 10.6),
                "NVIDIA H200 SXM datasheet, 2024"),
        _device("H20", "datacenter", (148, 296), 96 * GIB, 4000, (450, 50, 8), 400, (1.0, 2.5),
                "NVIDIA H20 datasheet as reported in 2024"),
        _device("B200", "datacenter", (2250, 4500), 180 * GB, 7700, (900, 50, 8), 1000, (3.0, 14.2),
                "NVIDIA DGX B200 datasheet, 2024, by the GPU"),
        _device("GB200", "datacenter", (2500, 5000), 186 * GB, 8000, (900, 50, 72), 1200, (4.0, 16.0),
                "NVIDIA GB200 NVL72 datasheet, 2024, by the GPU"),
        _device("MI300X", "datacenter", (1307, 2615), 192 * GB, 5300, (448, 50, 8), 750, (1.9, 7.9),
                "AMD Instinct MI300X datasheet, 2023"),
        _device("L40S", "datacenter", (362, 733), 48 * GIB, 864, (32, 25, 8), 350, (0.8, 2.0),
                "NVIDIA L40S datasheet, 2023"),
        _device("RTX-A6000", "geforce", (155, None), 48 * GIB, 768, (32, 12.5, 8), 300, (0.4, 0.8),
                "NVIDIA RTX A6000 datasheet, 2021"),
        # one's own
        _device("RTX-3090", "geforce", (71, None), 24 * GIB, 936, (32, 3, 8), 350, (0.2, 0.5), _GEFORCE),
        _device("RTX-4080", "geforce", (97, 390), 16 * GIB, 717, (32, 3, 8), 320, (0.2, 0.5), _GEFORCE),
        _device("RTX-4090", "geforce", (165, 660), 24 * GIB, 1008, (32, 3, 8), 450, (0.35, 0.8), _GEFORCE),
        _device("RTX-5090", "geforce", (210, 838), 32 * GIB, 1792, (64, 3, 8), 575, (0.5, 1.0), _GEFORCE),
        _device("DGX-Spark", "unified", (125, 250), 128 * GB, 273, (25, 25, 1), 140, (0, 0),
                "NVIDIA DGX Spark datasheet, 2025 (1 PFLOP/s of sparse FP4)"),
        _device("Strix-Halo", "unified", (59, None), 128 * GIB, 256, (5, 1.2, 1), 120, (0, 0),
                "AMD Ryzen AI Max+ 395, Radeon 8060S, 2025"),
        _device("M1-Max", "apple", (21, None), 64 * GIB, 400, (5, 1.2, 1), 60, (0, 0), _APPLE),
        _device("M1-Ultra", "apple", (42, None), 128 * GIB, 800, (5, 1.2, 1), 120, (0, 0), _APPLE),
        _device("M2-Ultra", "apple", (54, None), 192 * GIB, 800, (5, 1.2, 1), 150, (0, 0), _APPLE),
        _device("M3-Max", "apple", (28, None), 128 * GIB, 400, (5, 1.2, 1), 80, (0, 0), _APPLE),
        _device("M3-Ultra", "apple", (57, None), 512 * GIB, 819, (10, 1.2, 1), 180, (0, 0), _APPLE),
        _device("M4-Max", "apple", (34, None), 128 * GIB, 546, (10, 1.2, 1), 80, (0, 0), _APPLE),
        # processors: their memory is what the machine has
        _device("laptop", "cpu", (1.0, 2.0), 16 * GIB, 83, (1, 0.12, 1), 45, (0, 0),
                "8 cores with AVX-512 or the like at 4 GHz; two channels of DDR5-5200"),
        _device("desktop", "cpu", (2.0, 4.0), 64 * GIB, 90, (1, 0.12, 1), 150, (0, 0),
                "16 cores with AVX-512 or the like at 4.5 GHz; two channels of DDR5-5600"),
        _device("server", "server", (30, 60), 512 * GIB, 307, (5, 12.5, 1), 500, (1.0, 4.0),
                "32 cores with AMX, one socket, eight channels of DDR5-4800"),
        _device("server-2-socket", "server", (60, 120), 1024 * GIB, 614, (5, 12.5, 1), 900, (2.0, 8.0),
                "two of these sockets"),
    )
}  # fmt: skip

MEMORY_KINDS: Mapping[str, float] = {
    "ddr4": 51.2 * GB, "ddr5": 83.2 * GB, "lpddr5": 102.4 * GB, "lpddr5x": 136 * GB, "ddr4x8": 205 * GB,
    "ddr5x4": 166 * GB, "ddr5x8": 307 * GB, "ddr5x12": 461 * GB, "ddr5x16": 614 * GB,
}  # fmt: skip
"""Bytes/s: two channels of DDR4-3200 or DDR5-5200, 128 bits of LPDDR; `x8` is a server's eight channels."""

DISKS: Mapping[str, float] = {"hdd": 0.2 * GB, "sata": 0.55 * GB, "nvme": 3.5 * GB, "nvme4": 7.0 * GB, "nvme5": 12 * GB}
"""Bytes/s of large reads: a disk, an SSD on SATA, and on PCIe 3, 4 and 5."""
