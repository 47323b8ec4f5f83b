"""The dense SwiGLU feed-forward (arXiv 2002.05202): dense layers and shared experts use it."""

from torch import Tensor, nn
from torch.nn import functional

from moesaic.model.linear import Linear


class MLP(nn.Module):
    """x (..., D) -> down(silu(gate(x)) * up(x)), inner width `intermediate_size`; `bias` on all three projections."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
