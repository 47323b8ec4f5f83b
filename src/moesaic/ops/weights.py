"""The weights of a layer's experts, as every backend receives them.

E experts, D hidden size, F expert intermediate size.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ExpertWeights:
    """Stacked SwiGLU experts: expert e maps x to `down[e] @ (silu(gate[e] @ x) * (up[e] @ x))`."""

    gate_up: Tensor
    """(E, 2F, D): rows 0..F-1 are the gate, rows F..2F-1 the up projection."""
    down: Tensor
    """(E, D, F)."""

    @property
    def num_experts(self) -> int:
        return self.gate_up.shape[0]
