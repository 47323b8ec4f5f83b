"""Packing of weights by the C++ kernels of csrc/: what `moesaic.ops.quantize.pack` does, several times as fast.

N outputs, K inputs, P panels, S groups.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.ops.instruction_set import native_module
from moesaic.ops.native_call import NATIVE_DTYPES, raise_for

NOT_FINITE = "it holds numbers that are not finite, which cannot be packed; download or train it again"
_NOT_FINITE = -4
"""Status of a call."""


def packs(weight: Tensor) -> bool:
    """Whether the kernels are there for such weights."""
    return weight.device.type == "cpu" and native_module() is not None


def pack_matrices(
    weight: Tensor,
    data: Tensor,
    *,
    bits: int,
    group_size: int,
    threads: int,
    table: Sequence[int] = (),
    ends: Sequence[float] = (),
    instruction_set: str = "",
) -> None:
    """weight (..., N, K) -> data (..., P, S, bytes) uint8, contiguous, which is filled. For 4 bits `table` has the
    numbers of the codes, ascending, and `ends` what the largest number of a group is tried as.

    Raises MoesaicError for numbers that are not finite.
    """
    native = native_module()
    assert native is not None
    *leading, rows, columns = weight.shape
    count = math.prod(leading)
    codes = bytes(value % 256 for value in table)
    for matrix, target in zip(weight.reshape(count, rows, columns), data.view(count, *data.shape[-3:]), strict=True):
        plain = (matrix if matrix.dtype in NATIVE_DTYPES else matrix.float()).contiguous()
        status = native.pack(
            (rows, columns, group_size, bits, NATIVE_DTYPES[plain.dtype]),
            plain.data_ptr(),
            codes,
            list(ends),
            threads,
            instruction_set,
            target.data_ptr(),
        )
        if status == _NOT_FINITE:
            raise MoesaicError(NOT_FINITE)
        raise_for(status, instruction_set, native.packed_kernels)
