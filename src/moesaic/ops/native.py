"""Experts by the C++ kernels of csrc/, fused: on CPUs, as one operator for autograd and torch.compile.

T tokens, N assignments, E experts, D hidden size, F expert intermediate size.

Forward gathers, multiplies, activates and sums without leaving the cache, and keeps the pre-activations alone. Backward
recomputes the activation and takes the gradient of a row's weight from the hidden units, as `grouped` does (SonicMoE,
arXiv 2512.14080). Results repeat bitwise, whatever the number of threads.

float32, or bfloat16 with sums in float32: then the outputs, the gradients and the kept pre-activations are rounded,
once. So are the hidden units and the gradients of pre-activations where the CPU multiplies pairs of bfloat16 itself;
elsewhere products are float32 too. Row weights and their gradient are always float32.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import UsageError
from moesaic.ops import instruction_set as machine
from moesaic.ops import native_call
from moesaic.ops.native_call import NATIVE_DTYPES
from moesaic.ops.routing import Routing
from moesaic.ops.weights import ExpertWeights

NATIVE_ACTIVATIONS = {"swiglu": 0, "clamped_swiglu": 1}
"""Name to number in csrc/experts.h."""


_MOST_ROWS = 2**31 - 1


def native_experts(x: Tensor, routing: Routing, weights: ExpertWeights, *, instruction_set: str = "") -> Tensor:
    """x (T, D) -> y (T, D) on the CPU, D and F above 0. x and the weights are all float32 or all bfloat16, and so is y.

    `instruction_set` forces one of `native_instruction_sets(x.dtype)`, for tests; else it is the first of them.

    Raises:
        UsageError: the kernels are not built, this machine lacks that instruction set, a token or an expert of the
            routing does not exist, or a tensor has the wrong type or shape.
    """
    activation = weights.activation
    y_TD, _, _ = torch.ops.moesaic.native_experts(
        x,
        routing.weights,
        weights.gate_up,
        weights.down,
        weights.gate_up_bias,
        weights.down_bias,
        routing.token_ids,
        routing.expert_ids,
        activation.name,
        activation.limit,
        activation.alpha,
        instruction_set,
    )
    return y_TD


def native_instruction_sets(dtype: torch.dtype = torch.float32) -> list[str]:
    """Those that the kernels for a dtype are built for and this machine runs, the best first; none when not built."""
    native = machine.native_module()
    return [] if native is None else native.expert_kernels()[str(dtype).removeprefix("torch.")]


def why_native_is_missing() -> str | None:
    """The reason and the command that builds the kernels; None when they are there."""
    return None if machine.native_module() is not None else f"is {machine.native_status()}"


def make_plan(native: Any, token_ids: Tensor, expert_ids: Tensor, num_tokens: int, num_experts: int) -> Tensor:
    """Which rows each expert computes, and where each token's rows are (csrc/experts.h).

    Raises UsageError for a token or an expert that does not exist.
    """
    num_rows = len(token_ids)
    plan = torch.empty(native.plan_size(num_tokens, num_rows, num_experts), dtype=torch.int32, device="cpu")
    token_ids, expert_ids = token_ids.contiguous(), expert_ids.contiguous()
    wrong = native.make_plan(
        token_ids.data_ptr(), expert_ids.data_ptr(), num_tokens, num_rows, num_experts, plan.data_ptr()
    )
    if wrong >= 0:
        raise UsageError(
            f"row {wrong} of the routing sends token {int(token_ids[wrong])} to expert {int(expert_ids[wrong])}; "
            f"there are {num_tokens} tokens and {num_experts} experts"
        )
    return plan


_INPUTS = "Tensor x, Tensor row_weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias"
_ACTIVATION = "str activation, float limit, float alpha, str instruction_set"

torch.library.define(
    "moesaic::native_experts",
    f"({_INPUTS}, Tensor token_ids, Tensor expert_ids, {_ACTIVATION})"
    " -> (Tensor y, Tensor pre_activations, Tensor plan)",
)
torch.library.define(
    "moesaic::native_experts_backward",
    f"(Tensor grad_y, Tensor pre_activations, Tensor plan, {_INPUTS}, {_ACTIVATION})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("moesaic::native_experts", "cpu")
def _forward(
    x: Tensor,
    row_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    token_ids: Tensor,
    expert_ids: Tensor,
    activation: str,
    limit: float,
    alpha: float,
    instruction_set: str,
) -> tuple[Tensor, Tensor, Tensor]:
    native = native_call.native()
    sizes = num_tokens, num_rows, num_experts, hidden_size, intermediate_size = _sizes(x, row_weights, down)
    _require_shapes(sizes, x, row_weights, gate_up, down, gate_up_bias, down_bias, token_ids, expert_ids)
    plan = make_plan(native, token_ids, expert_ids, num_tokens, num_experts)
    inputs = _contiguous(x, row_weights, gate_up, down, gate_up_bias, down_bias)
    numbers = NATIVE_ACTIVATIONS[activation], limit, alpha
    experts = native.Experts(sizes, NATIVE_DTYPES[x.dtype], numbers, plan.data_ptr(), _addresses(*inputs))
    y_TD, pre_activations_N2F = x.new_empty(num_tokens, hidden_size), x.new_empty(num_rows, 2 * intermediate_size)
    status = native.experts_forward(
        experts, torch.get_num_threads(), instruction_set, pre_activations_N2F.data_ptr(), y_TD.data_ptr()
    )
    native_call.raise_for(status, instruction_set, partial(native_instruction_sets, x.dtype))
    return y_TD, pre_activations_N2F, plan


@torch.library.impl("moesaic::native_experts_backward", "cpu")
def _backward(
    grad_y: Tensor,
    pre_activations: Tensor,
    plan: Tensor,
    x: Tensor,
    row_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    limit: float,
    alpha: float,
    instruction_set: str,
) -> tuple[Tensor, ...]:
    native = native_call.native()
    inputs = _contiguous(x, row_weights, gate_up, down, gate_up_bias, down_bias)
    grad_y, pre_activations = grad_y.contiguous(), pre_activations.contiguous()
    gradients = _empty_gradients(*inputs)
    experts = native.Experts(
        _sizes(x, row_weights, down),
        NATIVE_DTYPES[x.dtype],
        (NATIVE_ACTIVATIONS[activation], limit, alpha),
        plan.data_ptr(),
        _addresses(*inputs),
    )
    has_input = [one is not None for one in inputs]
    status = native.experts_backward(
        experts,
        torch.get_num_threads(),
        instruction_set,
        pre_activations.data_ptr(),
        grad_y.data_ptr(),
        tuple(gradient.data_ptr() if has else 0 for gradient, has in zip(gradients, has_input, strict=True)),
    )
    native_call.raise_for(status, instruction_set, partial(native_instruction_sets, x.dtype))
    return gradients


@torch.library.register_fake("moesaic::native_experts")
def _fake_forward(x: Tensor, row_weights: Tensor, gate_up: Tensor, down: Tensor, *_: Any) -> tuple[Tensor, ...]:
    num_tokens, num_rows, num_experts, hidden_size, intermediate_size = _sizes(x, row_weights, down)
    plan_size = num_experts + num_tokens + 2 + 3 * num_rows
    return (
        x.new_empty(num_tokens, hidden_size),
        x.new_empty(num_rows, 2 * intermediate_size),
        x.new_empty(plan_size, dtype=torch.int32),
    )


@torch.library.register_fake("moesaic::native_experts_backward")
def _fake_backward(grad_y: Tensor, pre_activations: Tensor, plan: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return _empty_gradients(*inputs[:6])


def _set_up_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _, activation, limit, alpha, instruction_set = inputs
    _, pre_activations, plan = output
    ctx.arguments = activation, limit, alpha, instruction_set
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(pre_activations, plan)
    ctx.save_for_backward(pre_activations, plan, *tensors)


def _differentiate(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    no_gradient = (None,) * 6  # for the ids, the activation and the instruction set
    if grad_y is None:
        return (None,) * 6 + no_gradient
    pre_activations, plan, *tensors = ctx.saved_tensors
    gradients = torch.ops.moesaic.native_experts_backward(grad_y, pre_activations, plan, *tensors, *ctx.arguments)
    kept = (None if tensor is None else gradient for tensor, gradient in zip(tensors, gradients, strict=True))
    return (*kept, *no_gradient)


torch.library.register_autograd("moesaic::native_experts", _differentiate, setup_context=_set_up_backward)


def _sizes(x: Tensor, row_weights: Tensor, down: Tensor) -> tuple[int, int, int, int, int]:
    """T, N, E, D, F."""
    return x.shape[0], row_weights.shape[0], down.shape[0], x.shape[1], down.shape[2]


def _require_shapes(
    sizes: tuple[int, int, int, int, int],
    x: Tensor,
    row_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    token_ids: Tensor,
    expert_ids: Tensor,
) -> None:
    """The kernels trust what they are given, so nothing wrong may get there."""
    num_tokens, num_rows, num_experts, hidden_size, intermediate_size = sizes
    if x.dtype not in NATIVE_DTYPES:
        raise UsageError(f"x is {x.dtype}; the native experts compute in {' or '.join(map(str, NATIVE_DTYPES))}")
    expected = [
        ("x", x, (num_tokens, hidden_size), x.dtype),
        ("row_weights", row_weights, (num_rows,), torch.float32),
        ("gate_up", gate_up, (num_experts, 2 * intermediate_size, hidden_size), x.dtype),
        ("down", down, (num_experts, hidden_size, intermediate_size), x.dtype),
        ("gate_up_bias", gate_up_bias, (num_experts, 2 * intermediate_size), x.dtype),
        ("down_bias", down_bias, (num_experts, hidden_size), x.dtype),
        ("token_ids", token_ids, (num_rows,), torch.int64),
        ("expert_ids", expert_ids, (num_rows,), torch.int64),
    ]
    for name, tensor, shape, dtype in expected:
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != dtype):
            raise UsageError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; the experts need {dtype} {shape}")
    if not hidden_size or not intermediate_size:
        raise UsageError(f"hidden size {hidden_size} and intermediate size {intermediate_size}: nothing to compute")
    if max(num_tokens, num_rows) > _MOST_ROWS:
        raise UsageError(f"{num_rows} rows of {num_tokens} tokens are too many for one call; at most {_MOST_ROWS}")


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(map(native_call.address, tensors))


def _empty_gradients(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Like the inputs, with nothing for a bias that is not there."""
    like = tensors[0]
    assert like is not None
    return tuple(
        like.new_empty(0) if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in tensors
    )
