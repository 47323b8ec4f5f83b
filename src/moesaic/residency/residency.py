"""A model whose experts stay on disk, within a budget of memory."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moesaic.accounting import kv_bytes_per_token
from moesaic.config import ModelConfig
from moesaic.model.transformer import Transformer
from moesaic.ops import ExpertWeights
from moesaic.residency.expert_cache import CacheStatistics, ExpertCache
from moesaic.residency.memory_plan import ACTIVATIONS, MemoryPlan, activation_bytes, make_plan

PREFILL_TOKENS = 512
"""That a pass takes at most, so that activations have a bound; a longer prompt goes in pieces."""
FEW_ROWS = 64
"""Computed in one call, when all their experts have come: calls take longer than such work."""


@dataclass
class Residency:
    """What is in memory now, and how often what was needed was not; `residency_of` finds a model's."""

    plan: MemoryPlan
    cache: ExpertCache
    config: ModelConfig
    dtype: torch.dtype

    @property
    def statistics(self) -> CacheStatistics:
        """Of all layers together, since the model was loaded."""
        return sum(self.cache.statistics, CacheStatistics())

    def room_for_text(self, tokens: int) -> AbstractContextManager[None]:
        """Keys and values of so many tokens may be in memory within it; so fewer experts are.

        Raises UsageError, with the numbers, where there is not so much room.
        """
        dtype = str(self.dtype).removeprefix("torch.")
        return self._room_for(f"keys and values of {tokens:,} tokens", tokens * kv_bytes_per_token(self.config, dtype))

    def room_for_pass(self, tokens: int, logits: int) -> AbstractContextManager[None]:
        """Room for passes over so many tokens, which compute so many logits, in the place of PREFILL_TOKENS."""
        return self._room_for(ACTIVATIONS, activation_bytes(self.config, tokens, logits))

    @contextmanager
    def _room_for(self, part: str, nbytes: int) -> Iterator[None]:
        before = self.plan
        plan = make_plan(before.budget, {**before.parts, part: nbytes}, before.slot_bytes, before.num_experts)
        self._use(replace(plan, slots=min(plan.slots, self.cache.most_slots)))
        try:
            yield
        finally:
            self._use(before)

    def _use(self, plan: MemoryPlan) -> None:
        self.plan = plan
        self.cache.resize(plan.slots)


@dataclass(frozen=True)
class LayerStore:
    """The experts of one layer: an ExpertStore."""

    residency: Residency
    layer: int

    def chunks(self, expert_ids: Tensor) -> AbstractContextManager[Iterator[ExpertWeights]]:
        numbers, few = torch.unique(expert_ids).tolist(), len(expert_ids) <= FEW_ROWS
        return closing(self.residency.cache.chunks(self.layer, numbers, at_once=few))


def residency_of(model: Transformer) -> Residency | None:
    """None where the experts are simply in memory."""
    stores = (layer.experts.store for layer in model.moe_layers)
    return next((store.residency for store in stores if isinstance(store, LayerStore)), None)
