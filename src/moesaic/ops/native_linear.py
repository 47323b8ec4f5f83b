"""Linear layers in plain bfloat16 by the C++ kernels of csrc/, where torch is slow: on CPUs without products of it.

There torch makes up each product of bfloat16 from others: a fifth of float32's rate for many tokens, less than half of
the memory's for one. The kernels widen to float32 while they read, and round the result once.

T tokens, K inputs, N outputs.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from moesaic.ops.instruction_set import cpu_features, native_module
from moesaic.ops.native import native_instruction_sets
from moesaic.ops.native_call import address, is_plain_call, native, raise_for


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times weight (N, K), transposed, plus bias (N,): by the kernels where they serve, else by torch."""
    if is_served(x, weight, bias):
        return native_linear(x, weight, bias)
    return functional.linear(x, weight, bias)


def is_served(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels compute it: plain inference in bfloat16, on a CPU that has wide registers and no products."""
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and x.device.type == weight.device.type == "cpu"
        and _kernels_are_faster()
        and is_plain_call(x)
        and weight.is_contiguous()
        and (bias is None or (bias.dtype == weight.dtype and bias.is_contiguous()))
        and x.numel() > 0
        and weight.numel() > 0
    )


def native_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, instruction_set: str = "") -> Tensor:
    """What `is_served` says; `instruction_set` forces one of `native_instruction_sets()`, for tests."""
    rows = x.reshape(-1, weight.shape[1]).contiguous()
    y = x.new_empty(*x.shape[:-1], len(weight))
    sizes = len(rows), *weight.shape
    threads = torch.get_num_threads()
    status = native().linear(
        sizes, weight.data_ptr(), address(bias), rows.data_ptr(), threads, instruction_set, y.data_ptr()
    )
    raise_for(status, instruction_set, native_instruction_sets)
    return y


@functools.cache
def _kernels_are_faster() -> bool:
    if native_module() is None:
        return False
    return not cpu_features()["avx512_bf16"] and native_instruction_sets()[0] != "portable"
