"""Experts with random inputs, computed by a backend or by the float64 loop, and how far the two may differ.

T tokens, N assignments, E experts, K experts per token, D hidden size, F expert intermediate size.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from moesaic.ops import Activation, ExpertWeights, Routing
from moesaic.ops.activation import SWIGLU
from moesaic.ops.reference import reference_experts

Compute = Callable[[Tensor, Routing, ExpertWeights], Tensor]

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
    """Fresh random numbers. `ragged` drops some of the assignments; with `one_expert` every token goes to expert 1."""
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


def apply(compute: Compute, case: Case, leaves: dict[str, Tensor]) -> Tensor:
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
    return compute(x, routing, ExpertWeights(**experts, activation=case.activation))


def run(compute: Compute, case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """y and the gradient of every input, in float64. Row weights are float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {
        name: value.detach().to(wide if name == "row_weights" else dtype).requires_grad_()
        for name, value in case.inputs.items()
    }
    y_TD = apply(compute, case, leaves)
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
    sizes = run(reference_experts, replace(case, inputs=squared, grad_y=case.grad_y.square(), activation=product))
    return {name: size.sqrt() for name, size in sizes.items()}


def assert_equals_reference(compute: Compute, case: Case, dtype: torch.dtype, *, threads: int = 1) -> None:
    """y and all gradients, against the float64 loop over the numbers that a backend of this type is given."""
    case = case.seen_in(dtype)
    with num_threads(threads):
        ours = run(compute, case, dtype)
    oracle, sizes = run(reference_experts, case), sizes_of_terms(case)
    assert ours.keys() == oracle.keys()
    # The error of a sum, added up term by term, grows with the root of how many there are.
    longest_sum = max(*case.inputs.x.shape, *case.inputs.gate_up.shape[1:])
    tolerance = TOLERANCE[dtype] * max(1.0, longest_sum / 64) ** 0.5
    for what, expected in oracle.items():
        allowed = tolerance * torch.finfo(dtype).eps * (expected.abs() + sizes[what])
        excess = (ours[what] - expected).abs() - allowed
        assert (excess <= 0).all(), f"{what}: {int((excess > 0).sum())} entries, the worst by {excess.max():.2e}"


@contextlib.contextmanager
def num_threads(count: int) -> Iterator[None]:
    """torch's number of threads, which the kernels honour."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
