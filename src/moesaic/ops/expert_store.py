"""Where a layer's experts live, when that is not simply in tensors of the layer.

T tokens, N assignments, D hidden size.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from moesaic.ops.weights import ExpertWeights


class ExpertStore(Protocol):
    """The experts of one layer."""

    @property
    def format(self) -> str:
        """Of all its weights, as in `ExpertWeights`."""
        ...

    def chunks(self, expert_ids: Tensor, x: Tensor) -> AbstractContextManager[Iterator[ExpertWeights]]:
        """All experts among `expert_ids` (N,), each in one chunk: weights whose `slots` say who is there, until the
        next chunk is asked for. Of several chunks what is in memory comes first, the others as they come.

        The tokens x (T, D) are those for them, from which a store may guess what the next layer will need.

        Raises MoesaicError where an expert cannot be read.
        """
        ...
