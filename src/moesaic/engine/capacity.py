"""How much an engine may keep and read: blocks of keys and values, memory of a step, bytes of experts."""

from collections.abc import Iterator
from contextlib import contextmanager

from moesaic.config import EngineConfig
from moesaic.engine.scheduler import PROMPT_ROWS
from moesaic.errors import UsageError
from moesaic.model.paged_kv import PagedKV, kv_block_bytes
from moesaic.model.transformer import Transformer
from moesaic.ops.device import available_bytes
from moesaic.ops.instruction_set import native_module
from moesaic.ops.native_step import BLOCK_TOKENS
from moesaic.residency.memory_plan import parse_bytes, shown
from moesaic.residency.residency import PREFILL_TOKENS, Room, residency_of

_PART_OF_MEMORY = 4
_LEAST_TOKENS = 1024
"""Of keys and values: with less there is not much to serve."""
_CALM_STEPS = 8
"""After so many steps without a prompt its memory goes to experts."""


def blocks_for(model: Transformer, config: EngineConfig) -> int:
    """Of keys and values.

    Raises UsageError where they do not hold even one short text.
    """
    weight = model.embed_tokens.weight
    block_bytes = kv_block_bytes(model.config, weight.dtype, weight.device)
    longest = min(config.max_model_tokens, model.config.max_position_embeddings)
    wanted = config.max_sequences * -(-longest // BLOCK_TOKENS)
    if config.kv_memory == "auto":
        residency = residency_of(model)
        left = available_bytes(weight.device) if residency is None else residency.bytes_left
        least = -(-min(longest, _LEAST_TOKENS) // BLOCK_TOKENS)
        return max(min(wanted, left // _PART_OF_MEMORY // block_bytes), least)
    blocks = parse_bytes(config.kv_memory, "kv_memory") // block_bytes
    if blocks < 1:
        raise UsageError(
            f"kv_memory is {config.kv_memory}, and the keys and values of {BLOCK_TOKENS} tokens take "
            f"{shown(block_bytes)}; give it more"
        )
    return min(blocks, wanted)


class StepRoom:
    """The memory of an engine in the plan of a model whose experts are on disk; of others there is nothing to plan.

    While texts are only being written, the memory that reading prompts takes is for experts.
    """

    def __init__(self, model: Transformer, kv: PagedKV, config: EngineConfig) -> None:
        self._residency = residency_of(model)
        self._written = config.max_sequences * (1 + config.prompt_lookup)
        self._read = min(config.step_tokens, PREFILL_TOKENS)
        attends_in_place = native_module() is not None and model.config.mla is None
        self._sizes = {
            "cached_tokens": kv.num_blocks * BLOCK_TOKENS,
            "pass_tokens": self._read,
            "logits": self._written + PROMPT_ROWS,
            "context": 0 if attends_in_place else min(config.max_model_tokens, model.config.max_position_embeddings),
        }
        self._calm_steps = 0
        self._room: Room | None = None

    @contextmanager
    def opened(self) -> Iterator["StepRoom"]:
        if self._residency is None:
            yield self
            return
        with self._residency.room(**self._sizes) as self._room:
            yield self

    def make(self, num_tokens: int) -> None:
        """For a step of so many tokens."""
        if self._room is None:
            return
        self._calm_steps = 0 if num_tokens > self._written else self._calm_steps + 1
        if self._calm_steps == 0 and self._room.pass_tokens != self._read:
            self._room.resize(self._read)
        elif self._calm_steps == _CALM_STEPS:
            self._room.resize(self._written)


class ExpertTraffic:
    """How many texts advance together where their experts come from disk: as many as read about so much in a step."""

    def __init__(self, model: Transformer, config: EngineConfig) -> None:
        self._residency = residency_of(model)
        self._allowed = parse_bytes(config.expert_bytes, "expert_bytes") if config.expert_bytes else None
        self._most = config.max_sequences
        self._bytes_per_text = 0.0
        self._read = 0

    def most_sequences(self) -> int:
        if self._residency is None or self._allowed is None or not self._bytes_per_text:
            return self._most
        return max(1, min(self._most, int(self._allowed / self._bytes_per_text)))

    def observe(self, num_sequences: int, num_tokens: int) -> None:
        """After a step of so many texts; one that also read prompts says nothing."""
        if self._residency is None or self._allowed is None:
            return
        read, self._read = self._read, self._residency.statistics.bytes_read
        if num_tokens == num_sequences:
            now = (self._read - read) / num_sequences
            self._bytes_per_text += (now - self._bytes_per_text) / (4 if self._bytes_per_text else 1)
