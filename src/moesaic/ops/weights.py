"""The weights of a layer's experts, as every backend receives them.

E experts, D hidden size, F expert intermediate size.
"""

from dataclasses import dataclass

from torch import Tensor

from moesaic.ops.activation import SWIGLU, Activation


@dataclass(frozen=True)
class ExpertWeights:
    """Stacked gated experts: e maps x to `down[e] @ activation(gate[e] @ x, up[e] @ x)`, each product plus its bias."""

    gate_up: Tensor
    """(E, 2F, D): rows 0..F-1 are the gate, rows F..2F-1 the up projection."""
    down: Tensor
    """(E, D, F)."""
    gate_up_bias: Tensor | None = None
    """(E, 2F), in the order of gate_up's rows."""
    down_bias: Tensor | None = None
    """(E, D); a row's weight multiplies it with the rest of the expert's output."""
    activation: Activation = SWIGLU

    @property
    def num_experts(self) -> int:
        return self.gate_up.shape[0]

    @property
    def has_bias(self) -> bool:
        return self.gate_up_bias is not None or self.down_bias is not None
