"""The routed experts of one layer: their weights, and the backend that computes them.

T tokens, N assignments, E experts, S of them in a stack, D hidden size, F expert intermediate size.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from moesaic.config import ModelConfig
from moesaic.errors import UsageError
from moesaic.model.mixed_precision import HOT_FORMAT, StacksByPrecision
from moesaic.ops import BACKENDS, PLAIN, Activation, Backend, ExpertShape, ExpertWeights, Routing, pick
from moesaic.ops.expert_rows import ExpertRows
from moesaic.ops.expert_store import ExpertStore
from moesaic.ops.permute import rows_with_weighted_inputs, sum_rows_of_tokens
from moesaic.ops.quantize import PackedWeight, pack

MATRICES = ("gate_up", "down")
HOT = "hot_"
"""Before the name of a stack of those experts that have more bits than others."""


class Experts(nn.Module):
    """E stacked gated experts. x (T, D) and a routing -> the sum of each token's experts (T, D).

    The routing's weights multiply what comes out of an expert, or what goes in where the router says so. After
    `quantize`, gate_up and down are packed, buffers in place of parameters, and where the experts are of two precisions
    the hot ones have hot_gate_up and hot_down; after `move_out` a store gives them.
    """

    def __init__(self, config: ModelConfig, backend: str = "auto") -> None:
        super().__init__()
        assert config.moe is not None
        moe = config.moe
        E, D, F = moe.num_experts, config.hidden_size, moe.moe_intermediate_size
        self.backend = backend
        self.num_experts = E
        self.hidden_size, self.intermediate_size = D, F
        self._packed: dict[str, PackedWeight] = {}
        self._members: dict[str, tuple[int, ...]] = {"": tuple(range(E))}
        self.hot: tuple[int, ...] = ()
        self._slots_of: dict[str, Tensor] = {}
        self.store: ExpertStore | None = None
        self.activation = Activation(moe.activation, limit=moe.swiglu_limit, alpha=moe.swiglu_alpha)
        self.weighs_inputs = moe.router == "topk_sigmoid_input"
        self.gate_up = nn.Parameter(torch.empty(E, 2 * F, D))
        self.down = nn.Parameter(torch.empty(E, D, F))
        self.gate_up_bias = nn.Parameter(torch.empty(E, 2 * F)) if moe.projection_bias else None
        self.down_bias = nn.Parameter(torch.empty(E, D)) if moe.projection_bias else None

    def quantize(self, format: str, group_size: int, hot: Sequence[int] = (), hot_format: str = HOT_FORMAT) -> None:
        """Packs gate_up and down, each in its turn; biases stay as they are. The experts `hot` get a format of their
        own, in stacks of their own where not all of them do."""
        self.hot = tuple(hot)
        cold = tuple(number for number in range(self.num_experts) if number not in self.hot)
        if self.hot and cold:
            self._members, formats = {"": cold, HOT: self.hot}, {"": format, HOT: hot_format}
        else:
            formats = {"": hot_format if self.hot else format}
        for name in MATRICES:
            weight = self.get_parameter(name)
            packed = {
                prefix + name: pack(_stack_of(weight, members), formats[prefix], group_size)
                for prefix, members in self._members.items()
            }
            delattr(self, name)
            for leaf, stack in packed.items():
                self.register_buffer(leaf, stack.data)
            self._packed |= packed
        if len(self._members) > 1:
            self.store = StacksByPrecision(self)

    def members(self, leaf: str) -> tuple[int, ...]:
        """The experts that the packed stack of this name holds, in its order."""
        return self._members[HOT if leaf.startswith(HOT) else ""]

    def is_hot(self, leaf: str) -> bool:
        """Whether these are the experts that have more bits."""
        return self.members(leaf) == self.hot

    def part(self, leaf: str, tensor: Tensor, first: int, last: int) -> Tensor:
        """Of the tensor of this name with all experts, those `first` to `last` - 1, in memory of their own."""
        if leaf in self._packed:
            members = self.members(leaf)
            first, last = bisect_left(members, first), bisect_left(members, last)
        return tensor.detach()[first:last].clone()

    def keep(self, first: int, last: int) -> None:
        """Leaves the experts `first` to `last` - 1, which are 0 and up from then on. Raises UsageError for experts on
        disk."""
        if self.store is not None and not self._packed:
            raise UsageError("experts on disk cannot be shared out over ranks; load the model without memory")
        for name, parameter in list(self.named_parameters(recurse=False)):
            kept = nn.Parameter(self.part(name, parameter, first, last), requires_grad=parameter.requires_grad)
            setattr(self, name, kept)
        for name, weight in self.packed.items():
            data = self.part(name, weight.data, first, last)
            self.register_buffer(name, data)
            self._packed[name] = replace(weight, data=data)
        self._members = {
            prefix: tuple(number - first for number in members if first <= number < last)
            for prefix, members in self._members.items()
        }
        self.hot = tuple(number - first for number in self.hot if first <= number < last)
        self.num_experts, self._slots_of = last - first, {}

    def move_out(self, dtype: torch.dtype) -> ExpertWeights:
        """Gives up gate_up and down, which may be on the meta device: what is in `store` counts. What is not packed
        will be of that type. Raises UsageError for experts of two precisions."""
        if len(self._members) > 1:
            raise UsageError(
                "the experts of a layer are of two precisions, int4 and int8, which a budget of memory does not serve; "
                "quantise the model without --hot, or leave memory out"
            )
        weights = self.weights(dtype)
        for name in MATRICES:
            delattr(self, name)
        self._packed = {}
        return weights

    @property
    def packed(self) -> dict[str, PackedWeight]:
        """gate_up (S, 2F, D) and down (S, D, F) by name, and those of hot experts, where they are packed."""
        for name, weight in self._packed.items():
            data = self.get_buffer(name)
            if data is not weight.data:  # the module was moved, or loaded
                self._packed[name] = replace(weight, data=data)
        return self._packed

    @property
    def is_plainly_packed(self) -> bool:
        """Whether the backend `packed` computes them, weighing what comes out of an expert."""
        format = next((packed.format for packed in self._packed.values()), PLAIN)
        return (
            (format if self.store is None else self.store.format) != PLAIN
            and self.backend in ("auto", "packed")
            and self.activation.name in BACKENDS["packed"].activations
            and not self.weighs_inputs
        )

    def weights(self, dtype: torch.dtype) -> ExpertWeights:
        """As a backend takes them, where all are of one precision; what is not packed is of that type."""
        (weights,) = self.stacks(dtype)
        return weights

    def stacks(self, dtype: torch.dtype) -> list[ExpertWeights]:
        """One for each precision; where there are two, their `slots` say which experts are there."""
        packed, is_split = self.packed, len(self._members) > 1
        return [
            ExpertWeights(
                gate_up=packed[f"{prefix}gate_up"] if packed else self.gate_up.to(dtype),
                down=packed[f"{prefix}down"] if packed else self.down.to(dtype),
                gate_up_bias=None if self.gate_up_bias is None else self.gate_up_bias.to(dtype),
                down_bias=None if self.down_bias is None else self.down_bias.to(dtype),
                activation=self.activation,
                slots=self._slots(prefix) if is_split else None,
            )
            for prefix in self._members
        ]

    def _slots(self, prefix: str) -> Tensor:
        """(E,) int32: where in that stack each expert stands; -1 for those of the other."""
        device = self.get_buffer(f"{prefix}gate_up").device
        known = self._slots_of.get(prefix)
        if known is None or known.device != device:
            slots_E = torch.full((self.num_experts,), -1, dtype=torch.int32)
            members = self._members[prefix]
            slots_E[list(members)] = torch.arange(len(members), dtype=torch.int32)
            known = self._slots_of[prefix] = slots_E.to(device)
        return known

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        compute = self._computed_in_memory if self.store is None else self._computed_from_store
        if not self.weighs_inputs:
            return compute(x.to(dtype), routing)
        rows_ND, routing_of_rows = rows_with_weighted_inputs(x.to(dtype), routing)
        return sum_rows_of_tokens(compute(rows_ND, routing_of_rows), routing)

    def _computed_in_memory(self, x: Tensor, routing: Routing) -> Tensor:
        weights = self.weights(x.dtype)
        return self._backend(x, weights.format).run(x, routing, weights)

    def _computed_from_store(self, x: Tensor, routing: Routing) -> Tensor:
        assert self.store is not None
        if x.requires_grad and torch.is_grad_enabled():
            where, leave_out = ("of two precisions", "quantization") if self._packed else ("on disk", "memory")
            raise UsageError(
                f"experts {where} are for inference and give no gradients; load the model without {leave_out}"
            )
        rows = ExpertRows(x, routing, self._backend(x, self.store.format).run)
        with self.store.chunks(routing.expert_ids, x) as chunks:
            for weights in chunks:
                rows.add(weights)
        return rows.summed()

    def _backend(self, x: Tensor, format: str) -> Backend:
        shape = ExpertShape(
            hidden_size=self.hidden_size,
            moe_intermediate_size=self.intermediate_size,
            device=x.device.type,
            dtype=x.dtype,
            activation=self.activation.name,
            has_bias=self.gate_up_bias is not None,
            format=format,
        )
        return BACKENDS[pick(self.backend, shape)]


def _stack_of(weight: Tensor, members: Sequence[int]) -> Tensor:
    """Those matrices of a stack (E, ...)."""
    if len(members) == len(weight):
        return weight
    return weight.index_select(0, torch.tensor(members, device=weight.device))
