"""Experts that come in several parts: each row alone first, and then their sum, in an order of its own.

So the parts may come in any order, and the sum is that of `BACKENDS["packed"]` with all experts at once.

T tokens, N assignments, n of them, E experts, S slots, D hidden size.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moesaic.ops.instruction_set import native_module
from moesaic.ops.native import make_plan
from moesaic.ops.native_packed import packed_experts, packed_rows, summed_rows, with_float32_biases
from moesaic.ops.routing import Routing
from moesaic.ops.weights import PLAIN, ExpertWeights

Run = Callable[[Tensor, Routing, ExpertWeights], Tensor]


class ExpertRows:
    """What the experts of a routing make of x (T, D), computed by `run`, the function of a backend."""

    def __init__(self, x: Tensor, routing: Routing, run: Run) -> None:
        self._x, self._routing, self._run = x, routing, run
        self._rows_ND = torch.empty(len(routing.expert_ids), x.shape[1], dtype=torch.float32, device=x.device)
        native = native_module() if run is packed_experts and x.device.type == "cpu" else None
        self._plan: Tensor | None = None
        if native is not None:
            self._wide_x = x.float().contiguous()
            self._plan = make_plan(native, routing.token_ids, routing.expert_ids, len(x), routing.num_experts)

    def add(self, weights: ExpertWeights) -> None:
        """Those of the experts that are there, as `weights.slots` says."""
        if self._plan is not None:
            packed_rows(self._wide_x, self._plan, with_float32_biases(weights), self._rows_ND)
            return
        assert weights.slots is not None
        numbers_n = (weights.slots[self._routing.expert_ids] >= 0).nonzero().squeeze(1)
        x_nD, routing = self._x[self._routing.token_ids[numbers_n]], _routing_of_some(self._routing, numbers_n)
        if weights.format == PLAIN:
            routing, weights = _by_slot(routing, weights)
        else:
            x_nD = x_nD.float()
        self._rows_ND[numbers_n] = self._run(x_nD, routing, weights).float()

    def summed(self) -> Tensor:
        """(T, D) in x's type, when all have been added."""
        routing = self._routing
        if self._plan is None:
            return _summed_in_torch(self._rows_ND, routing).to(self._x.dtype)
        y_TD = summed_rows(
            self._rows_ND, routing.weights.float().contiguous(), self._plan, len(self._x), routing.num_experts
        )
        return y_TD.to(self._x.dtype)


def _routing_of_some(routing: Routing, numbers: Tensor) -> Routing:
    """The assignments of these `numbers` (n,) as tokens of their own, of weight 1."""
    count = len(numbers)
    return Routing(
        token_ids=torch.arange(count, device=numbers.device),
        expert_ids=routing.expert_ids[numbers],
        weights=torch.ones(count, dtype=torch.float32, device=numbers.device),
        logits=torch.zeros((), device=numbers.device).expand(count, routing.num_experts),
        num_experts=routing.num_experts,
        top_k=1,
    )


def _by_slot(routing: Routing, weights: ExpertWeights) -> tuple[Routing, ExpertWeights]:
    """The same with slots in the place of experts, as every backend knows them."""
    slots_E = weights.slots
    assert slots_E is not None
    num_slots = len(weights.gate_up.data)
    expert_of_slot_S = torch.zeros(num_slots, dtype=torch.int64)
    present = (slots_E >= 0).nonzero().squeeze(1)
    expert_of_slot_S[slots_E[present].long()] = present
    biases = {
        name: None if bias is None else bias[expert_of_slot_S]
        for name, bias in (("gate_up_bias", weights.gate_up_bias), ("down_bias", weights.down_bias))
    }
    expert_ids_n = slots_E[routing.expert_ids].long()
    logits = routing.logits.new_zeros(()).expand(len(expert_ids_n), num_slots)
    by_slot = replace(routing, expert_ids=expert_ids_n, num_experts=num_slots, logits=logits)
    return by_slot, replace(weights, slots=None, **biases)


def _summed_in_torch(rows: Tensor, routing: Routing) -> Tensor:
    """Rows (N, D) float32, times their weights, summed into tokens (T, D) in the order of the experts, so that it does
    not matter in which order the rows were made; with one rounding for each, as processors do it that have such an
    instruction.

    The product of two float32 is exact in float64, and rounding its sum there first changes next to nothing.
    """
    order_N = torch.argsort(routing.token_ids * routing.num_experts + routing.expert_ids, stable=True)
    rows_per_token_T = torch.bincount(routing.token_ids, minlength=routing.num_tokens)
    first_of_token_T = rows_per_token_T.cumsum(0) - rows_per_token_T
    y_TD = rows.new_zeros(routing.num_tokens, rows.shape[1])
    for place in range(int(rows_per_token_T.max()) if len(order_N) else 0):
        tokens = (rows_per_token_T > place).nonzero().squeeze(1)
        chosen = order_N[first_of_token_T[tokens] + place]
        weights = routing.weights[chosen].double().unsqueeze(1)
        y_TD[tokens] = torch.addcmul(y_TD[tokens].double(), weights, rows[chosen].double()).float()
    return y_TD
