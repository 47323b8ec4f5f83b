"""Which blocks of keys and values are whose, and which hold the beginnings of texts that may come again."""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from moesaic.errors import MoesaicError
from moesaic.ops.native_step import BLOCK_TOKENS


@dataclass(frozen=True)
class _Beginning:
    """What a kept block holds: the tokens in it, after those of the blocks before it."""

    number: int
    """Unique, so that a beginning is told by its last block's alone."""
    key: tuple[int, tuple[int, ...]]
    """The number of the one before it (0: none), and its own tokens."""


class BlockPool:
    """Blocks, counted by the texts that use them.

    Full ones are remembered by what they hold, and stay when nobody uses them any more until others need the room; the
    least recently used ones leave first.
    """

    def __init__(self, num_blocks: int, *, keeps_beginnings: bool = True) -> None:
        self.num_blocks = num_blocks
        self._keeps_beginnings = keeps_beginnings
        self._users = [0] * num_blocks
        self._empty = deque(range(num_blocks))
        self._unused: OrderedDict[int, None] = OrderedDict()
        """Blocks that hold a beginning and have no user, the least recently used first."""
        self._beginnings: dict[int, _Beginning] = {}
        self._block_of: dict[tuple[int, tuple[int, ...]], int] = {}
        self._last_number = 0

    @property
    def num_free(self) -> int:
        """That can be taken; some of them hold beginnings, which are then forgotten."""
        return len(self._empty) + len(self._unused)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def take(self, count: int) -> list[int]:
        """Blocks for new tokens. Raises MoesaicError where there are not so many."""
        if count > self.num_free:
            raise MoesaicError(f"{count} blocks are needed and {self.num_free} of {self.num_blocks} are free")
        blocks = [self._empty.popleft() if self._empty else self._forget_oldest() for _ in range(count)]
        for block in blocks:
            self._users[block] = 1
        return blocks

    def take_beginning(self, ids: Sequence[int]) -> list[int]:
        """The blocks, filled already, that a text of these ids begins with; at least one token is left to compute."""
        blocks: list[int] = []
        number = 0
        for start in range(0, len(ids) - BLOCK_TOKENS, BLOCK_TOKENS):
            block = self._block_of.get((number, tuple(ids[start : start + BLOCK_TOKENS])))
            if block is None:
                break
            blocks.append(block)
            number = self._beginnings[block].number
        for block in blocks:
            self._users[block] += 1
            self._unused.pop(block, None)
        return blocks

    def remember(self, blocks: Sequence[int], ids: Sequence[int], computed: int, known: int) -> int:
        """Keep for other texts what the full blocks of a text hold, whose first `computed` tokens of `ids` are there.

        The `known` first have been told already; returns how many are known now.
        """
        full = computed // BLOCK_TOKENS if self._keeps_beginnings else 0
        for index in range(known, full):
            before = self._beginnings.get(blocks[index - 1]) if index else None
            if index and before is None:  # the same text was computed twice at the same time, and the other one is kept
                return full
            start = index * BLOCK_TOKENS
            key = (before.number if before else 0, tuple(ids[start : start + BLOCK_TOKENS]))
            if key in self._block_of:
                return full
            self._last_number += 1
            self._block_of[key] = blocks[index]
            self._beginnings[blocks[index]] = _Beginning(self._last_number, key)
        return max(known, full)

    def give_back(self, blocks: Sequence[int]) -> None:
        """A text does not use these any more, all that it had, in their order."""
        for block in reversed(blocks):  # what a beginning goes on with is of no use without it, and leaves first
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._beginnings:
                self._unused[block] = None
            else:
                self._empty.append(block)

    def _forget_oldest(self) -> int:
        block, _ = self._unused.popitem(last=False)
        del self._block_of[self._beginnings.pop(block).key]
        return block
