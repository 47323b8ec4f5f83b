"""Experts as two grouped matrix products (`torch.nn.functional.grouped_mm`) over rows sorted by expert.

T tokens, N assignments, E experts, D hidden size, F expert intermediate size.

The backward pass is written out: it keeps x and the pre-activations only, recomputes the SwiGLU, and takes the
gradient of a row's weight from the hidden units (N, F) rather than from the outputs (N, D), which are never stored,
as in SonicMoE (arXiv 2512.14080): <dy, down h> = <down^T dy, h>.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moesaic.ops.permute import Permutation, permute, sort_by_expert, unpermute
from moesaic.ops.routing import Routing
from moesaic.ops.weights import ExpertWeights


def grouped_experts(x: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """x (T, D) -> y (T, D) in x's dtype. float32 or bfloat16; D and F must be multiples of 16 bytes."""
    permutation = sort_by_expert(routing)
    weights_N = routing.weights.index_select(0, permutation.order)
    return _GroupedExperts.apply(x, weights_N, weights.gate_up, weights.down, permutation)  # type: ignore[no-any-return]


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, row_weights: Tensor, gate_up: Tensor, down: Tensor, permutation: Permutation
    ) -> Tensor:
        offsets_E = permutation.expert_offsets
        gate_up_N2F = functional.grouped_mm(permute(x, permutation), gate_up.transpose(-1, -2), offs=offsets_E)
        gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
        weighted_NF = functional.silu(gate_NF).mul_(up_NF).mul_(row_weights.unsqueeze(1).to(x.dtype))
        y_ND = functional.grouped_mm(weighted_NF, down.transpose(-1, -2), offs=offsets_E)
        ctx.permutation = permutation
        ctx.save_for_backward(x, row_weights, gate_up, down, gate_up_N2F)
        return unpermute(y_ND, permutation)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y_TD,) = grad_outputs
        x_TD, row_weights_N, gate_up_E, down_E, gate_up_N2F = ctx.saved_tensors
        permutation: Permutation = ctx.permutation
        offsets_E = permutation.expert_offsets
        weights_N1 = row_weights_N.unsqueeze(1).to(x_TD.dtype)
        gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)

        grad_y_ND = permute(grad_y_TD.contiguous(), permutation)
        grad_weighted_NF = functional.grouped_mm(grad_y_ND, down_E, offs=offsets_E)
        sigmoid_NF = torch.sigmoid(gate_NF)
        silu_NF = gate_NF * sigmoid_NF
        hidden_NF = silu_NF * up_NF
        grad_row_weights_N = (grad_weighted_NF.float() * hidden_NF).sum(1)
        grad_down_E = _outer_products(grad_y_ND, hidden_NF.mul_(weights_N1), down_E, offsets_E)

        grad_hidden_NF = grad_weighted_NF.mul_(weights_N1)
        grad_gate_up_N2F = torch.empty_like(gate_up_N2F)
        grad_gate_NF, grad_up_NF = grad_gate_up_N2F.chunk(2, dim=-1)
        torch.mul(grad_hidden_NF, silu_NF, out=grad_up_NF)
        # d silu(g) / dg = sigmoid(g) (1 + g (1 - sigmoid(g))) = sigmoid(g) + silu(g) (1 - sigmoid(g))
        slope_NF = torch.addcmul(sigmoid_NF, silu_NF, 1 - sigmoid_NF)
        torch.mul(grad_hidden_NF.mul_(up_NF), slope_NF, out=grad_gate_NF)
        grad_gate_up_E = _outer_products(grad_gate_up_N2F, permute(x_TD, permutation), gate_up_E, offsets_E)
        grad_x_ND = functional.grouped_mm(grad_gate_up_N2F, gate_up_E, offs=offsets_E)
        return unpermute(grad_x_ND, permutation), grad_row_weights_N, grad_gate_up_E, grad_down_E, None


def _outer_products(left: Tensor, right: Tensor, like: Tensor, offsets: Tensor) -> Tensor:
    """(E, A, B): per expert the sum of left (N, A) outer right (N, B) over its rows; zeros when it has none."""
    if left.shape[0] == 0:
        return torch.zeros_like(like)
    return functional.grouped_mm(left.transpose(0, 1), right, offs=offsets)
