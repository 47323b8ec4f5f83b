"""What the calls into the native module share: addresses, what a status means, and when torch need not be asked."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import UsageError
from moesaic.ops.instruction_set import native_module, native_status

NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Types of plain numbers, as csrc/experts.h numbers them."""
NO_SUCH_KERNELS, NO_MEMORY = -1, -2
"""Status of a call, as csrc/ returns it; 0 is success."""


def native() -> Any:
    """The native module. Raises UsageError with the command that builds it where it is missing."""
    module = native_module()
    if module is None:
        raise UsageError(f"the native kernels are {native_status()}")
    return module


def address(tensor: Tensor | None) -> int:
    """0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def float32(tensor: Tensor | None) -> Tensor | None:
    """As the kernels read it, which trust an address, whatever stands there. Nothing is copied that is so already."""
    return None if tensor is None else tensor.float().contiguous()


def is_plain_call(x: Tensor) -> bool:
    """Whether nobody traces or differentiates: then the way through torch's dispatcher, which takes as long as a small
    operator does, can be left out."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and is_plain_tensor(x)


def is_plain_tensor(x: Tensor) -> bool:
    """Whether x has memory of its own: no subclass, and nothing of `torch.func`."""
    functorch = torch._C._functorch  # type: ignore[attr-defined]
    return type(x) in (Tensor, torch.nn.Parameter) and not functorch.is_functorch_wrapped_tensor(x)


def raise_for(status: int, instruction_set: str, usable: Callable[[], Sequence[str]]) -> None:
    """Raises UsageError where the kernels lack the instruction set, MemoryError where their buffers found no room."""
    if status == NO_SUCH_KERNELS:
        raise UsageError(f"no native kernels for '{instruction_set}' here; choose {', '.join(usable())}")
    if status == NO_MEMORY:
        raise MemoryError("not enough memory for the buffers of the native kernels")
    if status:
        raise UsageError("the native kernels do not know such weights; build them again")
