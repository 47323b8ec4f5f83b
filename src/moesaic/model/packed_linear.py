"""A linear layer whose weight is packed.

N outputs, K inputs.
"""

from torch import Tensor, nn

from moesaic.ops.native_packed import packed_linear
from moesaic.ops.quantize import PackedWeight, pack


class PackedLinear(nn.Module):
    """x (..., K) -> (..., N), for inference: what `nn.Linear` computes, with `weight` packed and `bias` as it is."""

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.rows, weight.columns
        self.format, self.group_size = weight.format, weight.group_size
        self.register_buffer("weight", weight.data)
        self.bias = bias

    @classmethod
    def of(cls, weight: Tensor, bias: nn.Parameter | None, format: str, group_size: int) -> "PackedLinear":
        """From a plain weight (N, K)."""
        return cls(pack(weight, format, group_size), bias)

    @property
    def packed(self) -> PackedWeight:
        data = self.get_buffer("weight")
        return PackedWeight(data, self.out_features, self.in_features, self.format, self.group_size)

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.packed, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}"
