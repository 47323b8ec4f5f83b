"""The weights of a layer's experts, as every backend receives them.

E experts, S slots, D hidden size, F expert intermediate size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.ops.activation import SWIGLU, Activation
from moesaic.ops.quantize import PackedWeight, unpack

PLAIN = "plain"
"""The format of weights that are not packed."""


@dataclass(frozen=True)
class ExpertWeights:
    """Stacked gated experts: e maps x to `down[e] @ activation(gate[e] @ x, up[e] @ x)`, each product plus its bias."""

    gate_up: Tensor | PackedWeight
    """(E, 2F, D): rows 0..F-1 are the gate, rows F..2F-1 the up projection."""
    down: Tensor | PackedWeight
    """(E, D, F); packed when gate_up is."""
    gate_up_bias: Tensor | None = None
    """(E, 2F), in the order of gate_up's rows."""
    down_bias: Tensor | None = None
    """(E, D); a row's weight multiplies it with the rest of the expert's output."""
    activation: Activation = SWIGLU
    slots: Tensor | None = None
    """(E,) int32, where each expert stands in gate_up and down, which then have S matrices; -1 for experts that are not
    there. None: expert e is matrix e. Plain weights that have slots are for `moesaic.ops.expert_rows` alone."""

    @property
    def num_experts(self) -> int:
        return len(self.gate_up.data) if self.slots is None else len(self.slots)

    @property
    def format(self) -> str:
        """`plain` or a name in moesaic.ops.quantize.FORMATS."""
        return self.gate_up.format if isinstance(self.gate_up, PackedWeight) else PLAIN

    @property
    def has_bias(self) -> bool:
        return self.gate_up_bias is not None or self.down_bias is not None

    def matrices_of(self, expert: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(2F, D) and (D, F) of one expert; what is packed is unpacked to `dtype`."""
        place = expert if self.slots is None else int(self.slots[expert])
        gate_up, down = (
            unpack(stack.of_expert(place), dtype) if isinstance(stack, PackedWeight) else stack[place]
            for stack in (self.gate_up, self.down)
        )
        return gate_up, down
