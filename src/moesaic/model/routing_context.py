"""What a router may know besides the hidden states of the tokens: one object for all layers of a forward pass.

B sequences, L positions, T = B x L tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moesaic.ops import Choice


@dataclass(frozen=True)
class RoutingContext:
    """Tokens t = b x L + l belong to sequence b. Whatever tokens compete for, they compete for within their sequence,
    so that neither micro-batches nor padding nor ranks change what a sequence gets."""

    tokens: Tensor
    """(B, L) int64 token ids."""
    mask: Tensor | None = None
    """(B, L) bool, False for padding. None: no padding."""
    noise_keys: Tensor | None = None
    """(B, L) int64, one for each token: equal keys draw equal noise (`noise.py`). None: torch's generator draws it."""
    replay: tuple[Choice, ...] | None = None
    """What the routers of this block are to choose, in the order in which they are asked. None: they choose."""

    is_read: bool = True
    """Whether somebody reads what the routers decide, outside the layers."""

    def of_tokens(self, index: Tensor) -> "RoutingContext":
        """Of tokens number `index` (n,) of each sequence alone, for routers that choose anew."""
        assert self.replay is None
        mask, keys = self.mask, self.noise_keys
        return replace(
            self,
            tokens=self.tokens[:, index],
            mask=None if mask is None else mask[:, index],
            noise_keys=None if keys is None else keys[:, index],
        )

    @property
    def flat_mask(self) -> Tensor | None:
        """(T,)."""
        return None if self.mask is None else self.mask.flatten()

    def lengths(self) -> Tensor:
        """(B,) int64: tokens of each sequence, without padding."""
        if self.mask is not None:
            return self.mask.sum(1)
        batch_size, length = self.tokens.shape
        return torch.full((batch_size,), length, device=self.tokens.device)
