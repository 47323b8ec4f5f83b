"""What a router decides, as flat assignments. Every router returns a `Routing`; every backend takes one.

T tokens, E experts, K experts per token, N assignments (one row of expert work each).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """N assignments of tokens to experts; assignment n sends token `token_ids[n]` to expert `expert_ids[n]`.

    One form fits token choice, expert choice, capacity dropping and dynamic k: a token may own any number of rows.
    """

    token_ids: Tensor
    """(N,) int64, in 0..T-1."""
    expert_ids: Tensor
    """(N,) int64, in 0..E-1."""
    weights: Tensor
    """(N,) float32, what the expert's output is multiplied by before the sum over a token's rows."""
    logits: Tensor
    """(T, E) float32, for balance losses and analysis."""
    num_experts: int
    top_k: int | None
    """K when the rows are T x K in token order, which allows a gather where others need a scatter; else None."""
    mask: Tensor | None = None
    """(T,) bool, False for padding. Padding owns no row and counts in no statistic. None: no padding."""

    @property
    def num_tokens(self) -> int:
        return self.logits.shape[0]

    def tokens_per_expert(self) -> Tensor:
        """(E,) int64: the load, rows that each expert receives."""
        return torch.bincount(self.expert_ids, minlength=self.num_experts)

    def detach(self) -> "Routing":
        """The same decisions without their autograd graph."""
        return Routing(
            token_ids=self.token_ids,
            expert_ids=self.expert_ids,
            weights=self.weights.detach(),
            logits=self.logits.detach(),
            num_experts=self.num_experts,
            top_k=self.top_k,
            mask=self.mask,
        )
