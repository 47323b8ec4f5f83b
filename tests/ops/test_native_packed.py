"""Packed weights: the kernels against float64 on inputs rounded by the definition, and torch in their place.

T tokens, E experts, K experts per token or inputs, D hidden size, F expert intermediate size, G inputs of a group.
"""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moesaic.errors import UsageError
from moesaic.ops import ExpertWeights, Routing, native_packed
from moesaic.ops.native_packed import packed_experts, packed_instruction_sets, packed_linear
from moesaic.ops.quantize import FORMATS, PackedWeight, pack, unpack
from moesaic.ops.reference import reference_experts

from .expert_cases import EXPERTS, Case, make_case, num_threads
from .test_quantize import KINDS, random_weight

SETS = packed_instruction_sets()
SIZES = [(1, 32, 16), (5, 33, 17), (1, 100, 50), (70, 127, 31), (0, 40, 20), (33, 64, 160), (3, 700, 1)]
built = pytest.mark.skipif(not SETS, reason="the kernels are not built here")


def packed_matrix(rows: int, columns: int, format: str, group_size: int) -> PackedWeight:
    return pack(random_weight(rows, columns, format), format, group_size)


def rounded(x: Tensor, group_size: int, near: float) -> tuple[Tensor, Tensor]:
    """x (T, K) float64 in whole multiples of the largest of each group / 127, and how far another number may be off:
    one multiple where x is within `near` multiples of the middle between two."""
    columns = x.shape[1]
    groups = functional.pad(x, (0, -columns % group_size)).unflatten(1, (-1, group_size))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    multiples = groups / torch.where(scales == 0, 1.0, scales)
    is_near = (multiples - multiples.floor() - 0.5).abs() < near
    values, off = scales * multiples.round(), scales * is_near
    return values.flatten(1)[:, :columns], off.flatten(1)[:, :columns]


@built
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize(("tokens", "columns", "rows"), SIZES)
@pytest.mark.parametrize(("format", "group_size"), KINDS)
def test_linear_equals_float64_on_rounded_inputs(
    format: str, group_size: int, tokens: int, columns: int, rows: int, instruction_set: str
) -> None:
    weight = packed_matrix(rows, columns, format, group_size)
    x, bias = torch.randn(tokens, columns) * torch.rand(tokens, 1), torch.randn(rows)
    if tokens > 2:
        x[1] = 0
        x[2, :group_size] *= 1e4
    plain = unpack(weight, torch.float64)
    values, off = rounded(x.double(), group_size, near=3e-4)
    expected = values @ plain.T + bias
    allowed = 1e-5 * (values.abs() @ plain.abs().T + bias.abs()) + off @ plain.abs().T
    y = packed_linear(x, weight, bias, instruction_set=instruction_set)
    assert y.dtype == torch.float32
    assert ((y - expected).abs() <= allowed).all()


def packed_case(case: Case, format: str, group_size: int) -> tuple[Tensor, Routing, ExpertWeights]:
    """The case with packed weights, and x in whole multiples already: rounding then changes nothing in it."""
    T, D = case.inputs.x.shape
    multiples = torch.randint(-127, 128, (T, D))
    multiples[:, ::group_size] = 127
    x = multiples * torch.randint(-8, -4, (T, 1)).float().exp2()
    routing = Routing(
        case.token_ids, case.expert_ids, case.inputs.row_weights.float(), torch.zeros(T, len(case.inputs.down)),
        len(case.inputs.down), case.top_k,
    )  # fmt: skip

    def packed(stack: Tensor) -> PackedWeight:
        if format == "mxfp4":
            stack = torch.stack([random_weight(stack.shape[1], stack.shape[2], format) / 2**16 for _ in stack])
        return pack(stack, format, group_size)

    gate_up_bias, down_bias = (
        None if bias is None else bias.float() for bias in (case.inputs.gate_up_bias, case.inputs.down_bias)
    )
    gate_up, down = packed(case.inputs.gate_up), packed(case.inputs.down)
    weights = ExpertWeights(gate_up, down, gate_up_bias, down_bias, case.activation)
    return x, routing, weights


def expected_experts(x: Tensor, routing: Routing, weights: ExpertWeights, group_size: int) -> tuple[Tensor, Tensor]:
    """y (T, D) with hidden units rounded by the definition, and how far other numbers may be off."""
    y = torch.zeros(x.shape, dtype=torch.float64)
    allowed = torch.zeros_like(y)
    for token, expert, weight in zip(routing.token_ids, routing.expert_ids, routing.weights.double(), strict=True):
        gate_up, down = weights.matrices_of(int(expert), torch.float64)
        bias = 0 if weights.gate_up_bias is None else weights.gate_up_bias[expert].double()
        gate, up = (gate_up @ x[token].double() + bias).chunk(2)
        hidden = weights.activation.forward(gate, up).unsqueeze(0)
        values, off = rounded(hidden, group_size, near=0.02)
        bias = torch.zeros(()) if weights.down_bias is None else weights.down_bias[expert].double()
        y[token] += weight * (down @ values[0] + bias)
        sizes = 1e-4 * (down.abs() @ values[0].abs() + bias.abs()) + 1.01 * down.abs() @ off[0]
        allowed[token] += weight.abs() * sizes
    return y, allowed


CASES = {
    "usual": {"T": 19, "E": 5, "K": 2, "D": 64, "F": 96},
    "odd": {"T": 7, "E": 4, "K": 3, "D": 45, "F": 39},
    "one token, small": {"T": 1, "E": 3, "K": 2, "D": 3, "F": 5},
    "one expert takes all": {"T": 70, "E": 3, "K": 1, "D": 33, "F": 40, "one_expert": True},
    "no token": {"T": 0, "E": 3, "K": 1, "D": 16, "F": 16},
}


@built
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize(("format", "group_size"), KINDS)
def test_experts_equal_float64_on_rounded_inputs(
    format: str, group_size: int, experts: str, name: str, instruction_set: str
) -> None:
    case = make_case(**CASES[name], experts=experts, ragged=name == "odd")
    x, routing, weights = packed_case(case, format, group_size)
    expected, allowed = expected_experts(x, routing, weights, group_size)
    y = packed_experts(x, routing, weights, instruction_set=instruction_set)
    assert ((y - expected).abs() <= allowed).all()


def in_slots(weights: ExpertWeights, number: int) -> ExpertWeights:
    """The same experts, each in some slot of so many."""
    slots = torch.randperm(number)[: weights.num_experts]

    def moved(stack: Tensor | PackedWeight) -> PackedWeight:
        assert isinstance(stack, PackedWeight)
        data = torch.randint(0, 256, (number, *stack.data.shape[1:]), dtype=torch.uint8)
        data[slots] = stack.data
        return replace(stack, data=data)

    return replace(weights, gate_up=moved(weights.gate_up), down=moved(weights.down), slots=slots.int())


@pytest.mark.parametrize("instruction_set", [*SETS, "without kernels"])
@pytest.mark.parametrize("experts", EXPERTS)
def test_it_does_not_matter_where_an_expert_stands(
    monkeypatch: pytest.MonkeyPatch, experts: str, instruction_set: str
) -> None:
    if instruction_set == "without kernels":
        without_kernels(monkeypatch)
        instruction_set = ""
    x, routing, weights = packed_case(make_case(**CASES["odd"], experts=experts), "int4", 32)
    expected = packed_experts(x, routing, weights, instruction_set=instruction_set)
    moved = in_slots(weights, weights.num_experts + 3)
    assert torch.equal(packed_experts(x, routing, moved, instruction_set=instruction_set), expected)
    with torch.no_grad():
        assert torch.equal(packed_experts(x, routing, moved, instruction_set=instruction_set), expected)


def test_an_expert_that_stands_nowhere_is_refused() -> None:
    x, routing, weights = packed_case(make_case(**CASES["odd"]), "int4", 32)
    moved = in_slots(weights, weights.num_experts)
    assert moved.slots is not None
    for slot in (-1, weights.num_experts):
        wrong = moved.slots.clone()
        wrong[routing.expert_ids[0]] = slot
        with pytest.raises(UsageError, match=f"stands in slot {slot} of {weights.num_experts}"):
            packed_experts(x, routing, replace(moved, slots=wrong))
    with pytest.raises(UsageError, match=r"slots are torch\.int64"):
        packed_experts(x, routing, replace(moved, slots=moved.slots.long()))


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_packed, "native_module", lambda: None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("format", "group_size"), KINDS)
def test_without_kernels_torch_multiplies_unpacked_weights(
    monkeypatch: pytest.MonkeyPatch, format: str, group_size: int, dtype: torch.dtype
) -> None:
    without_kernels(monkeypatch)
    monkeypatch.setattr(native_packed, "UNPACKED_TOGETHER", 4000)  # several parts
    assert packed_instruction_sets() == []
    weight, bias = packed_matrix(70, 101, format, group_size), torch.randn(70)
    x = torch.randn(2, 3, 101).to(dtype)
    expected = functional.linear(x.double(), unpack(weight, torch.float64), bias.double())
    y = packed_linear(x, weight, bias)
    assert y.dtype == dtype
    assert ((y.double() - expected).norm() / expected.norm()) < 8 * torch.finfo(dtype).eps

    x, routing, weights = packed_case(make_case(19, 5, 2, 33, 40, experts="clamped with biases"), format, group_size)
    routing_64 = replace(routing, weights=routing.weights.double())
    biases = {name: getattr(weights, name).double() for name in ("gate_up_bias", "down_bias")}
    expected = reference_experts(x.double(), routing_64, replace(weights, **biases))
    biases = {name: getattr(weights, name).to(dtype) for name in ("gate_up_bias", "down_bias")}
    y = packed_experts(x.to(dtype), routing, replace(weights, **biases))
    assert y.dtype == dtype
    assert ((y.double() - expected).norm() / expected.norm()) < max(20 * torch.finfo(dtype).eps, 1e-6)


def computed(
    compute: Callable[..., Tensor], x: Tensor, rows: slice, routing: Routing, weights: ExpertWeights
) -> Tensor:
    """Of some tokens alone."""
    is_in = (routing.token_ids >= rows.start) & (routing.token_ids < rows.stop)
    part = Routing(
        routing.token_ids[is_in] - rows.start, routing.expert_ids[is_in], routing.weights[is_in],
        routing.logits[rows], routing.num_experts, routing.top_k,
    )  # fmt: skip
    return compute(x[rows], part, weights)


@pytest.mark.parametrize("kernels", [pytest.param(True, marks=built), False])
@pytest.mark.parametrize("format", FORMATS)
def test_a_token_alone_gets_what_it_gets_among_others(
    monkeypatch: pytest.MonkeyPatch, format: str, kernels: bool
) -> None:
    if not kernels:
        without_kernels(monkeypatch)
    x, routing, weights = packed_case(make_case(40, 5, 2, 64, 96, experts="swiglu with biases"), format, 32)
    together = packed_experts(x, routing, weights)
    alone = torch.cat([computed(packed_experts, x, slice(t, t + 1), routing, weights) for t in range(40)])
    assert (together - alone).norm() < 1e-3 * together.norm()
    assert ((together - alone).abs().amax(1) < 1e-5 * together.abs().amax(1)).float().mean() > 0.7  # where none is near
    weight, x = packed_matrix(50, 90, format, 32), torch.randn(40, 90)
    together = packed_linear(x, weight)
    alone = torch.cat([packed_linear(x[t : t + 1], weight) for t in range(40)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5 * float(together.abs().max()))


@built
@pytest.mark.parametrize("format", FORMATS)
def test_results_do_not_depend_on_the_number_of_threads(format: str) -> None:
    x, routing, weights = packed_case(make_case(61, 6, 3, 130, 70), format, 32)
    weight = packed_matrix(200, 130, format, 32)
    results = []
    for threads in (1, 2, 5):
        with num_threads(threads):
            results.append((packed_experts(x, routing, weights), packed_linear(x, weight)))
    for experts, linear in results[1:]:
        assert torch.equal(experts, results[0][0])
        assert torch.equal(linear, results[0][1])


@pytest.mark.parametrize("format", FORMATS)
def test_bfloat16_goes_in_and_out(format: str) -> None:
    x, routing, weights = packed_case(make_case(9, 4, 2, 40, 50, experts="swiglu with biases"), format, 32)
    x = x.bfloat16()
    biases = {name: getattr(weights, name).bfloat16() for name in ("gate_up_bias", "down_bias")}
    wide = {name: bias.float() for name, bias in biases.items()}
    y = packed_experts(x, routing, replace(weights, **biases))
    assert y.dtype == torch.bfloat16
    expected = packed_experts(x.float(), routing, replace(weights, **wide))
    assert (y.float() - expected).norm() < 0.02 * expected.norm()
    weight = packed_matrix(50, 40, format, 32)
    y = packed_linear(x, weight, torch.ones(50).bfloat16())
    expected = packed_linear(x.float(), weight, torch.ones(50))
    assert (y.float() - expected).norm() < 0.01 * expected.norm()


def test_leading_dimensions_are_kept() -> None:
    weight, x = packed_matrix(20, 40, "int8", 32), torch.randn(2, 3, 40)
    for shape in ((2, 3), (6,), (3, 2, 1), (0, 4)):
        part = x.view(6, 40)[: torch.Size(shape).numel()].view(*shape, 40)
        assert packed_linear(part, weight).shape == (*shape, 20)
    transposed = x.transpose(0, 1)
    torch.testing.assert_close(packed_linear(transposed, weight), packed_linear(x, weight).transpose(0, 1))


def test_the_compiler_traces_through_and_gradients_are_refused() -> None:
    x, routing, weights = packed_case(make_case(9, 4, 2, 40, 50), "int4", 32)
    weight = packed_matrix(20, 40, "int8", 32)

    def compute(x: Tensor) -> Tensor:
        return packed_linear(torch.tanh(packed_experts(x, routing, weights)), weight)

    with torch.no_grad():
        compiled = torch.compile(compute, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), compute(x))
    x.requires_grad_()
    torch.testing.assert_close(compute(x).detach(), compute(x.detach()))
    for y in (packed_experts(x, routing, weights), packed_linear(x, weight)):
        with pytest.raises(
            UsageError, match="for inference and give no gradients; load the model without quantization"
        ):
            y.sum().backward()


def test_the_operators_say_the_truth_about_themselves() -> None:
    x, routing, weights = packed_case(make_case(9, 4, 2, 40, 50), "int4", 32)
    weight = packed_matrix(20, 40, "int8", 32)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.moesaic.packed_linear.default, (x, weight.data, None, 20, "int8", 32, ""), test_utils=checks
    )
    assert isinstance(weights.gate_up, PackedWeight)
    assert isinstance(weights.down, PackedWeight)
    arguments = (
        x, routing.weights, weights.gate_up.data, weights.down.data, None, None, routing.token_ids, routing.expert_ids,
        None, 50, ["int4", "int4"], [32, 32], "swiglu", 7.0, 1.7, "",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.moesaic.packed_experts.default, arguments, test_utils=checks)


def test_what_does_not_fit_is_refused() -> None:
    x, routing, weights = packed_case(make_case(9, 4, 2, 40, 50), "int4", 32)
    weight = packed_matrix(20, 40, "int8", 32)
    for call, message in (
        (lambda: packed_linear(x[:, :-8].contiguous(), weight), "x has shape (9, 32); the packed weights need (9, 40)"),
        (lambda: packed_linear(x, weight, torch.zeros(21)), "bias has shape (21,)"),
        (lambda: packed_linear(x, replace(weight, data=weight.data.float())), "packed data are torch.float32"),
        (lambda: packed_linear(x, replace(weight, format="int4")), "packed data are torch.uint8"),
        (lambda: packed_linear(x, weight, instruction_set="mmx"), "mmx" if SETS else "no native kernels"),
        (lambda: packed_experts(x, routing, replace(weights, down_bias=torch.zeros(4, 41))), "down_bias has shape"),
        (lambda: packed_experts(x, routing, replace(weights, down=weights.gate_up)), "gate_up is (100, 40) and"),
        (lambda: packed_experts(x, routing, ExpertWeights(torch.zeros(4, 100, 40), torch.zeros(4, 40, 50))),
         "use native, grouped or reference for plain ones"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=re.escape(message)):
            call()


@built
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_default_type_does_not_decide_what_is_written(dtype: torch.dtype) -> None:
    x, routing, weights = packed_case(make_case(9, 4, 2, 40, 50), "int4", 32)
    weight = packed_matrix(20, 40, "int8", 32)
    expected = packed_linear(x, weight), packed_experts(x, routing, weights)
    torch.set_default_dtype(dtype)
    try:
        results = packed_linear(x, weight), packed_experts(x, routing, weights)
    finally:
        torch.set_default_dtype(torch.float32)
    for got, wanted in zip(results, expected, strict=True):
        assert torch.equal(got, wanted)


def test_weights_elsewhere_are_refused() -> None:
    x, routing, weights = packed_case(make_case(9, 4, 2, 40, 50), "int4", 32)
    weight = packed_matrix(20, 40, "int8", 32)
    assert isinstance(weights.down, PackedWeight)
    elsewhere = replace(weights, down=replace(weights.down, data=weights.down.data.to("meta")))
    with torch.no_grad():
        for call in (
            lambda: packed_linear(x, replace(weight, data=weight.data.to("meta"))),
            lambda: packed_linear(x, weight, torch.zeros(20, device="meta")),
            lambda: packed_experts(x, routing, elsewhere),
            lambda: packed_experts(x, replace(routing, weights=routing.weights.to("meta")), weights),
        ):
            with pytest.raises(UsageError, match="x is on cpu, and what it meets on meta; move the model as a whole"):
                call()


@built
def test_a_routing_to_nowhere_is_refused() -> None:
    x, routing, weights = packed_case(make_case(9, 4, 2, 40, 50), "int4", 32)
    wrong = replace(routing, expert_ids=routing.expert_ids.index_fill(0, torch.tensor(3), 4))
    with pytest.raises(UsageError, match=r"row 3 of the routing sends token 1 to expert 4"):
        packed_experts(x, wrong, weights)
