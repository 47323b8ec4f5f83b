"""Products with packed weights by the C++ kernels of csrc/, as operators for torch.compile; no gradients.

The kernels round what they multiply, each row in groups of G numbers, to whole multiples of the group's largest / 127.
Where they are not built, and on other devices, the weights are unpacked a part at a time and torch multiplies; then
nothing is rounded.

T tokens, N assignments, E experts, D hidden size, F expert intermediate size, G inputs of a group.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moesaic.errors import UsageError
from moesaic.ops.activation import Activation
from moesaic.ops.instruction_set import native_module
from moesaic.ops.native import NATIVE_ACTIVATIONS, make_plan
from moesaic.ops.native_call import address, float32, is_plain_call, native, raise_for
from moesaic.ops.quantize import PANEL, PackedWeight, unpack
from moesaic.ops.reference import reference_experts
from moesaic.ops.routing import Routing
from moesaic.ops.weights import ExpertWeights

PACKED_DTYPES = frozenset({torch.float32, torch.bfloat16})
"""Of the inputs that the kernels take."""
UNPACKED_TOGETHER = 2**22
"""Numbers of a matrix, where there are no kernels."""


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, instruction_set: str = "") -> Tensor:
    """x (..., K) -> (..., N) in x's dtype; `bias` (N,). `instruction_set` as for `packed_experts`."""
    _require_shapes(("x", x, (*x.shape[:-1], weight.columns)))
    if is_plain_call(x):
        return _linear(x, weight, bias, instruction_set)
    return torch.ops.moesaic.packed_linear(
        x, weight.data, bias, weight.rows, weight.format, weight.group_size, instruction_set
    )


def packed_experts(x: Tensor, routing: Routing, weights: ExpertWeights, *, instruction_set: str = "") -> Tensor:
    """x (T, D) -> y (T, D) in x's dtype, of packed weights.

    `instruction_set` forces one of `packed_instruction_sets()`, for tests; else it is the first of them.

    Raises:
        UsageError: the weights are not packed, the machine lacks that instruction set, a row of the routing names a
            token or an expert that does not exist, or, in the backward pass, that there are no gradients.
    """
    gate_up, down, activation = weights.gate_up, weights.down, weights.activation
    if not isinstance(gate_up, PackedWeight) or not isinstance(down, PackedWeight):
        raise UsageError("the backend packed computes packed weights; use native, grouped or reference for plain ones")
    if (gate_up.rows, gate_up.columns) != (2 * down.columns, down.rows):
        raise UsageError(
            f"gate_up is ({gate_up.rows}, {gate_up.columns}) and down ({down.rows}, {down.columns}); they need to be "
            "(2F, D) and (D, F)"
        )
    _require_shapes(("x", x, (len(x), down.rows)))
    if is_plain_call(x):
        return _experts(x, routing.weights, weights, routing.token_ids, routing.expert_ids, instruction_set)
    return torch.ops.moesaic.packed_experts(
        x,
        routing.weights,
        gate_up.data,
        down.data,
        weights.gate_up_bias,
        weights.down_bias,
        routing.token_ids,
        routing.expert_ids,
        weights.slots,
        down.columns,
        [gate_up.format, down.format],
        [gate_up.group_size, down.group_size],
        activation.name,
        activation.limit,
        activation.alpha,
        instruction_set,
    )


def packed_rows(x: Tensor, plan: Tensor, weights: ExpertWeights, rows: Tensor, *, instruction_set: str = "") -> None:
    """Fills those `rows` (N, D) whose expert is there, with what it makes of its token: `packed_experts` for experts
    that come in parts, before `summed_rows`.

    x (T, D) and rows are float32 and contiguous; `plan` is native.make_plan's; biases are float32.
    """
    status = native().packed_experts_rows(
        described_experts(weights),
        len(x),
        len(rows),
        plan.data_ptr(),
        x.data_ptr(),
        0,
        torch.get_num_threads(),
        instruction_set,
        rows.data_ptr(),
    )
    raise_for(status, instruction_set, packed_instruction_sets)


def summed_rows(
    rows: Tensor, row_weights: Tensor, plan: Tensor, num_tokens: int, num_experts: int, *, instruction_set: str = ""
) -> Tensor:
    """Rows (N, D), times their weights (N,), summed into tokens (T, D): bit for bit what `packed_experts` gives."""
    y_TD = rows.new_empty(num_tokens, rows.shape[1])
    status = native().sum_rows(
        plan.data_ptr(),
        (num_tokens, len(rows), num_experts, rows.shape[1]),
        rows.data_ptr(),
        row_weights.data_ptr(),
        torch.get_num_threads(),
        instruction_set,
        y_TD.data_ptr(),
    )
    raise_for(status, instruction_set, packed_instruction_sets)
    return y_TD


def packed_instruction_sets() -> list[str]:
    """Those that the kernels are built for and this machine runs, the best first; none when they are not built."""
    module = native_module()
    return [] if module is None else module.packed_kernels()


torch.library.define(
    "moesaic::packed_linear",
    "(Tensor x, Tensor data, Tensor? bias, int rows, str format, int group_size, str instruction_set) -> Tensor",
)
torch.library.define(
    "moesaic::packed_experts",
    "(Tensor x, Tensor row_weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias,"
    " Tensor token_ids, Tensor expert_ids, Tensor? slots, int intermediate_size, str[] formats, int[] group_sizes,"
    " str activation, float limit, float alpha, str instruction_set) -> Tensor",
)


def _linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, instruction_set: str) -> Tensor:
    leading = x.shape[:-1]
    _require_shapes(("bias", bias, (weight.rows,)))
    _require_device(x, weight.data, bias)
    kernels = _kernels_for(x, instruction_set)
    if kernels is None:
        return _unpacked_linear(x.reshape(-1, weight.columns), weight, bias).view(*leading, weight.rows)
    wide_x, wide_bias, y = float32(x), float32(bias), x.new_empty(*leading, weight.rows, dtype=torch.float32)
    status = kernels.packed_linear(
        described(weight),
        address(wide_bias),
        address(wide_x),
        leading.numel(),
        torch.get_num_threads(),
        instruction_set,
        y.data_ptr(),
    )
    raise_for(status, instruction_set, kernels.packed_kernels)
    return y.to(x.dtype)


def _experts(
    x: Tensor, row_weights: Tensor, weights: ExpertWeights, token_ids: Tensor, expert_ids: Tensor, instruction_set: str
) -> Tensor:
    gate_up, down = weights.gate_up, weights.down
    assert isinstance(gate_up, PackedWeight)
    assert isinstance(down, PackedWeight)
    num_tokens, num_rows, num_experts = len(x), len(row_weights), weights.num_experts
    hidden_size, intermediate_size = down.rows, down.columns
    num_matrices = num_experts if weights.slots is None else len(gate_up.data)
    _require_shapes(
        ("gate_up", gate_up.data, (num_matrices, *gate_up.data.shape[-3:])),
        ("down", down.data, (num_matrices, *down.data.shape[-3:])),
        ("gate_up_bias", weights.gate_up_bias, (num_experts, 2 * intermediate_size)),
        ("down_bias", weights.down_bias, (num_experts, hidden_size)),
        ("token_ids", token_ids, (num_rows,)),
        ("expert_ids", expert_ids, (num_rows,)),
    )
    biases = (weights.gate_up_bias, weights.down_bias)
    _require_device(x, gate_up.data, down.data, *biases, row_weights, token_ids, expert_ids)
    _require_slots(weights.slots, expert_ids, num_matrices)
    kernels = _kernels_for(x, instruction_set)
    if kernels is None:
        nothing = row_weights.new_zeros(()).expand(num_tokens, num_experts)
        return reference_experts(
            x, Routing(token_ids, expert_ids, row_weights, nothing, num_experts, top_k=None), weights
        )
    plan = make_plan(kernels, token_ids.long(), expert_ids.long(), num_tokens, num_experts)
    wide, wide_x, wide_row_weights = with_float32_biases(weights), float32(x), float32(row_weights)
    y_TD = x.new_empty(num_tokens, hidden_size, dtype=torch.float32)
    status = kernels.packed_experts_forward(
        described_experts(wide),
        num_tokens,
        num_rows,
        plan.data_ptr(),
        address(wide_x),
        address(wide_row_weights),
        torch.get_num_threads(),
        instruction_set,
        y_TD.data_ptr(),
    )
    raise_for(status, instruction_set, kernels.packed_kernels)
    return y_TD.to(x.dtype)


def _linear_of_data(
    x: Tensor, data: Tensor, bias: Tensor | None, rows: int, format: str, group_size: int, instruction_set: str
) -> Tensor:
    return _linear(x, PackedWeight(data, rows, x.shape[-1], format, group_size), bias, instruction_set)


def _experts_of_data(
    x: Tensor,
    row_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    token_ids: Tensor,
    expert_ids: Tensor,
    slots: Tensor | None,
    intermediate_size: int,
    formats: list[str],
    group_sizes: list[int],
    activation: str,
    limit: float,
    alpha: float,
    instruction_set: str,
) -> Tensor:
    hidden_size = x.shape[1]
    first = PackedWeight(gate_up, 2 * intermediate_size, hidden_size, formats[0], group_sizes[0])
    second = PackedWeight(down, hidden_size, intermediate_size, formats[1], group_sizes[1])
    weights = ExpertWeights(first, second, gate_up_bias, down_bias, Activation(activation, limit, alpha), slots)
    return _experts(x, row_weights, weights, token_ids, expert_ids, instruction_set)


@torch.library.register_fake("moesaic::packed_linear")
def _fake_linear(x: Tensor, data: Tensor, bias: Tensor | None, rows: int, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.register_fake("moesaic::packed_experts")
def _fake_experts(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _refuse_gradients(ctx: Any, *_: Any) -> None:
    raise UsageError("packed weights are for inference and give no gradients; load the model without quantization")


for _name, _run in (("packed_linear", _linear_of_data), ("packed_experts", _experts_of_data)):
    torch.library.impl(f"moesaic::{_name}", "default", _run)
    torch.library.register_autograd(f"moesaic::{_name}", _refuse_gradients)


def _unpacked_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    y_TN = x.new_empty(len(x), weight.rows)
    step = max(1, UNPACKED_TOGETHER // (PANEL * max(weight.columns, 1)))
    for first in range(0, len(weight.data), step):
        rows = slice(first * PANEL, min((first + step) * PANEL, weight.rows))
        data = weight.data[first : first + step]
        part = PackedWeight(data, rows.stop - rows.start, weight.columns, weight.format, weight.group_size)
        y_TN[:, rows] = functional.linear(x, unpack(part, x.dtype), None if bias is None else bias[rows].to(x.dtype))
    return y_TN


def _require_device(x: Tensor, *others: Tensor | None) -> None:
    """The kernels follow addresses, which mean something else elsewhere."""
    for other in others:
        if other is not None and other.device != x.device:
            raise UsageError(f"x is on {x.device}, and what it meets on {other.device}; move the model as a whole")


def _kernels_for(x: Tensor, instruction_set: str) -> Any:
    """The native module, or None where torch has to do it. Raises UsageError where an instruction set was asked for."""
    kernels = native_module() if x.device.type == "cpu" and x.dtype in PACKED_DTYPES else None
    if kernels is None and instruction_set:
        raise UsageError(f"no native kernels for packed weights and {x.dtype} on {x.device} here; see `moesaic doctor`")
    return kernels


def described(weight: PackedWeight) -> tuple[int, int, int, int, bytes, int]:
    """As csrc/packed_bindings.cpp reads it."""
    return (*weight.layout, weight.data.data_ptr())


def with_float32_biases(weights: ExpertWeights) -> ExpertWeights:
    if not weights.has_bias:
        return weights
    return replace(weights, gate_up_bias=float32(weights.gate_up_bias), down_bias=float32(weights.down_bias))


def described_experts(weights: ExpertWeights) -> tuple[object, ...]:
    """Likewise; biases are float32, and have to live as long as the result."""
    gate_up, down, activation = weights.gate_up, weights.down, weights.activation
    assert isinstance(gate_up, PackedWeight)
    assert isinstance(down, PackedWeight)
    return (
        (weights.num_experts, down.rows, down.columns),
        (NATIVE_ACTIVATIONS[activation.name], activation.limit, activation.alpha),
        (address(weights.gate_up_bias), address(weights.down_bias)),
        described(gate_up),
        described(down),
        address(weights.slots),
    )


def _require_slots(slots: Tensor | None, expert_ids: Tensor, number: int) -> None:
    if slots is None or not len(expert_ids):
        return
    if slots.dtype != torch.int32 or not slots.is_contiguous():
        raise UsageError(f"slots are {slots.dtype} with strides {slots.stride()}; they need to be contiguous int32")
    if not 0 <= int(expert_ids.min()) <= int(expert_ids.max()) < len(slots):
        return  # whoever reads the routing says which row is wrong
    first, last = (int(slot) for slot in slots[expert_ids].aminmax())
    if not 0 <= first <= last < number:
        raise UsageError(f"an expert of the routing stands in slot {first if first < 0 else last} of {number}")


def _require_shapes(*tensors: tuple[str, Tensor | None, tuple[int, ...]]) -> None:
    for name, tensor, shape in tensors:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise UsageError(f"{name} has shape {tuple(tensor.shape)}; the packed weights need {shape}")
