"""Quantised checkpoints, shown as plain ones and unpacked while they are read, a few rows at a time.

fp8: "X.weight" holds F8_E4M3 numbers and "X.weight_scale_inv" one factor per block, 128 x 128 as in DeepSeek-V3 (arXiv
2412.19437, section 3.3); fused experts (E, rows, columns) have a grid of factors each. mxfp4: "X_blocks" and "X_scales"
are the logical tensor "X" in OCP Microscaling MXFP4 (arXiv 2310.10537): 32 numbers of type E2M1, two a byte with the
first in the low bits, share a power of two of type E8M0. As in gpt-oss, X (E, in, out) lies on disk transposed.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moesaic.checkpoint.families.hf_config import shortened
from moesaic.errors import MoesaicError, UsageError
from moesaic.safetensors_file import DTYPES, Extent, Shape
from moesaic.weight_reader import PART_BYTES, Read, WeightDirectory, check_fits, pieces

METHODS = ("fp8", "mxfp4")
SCALE_TYPES = ("F64", "F32", "F16", "BF16", "F8_E8M0", "U8")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E2M1_MAX_EXPONENT = 2
E8M0_BIAS, E8M0_NAN = 127, 255
E4M3_MAX = 448.0
MXFP4_BLOCK = 32
FP8_BLOCK = (128, 128)
CHUNK_ELEMENTS = 2**17  # unpacked together: temporaries stay in a core's cache
MAX_ROW_ELEMENTS = 2**22


class UnpackedWeights:
    """A WeightDirectory as if its packed tensors were stored unpacked: scales are hidden, logical names shown.

    It closes the directory, when it is closed and when it cannot be made.

    Which tensors are packed shows in their types and names, not in `quantization`, the value of quantization_config in
    config.json (None when there is none); that says which method it is and how large its blocks are.

    Raises MoesaicError for methods other than fp8 and mxfp4, by name, and for packed tensors that contradict their
    scales.
    """

    def __init__(self, stored: WeightDirectory, quantization: Any = None):
        self.directory = stored.directory
        self._stored = stored
        try:
            self._packed, hidden = _find_packed(
                stored, _checked_block(quantization, f"{stored.directory}: config.json")
            )
        except BaseException:
            stored.__exit__()
            raise
        plain = [name for name in stored.names if name not in self._packed and name not in hidden]
        self._names = dict.fromkeys([*plain, *self._packed])

    def __enter__(self) -> "UnpackedWeights":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stored.__exit__(*exception)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    @property
    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> Shape:
        packed = self._packed.get(name)
        return packed.shape if packed else self._stored.shape(name)

    def stored_type(self, name: str) -> str:
        """As WeightDirectory.stored_type: F8_E4M3 for fp8 tensors; MXFP4 for that."""
        packed = self._packed.get(name)
        return packed.stored_type if packed else self._stored.stored_type(name)

    def dtype(self, name: str) -> torch.dtype:
        """bfloat16 for packed tensors. Raises MoesaicError for types that are neither plain nor packed."""
        return torch.bfloat16 if name in self._packed else self._stored.dtype(name)

    def extent(self, name: str) -> Extent:
        """Where a tensor lies that is stored plain. Raises UsageError for one that is packed."""
        if name in self._packed:
            raise UsageError(
                f"{self.directory} is quantised ({self.stored_type(name)}), and can be read as a whole only; write it "
                "with `moesaic quantize MODEL OUT`, --scheme mxfp4 where it is MXFP4, and name OUT"
            )
        return self._stored.extent(name)

    def read(self, name: str) -> Tensor:
        """The whole tensor, in memory of its own: as stored, or as bfloat16 when it is packed."""
        if name not in self._packed:
            return self._stored.read(name)
        tensor = torch.empty(self.shape(name), dtype=torch.bfloat16)
        self.read_into(name, tensor)
        return tensor

    def read_into(self, name: str, target: Tensor) -> None:
        """As WeightDirectory.read_into; the dimensions of `target` must divide those of a packed tensor, not cross
        them. Numbers are unpacked in float32 and rounded once, to the type of `target`."""
        for read in self.reads(name, target):
            read()

    def reads(self, name: str, target: Tensor) -> Iterator[Read]:
        """As WeightDirectory.reads."""
        packed = self._packed.get(name)
        if packed is None:
            yield from self._stored.reads(name, target)
            return
        check_fits(self, name, target)
        if target.numel():
            ordered = packed.in_stored_order(target.detach())
            limit = max(PART_BYTES // target.element_size(), packed.columns)
            for start, part in pieces(ordered, limit):
                yield partial(_unpack, packed, start, part)


def _find_packed(
    stored: WeightDirectory, block: tuple[int, int] | None
) -> tuple[dict[str, "_Fp8Tensor | _Mxfp4Tensor"], set[str]]:
    """The packed tensors by logical name, and the names that they make needless."""
    packed: dict[str, _Fp8Tensor | _Mxfp4Tensor] = {}
    hidden: set[str] = set()
    e4m3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    mxfp4 = _mxfp4_table()
    for name in stored.names:
        base = name.removesuffix("_blocks")
        if stored.stored_type(name) == "F8_E4M3":
            scale = next((label for label in (f"{name}_scale_inv", f"{name}_scale") if label in stored), None)
            if scale is not None:
                packed[name] = _Fp8Tensor(stored, name, scale, block, e4m3)
                stem = name.removesuffix("weight") if name.endswith("weight") else f"{name}_"
                hidden |= {scale, f"{stem}input_scale", f"{stem}activation_scale"}
        elif base != name and stored.stored_type(name) == "U8" and f"{base}_scales" in stored:
            if base in stored:
                raise MoesaicError(f"{stored.directory} holds both {base} and {name}; keep one of them")
            packed[base] = _Mxfp4Tensor(stored, base, mxfp4)
            hidden |= {name, f"{base}_scales"}
    return packed, hidden


def _checked_block(quantization: Any, where: str) -> tuple[int, int] | None:
    """Size of the fp8 blocks; None when each tensor, or each of its rows, has one scale."""
    if quantization is None:
        return FP8_BLOCK
    if not isinstance(quantization, dict):
        raise MoesaicError(f"{where}: quantization_config is a {type(quantization).__name__}, not an object")
    method = quantization.get("quant_method")
    if method not in METHODS:
        raise MoesaicError(
            f"{where}: quantization_config has quant_method {shortened(method)}; only {', '.join(METHODS)} and moesaic "
            "are read: use the checkpoint that is not quantised"
        )
    block = quantization.get("weight_block_size", FP8_BLOCK)
    if block is None:
        return None
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise MoesaicError(f"{where}: weight_block_size = {block!r} must be two positive whole numbers")
    return block[0], block[1]


def _unpack(packed: "_Fp8Tensor | _Mxfp4Tensor", start: int, target: Tensor) -> None:
    """`target` is in stored order, whole rows from element `start` on."""
    for first, part in pieces(target, max(CHUNK_ELEMENTS, packed.columns), start):
        part.copy_(packed.rows(first // packed.columns, part.numel() // packed.columns).view(part.shape))


class _Fp8Tensor:
    """A weight (..., rows, columns) of E4M3 numbers with a grid (..., ceil(rows / a), ceil(columns / b)) of factors."""

    stored_type = "F8_E4M3"

    def __init__(self, stored: WeightDirectory, name: str, scale: str, block: tuple[int, int] | None, table: Tensor):
        self._stored, self._name, self._scale, self._table = stored, name, scale, table
        self.shape = stored.shape(name)
        if len(self.shape) < 2:
            raise MoesaicError(f"tensor {name} in {stored.directory} is quantised but {list(self.shape)} is no matrix")
        self.columns = _checked_columns(stored, name, self.shape[-1])
        grid = stored.shape(scale)
        if math.prod(grid) == 1:
            grid = (1,) * len(self.shape)
        elif grid == self.shape[:-1]:
            grid = (*grid, 1)
        fits = len(grid) == len(self.shape) and grid[:-2] == self.shape[:-2]
        sizes = block or self.shape[-2:]
        self._block_rows = _block_size(self.shape[-2], grid[-2], sizes[0]) if fits else 0
        self._block_columns = _block_size(self.shape[-1], grid[-1], sizes[1]) if fits else 0
        if not self._block_rows or not self._block_columns or stored.stored_type(scale) not in SCALE_TYPES:
            raise MoesaicError(
                f"tensor {scale} in {stored.directory}, {stored.stored_type(scale)} {list(stored.shape(scale))}, does "
                f"not fit {name} {list(self.shape)} and blocks of {list(block) if block else 'any size'}; "
                "download both again"
            )
        self._grid_rows, self._grid_columns = grid[-2:]

    def in_stored_order(self, target: Tensor) -> Tensor:
        _dimensions_of((math.prod(self.shape[:-1]), self.columns), target, self._name)
        return target

    def rows(self, first: int, count: int) -> Tensor:
        """Rows `first` to `first + count` of all leading dimensions together: (count, columns) in float32."""
        stored = torch.empty(count * self.columns, dtype=torch.float8_e4m3fn)
        self._stored.read_elements(self._name, first * self.columns, stored)
        # Six times as fast as stored.float().
        values = torch.index_select(self._table, 0, stored.view(torch.uint8).int()).view(count, self.columns)
        row_numbers = torch.arange(first, first + count)
        matrix, row = row_numbers // self.shape[-2], row_numbers % self.shape[-2]
        grid_rows = matrix * self._grid_rows + row // self._block_rows
        first_scale = int(grid_rows[0])
        scales = self._scales(first_scale, int(grid_rows[-1]) + 1 - first_scale)[grid_rows - first_scale]
        whole, rest = divmod(self.columns, self._block_columns)
        blocks = values[:, : self.columns - rest].unflatten(1, (whole, self._block_columns))
        blocks.mul_(scales[:, :whole, None])
        if rest:
            values[:, -rest:].mul_(scales[:, whole:])
        return values

    def _scales(self, first: int, count: int) -> Tensor:
        stored = torch.empty(count, self._grid_columns, dtype=DTYPES[self._stored.stored_type(self._scale)])
        self._stored.read_elements(self._scale, first * self._grid_columns, stored)
        # Some files say U8 for E8M0.
        return (stored.view(torch.float8_e8m0fnu) if stored.dtype == torch.uint8 else stored).float()


class _Mxfp4Tensor:
    """Logical (E, in, out), stored as blocks (E, out, in / 32, 16) and scales (E, out, in / 32)."""

    stored_type = "MXFP4"

    def __init__(self, stored: WeightDirectory, base: str, table: Tensor):
        self._stored, self._base, self._table = stored, base, table
        blocks, scales = stored.shape(f"{base}_blocks"), stored.shape(f"{base}_scales")
        if len(blocks) != 4 or blocks[3] != MXFP4_BLOCK // 2:
            raise MoesaicError(
                f"tensor {base}_blocks in {stored.directory} has shape {list(blocks)}; MXFP4 experts have four "
                f"dimensions, the last of {MXFP4_BLOCK // 2} bytes: use the checkpoint that is not quantised"
            )
        if scales != blocks[:3] or stored.stored_type(f"{base}_scales") not in ("U8", "F8_E8M0"):
            raise MoesaicError(
                f"tensor {base}_scales in {stored.directory}, {stored.stored_type(f'{base}_scales')} {list(scales)}, "
                f"does not fit {base}_blocks {list(blocks)}; download both again"
            )
        self._groups = blocks[2]
        self.columns = _checked_columns(stored, base, blocks[2] * MXFP4_BLOCK)
        self.shape = (blocks[0], self.columns, blocks[1])

    def in_stored_order(self, target: Tensor) -> Tensor:
        experts, inputs, outputs = _dimensions_of(self.shape, target, self._base)
        return target.permute(*experts, *outputs, *inputs)

    def rows(self, first: int, count: int) -> Tensor:
        """Stored rows `first` to `first + count` of all experts together: (count, in) in bfloat16, which is exact."""
        blocks = torch.empty(count * self._groups, MXFP4_BLOCK // 2, dtype=torch.uint8)
        scales = torch.empty(count * self._groups, dtype=DTYPES[self._stored.stored_type(f"{self._base}_scales")])
        self._stored.read_elements(f"{self._base}_blocks", first * blocks[: self._groups].numel(), blocks)
        self._stored.read_elements(f"{self._base}_scales", first * self._groups, scales)
        entries = blocks.int() + (scales.view(torch.uint8).int() << 8)[:, None]
        return torch.index_select(self._table, 0, entries.view(-1)).view(torch.bfloat16).view(count, self.columns)


def _mxfp4_table() -> Tensor:
    """Both numbers of every byte under every scale, (256 scales x 256 bytes,), each pair as the bits of one int32."""
    byte = torch.arange(256)
    values = torch.tensor(E2M1, dtype=torch.float64)
    pairs = torch.stack([values[byte & 15], values[byte >> 4]], dim=1)
    scales = torch.arange(256, dtype=torch.float64).sub(E8M0_BIAS).exp2()
    scales[E8M0_NAN] = torch.nan
    return (scales[:, None, None] * pairs).to(torch.bfloat16).view(torch.int32).view(-1)


def _dimensions_of(shape: Shape, target: Tensor, name: str) -> list[list[int]]:
    """Which dimensions of `target` make up each dimension of `shape`."""
    groups: list[list[int]] = []
    rest = list(range(target.ndim))
    for size in shape:
        group: list[int] = []
        product = 1
        while product < size and rest:
            group.append(rest.pop(0))
            product *= target.shape[group[-1]]
        if product != size:
            raise MoesaicError(f"tensor {name} of shape {list(shape)} cannot fill {list(target.shape)} row by row")
        groups.append(group)
    groups[-1] += rest  # of size 1
    return groups


def _block_size(count: int, cells: int, size: int) -> int:
    """How many rows or columns share a factor: `size`, the last fewer, or else equal shares. 0 when neither fits."""
    if -(-count // max(size, 1)) == cells:
        return max(size, 1)
    return count // cells if cells and count % cells == 0 else 0


def _checked_columns(stored: WeightDirectory, name: str, columns: int) -> int:
    if columns > MAX_ROW_ELEMENTS:
        raise MoesaicError(
            f"tensor {name} in {stored.directory} has rows of {columns:,} numbers; quantised ones may have at most "
            f"{MAX_ROW_ELEMENTS:,}: use the checkpoint that is not quantised"
        )
    return columns


def pack_mxfp4(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks (E, out, in / 32, 16) and scales (E, out, in / 32), both uint8, of finite numbers (E, in, out).

    As arXiv 2310.10537, section 6.3: the scale is the power of two that brings the largest number of a block into
    [4, 8), what is then beyond 6 becomes 6, and the rest is rounded to the nearest, ties to the even code.
    """
    groups = tensor.mT.float().unflatten(-1, (-1, MXFP4_BLOCK))
    exponent = torch.frexp(groups.abs().amax(-1, keepdim=True)).exponent - 1 - E2M1_MAX_EXPONENT
    exponent = exponent.clamp(-E8M0_BIAS, E8M0_BIAS)
    magnitudes = torch.ldexp(groups.abs().double(), -exponent).contiguous()
    levels = torch.tensor(E2M1[:8], dtype=torch.float64)
    midpoints = (levels[1:] + levels[:-1]) / 2
    midpoints[1::2] = torch.nextafter(midpoints[1::2], torch.zeros(3, dtype=torch.float64))
    codes = torch.bucketize(magnitudes, midpoints) + 8 * groups.signbit()
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    return blocks.to(torch.uint8), (exponent.squeeze(-1) + E8M0_BIAS).to(torch.uint8)


def pack_fp8_blocks(tensor: Tensor, block: tuple[int, int] = FP8_BLOCK) -> tuple[Tensor, Tensor]:
    """E4M3 numbers (..., rows, columns) and their factors, float32 (..., ceil(rows / a), ceil(columns / b)).

    The largest number of each block becomes 448, the largest of the type.
    """
    (rows, columns), (a, b) = tensor.shape[-2:], block
    padded = functional.pad(tensor.float(), (0, -columns % b, 0, -rows % a))
    blocks = padded.unflatten(-1, (-1, b)).unflatten(-3, (-1, a))
    largest = blocks.abs().amax((-3, -1))
    factors = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
    scaled = (blocks / factors[..., :, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    return scaled.reshape(padded.shape)[..., :rows, :columns].to(torch.float8_e4m3fn), factors
