"""Every backend against `reference`, outputs and gradients, on fresh random inputs.

T tokens, E experts, K experts per token, D hidden size, F expert intermediate size.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moesaic.errors import UsageError
from moesaic.ops import BACKENDS, ExpertShape, ExpertWeights, Routing, pick, refusal
from moesaic.ops.reference import reference_experts

CASES = {
    "usual": {"T": 37, "E": 8, "K": 2, "D": 32, "F": 48},
    "one token": {"T": 1, "E": 8, "K": 2, "D": 16, "F": 16},
    "one expert takes all": {"T": 20, "E": 4, "K": 1, "D": 16, "F": 32},
    "every expert": {"T": 9, "E": 4, "K": 4, "D": 16, "F": 16},
    "many empty experts": {"T": 3, "E": 64, "K": 2, "D": 32, "F": 16},
    "no token": {"T": 0, "E": 4, "K": 2, "D": 16, "F": 16},
}
# Largest error allowed, relative to the largest entry of the float64 result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def make_case(T: int, E: int, K: int, D: int, F: int, *, ragged: bool, one_expert: bool) -> tuple[Tensor, ...]:
    """Random x, choice of experts, routing weights, and stacked weights, all float64."""
    scores_TE = torch.rand(T, E, dtype=torch.float64)
    if one_expert:
        scores_TE[:, 1] += 2
    topk = scores_TE.topk(K, dim=-1)
    keep_TK = torch.rand(T, K) < 0.7 if ragged else torch.ones(T, K, dtype=torch.bool)
    token_ids = torch.arange(T)[:, None].expand(T, K)[keep_TK]
    return (
        torch.randn(T, D, dtype=torch.float64),
        token_ids,
        topk.indices[keep_TK],
        topk.values[keep_TK].float().double(),  # routing weights are float32 numbers
        torch.randn(E, 2 * F, D, dtype=torch.float64) / D**0.5,
        torch.randn(E, D, F, dtype=torch.float64) / F**0.5,
        torch.randn(T, D, dtype=torch.float64),
    )


def run(backend: str, case: tuple[Tensor, ...], dtype: torch.dtype, top_k: int | None) -> list[Tensor]:
    """Output and the gradients of x, routing weights, gate_up and down, in float64."""
    x, token_ids, expert_ids, row_weights, gate_up, down, grad_y = case
    # The oracle gets the numbers that the backend sees, so that only the arithmetic differs.
    seen = [value.to(dtype) for value in (x, gate_up, down, grad_y)]
    wide = dtype if backend != "reference" else torch.float64
    x, gate_up, down = (value.to(wide).requires_grad_() for value in seen[:3])
    row_weights = row_weights.to(wide if backend == "reference" else torch.float32).requires_grad_()
    routing = Routing(
        token_ids=token_ids,
        expert_ids=expert_ids,
        weights=row_weights,
        logits=torch.zeros(x.shape[0], gate_up.shape[0]),
        num_experts=gate_up.shape[0],
        top_k=top_k,
    )
    y = BACKENDS[backend].run(x, routing, ExpertWeights(gate_up=gate_up, down=down))
    y.backward(seen[3].to(wide))
    results = [y.detach(), *(leaf.grad for leaf in (x, row_weights, gate_up, down))]
    assert all(result is not None for result in results)
    return [result.double() for result in results if result is not None]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["every token has K rows", "tokens have 0 to K rows"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_outputs_and_gradients_equal_the_float64_reference(
    backend: str, name: str, ragged: bool, dtype: torch.dtype
) -> None:
    case = make_case(**CASES[name], ragged=ragged, one_expert="one expert" in name)
    top_k = None if ragged else CASES[name]["K"]
    ours = run(backend, case, dtype, top_k)
    oracle = run("reference", case, dtype, top_k)
    for what, got, expected in zip(("y", "dx", "dweights", "dgate_up", "ddown"), ours, oracle, strict=True):
        assert got.shape == expected.shape, what
        # Inputs are of order 1; what comes out much smaller is what cancellation left, and rounds like its terms.
        scale = expected.abs().max().clamp_min(1.0) if expected.numel() else 1.0
        error = (got - expected).abs().max() / scale if expected.numel() else 0.0
        assert error <= TOLERANCE[dtype], f"{what}: {error:.2e}"


def test_reference_equals_a_sum_over_rows_written_out() -> None:
    case = make_case(T=11, E=5, K=3, D=6, F=7, ragged=True, one_expert=False)
    x, token_ids, expert_ids, row_weights, gate_up, down, _ = case
    expected = torch.zeros_like(x)
    for token, expert, weight in zip(token_ids.tolist(), expert_ids.tolist(), row_weights.tolist(), strict=True):
        gate, up = gate_up[expert, :7] @ x[token], gate_up[expert, 7:] @ x[token]
        expected[token] += weight * (down[expert] @ (gate / (1 + torch.exp(-gate)) * up))
    y = run("reference", case, torch.float64, None)[0]
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)


def test_reference_gradients_in_float64() -> None:
    x, token_ids, expert_ids, row_weights, gate_up, down, _ = make_case(
        T=5, E=4, K=2, D=4, F=3, ragged=True, one_expert=False
    )
    leaves = [value.requires_grad_() for value in (x, row_weights, gate_up, down)]

    def apply(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        routing = Routing(token_ids, expert_ids, weights, torch.zeros(5, 4), num_experts=4, top_k=None)
        return reference_experts(x, routing, ExpertWeights(gate_up=gate_up, down=down))

    assert torch.autograd.gradcheck(apply, leaves)


def test_an_expert_without_rows_has_zero_gradient_not_none() -> None:
    for backend in BACKENDS:
        case = make_case(T=6, E=8, K=1, D=16, F=16, ragged=False, one_expert=True)
        _, _, _, gate_up_grad, down_grad = run(backend, case, torch.float32, 1)
        assert gate_up_grad[1].abs().max() > 0
        others = [expert for expert in range(8) if expert != 1]
        assert gate_up_grad[others].abs().max() == 0
        assert down_grad[others].abs().max() == 0


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
