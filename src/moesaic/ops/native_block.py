"""One block of a decoder in one call into C++, for packed weights.

Between the calls of a step of a few tokens the interpreter and torch have to come back into the caches, from which the
weights of every product push them out; that takes a fifth of a token's time.

T new tokens of all sequences, R of them that go on after attention, D hidden size, E experts, K experts per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.ops.expert_store import ExpertStore
from moesaic.ops.native_call import address, float32, native, raise_for
from moesaic.ops.native_packed import described, described_experts, packed_rows, with_float32_biases
from moesaic.ops.native_step import AttentionStep, RouterStep
from moesaic.ops.quantize import PackedWeight
from moesaic.ops.weights import ExpertWeights

Linear = tuple[PackedWeight, Tensor | None]
"""Weight and bias of a linear layer."""


@dataclass(frozen=True)
class BlockStep:
    """What a step of a block reads besides its tokens."""

    attention_norm: Tensor
    """(D,)."""
    feed_forward_norm: Tensor
    """(D,)."""
    norm_eps: float
    residual: float
    """What each half adds to the residual stream is multiplied by it."""
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    attention: AttentionStep
    router: RouterStep
    experts: ExpertWeights | ExpertStore
    """Packed."""
    kept: Tensor | None = None
    """(R,) int64: the tokens that go on after attention. None: all do."""

    def __post_init__(self) -> None:
        for name in ("attention_norm", "feed_forward_norm"):
            object.__setattr__(self, name, float32(getattr(self, name)))
        for name in ("query", "key", "value", "output"):
            weight, bias = getattr(self, name)
            object.__setattr__(self, name, (weight, float32(bias)))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (1, T, D) float32 -> (1, R, D), and what the router says: logits (R, E), experts (R, K) int64 and weights
        (R, K). Keys and values of all T go into the cache."""
        x = x.contiguous()
        num_kept, top_k = x.shape[1] if self.kept is None else len(self.kept), self.router.top_k
        routed = (
            x.new_empty(num_kept, len(self.router.weight)),
            torch.empty(num_kept, top_k, dtype=torch.int64),
            x.new_empty(num_kept, top_k),
        )
        if not isinstance(self.experts, ExpertWeights):
            return self._with_store(x, self.experts, *routed), *routed
        y, experts = x.new_empty(1, num_kept, x.shape[2]), with_float32_biases(self.experts)
        outputs = tuple(map(address, (y, *routed)))
        status = native().block(
            self._described(x), described_experts(experts), x.data_ptr(), torch.get_num_threads(), outputs
        )
        raise_for(status, "", native().packed_kernels)
        return y, *routed

    def _with_store(self, x: Tensor, store: ExpertStore, logits: Tensor, ids: Tensor, weights_RK: Tensor) -> Tensor:
        """In several calls: which experts have to come is known after the first."""
        described_step, threads, kernels = self._described(x), torch.get_num_threads(), native()
        (num_experts, hidden_size), num_rows = self.router.weight.shape, ids.numel()
        y, normed_RD = x.new_empty(1, len(ids), hidden_size), x.new_empty(len(ids), hidden_size)
        plan = torch.empty(kernels.plan_size(len(ids), num_rows, num_experts), dtype=torch.int32)
        outputs = tuple(map(address, (y, normed_RD, logits, ids, weights_RK, plan)))
        raise_for(kernels.block_route(described_step, x.data_ptr(), threads, outputs), "", kernels.packed_kernels)

        rows_ND = x.new_empty(num_rows, hidden_size)
        with store.chunks(ids.flatten(), normed_RD) as chunks:
            for weights in chunks:
                packed_rows(normed_RD, plan, with_float32_biases(weights), rows_ND)
        status = kernels.block_finish(
            described_step, *map(address, (plan, rows_ND, weights_RK)), threads, address(normed_RD), y.data_ptr()
        )
        raise_for(status, "", kernels.packed_kernels)
        return y

    def _described(self, x: Tensor) -> tuple[object, ...]:
        """As csrc/block_bindings.cpp reads it."""
        return (
            (address(self.attention_norm), address(self.feed_forward_norm), self.norm_eps, self.residual),
            tuple(_described_linear(*each) for each in (self.query, self.key, self.value, self.output)),
            self.attention.described(x.shape[1]),
            self.router.described(),
            (address(self.kept), -1 if self.kept is None else len(self.kept)),
        )


def _described_linear(weight: PackedWeight, bias: Tensor | None) -> tuple[tuple[object, ...], int]:
    return described(weight), address(bias)
