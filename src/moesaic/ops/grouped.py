"""Experts as two grouped matrix products (`torch.nn.functional.grouped_mm`) over rows sorted by expert.

T tokens, N assignments, E experts, D hidden size, F expert intermediate size.

The backward pass is written out: it keeps x and the pre-activations only, recomputes the activation, and takes the
gradient of a row's weight from the hidden units (N, F) rather than from the outputs (N, D), which are never stored,
as in SonicMoE (arXiv 2512.14080): <dy, down h + b> = <down^T dy, h> + <dy, b>.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moesaic.ops.activation import Activation
from moesaic.ops.permute import Permutation, permute, sort_by_expert, unpermute
from moesaic.ops.routing import Routing
from moesaic.ops.weights import ExpertWeights


def grouped_experts(x: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """x (T, D) -> y (T, D) in x's dtype. float32 or bfloat16; D and F must be multiples of 16 bytes."""
    permutation = sort_by_expert(routing)
    weights_N = routing.weights.index_select(0, permutation.order)
    experts_N = routing.expert_ids.index_select(0, permutation.order) if weights.has_bias else None
    return _GroupedExperts.apply(  # type: ignore[no-any-return]
        x,
        weights_N,
        weights.gate_up,
        weights.down,
        weights.gate_up_bias,
        weights.down_bias,
        experts_N,
        permutation,
        weights.activation,
    )


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        row_weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        row_experts: Tensor | None,
        permutation: Permutation,
        activation: Activation,
    ) -> Tensor:
        offsets_E = permutation.expert_offsets
        weights_N1 = row_weights.unsqueeze(1).to(x.dtype)
        gate_up_N2F = functional.grouped_mm(permute(x, permutation), gate_up.transpose(-1, -2), offs=offsets_E)
        if gate_up_bias is not None:
            gate_up_N2F.add_(gate_up_bias[row_experts])
        gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
        weighted_NF = activation.forward(gate_NF, up_NF).mul_(weights_N1)
        y_ND = functional.grouped_mm(weighted_NF, down.transpose(-1, -2), offs=offsets_E)
        if down_bias is not None:
            y_ND.addcmul_(down_bias[row_experts], weights_N1)
        ctx.permutation, ctx.activation = permutation, activation
        ctx.save_for_backward(x, row_weights, gate_up, down, gate_up_bias, down_bias, row_experts, gate_up_N2F)
        return unpermute(y_ND, permutation)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y_TD,) = grad_outputs
        x_TD, row_weights_N, gate_up_E, down_E, gate_up_bias_E, down_bias_E, experts_N, gate_up_N2F = ctx.saved_tensors
        permutation: Permutation = ctx.permutation
        offsets_E = permutation.expert_offsets
        weights_N1 = row_weights_N.unsqueeze(1).to(x_TD.dtype)

        grad_y_ND = permute(grad_y_TD.contiguous(), permutation)
        grad_weighted_NF = functional.grouped_mm(grad_y_ND, down_E, offs=offsets_E)
        hidden_NF, gate_slope_NF, up_slope_NF = ctx.activation.forward_and_slopes(*gate_up_N2F.chunk(2, dim=-1))
        grad_row_weights_N = (grad_weighted_NF.float() * hidden_NF).sum(1)
        grad_down_E = _outer_products(grad_y_ND, hidden_NF.mul_(weights_N1), down_E, offsets_E)
        grad_down_bias_E = None
        if down_bias_E is not None:
            grad_row_weights_N += (grad_y_ND.float() * down_bias_E[experts_N]).sum(1)
            grad_down_bias_E = _sum_of_rows(grad_y_ND, weights_N1, down_bias_E, offsets_E)

        grad_hidden_NF = grad_weighted_NF.mul_(weights_N1)
        grad_gate_up_N2F = torch.empty_like(gate_up_N2F)
        grad_gate_NF, grad_up_NF = grad_gate_up_N2F.chunk(2, dim=-1)
        torch.mul(grad_hidden_NF, gate_slope_NF, out=grad_gate_NF)
        torch.mul(grad_hidden_NF, up_slope_NF, out=grad_up_NF)
        grad_gate_up_bias_E = None
        if gate_up_bias_E is not None:
            ones_N1 = torch.ones_like(weights_N1)
            grad_gate_up_bias_E = _sum_of_rows(grad_gate_up_N2F, ones_N1, gate_up_bias_E, offsets_E)
        grad_gate_up_E = _outer_products(grad_gate_up_N2F, permute(x_TD, permutation), gate_up_E, offsets_E)
        grad_x_ND = functional.grouped_mm(grad_gate_up_N2F, gate_up_E, offs=offsets_E)
        return (
            unpermute(grad_x_ND, permutation),
            grad_row_weights_N,
            grad_gate_up_E,
            grad_down_E,
            grad_gate_up_bias_E,
            grad_down_bias_E,
            None,
            None,
            None,
        )


def _outer_products(left: Tensor, right: Tensor, like: Tensor, offsets: Tensor) -> Tensor:
    """(E, A, B): per expert the sum of left (N, A) outer right (N, B) over its rows; zeros when it has none."""
    if left.shape[0] == 0:
        return torch.zeros_like(like)
    return functional.grouped_mm(left.transpose(0, 1), right, offs=offsets)


def _sum_of_rows(rows: Tensor, factors: Tensor, like: Tensor, offsets: Tensor) -> Tensor:
    """(E, A): per expert the sum of rows (N, A) times factors (N, 1), as a product that repeats bitwise on any device.

    The factors are repeated to the 16 bytes that grouped_mm asks of a row.
    """
    if rows.shape[0] == 0:
        return torch.zeros_like(like)
    factors_NA = factors.expand(-1, 16 // factors.itemsize).contiguous()
    return functional.grouped_mm(rows.transpose(0, 1), factors_NA, offs=offsets)[..., 0]
