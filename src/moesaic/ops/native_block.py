"""One block of a decoder in one call into C++, for a few tokens and packed weights.

Between the calls of a step the interpreter and torch have to come back into the caches, from which the weights of every
product push them out; that takes a fifth of a token's time.

B sequences, L new tokens of each, D hidden size.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moesaic.ops.native_call import address, float32, native, raise_for
from moesaic.ops.native_packed import described, described_experts
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
    experts: ExpertWeights
    """Packed."""

    def __post_init__(self) -> None:
        for name in ("attention_norm", "feed_forward_norm"):
            object.__setattr__(self, name, float32(getattr(self, name)))
        for name in ("query", "key", "value", "output"):
            weight, bias = getattr(self, name)
            object.__setattr__(self, name, (weight, float32(bias)))
        biases = {name: float32(getattr(self.experts, name)) for name in ("gate_up_bias", "down_bias")}
        object.__setattr__(self, "experts", replace(self.experts, **biases))

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, L, D) float32 -> (B, L, D); keys and values go into the cache."""
        x = x.contiguous()
        y = torch.empty_like(x)
        status = native().block(
            (address(self.attention_norm), address(self.feed_forward_norm), self.norm_eps, self.residual),
            tuple(_described_linear(*each) for each in (self.query, self.key, self.value, self.output)),
            self.attention.described(*x.shape[:2]),
            self.router.described(),
            described_experts(self.experts),
            x.data_ptr(),
            torch.get_num_threads(),
            y.data_ptr(),
        )
        raise_for(status, "", native().packed_kernels)
        return y


def _described_linear(weight: PackedWeight, bias: Tensor | None) -> tuple[tuple[object, ...], int]:
    return described(weight), address(bias)
