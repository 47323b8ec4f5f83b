"""Keys and values of many sequences in blocks, so that each takes memory as it grows and gives it back when it ends.

T new tokens of all sequences side by side, B sequences, M blocks of the longest, S tokens attended to, G cached heads,
H query heads, d head dim, k and v widths of a key and a value.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moesaic.accounting import kv_bytes_per_token
from moesaic.config import ModelConfig
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.attention_mask import attention_masks, first_visible
from moesaic.model.kv_cache import cached_sizes
from moesaic.model.rope import rotary_tables
from moesaic.model_config import LayerType
from moesaic.ops.instruction_set import native_module
from moesaic.ops.native_step import BLOCK_TOKENS

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""query (1, H, L, k), key (1, G, S, k), value (1, G, S, v), mask (1, 1, L, S) -> (1, H, L, v)."""

_LEAST_POSITIONS = 1024
"""Whose rotary tables are made at once."""


@dataclass(frozen=True)
class NewTokens:
    """What one sequence computes in a pass: its next tokens, after those that its blocks hold."""

    blocks: Sequence[int]
    """Numbers of its blocks, in order; they have room for the new tokens."""
    past: int
    new: int
    prompt_length: int = 0
    """For positions that are stretched by the length of a text: its first tokens saw a text of this length."""


class PagedKV:
    """`num_blocks` blocks of BLOCK_TOKENS tokens in every layer, given out by numbers.

    In a block keys are stored dimension by dimension, as the native kernels multiply them. These keep them in float32,
    whatever the model's type.
    """

    def __init__(self, config: ModelConfig, num_blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        if config.depth_layers or config.looks_ahead:
            raise MoesaicError("tokens of this model may pass by layers or look ahead, which blocks do not remember")
        heads, key_size, value_size = cached_sizes(config)
        dtype = kv_dtype(dtype, device)
        shape = (config.num_hidden_layers, num_blocks, heads)
        self.config = config
        self.keys = torch.zeros((*shape, key_size, BLOCK_TOKENS), dtype=dtype, device=device)
        self.values = torch.zeros((*shape, BLOCK_TOKENS, value_size), dtype=dtype, device=device)
        self._rotary: tuple[Tensor, Tensor] | None = None

    def rotary_tables(self, end: int) -> tuple[Tensor, Tensor]:
        """cos and sin, each (1, 1, S, r), of the positions 0 to S, which is at least `end`; for methods that do not
        depend on a text's length. They are kept: to make those of one step wakes torch's threads, which then compete
        with the native ones."""
        if self._rotary is None or end > self._rotary[0].shape[2]:
            size = max(end, min(max(2 * end, _LEAST_POSITIONS), self.num_blocks * BLOCK_TOKENS))
            positions_1S = torch.arange(size, device=self.keys.device).unsqueeze(0)
            self._rotary = rotary_tables(positions_1S, self.config)
        return self._rotary

    @property
    def num_blocks(self) -> int:
        return self.keys.shape[1]

    def batch(self, sequences: Sequence[NewTokens]) -> "PagedBatch":
        """For a pass over the new tokens of these, side by side.

        Raises MoesaicError for blocks that are not there, or too few of them, and where nothing is to be computed.
        """
        if not sequences:
            raise MoesaicError("there is no sequence to compute; a pass needs one")
        for each in sequences:
            needed, lowest, highest = each.past + each.new, min(each.blocks, default=0), max(each.blocks, default=-1)
            if (
                min(each.past, each.new - 1, lowest) < 0
                or needed > len(each.blocks) * BLOCK_TOKENS
                or highest >= self.num_blocks
            ):
                raise MoesaicError(
                    f"{each.new} new tokens after {each.past} do not fit {len(each.blocks)} blocks of {BLOCK_TOKENS} "
                    f"tokens, of which the lowest and highest are number {lowest} and {highest} of {self.num_blocks}"
                )
        return PagedBatch(self, tuple(sequences))


def kv_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of the keys and values of a model of that type."""
    return torch.float32 if device.type == "cpu" and native_module() is not None else dtype


def kv_block_bytes(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Of one block in all layers."""
    return BLOCK_TOKENS * kv_bytes_per_token(config, str(kv_dtype(dtype, device)).removeprefix("torch."))


@dataclass(frozen=True)
class PagedBatch:
    """New tokens of several sequences in one row (1, T), as a model's `kv`."""

    store: PagedKV
    sequences: tuple[NewTokens, ...]

    @cached_property
    def first_tokens(self) -> Tensor:
        """(B + 1,) int64: where each sequence's new tokens begin, and T."""
        counts_B = torch.tensor([0, *(sequence.new for sequence in self.sequences)])
        return counts_B.cumsum(0)

    @cached_property
    def num_keys(self) -> Tensor:
        """(B,) int64: tokens of each sequence, the new ones included."""
        return torch.tensor([sequence.past + sequence.new for sequence in self.sequences])

    @cached_property
    def block_tables(self) -> Tensor:
        """(B, M) int64."""
        most = max(len(sequence.blocks) for sequence in self.sequences)
        return torch.tensor([[*sequence.blocks, *[0] * (most - len(sequence.blocks))] for sequence in self.sequences])

    @cached_property
    def positions(self) -> Tensor:
        """(1, T) int64."""
        spans = [torch.arange(each.past, each.past + each.new) for each in self.sequences]
        return torch.cat(spans).unsqueeze(0).to(self.store.keys.device)

    def require(self, tokens: Tensor, *, positions_are_given: bool) -> None:
        """That a pass computes the new tokens of these sequences, (1, T), which know where they stand.

        Raises UsageError: the kernels trust the tables, and torch would spread some of them over other tokens.
        """
        if positions_are_given:
            raise UsageError("sequences in blocks know the positions of their tokens; pass none")
        if tokens.shape != self.positions.shape:
            raise UsageError(
                f"tokens are {tuple(tokens.shape)}, and the sequences have {self.positions.numel()} new ones; pass "
                "these side by side in one row"
            )

    def first_keys(self, layer_type: LayerType) -> Tensor | None:
        """(T,) int64: the first token of its sequence that a token sees; None: all see their sequence's first."""
        return first_visible(self.store.config, layer_type, self.positions[0])

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, layer_type: LayerType, attend: Attend
    ) -> Tensor:
        """Store key (1, G, T, k) and value (1, G, T, v), and give each sequence's queries (1, H, T, k) to `attend` with
        all keys and values of that sequence; -> (1, H, T, v)."""
        starts, parts = self.first_tokens.tolist(), []
        for number, sequence in enumerate(self.sequences):
            new = slice(starts[number], starts[number + 1])
            keys, values = self._extend(layer_index, sequence, key[0, :, new], value[0, :, new])
            mask = self._masks[number][layer_type]
            parts.append(attend(query[:, :, new], keys.to(query.dtype), values.to(query.dtype), mask))
        return torch.cat(parts, dim=2)

    def _extend(self, layer_index: int, sequence: NewTokens, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store key (G, L, k) and value (G, L, v); all of the sequence, (1, G, S, k) and (1, G, S, v)."""
        keys, values = self.store.keys[layer_index], self.store.values[layer_index]
        end = sequence.past + sequence.new
        blocks = torch.tensor(sequence.blocks[: -(-end // BLOCK_TOKENS)], device=keys.device)
        slots_L = torch.arange(sequence.past, end, device=keys.device)
        block_L, offset_L = blocks[slots_L // BLOCK_TOKENS], slots_L % BLOCK_TOKENS
        keys[block_L, :, :, offset_L] = key.transpose(0, 1).to(keys.dtype)
        values[block_L, :, offset_L] = value.transpose(0, 1).to(values.dtype)
        keys_GSk = keys[blocks].permute(1, 0, 3, 2).flatten(1, 2)[:, :end]
        values_GSv = values[blocks].transpose(0, 1).flatten(1, 2)[:, :end]
        return keys_GSk.unsqueeze(0), values_GSv.unsqueeze(0)

    @cached_property
    def _masks(self) -> list[dict[LayerType, Tensor]]:
        """Of each sequence, by layer type, (1, 1, L, S)."""
        device, made = self.store.keys.device, []
        for sequence in self.sequences:
            positions_1S = torch.arange(sequence.past + sequence.new, device=device).unsqueeze(0)
            masks = attention_masks(
                self.store.config, positions_1S[:, sequence.past :], positions_1S, plainly_causal=False
            )
            made.append({kind: mask for kind, mask in masks.items() if mask is not None})
        return made
