"""The step of the optimizer Muon in C++ for many small matrices: each stays in its core's cache through all iterations.

n matrices of M x N in a stack.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.errors import UsageError
from moesaic.ops.instruction_set import native_module
from moesaic.ops.native import native_instruction_sets
from moesaic.ops.native_call import native, raise_for


@dataclass(frozen=True)
class MatrixStack:
    """Matrices of one size that take a step. Parameters and momenta are changed where they stand."""

    size: tuple[int, int]
    """M and N: the last dimension of the tensors, and a divisor of the one before it."""
    parameters: Tensor
    gradients: Tensor
    momenta: Tensor
    keep: float
    """What parameters are multiplied by."""
    step_size: float
    """What a matrix with orthogonal rows or columns is multiplied by before it is subtracted."""
    coefficients: Sequence[tuple[float, float, float]]
    """(a, b, c) of each iteration, which replaces a direction x by a x + b (x x^T) x + c (x x^T)^2 x."""

    @property
    def is_served(self) -> bool:
        """Whether `muon_step` takes them: float32 on the CPU, contiguous, the smaller of M and N at most 256."""
        tensors = (self.parameters, self.gradients, self.momenta)
        module = native_module()
        return (
            module is not None
            and min(self.size) <= module.muon_largest_side()
            and all(each.dtype == torch.float32 and each.device.type == "cpu" for each in tensors)
            and all(each.is_contiguous() for each in tensors)
        )


def muon_step(stacks: Sequence[MatrixStack], *, momentum: float, instruction_set: str = "") -> None:
    """Move momenta towards gradients, orthogonalise Nesterov's directions, subtract them from what is kept.

    A matrix whose gradient is exactly zero is only multiplied by its `keep`. Results do not depend on the threads.

    Raises:
        UsageError: a stack is not served, or this machine lacks the instruction set; nothing has changed.
        MemoryError: a thread found no room; some matrices have taken the step and others have not.
    """
    for each in stacks:
        if not each.is_served:
            raise UsageError(f"matrices {each.size[0]} x {each.size[1]} of {each.parameters.dtype} are left to torch")
    described = [
        (
            each.parameters.numel() // (each.size[0] * each.size[1]),
            *each.size,
            each.parameters.data_ptr(),
            each.gradients.data_ptr(),
            each.momenta.data_ptr(),
            each.keep,
            each.step_size,
            [coefficient for iteration in each.coefficients for coefficient in iteration],
        )
        for each in stacks
    ]
    status = native().muon_step(described, momentum, torch.get_num_threads(), instruction_set)
    for each in stacks:
        torch.autograd.graph.increment_version((each.parameters, each.momenta))
    raise_for(status, instruction_set, native_instruction_sets)
