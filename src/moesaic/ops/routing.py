"""What a router decides, as flat assignments. Every router returns a `Routing`; every backend takes one.

T tokens, E experts, K experts per token, N assignments (one row of expert work each).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """Which experts the tokens go to, before the assignments are weighed."""

    token_ids: Tensor
    """(N,) int64."""
    expert_ids: Tensor
    """(N,) int64."""
    top_k: int | None
    """K when the rows are T x K in token order, else None."""
    kept: Tensor | None = None
    """(N,) bool, False for rows that are not computed: padding, and what is over capacity. None: all are."""
    asked_ids: Tensor | None = None
    """(N,) int64, the experts that were asked for, where full ones passed rows on to others. None: `expert_ids`."""

    @classmethod
    def of_topk(cls, topk_ids: Tensor, kept: Tensor | None = None) -> "Choice":
        """From the experts (T, K) of each token, and which of them stay (T, K)."""
        num_tokens, top_k = topk_ids.shape
        token_ids_TK = torch.arange(num_tokens, device=topk_ids.device).unsqueeze(1).expand(-1, top_k)
        return cls(token_ids_TK.reshape(-1), topk_ids.reshape(-1), top_k, None if kept is None else kept.reshape(-1))

    @classmethod
    def of_mask(cls, chosen: Tensor) -> "Choice":
        """From (T, E), True where a token goes to an expert; rows in token order."""
        token_ids, expert_ids = chosen.nonzero(as_tuple=True)
        return cls(token_ids, expert_ids, None)

    @property
    def wishes(self) -> Tensor:
        """(N,) int64: the expert that each row first asked for."""
        return self.expert_ids if self.asked_ids is None else self.asked_ids

    def without_padding(self, mask: Tensor | None) -> "Choice":
        """Keeps no row of a token that `mask` (T,) calls padding."""
        if mask is None:
            return self
        is_token_N = mask[self.token_ids]
        return replace(self, kept=is_token_N if self.kept is None else self.kept & is_token_N)


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

    choice: Choice | None = None
    """What was chosen, where that is more than the rows above: with what capacity dropped, and padding."""

    @property
    def num_tokens(self) -> int:
        return self.logits.shape[0]

    @property
    def decision(self) -> Choice:
        """What to hand in again so that the same experts are chosen."""
        return self.choice or Choice(self.token_ids, self.expert_ids, self.top_k)

    def tokens_per_expert(self) -> Tensor:
        """(E,) int64: rows that each expert computes."""
        return torch.bincount(self.expert_ids, minlength=self.num_experts)

    def load(self) -> Tensor:
        """(E,) int64: rows that tokens sent to each expert, whether or not it had room for them."""
        if self.choice is None:
            return self.tokens_per_expert()
        ids_N = self.choice.wishes
        if self.mask is not None:
            ids_N = ids_N[self.mask[self.choice.token_ids]]
        return torch.bincount(ids_N, minlength=self.num_experts)

    def num_dropped(self) -> Tensor:
        """() int64: rows that tokens sent and no expert computed."""
        kept = None if self.choice is None else self.choice.kept
        return self.load().sum() - (self.expert_ids.numel() if kept is None else kept.sum())

    def of_first_experts(self, num_experts: int) -> "Routing":
        """The rows of experts 0..num_experts-1 alone."""
        first_N = self.expert_ids < num_experts
        return replace(
            self,
            token_ids=self.token_ids[first_N],
            expert_ids=self.expert_ids[first_N],
            weights=self.weights[first_N],
            logits=self.logits[:, :num_experts],
            num_experts=num_experts,
            top_k=None,
            choice=None,
        )

    def detach(self) -> "Routing":
        """The same decisions without their autograd graph."""
        return replace(self, weights=self.weights.detach(), logits=self.logits.detach())
