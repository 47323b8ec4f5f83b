"""How rows travel: as they are, or in fewer bytes.

R rows, D hidden size, W what a row is sent as.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

EIGHT_BITS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""The type of a number, and the largest that it holds."""
SCALE_BYTES = 4


@dataclass(frozen=True)
class Transport:
    """Rows to what is sent, and back."""

    encode: Callable[[Tensor], Tensor]
    """(R, D) -> (R, W)."""
    decode: Callable[[Tensor, torch.dtype], Tensor]
    """(R, W) and the type of the rows -> (R, D)."""
    row_bytes: Callable[[int, int], int]
    """D and the bytes of a number of the rows -> the bytes of a row on its way."""


def _encode_8bit(rows: Tensor, name: str) -> Tensor:
    """(R, D) -> (R, D + 4) bytes: the numbers, divided by a float32 scale for each row, and the scale."""
    dtype, largest = EIGHT_BITS[name]
    # Subnormal scales would lose bits; a row of zeros needs any scale but 0.
    scale_R1 = (rows.abs().amax(1, keepdim=True).float() / largest).clamp_min(torch.finfo(torch.float32).tiny)
    scaled_RD = (rows / scale_R1).clamp(-largest, largest)
    codes_RD = (scaled_RD.round() if dtype == torch.int8 else scaled_RD).to(dtype)
    return torch.cat((codes_RD.view(torch.uint8), scale_R1.view(torch.uint8)), dim=1)


def _decode_8bit(message: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    code_dtype, _ = EIGHT_BITS[name]
    codes_RD = message[:, :-SCALE_BYTES].clone(memory_format=torch.contiguous_format).view(code_dtype)
    scale_R1 = message[:, -SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return (codes_RD.float() * scale_R1).to(dtype)


def _eight_bits(name: str) -> Transport:
    return Transport(
        encode=lambda rows: _encode_8bit(rows, name),
        decode=lambda message, dtype: _decode_8bit(message, dtype, name),
        row_bytes=lambda hidden_size, _: hidden_size + SCALE_BYTES,
    )


TRANSPORTS = {
    "exact": Transport(
        encode=lambda rows: rows,
        decode=lambda message, _: message,
        row_bytes=lambda hidden_size, itemsize: hidden_size * itemsize,
    ),
    "bfloat16": Transport(
        encode=lambda rows: rows.bfloat16(),
        decode=lambda message, dtype: message.to(dtype),
        row_bytes=lambda hidden_size, _: 2 * hidden_size,
    ),
    "fp8": _eight_bits("fp8"),
    "int8": _eight_bits("int8"),
}
