"""Linear layers in plain bfloat16 by the C++ kernels of csrc/, where torch is slow: on CPUs without products of it.

There torch makes up each product of bfloat16 from others: a fifth of float32's rate for many tokens, less than half of
the memory's for one. The kernels widen to float32 while they read, and round the result once.

T tokens, K inputs, N outputs.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from moesaic.errors import UsageError
from moesaic.ops.instruction_set import cpu_features, native_module
from moesaic.ops.native import native_instruction_sets
from moesaic.ops.native_call import address, is_plain_call, native, raise_for


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times weight (N, K), transposed, plus bias (N,): by the kernels where they serve, else by torch."""
    return _run(x, weight, bias) if is_served(x, weight, bias) else functional.linear(x, weight, bias)


def is_served(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels compute it: plain inference in bfloat16, on a CPU that has wide registers and no products."""
    return (
        x.dtype == torch.bfloat16
        and _kernels_are_faster()
        and is_plain_call(x)
        and x.numel() > 0
        and weight.numel() > 0
        and _fit(x, weight, bias)
    )


def native_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, instruction_set: str = "") -> Tensor:
    """By the kernels, whatever is faster; `instruction_set` forces one of `native_instruction_sets()`, for tests.

    Raises UsageError for tensors that are not bfloat16 on the CPU, contiguous (but x), and of fitting shapes.
    """
    if not _fit(x, weight, bias):
        told = ", ".join(f"{each.dtype} {tuple(each.shape)}" for each in (x, weight, bias) if each is not None)
        needed = "bfloat16 (..., K), (N, K) and (N,) on the CPU, the weight and the bias without gaps"
        raise UsageError(f"x, weight and bias are {told}; they need to be {needed}")
    return _run(x, weight, bias, instruction_set)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, instruction_set: str = "") -> Tensor:
    rows = x.reshape(-1, weight.shape[1]).contiguous()
    y = x.new_empty(*x.shape[:-1], len(weight))
    sizes = len(rows), *weight.shape
    threads = torch.get_num_threads()
    status = native().linear(
        sizes, weight.data_ptr(), address(bias), rows.data_ptr(), threads, instruction_set, y.data_ptr()
    )
    raise_for(status, instruction_set, native_instruction_sets)
    return y


def _fit(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """The kernels trust addresses and sizes."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    return (
        weight.ndim == 2
        and x.ndim > 0
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and all(each.dtype == torch.bfloat16 and each.device.type == "cpu" for each in tensors)
        and all(each.is_contiguous() for each in tensors[1:])
    )


@functools.cache
def _kernels_are_faster() -> bool:
    if native_module() is None:
        return False
    return not cpu_features()["avx512_bf16"] and native_instruction_sets()[0] != "portable"
