"""A plain loop over experts: the oracle that every other backend is compared with.

T tokens, E experts, D hidden size, F expert intermediate size, n rows of one expert.
"""

import torch
from torch import Tensor
from torch.nn import functional

from moesaic.ops.routing import Routing
from moesaic.ops.weights import PLAIN, ExpertWeights


def reference_experts(x: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """Each expert in turn computes its tokens; x (T, D) -> y (T, D). Any floating dtype, any device, autograd.

    Packed weights are unpacked, one expert at a time.
    """
    y_TD = torch.zeros_like(x)
    for expert in range(weights.num_experts):
        gate_up_bias = None if weights.gate_up_bias is None else weights.gate_up_bias[expert]
        down_bias = None if weights.down_bias is None else weights.down_bias[expert]
        assignment_n = torch.nonzero(routing.expert_ids == expert).squeeze(1)
        if weights.format != PLAIN and not len(assignment_n):
            continue  # plain weights get a gradient of zeros; unpacking takes time
        token_n = routing.token_ids[assignment_n]
        gate_up_2FD, down_DF = weights.matrices_of(expert, x.dtype)
        gate_nF, up_nF = functional.linear(x[token_n], gate_up_2FD, gate_up_bias).chunk(2, dim=-1)
        hidden_nF = weights.activation.forward(gate_nF, up_nF)
        out_nD = functional.linear(hidden_nF, down_DF, down_bias)
        weight_n1 = routing.weights[assignment_n].unsqueeze(1)
        y_TD = y_TD.index_add(0, token_n, (out_nD * weight_n1).to(x.dtype))
    return y_TD
