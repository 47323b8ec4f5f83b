"""The C++ experts: every instruction set against the float64 loop, at sizes that fit no register, on several threads.

T tokens, N assignments, E experts, K experts per token, D hidden size, F expert intermediate size.
"""

import os
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic.errors import UsageError
from moesaic.ops import ACTIVATIONS, ExpertWeights, Routing
from moesaic.ops.activation import SWIGLU
from moesaic.ops.native import NATIVE_ACTIVATIONS, native_experts, native_instruction_sets
from moesaic.ops.native_call import NATIVE_DTYPES

from .expert_cases import EXPERTS, TOLERANCE, Case, Compute, assert_equals_reference, make_case, num_threads, run
from .sanitized import COMPILER, SANITIZERS, run_sanitized

SETS = native_instruction_sets()
SETS_OF_BFLOAT16 = native_instruction_sets(torch.bfloat16)
PAIRS = ("avx512_bf16", "avx512f_pairs")
"""Those that multiply pairs of bfloat16, for which more than the results is rounded."""
SIZES = {
    "smaller than a register": {"T": 5, "E": 3, "K": 2, "D": 3, "F": 1},
    "one of everything": {"T": 1, "E": 1, "K": 1, "D": 1, "F": 1},
    "one more than a register": {"T": 40, "E": 3, "K": 2, "D": 17, "F": 17},
    "one more than a panel": {"T": 21, "E": 2, "K": 1, "D": 33, "F": 65},
    "one more than a block": {"T": 30, "E": 2, "K": 1, "D": 257, "F": 129},
    "several blocks": {"T": 33, "E": 3, "K": 2, "D": 530, "F": 290},
    "several chunks": {"T": 900, "E": 2, "K": 1, "D": 19, "F": 23},
    "an expert of several chunks": {"T": 1700, "E": 1, "K": 1, "D": 9, "F": 7},
    "few rows of an expert": {"T": 12, "E": 3, "K": 2, "D": 37, "F": 50},
    "few rows, weights in several pieces": {"T": 5, "E": 2, "K": 1, "D": 610, "F": 301},
    "one token, empty experts": {"T": 1, "E": 70, "K": 3, "D": 20, "F": 12},
    "no token": {"T": 0, "E": 4, "K": 2, "D": 7, "F": 5},
}

needs_kernels = pytest.mark.skipif(not SETS, reason="the native kernels are not built")
every_kernel = pytest.mark.parametrize(
    ("dtype", "instruction_set"),
    [
        pytest.param(dtype, name, id=f"{dtype}-{name}")
        for dtype in NATIVE_DTYPES
        for name in native_instruction_sets(dtype)
    ],
)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def of(instruction_set: str) -> Compute:
    return partial(native_experts, instruction_set=instruction_set)


def shuffled(case: Case) -> Case:
    """The assignments in any order, as routers that choose per expert give them."""
    order = torch.randperm(len(case.token_ids))
    inputs = replace(case.inputs, row_weights=case.inputs.row_weights[order])
    return replace(case, inputs=inputs, token_ids=case.token_ids[order], expert_ids=case.expert_ids[order], top_k=None)


@needs_kernels
def test_this_machine_can_force_every_path_below_its_best() -> None:
    assert SETS[-1] == "portable"
    assert [name for name in ("avx512f", "avx2", "portable") if name in SETS] == SETS
    assert [name for name in SETS_OF_BFLOAT16 if name not in PAIRS] == SETS
    assert ("avx512f_pairs" in SETS_OF_BFLOAT16) == ("avx512f" in SETS)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("name", SIZES)
@every_kernel
def test_outputs_and_gradients_equal_the_float64_reference(
    instruction_set: str, dtype: torch.dtype, name: str, experts: str
) -> None:
    ragged, one_expert = torch.rand(2) < 0.4
    one_expert &= SIZES[name]["E"] > 1
    case = make_case(**SIZES[name], experts=experts, ragged=bool(ragged), one_expert=bool(one_expert))
    case = shuffled(case) if torch.rand(()) < 0.5 else case
    assert_equals_reference(of(instruction_set), case, dtype, threads=int(torch.randint(1, 5, ())))


@pytest.mark.parametrize("name", ["an expert of several chunks", "several blocks", *(n for n in SIZES if "few" in n)])
@pytest.mark.parametrize("instruction_set", [name for name in SETS_OF_BFLOAT16 if name not in PAIRS])
def test_bfloat16_is_float32_rounded_once(instruction_set: str, name: str) -> None:
    """Bitwise, given numbers whose pre-activations are exact in bfloat16, as the clamped ones are."""
    one_expert = SIZES[name]["E"] > 1 and bool(torch.rand(()) < 0.5)
    case = make_case(**SIZES[name], experts="clamped with biases", ragged=True, one_expert=one_expert)
    case = case.seen_in(torch.bfloat16)
    with num_threads(int(torch.randint(1, 5, ()))):
        wide, narrow = (run(of(instruction_set), case, dtype) for dtype in (torch.float32, torch.bfloat16))
    for what, value in wide.items():
        expected = value if what == "grad of row_weights" else value.bfloat16().double()
        assert torch.equal(narrow[what], expected), what


@pytest.mark.parametrize("T", [3, 40], ids=["few rows", "many rows"])
@pytest.mark.parametrize("D", [1, 35])
@pytest.mark.parametrize("instruction_set", SETS_OF_BFLOAT16)
def test_every_float_is_rounded_as_torch_rounds_it(instruction_set: str, D: int, T: int) -> None:
    """Of any bits, NaN too: an expert that is nothing but a bias of 1, times the weight of the row."""
    row_weights = torch.randint(-(2**31), 2**31, (T,)).int().view(torch.float32)
    row_weights[:2] = torch.tensor([torch.nan, 1 + 2**-8])
    zeros = torch.zeros(1, 2 * D, dtype=torch.bfloat16)
    weights = ExpertWeights(zeros.view(1, 2, D), zeros[:, :D].view(1, D, 1), zeros[:, :2], zeros[:, :D] + 1)
    routing = Routing(torch.arange(T), torch.zeros(T, dtype=torch.int64), row_weights, torch.zeros(T, 1), 1, 1)
    y_TD = native_experts(torch.ones(T, D).bfloat16(), routing, weights, instruction_set=instruction_set)
    expected_TD = (row_weights[:, None] * torch.ones(D)).bfloat16()
    torch.testing.assert_close(y_TD, expected_TD, rtol=0, atol=0, equal_nan=True)


@every_kernel
def test_results_repeat_bitwise_on_any_number_of_threads(instruction_set: str, dtype: torch.dtype) -> None:
    """Also where one expert has so many rows that several threads share it, and where some have only a few."""
    sizes = {"T": 1000, "E": 6, "K": 2, "D": 70, "F": 45}
    if torch.rand(()) < 0.5:
        sizes = {"T": 5, "E": 6, "K": 2, "D": 610, "F": 301}
    case = make_case(**sizes, experts="clamped with biases", ragged=True, one_expert=True)
    results = []
    for threads in (1, 1, 2, 3, 4):
        with num_threads(threads):
            results.append(run(of(instruction_set), case, dtype))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@needs_kernels
def test_denormal_numbers_are_treated_as_the_caller_does_on_every_thread() -> None:
    case = make_case(T=300, E=4, K=2, D=32, F=32)
    tiny = replace(case, inputs=replace(case.inputs, down=case.inputs.down * 1e-40))
    with num_threads(4):
        assert forward_only(tiny).abs().max() > 0
        torch.set_flush_denormal(True)
        try:
            assert forward_only(tiny).abs().max() == 0
        finally:
            torch.set_flush_denormal(False)


@needs_kernels
def test_threads_of_the_caller_do_not_disturb_each_other() -> None:
    cases = [make_case(T=150, E=4, K=2, D=40, F=24) for _ in range(4)]
    alone = [run(native_experts, case, torch.float32) for case in cases]
    together: list[dict[str, Tensor]] = [{} for _ in cases]

    def compute(number: int) -> None:
        for _ in range(10):
            together[number] = run(native_experts, cases[number], torch.float32)

    threads = [threading.Thread(target=compute, args=(number,)) for number in range(4)]
    with num_threads(2):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="torch's OpenMP threads are found on Linux only")
def test_the_work_is_done_by_the_threads_that_torch_has_already() -> None:
    case = make_case(T=200, E=4, K=2, D=24, F=16)
    with num_threads(3):
        torch.ones(2**21).sum()
        before = len(os.listdir("/proc/self/task"))
        forward_only(case)
    assert len(os.listdir("/proc/self/task")) == before


@needs_kernels
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_computes_with_threads_of_its_own() -> None:
    case = make_case(T=200, E=4, K=2, D=24, F=16)
    with num_threads(3):
        expected = forward_only(case)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(forward_only(case), expected) else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def forward_only(case: Case) -> Tensor:
    inputs = case.inputs
    routing = routing_of(case, inputs.row_weights.float())
    with torch.no_grad():
        return native_experts(inputs.x.float(), routing, ExpertWeights(inputs.gate_up.float(), inputs.down.float()))


def routing_of(case: Case, row_weights: Tensor) -> Routing:
    num_experts = case.inputs.gate_up.shape[0]
    logits = torch.zeros(case.inputs.x.shape[0], num_experts)
    return Routing(case.token_ids, case.expert_ids, row_weights, logits, num_experts, case.top_k)


@needs_kernels
def test_a_tensor_that_needs_no_gradient_gets_none() -> None:
    case = make_case(T=9, E=3, K=2, D=8, F=6)
    x = case.inputs.x.float().requires_grad_()
    gate_up, down = case.inputs.gate_up.float(), case.inputs.down.float().requires_grad_()
    routing = routing_of(case, case.inputs.row_weights.float())
    native_experts(x, routing, ExpertWeights(gate_up, down)).sum().backward()
    assert x.grad is not None
    assert down.grad is not None
    assert gate_up.grad is None


@needs_kernels
def test_views_with_gaps_are_read_right() -> None:
    case = make_case(T=12, E=3, K=2, D=10, F=7)
    gate_up, down = case.inputs.gate_up.float(), case.inputs.down.float()
    expected = forward_only(case)
    strided = ExpertWeights(gate_up.mT.contiguous().mT, down.mT.contiguous().mT)
    x = torch.cat([case.inputs.x.float(), torch.ones(12, 3)], 1)[:, :10]
    assert not x.is_contiguous()
    assert torch.equal(native_experts(x, routing_of(case, case.inputs.row_weights.float()), strided), expected)


@needs_kernels
@pytest.mark.parametrize("experts", ["swiglu", "clamped with biases"])
def test_gradients_are_the_slopes_of_the_outputs(experts: str) -> None:
    """Against differences along a random direction, not against another implementation's formulas."""
    case = make_case(T=20, E=4, K=2, D=12, F=9, experts=experts)
    gradients = run(native_experts, case, torch.float32)
    step = 2e-3  # too small to carry a pre-activation across the clamp's limit, where the slope jumps
    for name, value in case.inputs.items():
        direction = torch.randn_like(value)
        sides = []
        for sign in (1, -1):
            moved = replace(case, inputs=replace(case.inputs, **{name: value + sign * step * direction}))
            sides.append((run(native_experts, moved, torch.float32)["y"] * case.grad_y).sum().item())
        slope = (sides[0] - sides[1]) / (2 * step)
        expected = (gradients[f"grad of {name}"] * direction).sum().item()
        size = (gradients[f"grad of {name}"] * direction).square().sum().sqrt().item()
        assert abs(slope - expected) < 0.05 * (size + abs(expected)) + 0.02, name


@needs_kernels
@needs_compiler
def test_torch_compile_traces_through() -> None:
    case = make_case(T=16, E=4, K=2, D=8, F=8)
    routing = routing_of(case, case.inputs.row_weights.float())
    activation = case.activation
    leaves = [value.float().requires_grad_() for value in (case.inputs.x, case.inputs.gate_up, case.inputs.down)]

    def layer(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return torch.tanh(native_experts(2 * x, routing, ExpertWeights(gate_up, down, activation=activation)))

    results = []
    for compute in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = compute(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y.sum(), leaves)])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


@needs_kernels
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_operators_describe_themselves_rightly_to_the_compiler(dtype: torch.dtype) -> None:
    case = make_case(T=7, E=3, K=2, D=5, F=4, experts="swiglu with biases")
    inputs = {
        name: value.to(torch.float32 if name == "row_weights" else dtype).requires_grad_()
        for name, value in case.inputs.items()
    }
    names = ("x", "row_weights", "gate_up", "down", "gate_up_bias", "down_bias")
    arguments = (*(inputs[name] for name in names), case.token_ids, case.expert_ids, "swiglu", 7.0, 1.702, "")
    torch.library.opcheck(torch.ops.moesaic.native_experts.default, arguments)


@needs_kernels
def test_wrong_inputs_are_refused_before_any_memory_is_touched() -> None:
    case = make_case(T=4, E=3, K=1, D=5, F=6)
    x, weights = case.inputs.x.float(), ExpertWeights(case.inputs.gate_up.float(), case.inputs.down.float())
    routing = routing_of(case, case.inputs.row_weights.float())
    with pytest.raises(UsageError, match=r"no native kernels for 'mmx' here; choose .*portable"):
        native_experts(x, routing, weights, instruction_set="mmx")
    with pytest.raises(UsageError, match=r"to expert 3; there are 4 tokens and 3 experts"):
        native_experts(x, replace(routing, expert_ids=torch.tensor([0, 1, 3, 2])), weights)
    with pytest.raises(UsageError, match=r"sends token -1 to"):
        native_experts(x, replace(routing, token_ids=torch.tensor([0, 1, 2, -1])), weights)
    with pytest.raises(UsageError, match=r"gate_up is .*\(3, 12, 4\); the experts need .*\(3, 12, 5\)"):
        native_experts(x, routing, replace(weights, gate_up=case.inputs.gate_up[:, :, :4]))
    for D, F in ((5, 0), (0, 6), (0, 0)):
        with pytest.raises(UsageError, match=f"hidden size {D} and intermediate size {F}: nothing to compute"):
            native_experts(torch.zeros(4, D), routing, ExpertWeights(torch.zeros(3, 2 * F, D), torch.zeros(3, D, F)))
    with pytest.raises(UsageError, match=r"x is torch.float64"):
        native_experts(x.double(), routing, weights)
    with pytest.raises(UsageError, match=r"gate_up is torch.float32 .*; the experts need torch.bfloat16"):
        native_experts(x.bfloat16(), routing, weights)


def test_every_activation_is_there_or_refused_by_name() -> None:
    assert NATIVE_DTYPES.keys() == TOLERANCE.keys()
    assert NATIVE_ACTIVATIONS.keys() <= ACTIVATIONS.keys()
    assert SWIGLU.name in NATIVE_ACTIVATIONS


@needs_compiler
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_kernels_and_threads_under_sanitizers(sanitizer: str, tmp_path: Path, seed: int) -> None:
    """Every instruction set and element type against plain loops, and the threads, with every access checked."""
    run_sanitized("kernel_tests", [str(seed), "6" if sanitizer == "thread" else "30"], sanitizer, tmp_path)
