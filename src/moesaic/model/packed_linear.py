"""A linear layer whose weight is packed.

N outputs, K inputs.
"""

from dataclasses import replace

from torch import Tensor, nn

from moesaic.ops.native_packed import packed_linear
from moesaic.ops.quantize import PackedWeight, pack


class PackedLinear(nn.Module):
    """x (..., K) -> (..., N), for inference: what `nn.Linear` computes, with `weight` packed and `bias` as it is."""

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self._packed = weight
        self.register_buffer("weight", weight.data)
        self.bias = bias

    @classmethod
    def of(cls, weight: Tensor, bias: nn.Parameter | None, format: str, group_size: int) -> "PackedLinear":
        """From a plain weight (N, K)."""
        return cls(pack(weight, format, group_size), bias)

    @property
    def packed(self) -> PackedWeight:
        data = self.get_buffer("weight")
        if data is not self._packed.data:  # the module was moved, or loaded
            self._packed = replace(self._packed, data=data)
        return self._packed

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.packed, self.bias)

    def extra_repr(self) -> str:
        weight = self._packed
        return f"in_features={weight.columns}, out_features={weight.rows}, format={weight.format}"
