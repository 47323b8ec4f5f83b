"""Activations against formulas written out, and their slopes against autograd. N rows, F expert intermediate size."""

import math

import pytest
import torch
from torch import Tensor

from moesaic.errors import UsageError
from moesaic.ops import ACTIVATIONS, Activation

LIMIT = 1.5


def random_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """gate, up (7, 12), views of one tensor as backends have them: some beyond the limits, one of each right on one."""
    gate_NF, up_NF = (2 * torch.randn(7, 24, dtype=dtype)).chunk(2, dim=-1)
    gate_NF[0, :4] = torch.tensor([LIMIT, 2 * LIMIT, -LIMIT, -2 * LIMIT])
    up_NF[1, :4] = torch.tensor([LIMIT, 2 * LIMIT, -LIMIT, -2 * LIMIT])
    return gate_NF, up_NF


def written_out(activation: Activation, gate: float, up: float) -> float:
    if activation.name == "swiglu":
        return gate / (1 + math.exp(-gate)) * up
    g, u = min(gate, activation.limit), max(-activation.limit, min(up, activation.limit))
    return (u + 1) * g / (1 + math.exp(-activation.alpha * g))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_forward_equals_the_formula_written_out(name: str) -> None:
    activation = Activation(name, limit=LIMIT, alpha=1.3)
    gate_NF, up_NF = random_inputs()
    pairs = zip(gate_NF.flatten().tolist(), up_NF.flatten().tolist(), strict=True)
    expected = torch.tensor([written_out(activation, gate, up) for gate, up in pairs], dtype=torch.float64)
    hidden_NF = activation.forward(gate_NF, up_NF)
    torch.testing.assert_close(hidden_NF.flatten(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(activation.forward_and_slopes(gate_NF, up_NF)[0], hidden_NF, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_equal_autograd(name: str) -> None:
    activation = Activation(name, limit=LIMIT, alpha=1.3)
    gate_NF, up_NF = (value.clone().requires_grad_() for value in random_inputs())
    grad_hidden_NF = torch.randn_like(gate_NF)
    activation.forward(gate_NF, up_NF).backward(grad_hidden_NF)
    with torch.no_grad():
        _, gate_slope_NF, up_slope_NF = activation.forward_and_slopes(gate_NF, up_NF)
    torch.testing.assert_close(grad_hidden_NF * gate_slope_NF, gate_NF.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_hidden_NF * up_slope_NF, up_NF.grad, rtol=1e-12, atol=1e-12)


def test_slopes_of_a_clamp_are_zero_beyond_the_limit_only() -> None:
    gate_NF, up_NF = random_inputs()
    _, gate_slope_NF, up_slope_NF = Activation("clamped_swiglu", limit=LIMIT).forward_and_slopes(gate_NF, up_NF)
    assert torch.equal(gate_slope_NF == 0, gate_NF > LIMIT)
    assert torch.equal(up_slope_NF == 0, up_NF.abs() > LIMIT)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_stay_as_they_were_and_types_too(name: str, dtype: torch.dtype) -> None:
    activation = Activation(name, limit=LIMIT)
    gate_NF, up_NF = random_inputs(dtype)
    before = gate_NF.clone(), up_NF.clone()
    results = activation.forward(gate_NF, up_NF), *activation.forward_and_slopes(gate_NF, up_NF)
    assert torch.equal(gate_NF, before[0])
    assert torch.equal(up_NF, before[1])
    for result in results:
        assert result.dtype == dtype
        result.zero_()  # each is its own tensor, which callers may write to
    assert torch.equal(gate_NF, before[0])
    assert torch.equal(up_NF, before[1])


def test_an_unknown_activation_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown activation 'gelu'; choose swiglu or clamped_swiglu"):
        Activation("gelu")
