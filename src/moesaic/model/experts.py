"""The routed experts of one layer: their weights, and the backend that computes them.

T tokens, N assignments, E experts, D hidden size, F expert intermediate size.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from moesaic.config import ModelConfig
from moesaic.errors import UsageError
from moesaic.ops import BACKENDS, PLAIN, Activation, Backend, ExpertShape, ExpertWeights, Routing, pick
from moesaic.ops.expert_rows import ExpertRows
from moesaic.ops.expert_store import ExpertStore
from moesaic.ops.permute import rows_with_weighted_inputs, sum_rows_of_tokens
from moesaic.ops.quantize import PackedWeight, pack


class Experts(nn.Module):
    """E stacked gated experts. x (T, D) and a routing -> the sum of each token's experts (T, D).

    The routing's weights multiply what comes out of an expert, or what goes in where the router says so. After
    `quantize`, gate_up and down are packed, buffers in place of parameters; after `move_out` a store gives them.
    """

    def __init__(self, config: ModelConfig, backend: str = "auto") -> None:
        super().__init__()
        assert config.moe is not None
        moe = config.moe
        E, D, F = moe.num_experts, config.hidden_size, moe.moe_intermediate_size
        self.backend = backend
        self.hidden_size, self.intermediate_size = D, F
        self._packed: dict[str, PackedWeight] = {}
        self.store: ExpertStore | None = None
        self.activation = Activation(moe.activation, limit=moe.swiglu_limit, alpha=moe.swiglu_alpha)
        self.weighs_inputs = moe.router == "topk_sigmoid_input"
        self.gate_up = nn.Parameter(torch.empty(E, 2 * F, D))
        self.down = nn.Parameter(torch.empty(E, D, F))
        self.gate_up_bias = nn.Parameter(torch.empty(E, 2 * F)) if moe.projection_bias else None
        self.down_bias = nn.Parameter(torch.empty(E, D)) if moe.projection_bias else None

    def quantize(self, format: str, group_size: int) -> None:
        """Packs gate_up and down, each in its turn; biases stay as they are."""
        for name in ("gate_up", "down"):
            packed = pack(self.get_parameter(name), format, group_size)
            delattr(self, name)
            self.register_buffer(name, packed.data)
            self._packed[name] = packed

    def move_out(self, dtype: torch.dtype) -> ExpertWeights:
        """Gives up gate_up and down, which may be on the meta device: what is in `store` counts. What is not packed
        will be of that type."""
        weights = self.weights(dtype)
        for name in ("gate_up", "down"):
            delattr(self, name)
        self._packed = {}
        return weights

    @property
    def packed(self) -> dict[str, PackedWeight]:
        """gate_up (E, 2F, D) and down (E, D, F) by name, where they are packed."""
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
        """As a backend takes them; what is not packed is of that type."""
        packed = self.packed
        return ExpertWeights(
            gate_up=packed["gate_up"] if packed else self.gate_up.to(dtype),
            down=packed["down"] if packed else self.down.to(dtype),
            gate_up_bias=None if self.gate_up_bias is None else self.gate_up_bias.to(dtype),
            down_bias=None if self.down_bias is None else self.down_bias.to(dtype),
            activation=self.activation,
        )

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
            raise UsageError("experts on disk are for inference and give no gradients; load the model without memory")
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
