"""Every backend against `reference`, outputs and gradients, on fresh random inputs.

T tokens, N assignments, E experts, K experts per token, D hidden size, F expert intermediate size.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moesaic.errors import UsageError
from moesaic.ops import ACTIVATIONS, BACKENDS, Backend, ExpertShape, pick, refusal
from moesaic.ops.reference import reference_experts
from moesaic.ops.weights import PLAIN

from .expert_cases import CLAMPED, EXPERTS, TOLERANCE, apply, assert_equals_reference, make_case, run

CASES = {
    "usual": {"T": 37, "E": 8, "K": 2, "D": 32, "F": 48},
    "one token": {"T": 1, "E": 8, "K": 2, "D": 16, "F": 16},
    "one expert takes all": {"T": 20, "E": 4, "K": 1, "D": 16, "F": 32},
    "every expert": {"T": 9, "E": 4, "K": 4, "D": 16, "F": 16},
    "many empty experts": {"T": 3, "E": 64, "K": 2, "D": 32, "F": 16},
    "no token": {"T": 0, "E": 4, "K": 2, "D": 16, "F": 16},
}
TRAINING = {name: backend for name, backend in BACKENDS.items() if backend.gradients and PLAIN in backend.formats}
"""Those that compute plain weights, with gradients; tests/ops/test_native_packed.py has the others."""
COMPUTED = [
    pytest.param(name, dtype, id=f"{name} {dtype}")
    for name, backend in TRAINING.items()
    for dtype in sorted(backend.dtypes & TOLERANCE.keys(), key=str)
    if name != "reference" and backend.missing() is None
]
BUILT = BACKENDS["native"].missing() is None


@pytest.mark.parametrize("ragged", [False, True], ids=["every token has K rows", "tokens have 0 to K rows"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize(("backend", "dtype"), COMPUTED)
def test_outputs_and_gradients_equal_the_float64_reference(
    backend: str, dtype: torch.dtype, experts: str, name: str, ragged: bool
) -> None:
    case = make_case(**CASES[name], experts=experts, ragged=ragged, one_expert="one expert" in name)
    assert_equals_reference(BACKENDS[backend].run, case, dtype)


@pytest.mark.parametrize("experts", EXPERTS)
def test_reference_equals_a_sum_over_rows_written_out(experts: str) -> None:
    case = make_case(T=11, E=5, K=3, D=6, F=7, experts=experts, ragged=True)
    leaves, limit, alpha = case.inputs, case.activation.limit, case.activation.alpha
    gate_up_bias = torch.zeros(5, 14) if leaves.gate_up_bias is None else leaves.gate_up_bias
    down_bias = torch.zeros(5, 6) if leaves.down_bias is None else leaves.down_bias
    expected, beyond = torch.zeros_like(leaves.x), torch.zeros(2)
    for token, e, weight in zip(case.token_ids, case.expert_ids, leaves.row_weights, strict=True):
        gate, up = (leaves.gate_up[e] @ leaves.x[token] + gate_up_bias[e]).chunk(2)
        if case.activation is CLAMPED:
            beyond += torch.stack([(gate > limit).sum(), (up.abs() > limit).sum()])
            gate, up = gate.minimum(torch.tensor(limit)), up.clamp(-limit, limit)
            hidden = (up + 1) * gate / (1 + torch.exp(-alpha * gate))
        else:
            hidden = up * gate / (1 + torch.exp(-gate))
        expected[token] += weight * (leaves.down[e] @ hidden + down_bias[e])
    assert case.activation is not CLAMPED or beyond.min() > 0, "no input is beyond a limit"
    torch.testing.assert_close(run(reference_experts, case)["y"], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("experts", EXPERTS)
def test_reference_gradients_in_float64(experts: str) -> None:
    case = make_case(T=5, E=4, K=2, D=4, F=3, experts=experts, ragged=True)
    leaves = {name: value.requires_grad_() for name, value in case.inputs.items()}

    def y_of(*values: Tensor) -> Tensor:
        return apply(reference_experts, case, dict(zip(leaves, values, strict=True)))

    assert torch.autograd.gradcheck(y_of, tuple(leaves.values()))


@pytest.mark.parametrize("backend", [name for name, backend in TRAINING.items() if backend.missing() is None])
def test_an_expert_without_rows_has_zero_gradient_not_none(backend: str) -> None:
    case = make_case(T=6, E=8, K=1, D=16, F=16, experts="swiglu with biases", one_expert=True)
    results = run(BACKENDS[backend].run, case, torch.float32)
    others = [expert for expert in range(8) if expert != 1]
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        grad = results[f"grad of {name}"]
        assert grad[1].abs().max() > 0
        assert grad[others].abs().max() == 0


def test_pick_prefers_native_when_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ExpertShape(hidden_size=64, moe_intermediate_size=32, device="cpu", dtype=torch.float32)
    assert pick("auto", shape) == ("native" if BUILT else "grouped")
    monkeypatch.setitem(BACKENDS, "native", replace(BACKENDS["native"], missing=lambda: None))
    assert pick("auto", shape) == "native"
    assert pick("auto", replace(shape, dtype=torch.bfloat16)) == "native"
    assert pick("auto", replace(shape, device="cuda")) == "grouped"


def test_pick_falls_back_on_shapes_and_machines_that_a_backend_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "native", replace(BACKENDS["native"], missing=lambda: "is not built: no compiler"))
    shape = ExpertShape(hidden_size=64, moe_intermediate_size=32, device="cpu", dtype=torch.float32)
    assert pick("auto", shape) == "grouped"
    with pytest.raises(UsageError, match=r"'native' cannot .*: it is not built: no compiler; use grouped or reference"):
        pick("native", shape)
    assert pick("auto", replace(shape, dtype=torch.float64)) == "reference"
    odd = replace(shape, hidden_size=63)
    assert pick("auto", odd) == "reference"
    assert "63 x 4 bytes" in str(refusal("grouped", odd))


def test_pick_refuses_with_reason_and_alternative() -> None:
    shape = ExpertShape(hidden_size=64, moe_intermediate_size=32, device="cpu", dtype=torch.float64)
    with pytest.raises(UsageError, match=r"computes in .*float32.*use reference"):
        pick("grouped", shape)
    with pytest.raises(UsageError, match=r"unknown backend 'grpuped'; choose auto, native, grouped, packed, reference"):
        pick("grpuped", shape)


def test_pick_passes_over_a_backend_that_lacks_the_activation_or_the_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = Backend(
        run=reference_experts,
        devices=frozenset({"cpu"}),
        dtypes=frozenset({torch.float32}),
        activations=frozenset({"swiglu"}),
        biases=False,
    )
    monkeypatch.setitem(BACKENDS, "bare", bare)
    shape = ExpertShape(hidden_size=64, moe_intermediate_size=32, device="cpu", dtype=torch.float32)
    assert pick("bare", shape) == "bare"
    with pytest.raises(UsageError, match=r"it computes swiglu, not clamped_swiglu; use .*grouped or reference"):
        pick("bare", replace(shape, activation="clamped_swiglu"))
    with pytest.raises(UsageError, match=r"it adds no biases .*; use .*grouped or reference"):
        pick("bare", replace(shape, has_bias=True))


def test_pick_goes_by_the_format_of_the_weights() -> None:
    shape = ExpertShape(hidden_size=64, moe_intermediate_size=32, device="cpu", dtype=torch.bfloat16, format="int4")
    assert pick("auto", shape) == "packed"
    assert pick("auto", replace(shape, device="cuda")) == "packed"
    assert pick("reference", shape) == "reference"
    with pytest.raises(UsageError, match=r"'grouped' cannot .* takes plain weights, not int4; use packed or reference"):
        pick("grouped", shape)
    with pytest.raises(UsageError, match=r"takes int4, int8, mxfp4 weights, not plain; use .*grouped or reference"):
        pick("packed", replace(shape, format=PLAIN))


def test_the_backends_that_run_everywhere_support_every_expert() -> None:
    for name in ("grouped", "reference"):
        assert BACKENDS[name].biases
        assert BACKENDS[name].activations == ACTIVATIONS.keys()
