"""What the routers decided in a step: counted for all texts, told for those that ask.

T tokens of a step, K experts per token, E experts.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from moesaic.engine.request import EngineStatistics, TokenRouting
from moesaic.model.transformer import Transformer
from moesaic.ops import Routing
from moesaic.residency.residency import residency_of


class RoutingLog:
    """How many tokens each expert computed, since the start."""

    def __init__(self, model: Transformer) -> None:
        self._load = [np.zeros(layer.router.num_experts, np.int64) for layer in model.moe_layers]
        self._residency = residency_of(model)

    def count(self, routings: Sequence[Routing]) -> None:
        """Of one pass, by layer."""
        for load_E, routing in zip(self._load, routings, strict=True):
            load_E += np.bincount(routing.expert_ids.cpu().numpy(), minlength=len(load_E))

    def described(self, statistics: EngineStatistics, **now: int) -> EngineStatistics:
        """A copy of `statistics` with what is known here, and what is so `now`."""
        load = [load_E.tolist() for load_E in self._load]
        copy = replace(statistics, finished=dict(statistics.finished), expert_load=load, **now)
        if self._residency is not None:
            cache = self._residency.statistics
            copy.hits, copy.misses, copy.bytes_read = cache.hits, cache.misses, cache.bytes_read
            copy.stall_seconds = cache.stall_seconds
        return copy

    class Part:
        """The tokens from `first` on."""

        def __init__(self, routings: Sequence[Routing], first: int) -> None:
            self._routings, self._first = routings, first

        def of_token(self, index: int) -> TokenRouting:
            chosen = [_of_token(routing, self._first + index) for routing in self._routings]
            return TokenRouting([ids.tolist() for ids, _ in chosen], [weights.tolist() for _, weights in chosen])

    @staticmethod
    def part(routings: Sequence[Routing], first: int) -> "RoutingLog.Part":
        return RoutingLog.Part(routings, first)


def _of_token(routing: Routing, token: int) -> tuple[Tensor, Tensor]:
    """Its experts and their weights."""
    if routing.top_k is not None:
        rows = slice(token * routing.top_k, (token + 1) * routing.top_k)
    else:
        rows = routing.token_ids == token
    return routing.expert_ids[rows], routing.weights[rows]
