"""What the next layer will need, guessed before it is known: reading it early hides the disk behind the computing.

The residual stream changes little from layer to layer, so the next layer's router says of it nearly what it will say
one layer later (as in arXiv 2312.17238, section 3.2). With pre-normalisation the tokens that this layer's experts see
are the stream over its size, times this layer's norm weights; divided by these and multiplied by the next layer's they
are what the next router would see.

T tokens, N assignments, E experts, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from moesaic.model.block import Block
from moesaic.model.moe import MoE
from moesaic.model.norm import RMSNorm
from moesaic.model.routers.topk import ScoreTopKRouter
from moesaic.ops import native_step
from moesaic.residency.slots import Expert

WORTH_A_READ = 0.5
"""Of what would be read ahead, so much has to be needed."""
MEMORY_OF_GUESSES = 256
"""Over so many guesses, about, their quality is averaged."""
ALL_AT = 2.0
"""With so many assignments for an expert all experts of the next layer are read."""


@dataclass
class Guess:
    layer: int
    numbers: Sequence[int]
    is_certain: bool = False
    is_taken_up: bool = False


class Foresight:
    """How good uncertain guesses are, of experts that are not in memory; that decides whether to read these."""

    def __init__(self) -> None:
        self.precision = 1.0
        self._layer = -1
        self._guessed: set[Expert] = set()

    def worth_reading(self, guess: Guess, absent: list[Expert]) -> list[Expert]:
        """Those of the `absent` experts of a guess."""
        if guess.is_certain:
            return absent
        self._layer, self._guessed = guess.layer, set(absent)
        return absent if self.precision >= WORTH_A_READ else []

    def learn(self, layer: int, needed: set[Expert]) -> None:
        """A layer needs these experts."""
        count = len(self._guessed)
        if count and layer == self._layer:
            keep = (1 - 1 / MEMORY_OF_GUESSES) ** count
            self.precision = keep * self.precision + (1 - keep) * len(self._guessed & needed) / count
        self._guessed = set()


@dataclass(frozen=True)
class Lookahead:
    """The next layer's router, for the tokens of this layer's experts."""

    layer: int
    """The next one's number among the layers of experts."""
    num_experts: int
    router: native_step.RouterStep | None
    """None where it is of another kind."""

    def guess(self, x: Tensor, num_rows: int) -> Guess | None:
        """Of tokens (T, D) that `num_rows` experts' rows are computed for; None where nothing is known."""
        if num_rows >= ALL_AT * self.num_experts:
            return Guess(self.layer, range(self.num_experts), is_certain=True)
        wide_x = x.float()
        if self.router is None or len(x) > native_step.FEW_TOKENS or not native_step.serves(wide_x):
            return None
        _, ids_TK, _ = native_step.route(self.router, wide_x)
        return Guess(self.layer, sorted(set(ids_TK.flatten().tolist())))


def look_ahead(blocks: Sequence[Block]) -> list[Lookahead | None]:
    """For each layer of experts of these blocks, in order; the last looks at nothing."""
    sparse = [block for block in blocks if isinstance(block.feed_forward, MoE)]
    ahead: list[Lookahead | None] = []
    for number, (block, following) in enumerate(pairwise(sparse), start=1):
        moe = following.feed_forward
        assert isinstance(moe, MoE)
        ahead.append(Lookahead(number, moe.num_experts, _router_seen_from(block, following)))
    return [*ahead, None]


def look_ahead_bytes(num_experts: int, hidden_size: int, num_layers: int) -> int:
    """Of the routers that `look_ahead` makes, at most."""
    return (num_layers - 1) * num_experts * hidden_size * 4


def _router_seen_from(block: Block, following: Block) -> native_step.RouterStep | None:
    moe, norms = following.feed_forward, (block.feed_forward_norm, following.feed_forward_norm)
    assert isinstance(moe, MoE)
    router = moe.router
    if not isinstance(router, ScoreTopKRouter) or router.n_group > 1 or router.num_experts != moe.num_experts:
        return None
    if router.multiplies_bias and router.expert_bias is not None:
        return None
    if block.norm_placement != "pre":
        return router.step()
    if not all(isinstance(norm, RMSNorm) for norm in norms) or bool((norms[0].weight == 0).any()):
        return None
    with torch.no_grad():
        weight_ED = router.weight.float() * (norms[1].weight.float() / norms[0].weight.float())
    return replace(router.step(), weight=weight_ED)
