"""Packed weights: matrices of 8 or 4 bits a number, with one factor for each group of inputs, laid out for the kernels.

A matrix (N outputs, K inputs) lies in panels of 16 outputs and groups of G inputs; both are filled up with zeros. The
block of a panel and a group, contiguous, holds 16 factors (bfloat16), one for each output, then the codes: of 4
consecutive inputs, a quad, 64 bytes, byte 4 o + i that of output o and input i. With 4 bits two quads share 64 bytes,
the first in the low halves. A number is its code's value times its factor.

int8: values -127 to 127, code = value + 128; the factor is rounded up, so that nothing is cut off. int4: 16 values that
suit normally distributed weights (as in QLoRA, arXiv 2305.14314, but with the factor that fits each group best);
relative error 0.073 with groups of 32, where 16 equal steps and as long a search leave 0.081. mxfp4: OCP Microscaling
(arXiv 2310.10537), for weights that are of that form, and exact.

N outputs, K inputs, P panels, S groups of a row, G inputs of a group, n groups in memory together.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from moesaic.errors import MoesaicError, UsageError
from moesaic.ops.native_pack import NOT_FINITE, pack_matrices, packs

Result = TypeVar("Result")

PANEL = 16
QUAD = 4
GROUP_SIZES = (32, 64)
DEFAULT_GROUP_SIZE = 32
SCALE_BYTES = 2 * PANEL
CHUNK_ELEMENTS = 2**17
"""Packed together: temporaries stay in a core's cache."""
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the values of the type, by code."""
SMALLEST_MXFP4_EXPONENT = -128
"""Of half an E8M0 factor."""
INT4_VALUES = (-127, -102, -81, -64, -49, -35, -22, -9, 3, 15, 28, 42, 57, 74, 94, 123)
"""Lloyd's algorithm on groups of 32 normal numbers, together with the search below; then rounded."""
INT4_ENDS = tuple(end * share for end in (-127, 123) for share in (0.95, 1.0, 1.05))
"""The largest number of a group is tried in these places."""


@dataclass(frozen=True)
class PackedFormat:
    bits: int
    table: tuple[int, ...]
    """Value of each code, int8; empty where the code is value + 128."""
    group_sizes: tuple[int, ...]
    scales: Callable[[Tensor, Tensor], Tensor]
    """(groups (n, G), which of them count (G,)) -> bfloat16 (n, 1)."""
    ends: tuple[float, ...] = ()
    """For the C++ kernels: what the search for a factor brings the largest number of a group to."""

    @property
    def is_native(self) -> bool:
        """Whether the C++ kernels pack it too."""
        return not self.table or bool(self.ends)


@dataclass(frozen=True)
class PackedWeight:
    """Of one matrix (rows, columns), or of a stack of them.

    Raises UsageError where `data` is not what the rest says: the kernels trust a PackedWeight.
    """

    data: Tensor
    """(..., P, S, bytes of a block) uint8."""
    rows: int
    columns: int
    format: str
    group_size: int

    def __post_init__(self) -> None:
        expected = packed_shape(self.rows, self.columns, self.format, self.group_size)
        data = self.data
        if tuple(data.shape[-3:]) != expected or data.dtype != torch.uint8 or not data.is_contiguous():
            raise UsageError(
                f"packed data are {data.dtype} {tuple(data.shape)}; {self.format} with ({self.rows}, {self.columns}) "
                f"needs contiguous torch.uint8 {expected}"
            )

    @cached_property
    def layout(self) -> tuple[int, int, int, int, bytes]:
        """As the kernels take it: rows, columns, group size, bits, and the table, 16 int8 or nothing for 8 bits."""
        format = FORMATS[self.format]
        return self.rows, self.columns, self.group_size, format.bits, bytes(value & 0xFF for value in format.table)

    def of_expert(self, expert: int) -> "PackedWeight":
        return replace(self, data=self.data[expert])


def packed_shape(rows: int, columns: int, format: str, group_size: int) -> tuple[int, int, int]:
    """P, S and the bytes of a block."""
    block = SCALE_BYTES + PANEL * group_size * FORMATS[format].bits // 8
    return math.ceil(rows / PANEL), math.ceil(columns / group_size), block


def require_format(format: str, group_size: int) -> None:
    """Raises UsageError for a format that is not known, or not with such groups."""
    if format not in FORMATS:
        raise UsageError(f"weight format {format!r} is not known; choose {', '.join(FORMATS)}")
    if group_size not in FORMATS[format].group_sizes:
        sizes = " or ".join(map(str, FORMATS[format].group_sizes))
        raise UsageError(f"group size {group_size} is not possible with {format}; choose {sizes}")


@torch.no_grad()
def pack(weight: Tensor, format: str, group_size: int = DEFAULT_GROUP_SIZE) -> PackedWeight:
    """weight (..., N, K) of any floating type and device -> the same, packed. On the meta device only shapes are made.

    Raises UsageError for an unknown format or group size, MoesaicError for numbers that are not finite, and for those
    that mxfp4 cannot hold.
    """
    require_format(format, group_size)
    *leading, rows, columns = weight.shape
    shape = (*leading, *packed_shape(rows, columns, format, group_size))
    with torch.inference_mode(False):  # the threads below write to it, and they are in no such mode
        data = torch.empty(shape, dtype=torch.uint8, device=weight.device)
    packed = PackedWeight(data, rows, columns, format, group_size)
    if not weight.is_meta:
        pack_into(weight, packed, threads=torch.get_num_threads())
    return packed


@torch.no_grad()
def pack_into(weight: Tensor, packed: PackedWeight, *, threads: int) -> None:
    """Fills `packed`, of weight's shape. Raises as `pack`."""
    chosen = FORMATS[packed.format]
    if chosen.is_native and packs(weight):
        pack_matrices(
            weight.detach(),
            packed.data,
            bits=chosen.bits,
            group_size=packed.group_size,
            table=chosen.table,
            ends=chosen.ends,
            threads=threads,
        )
        return

    def pack_panels(part: Tensor, target: Tensor) -> None:
        target.copy_(_pack_panels(part, chosen, packed.group_size))

    _on_all_threads(pack_panels, _panels(weight.detach(), packed), threads)
    if packed.format == "mxfp4" and squared_error(weight, packed, threads)[0]:
        raise MoesaicError(
            "its numbers are not of the form mxfp4, for experts that were published so; choose int8 or int4"
        )


def unpack(packed: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """(..., N, K), rounded once, to `dtype`."""
    weight = packed.data.new_empty((*packed.data.shape[:-3], packed.rows, packed.columns), dtype=dtype)
    for part, data in _panels(weight, packed):
        part.copy_(_unpack_panels(data, FORMATS[packed.format])[: part.shape[0], : part.shape[1]])
    return weight


def squared_error(weight: Tensor, packed: PackedWeight, threads: int | None = None) -> tuple[float, float]:
    """Sum of the squares of what packing changed, and of the weights."""

    def of_panels(part: Tensor, data: Tensor) -> tuple[float, float]:
        restored = _unpack_panels(data, FORMATS[packed.format])[: part.shape[0], : part.shape[1]]
        error = torch.linalg.vector_norm(restored.sub_(part), dtype=torch.float64)
        return float(error) ** 2, float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2

    sums = _on_all_threads(of_panels, _panels(weight.detach(), packed), threads or torch.get_num_threads())
    return sum(error for error, _ in sums), sum(total for _, total in sums)


def _on_all_threads(
    run: Callable[[Tensor, Tensor], Result], chunks: Iterable[tuple[Tensor, Tensor]], threads: int
) -> list[Result]:
    """`run` of each chunk. A chunk is too small for torch to divide it among threads; so each has chunks of its own."""
    if threads == 1:
        return [run(*chunk) for chunk in chunks]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda chunk: run(*chunk), chunks))
    finally:
        torch.set_num_threads(before)


def _panels(weight: Tensor, packed: PackedWeight) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows (rows, K) at a time, whole panels but for the last, each with its packed panels (P', S, bytes)."""
    step = max(1, CHUNK_ELEMENTS // (PANEL * max(packed.columns, 1)))
    *leading, panels, groups, block = packed.data.shape
    count = math.prod(leading)
    matrices = weight if weight.ndim == 3 else weight.reshape(count, packed.rows, packed.columns)
    for matrix, data in zip(matrices, packed.data.view(count, panels, groups, block), strict=True):
        for first in range(0, len(data), step):
            yield matrix[first * PANEL : (first + step) * PANEL], data[first : first + step]


def _pack_panels(part: Tensor, format: PackedFormat, group_size: int) -> Tensor:
    """(rows, K) -> (P', S, bytes)."""
    rows, columns = part.shape
    padded = functional.pad(part.float(), (0, -columns % group_size, 0, -rows % PANEL))
    groups_nG = padded.view(-1, group_size)
    if not math.isfinite(float(groups_nG.abs().amax())):
        raise MoesaicError(NOT_FINITE)
    scales_n1 = _counted_scales(groups_nG, columns, format, group_size)
    codes_nG = _nearest_codes(groups_nG, scales_n1.float(), format)
    panels = padded.shape[0] // PANEL
    codes = codes_nG.view(panels, PANEL, -1, group_size // QUAD, QUAD).permute(0, 2, 3, 1, 4)  # (P', S, G / 4, 16, 4)
    if format.bits == 4:
        low, high = codes.unflatten(2, (-1, 2)).unbind(3)
        codes = low | high << 4
    scales = scales_n1.view(panels, PANEL, -1).transpose(1, 2).contiguous().view(torch.uint8)
    return torch.cat((scales, codes.flatten(2)), dim=2)


def _counted_scales(groups: Tensor, columns: int, format: PackedFormat, group_size: int) -> Tensor:
    """What fills up a row's last group has no say in its factor."""
    everything = groups.new_ones(group_size)
    scales_n1 = format.scales(groups, everything)
    rest = columns % group_size
    if rest:
        last = slice(columns // group_size, None, math.ceil(columns / group_size))
        counted = everything.clone()
        counted[rest:] = 0
        scales_n1[last] = format.scales(groups[last], counted)
    return scales_n1


def _nearest_codes(groups: Tensor, scales: Tensor, format: PackedFormat) -> Tensor:
    """(n, G) uint8."""
    scaled_nG = groups / torch.where(scales == 0, 1.0, scales)
    if not format.table:
        return scaled_nG.round_().clamp_(-127, 127).add_(128).to(torch.uint8)
    return _look_up(_nearest_table(format, scaled_nG.device), scaled_nG)


def _look_up(table: Tensor, scaled: Tensor) -> Tensor:
    """Entry of `table` (512,) for each number x, by floor(2 x) + 256; destroys `scaled`."""
    places = scaled.mul_(2).add_(256).clamp_(0, 511).to(torch.int32)
    return torch.index_select(table, 0, places.view(-1)).view(scaled.shape)


def _nearest_table(format: PackedFormat, device: torch.device) -> Tensor:
    """(512,) uint8: for each half step from -128 to 128 the code of the nearest value. Two whole numbers have their
    middle at the edge of a half step, so this is exact."""
    middles = torch.arange(-128, 128, 0.5, device=device) + 0.25
    values = torch.tensor(format.table, dtype=torch.float32, device=device)
    return (middles[:, None] - values).abs().argmin(1).to(torch.uint8)


def _unpack_panels(data: Tensor, format: PackedFormat) -> Tensor:
    """(P', S, bytes) -> (16 P', S G) in float32."""
    scales_PS16 = data[..., :SCALE_BYTES].contiguous().view(torch.bfloat16).float()
    codes = data[..., SCALE_BYTES:].unflatten(2, (-1, PANEL, QUAD))
    if format.bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=3).flatten(2, 3)
    if format.table:
        table = torch.tensor(format.table, dtype=torch.float32, device=data.device)
        values = torch.index_select(table, 0, codes.flatten().int()).view(codes.shape)
    else:
        values = codes.float().sub_(128)
    values.mul_(scales_PS16[:, :, None, :, None])
    return values.permute(0, 3, 1, 2, 4).reshape(data.shape[0] * PANEL, -1)


def _int8_scales(groups: Tensor, counted: Tensor) -> Tensor:
    """The largest number becomes 127 or less: the factor's lower bits are rounded up."""
    bits = (groups.abs().amax(1, keepdim=True) / 127).view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32).bfloat16()


def _int4_scales(groups: Tensor, counted: Tensor) -> Tensor:
    """The factor of least squared error among those that put the largest number near an end of the table.

    For given codes with values v the best factor is <w, v> / <v, v>, and it takes <w, v>^2 / <v, v> off the error.
    """
    format = FORMATS["int4"]
    codes = _nearest_table(format, groups.device).int()
    nearest_value = torch.tensor(format.table, dtype=torch.float32, device=groups.device)[codes]
    largest_n1 = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    shares_nG = groups / torch.where(largest_n1 == 0, 1.0, largest_n1)
    best_n1, gain_n1 = torch.zeros_like(largest_n1), torch.full_like(largest_n1, -1.0)
    for end in INT4_ENDS:
        values_nG = _look_up(nearest_value, shares_nG * end).mul_(counted)
        product_n1 = torch.linalg.vecdot(shares_nG, values_nG).unsqueeze(1)
        factor_n1 = product_n1 / torch.linalg.vecdot(values_nG, values_nG).unsqueeze(1)
        better_n1 = product_n1 * factor_n1 > gain_n1
        best_n1 = torch.where(better_n1, factor_n1, best_n1)
        gain_n1 = torch.where(better_n1, product_n1 * factor_n1, gain_n1)
    return (largest_n1 * best_n1).bfloat16()


def _mxfp4_scales(groups: Tensor, counted: Tensor) -> Tensor:
    """Half the power of two that brings the largest number into [4, 8); as section 6.3 of the format's paper."""
    _, exponent = torch.frexp(groups.abs().amax(1, keepdim=True))  # the number is in [0.5, 1) x 2^exponent
    smallest = torch.full_like(exponent, SMALLEST_MXFP4_EXPONENT)
    exponents = torch.maximum(exponent - 4, smallest).double()
    return exponents.exp2().bfloat16()


FORMATS: dict[str, PackedFormat] = {
    "int8": PackedFormat(8, (), GROUP_SIZES, _int8_scales),
    "int4": PackedFormat(4, INT4_VALUES, GROUP_SIZES, _int4_scales, INT4_ENDS),
    "mxfp4": PackedFormat(4, E2M1, (32,), _mxfp4_scales),
}
