"""A model whose experts stay on disk, within a budget of memory."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moesaic.accounting import kv_bytes_per_token
from moesaic.config import ModelConfig
from moesaic.model.paged_kv import kv_dtype
from moesaic.model.transformer import Transformer
from moesaic.ops import ExpertWeights
from moesaic.residency.expert_cache import CacheStatistics, ExpertCache
from moesaic.residency.foresight import Lookahead
from moesaic.residency.memory_plan import ACTIVATIONS, MemoryPlan, activation_bytes, make_plan
from moesaic.residency.placement import Record, read_record

PREFILL_TOKENS = 512
"""That a pass takes at most, so that activations have a bound; a longer prompt goes in pieces."""


@dataclass(eq=False)
class Room:
    """Memory that a text or a pass has beside the experts."""

    residency: "Residency"
    cached_tokens: int
    """Of which keys and values are kept."""
    pass_tokens: int
    """That are computed at the same time, at most."""
    logits: int
    """Rows of logits that a pass makes."""
    context: int
    """Tokens whose keys and values a pass spreads over all heads."""

    def resize(self, pass_tokens: int) -> None:
        """From now on so many tokens at a time: the rest of its memory is for experts."""
        self.pass_tokens = pass_tokens
        self.residency.plan_anew()


class Residency:
    """What is in memory, and how often what was needed was not; `residency_of` finds a model's."""

    def __init__(self, plan: MemoryPlan, cache: ExpertCache, config: ModelConfig, dtype: torch.dtype) -> None:
        self.plan, self.cache = plan, cache
        self.record: Record | None = None
        """That says which experts stay."""
        self._config, self._dtype = config, str(kv_dtype(dtype, torch.device("cpu"))).removeprefix("torch.")
        self._fixed = {name: nbytes for name, nbytes in plan.parts.items() if name != ACTIVATIONS}
        self._rooms: list[Room] = []
        self._pass_tokens = PREFILL_TOKENS
        """That there are activations for."""

    @property
    def bytes_left(self) -> int:
        """For experts, and for keys and values that nobody has asked for yet."""
        return self.plan.budget - sum(self.plan.parts.values())

    @property
    def statistics(self) -> CacheStatistics:
        """Of all layers together, since the model was loaded."""
        return sum(self.cache.statistics, CacheStatistics())

    @contextmanager
    def room(
        self,
        *,
        cached_tokens: int = 0,
        pass_tokens: int = PREFILL_TOKENS,
        logits: int = 1,
        context: int | None = None,
    ) -> Iterator[Room]:
        """Within it there is room for this beside the experts, of which fewer may be in memory. Several may be open.

        Raises UsageError, with the numbers, where there is not so much room.
        """
        room = Room(self, cached_tokens, pass_tokens, logits, cached_tokens if context is None else context)
        self._rooms.append(room)
        try:
            self.plan_anew()
            yield room
        finally:
            self._rooms.remove(room)
            self.plan_anew()

    def plan_anew(self) -> None:
        """As all rooms that are open have it; without any, nothing is computed."""
        self._plan_for(self._rooms or [Room(self, 0, 1, 1, 0)])

    def make_way(self, tokens: int) -> None:
        """For a pass over so many tokens, whether or not somebody made a room for it."""
        if tokens > self._pass_tokens:
            self._plan_for([*self._rooms, Room(self, 0, tokens, 1, 0)])

    def _plan_for(self, rooms: Sequence[Room]) -> None:
        cached = sum(room.cached_tokens for room in rooms)
        parts = {**self._fixed, ACTIVATIONS: max(map(self._activation_bytes, rooms))}
        if cached:
            parts[f"keys and values of {cached:,} tokens"] = cached * kv_bytes_per_token(self._config, self._dtype)
        plan = make_plan(self.plan.budget, parts, self.plan.slot_bytes, self.plan.num_experts)
        self.plan = replace(plan, slots=min(plan.slots, self.cache.most_slots))
        self._pass_tokens = max(room.pass_tokens for room in rooms)
        self.cache.resize(self.plan.slots)

    def _activation_bytes(self, room: Room) -> int:
        return activation_bytes(self._config, room.pass_tokens, room.logits, room.context)


@dataclass(frozen=True)
class LayerStore:
    """The experts of one layer: an ExpertStore."""

    residency: Residency
    layer: int
    ahead: Lookahead | None

    @property
    def format(self) -> str:
        return self.residency.cache.layers[self.layer].weights.format

    def chunks(self, expert_ids: Tensor, x: Tensor) -> AbstractContextManager[Iterator[ExpertWeights]]:
        self.residency.make_way(len(x))
        guess = None if self.ahead is None else self.ahead.guess(x, len(expert_ids))
        return closing(self.residency.cache.chunks(self.layer, sorted(set(expert_ids.tolist())), guess))


def place_experts(model: Transformer, recorded: str | Path) -> None:
    """Keeps in memory those experts that a record used most; `read_record` says which records.

    Raises UsageError for a record of another model.
    """
    residency = residency_of(model)
    assert residency is not None
    layers = residency.cache.layers
    residency.record = read_record(recorded, len(layers), layers[0].num_experts)
    residency.cache.place(residency.record.uses)


def residency_of(model: Transformer) -> Residency | None:
    """None where the experts are simply in memory."""
    stores = (layer.experts.store for layer in model.moe_layers)
    return next((store.residency for store in stores if isinstance(store, LayerStore)), None)
