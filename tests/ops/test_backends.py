"""Every backend against `reference`, outputs and gradients, on fresh random inputs.

T tokens, N assignments, E experts, K experts per token, D hidden size, F expert intermediate size.
"""

from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from moesaic.errors import UsageError
from moesaic.ops import ACTIVATIONS, BACKENDS, Activation, Backend, ExpertShape, ExpertWeights, Routing, pick, refusal
from moesaic.ops.activation import SWIGLU
from moesaic.ops.reference import reference_experts

CASES = {
    "usual": {"T": 37, "E": 8, "K": 2, "D": 32, "F": 48},
    "one token": {"T": 1, "E": 8, "K": 2, "D": 16, "F": 16},
    "one expert takes all": {"T": 20, "E": 4, "K": 1, "D": 16, "F": 32},
    "every expert": {"T": 9, "E": 4, "K": 4, "D": 16, "F": 16},
    "many empty experts": {"T": 3, "E": 64, "K": 2, "D": 32, "F": 16},
    "no token": {"T": 0, "E": 4, "K": 2, "D": 16, "F": 16},
}
CLAMPED = Activation("clamped_swiglu", limit=1.0625, alpha=1.3)
EXPERTS = {
    "swiglu": (SWIGLU, ()),
    "swiglu with biases": (SWIGLU, ("gate_up_bias", "down_bias")),
    "swiglu with a bias below": (SWIGLU, ("gate_up_bias",)),
    "clamped": (CLAMPED, ()),
    "clamped with biases": (CLAMPED, ("gate_up_bias", "down_bias")),
}
# Largest error of an entry, in units of the type's epsilon, relative to its value plus the size of its terms (see
# `sizes_of_terms`). The worst entries of 120 runs had 10 and 5: float32 rounds every partial sum, bfloat16 only what is
# stored.
TOLERANCE = {torch.float32: 20.0, torch.bfloat16: 10.0}


@dataclass(frozen=True)
class Inputs:
    """The leaves of a layer, float64. The routing's decisions are beside them in `Case`."""

    x: Tensor
    row_weights: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    def items(self) -> list[tuple[str, Tensor]]:
        values = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, value) for name, value in values if value is not None]


@dataclass(frozen=True)
class Case:
    inputs: Inputs
    token_ids: Tensor
    expert_ids: Tensor
    top_k: int | None
    activation: Activation
    grad_y: Tensor

    def seen_in(self, dtype: torch.dtype) -> "Case":
        """The numbers that a backend of this type is given, so that only the arithmetic differs."""
        rounded = {name: value.to(dtype).double() for name, value in self.inputs.items() if name != "row_weights"}
        return replace(self, inputs=replace(self.inputs, **rounded), grad_y=self.grad_y.to(dtype).double())


def make_case(
    T: int, E: int, K: int, D: int, F: int, *, experts: str = "swiglu", ragged: bool = False, one_expert: bool = False
) -> Case:
    activation, biases = EXPERTS[experts]
    scores_TE = torch.rand(T, E, dtype=torch.float64)
    if one_expert:
        scores_TE[:, 1] += 2
    topk = scores_TE.topk(K, dim=-1)
    keep_TK = torch.rand(T, K) < 0.7 if ragged else torch.ones(T, K, dtype=torch.bool)

    def random(*shape: int, std: float = 1.0, step: float = 0.0) -> Tensor:
        values = std * torch.randn(*shape, dtype=torch.float64)
        # A clamp's slope jumps, so rounding must not carry a pre-activation across the limit. These are eighths, exact
        # in every type, and the limit is none.
        return (values / step).round() * step if step and activation is CLAMPED else values

    inputs = Inputs(
        x=random(T, D, step=1 / 2),
        row_weights=topk.values[keep_TK].float().double(),  # float32 numbers whatever the layer computes in
        gate_up=random(E, 2 * F, D, std=D**-0.5, step=1 / 4),
        down=random(E, D, F, std=F**-0.5),
        gate_up_bias=random(E, 2 * F, step=1 / 8) if "gate_up_bias" in biases else None,
        down_bias=random(E, D) if "down_bias" in biases else None,
    )
    return Case(
        inputs=inputs,
        token_ids=torch.arange(T)[:, None].expand(T, K)[keep_TK],
        expert_ids=topk.indices[keep_TK],
        top_k=None if ragged else K,
        activation=activation,
        grad_y=random(T, D),
    )


def apply(backend: str, case: Case, leaves: dict[str, Tensor]) -> Tensor:
    """y (T, D) of the case, with these tensors in the place of its inputs."""
    experts = {name: value for name, value in leaves.items() if name not in ("x", "row_weights")}
    x, gate_up = leaves["x"], leaves["gate_up"]
    routing = Routing(
        token_ids=case.token_ids,
        expert_ids=case.expert_ids,
        weights=leaves["row_weights"],
        logits=torch.zeros(x.shape[0], gate_up.shape[0]),
        num_experts=gate_up.shape[0],
        top_k=case.top_k,
    )
    return BACKENDS[backend].run(x, routing, ExpertWeights(**experts, activation=case.activation))


def run(backend: str, case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """y and the gradient of every input, in float64. Row weights are float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {
        name: value.detach().to(wide if name == "row_weights" else dtype).requires_grad_()
        for name, value in case.inputs.items()
    }
    y_TD = apply(backend, case, leaves)
    y_TD.backward(case.grad_y.to(dtype))
    results = {"y": y_TD.detach().double()}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        assert leaf.grad.shape == leaf.shape, name
        results[f"grad of {name}"] = leaf.grad.double()
    return results


class _Product(Activation):
    """An upper bound of both activations and their slopes, up to a factor near 1."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate * up if self.name == "swiglu" else gate * (up + 1)


def sizes_of_terms(case: Case) -> dict[str, Tensor]:
    """For each result the root of the sum of its terms' squares, which a sum of independent rounding errors grows like.

    Terms may cancel and leave a result much smaller than its rounding error, so the result itself is no measure. All
    results are sums of products of the inputs, but for the activation, and the same sums of the inputs' squares are
    the squared sizes.
    """
    squared = Inputs(**{**vars(case.inputs), **{name: value.square() for name, value in case.inputs.items()}})
    product = _Product(**vars(case.activation))
    sizes = run("reference", replace(case, inputs=squared, grad_y=case.grad_y.square(), activation=product))
    return {name: size.sqrt() for name, size in sizes.items()}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["every token has K rows", "tokens have 0 to K rows"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_outputs_and_gradients_equal_the_float64_reference(
    backend: str, experts: str, name: str, ragged: bool, dtype: torch.dtype
) -> None:
    case = make_case(**CASES[name], experts=experts, ragged=ragged, one_expert="one expert" in name).seen_in(dtype)
    ours, oracle, sizes = run(backend, case, dtype), run("reference", case), sizes_of_terms(case)
    assert ours.keys() == oracle.keys()
    for what, expected in oracle.items():
        allowed = TOLERANCE[dtype] * torch.finfo(dtype).eps * (expected.abs() + sizes[what])
        excess = (ours[what] - expected).abs() - allowed
        assert (excess <= 0).all(), f"{what}: {int((excess > 0).sum())} entries, the worst by {excess.max():.2e}"


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
    torch.testing.assert_close(run("reference", case)["y"], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("experts", EXPERTS)
def test_reference_gradients_in_float64(experts: str) -> None:
    case = make_case(T=5, E=4, K=2, D=4, F=3, experts=experts, ragged=True)
    leaves = {name: value.requires_grad_() for name, value in case.inputs.items()}

    def y_of(*values: Tensor) -> Tensor:
        return apply("reference", case, dict(zip(leaves, values, strict=True)))

    assert torch.autograd.gradcheck(y_of, tuple(leaves.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_without_rows_has_zero_gradient_not_none(backend: str) -> None:
    case = make_case(T=6, E=8, K=1, D=16, F=16, experts="swiglu with biases", one_expert=True)
    results = run(backend, case, torch.float32)
    others = [expert for expert in range(8) if expert != 1]
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        grad = results[f"grad of {name}"]
        assert grad[1].abs().max() > 0
        assert grad[others].abs().max() == 0


def test_pick_prefers_grouped_and_falls_back_on_shapes_it_refuses() -> None:
    shape = ExpertShape(hidden_size=64, moe_intermediate_size=32, device="cpu", dtype=torch.float32)
    assert pick("auto", shape) == "grouped"
    assert pick("auto", replace(shape, dtype=torch.float64)) == "reference"
    odd = replace(shape, hidden_size=63)
    assert pick("auto", odd) == "reference"
    assert "63 x 4 bytes" in str(refusal("grouped", odd))


def test_pick_refuses_with_reason_and_alternative() -> None:
    shape = ExpertShape(hidden_size=64, moe_intermediate_size=32, device="cpu", dtype=torch.float64)
    with pytest.raises(UsageError, match=r"computes in .*float32.*use reference"):
        pick("grouped", shape)
    with pytest.raises(UsageError, match=r"unknown backend 'grpuped'; choose auto, grouped, reference"):
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
    with pytest.raises(UsageError, match=r"it computes swiglu, not clamped_swiglu; use grouped or reference"):
        pick("bare", replace(shape, activation="clamped_swiglu"))
    with pytest.raises(UsageError, match=r"it adds no biases .*; use grouped or reference"):
        pick("bare", replace(shape, has_bias=True))


def test_the_backends_that_run_everywhere_support_every_expert() -> None:
    for name in ("grouped", "reference"):
        assert BACKENDS[name].biases
        assert BACKENDS[name].activations == ACTIVATIONS.keys()
