"""One linear layer with packed weights beside torch's own operators for 8 and 4 bits, in one process.

N outputs, K inputs, T tokens, G inputs of a group.
"""

import time
import warnings
from collections.abc import Callable
from statistics import median

import torch
from common import Row
from torch import Tensor, nn

from moesaic.ops.native_packed import packed_linear
from moesaic.ops.quantize import pack

OUTPUTS, INPUTS = 8192, 2048
TOKENS = (1, 16, 512)
GROUP_SIZE = 32
SECONDS = 0.2
"""Of one turn, at least."""
LARGEST_ERROR = {"int4": 0.12, "int8": 0.05}
"""Of every side against float32, relative: they must compute the same."""
INT4_STEPS = 15

Linear = Callable[[Tensor], Tensor]


@torch.inference_mode()
def linear_rows(format: str, rounds: int) -> list[Row]:
    """A row for each number of tokens and each of torch's operators for `format`; sides take turns."""
    with torch.inference_mode(False):
        weight = torch.randn(OUTPUTS, INPUTS)
    packed = pack(weight, format, GROUP_SIZE)
    sides: dict[str, Linear] = {"moesaic": lambda x: packed_linear(x, packed), **PEERS[format](weight)}
    rows = []
    for tokens in TOKENS:
        x = torch.randn(tokens, INPUTS)
        for name, linear in sides.items():
            _require_close(name, format, linear(x), x @ weight.T)
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds):
            for name in sides if number % 2 == 0 else reversed(sides):
                seconds[name].append(_seconds(sides[name], x))
        rows += [
            Row(
                work=f"{format}: one linear layer {INPUTS} x {OUTPUTS}, tokens {tokens}",
                unit="tokens/s",
                ours=tokens / median(seconds["moesaic"]),
                peer=tokens / median(seconds[name]),
                peer_name=name,
                ratio=median(b / a for a, b in zip(seconds["moesaic"], seconds[name], strict=True)),
            )
            for name in sides
            if name != "moesaic"
        ]
    return rows


def _torch_int4(weight: Tensor) -> dict[str, Linear]:
    """16 equal steps between the smallest and the largest of a group; the input stays bfloat16."""
    groups_NSG = weight.unflatten(1, (-1, GROUP_SIZE))
    low, high = groups_NSG.amin(-1, keepdim=True), groups_NSG.amax(-1, keepdim=True)
    scales = (high - low) / INT4_STEPS
    codes_NK = ((groups_NSG - low) / scales).round().clamp(0, INT4_STEPS).int().flatten(1)
    zeros = low + scales * (INT4_STEPS + 1) / 2
    scales_and_zeros_SN2 = torch.cat((scales, zeros), -1).transpose(0, 1).contiguous().bfloat16()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_NK, 1)

    def multiply(x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, GROUP_SIZE, scales_and_zeros_SN2)

    return {"torch _weight_int4pack_mm": multiply}


def _torch_int8(weight: Tensor) -> dict[str, Linear]:
    """A scale for each output: with the input in bfloat16, and with the input rounded to 8 bits by oneDNN."""
    scales_N = weight.abs().amax(1) / 127
    codes_NK = (weight / scales_N.unsqueeze(1)).round().to(torch.int8)

    def multiply(x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x.bfloat16(), codes_NK, scales_N.bfloat16())

    linear = nn.Linear(INPUTS, OUTPUTS, bias=False)
    linear.weight = nn.Parameter(weight)
    torch.backends.quantized.engine = "onednn"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to retire it
        dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)
    return {"torch _weight_int8pack_mm": multiply, "torch dynamic, oneDNN": dynamic}


PEERS: dict[str, Callable[[Tensor], dict[str, Linear]]] = {"int4": _torch_int4, "int8": _torch_int8}


def _require_close(name: str, format: str, found: Tensor, expected: Tensor) -> None:
    error = float((found.float() - expected).norm() / expected.norm())
    if not error <= LARGEST_ERROR[format]:
        raise SystemExit(f"{format}: {name} is off by {error:.3f} of the size of the result")


def _seconds(linear: Linear, x: Tensor) -> float:
    """Of one call, the mean over as many as fill a turn."""
    linear(x)
    start, calls = time.perf_counter(), 0
    while True:
        linear(x)
        calls += 1
        elapsed = time.perf_counter() - start
        if elapsed > SECONDS:
            return elapsed / calls
