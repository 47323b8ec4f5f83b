"""The gated activations of routed experts: gate (N, F) and up (N, F) -> hidden (N, F), with their slopes written out.

N rows, F expert intermediate size.

Both work entry by entry, so a gradient is a product with a slope: grad_gate = grad_hidden * slope_of_gate, and
likewise for up. A backend that recomputes gets all three from one call and shares the sigmoid between them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from moesaic.errors import UsageError


@dataclass(frozen=True)
class Activation:
    """A name in ACTIVATIONS with its numbers, which `swiglu` does not use.

    Raises:
        UsageError: the name is unknown.
    """

    name: str
    limit: float = 7.0
    """`clamped_swiglu`: gate is clamped above, up on both sides."""
    alpha: float = 1.702
    """`clamped_swiglu`: gain inside the sigmoid."""

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS:
            raise UsageError(f"unknown activation '{self.name}'; choose {' or '.join(ACTIVATIONS)}")

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate, up (N, F) -> hidden (N, F), a new tensor. Autograd works through it."""
        return ACTIVATIONS[self.name].forward(self, gate, up)

    def forward_and_slopes(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """gate, up (N, F) -> hidden, d hidden / d gate, d hidden / d up, each a new (N, F). For use without autograd.

        At and within a limit the slope of a clamp is 1, beyond it 0, as in torch's autograd.
        """
        return ACTIVATIONS[self.name].forward_and_slopes(self, gate, up)


def _swiglu(_: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202)."""
    return functional.silu(gate).mul_(up)


def _swiglu_and_slopes(_: Activation, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sigmoid_NF = torch.sigmoid(gate)
    silu_NF = gate * sigmoid_NF
    hidden_NF = silu_NF * up
    return hidden_NF, _silu_slope(sigmoid_NF, silu_NF).mul_(up), silu_NF


def _clamped_swiglu(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """(u + 1) * g * sigmoid(alpha * g) with g = min(gate, limit) and u = up within -limit..limit (arXiv 2508.10925)."""
    gate_NF = gate.clamp(max=activation.limit)
    up_plus_one_NF = up.clamp(-activation.limit, activation.limit) + 1
    return up_plus_one_NF * gate_NF * torch.sigmoid(activation.alpha * gate_NF)


def _clamped_swiglu_and_slopes(activation: Activation, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate_NF = gate.clamp(max=activation.limit)
    up_plus_one_NF = up.clamp(-activation.limit, activation.limit).add_(1)
    sigmoid_NF = torch.sigmoid(activation.alpha * gate_NF)
    glu_NF = gate_NF.mul_(sigmoid_NF)
    hidden_NF = up_plus_one_NF * glu_NF
    gate_slope_NF = _silu_slope(sigmoid_NF, glu_NF, activation.alpha).mul_(up_plus_one_NF)
    gate_slope_NF.masked_fill_(gate > activation.limit, 0.0)
    return hidden_NF, gate_slope_NF, glu_NF.masked_fill_(up.abs() > activation.limit, 0.0)


def _silu_slope(sigmoid: Tensor, silu: Tensor, alpha: float = 1.0) -> Tensor:
    """d/dg of g s(g) with s(g) = sigmoid(alpha g): s + alpha g s (1 - s), where silu = g s."""
    rest_NF = 1 - sigmoid
    return torch.addcmul(sigmoid, silu, rest_NF, value=alpha, out=rest_NF)


class _Formulas(NamedTuple):
    forward: Callable[[Activation, Tensor, Tensor], Tensor]
    forward_and_slopes: Callable[[Activation, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


ACTIVATIONS: dict[str, _Formulas] = {
    "swiglu": _Formulas(_swiglu, _swiglu_and_slopes),
    "clamped_swiglu": _Formulas(_clamped_swiglu, _clamped_swiglu_and_slopes),
}

SWIGLU = Activation("swiglu")
