"""Which texts advance in the next step, and by how many tokens."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from moesaic.engine.block_pool import BlockPool
from moesaic.engine.sequence import Sequence
from moesaic.ops.native_step import BLOCK_TOKENS

PROMPT_ROWS = 64
"""Tokens of prompts in a step at most, where logits of all of them are asked for."""


@dataclass(frozen=True)
class Share:
    """Part of a step: the next `count` tokens of a sequence, its drafts included."""

    sequence: Sequence
    count: int

    @property
    def reaches_end(self) -> bool:
        """Whether the next token can be drawn after it."""
        return self.sequence.num_computed + self.count >= len(self.sequence.ids)

    @property
    def prompt_rows(self) -> int:
        """Of its tokens, from the first on, those that have a token of the prompt after them."""
        return max(0, min(self.count, self.sequence.num_prompt - 1 - self.sequence.num_computed))

    @property
    def logit_rows(self) -> range:
        """Its tokens whose logits are needed: to draw what comes next, and to tell how likely the prompt is."""
        if self.sequence.request.prompt_logprobs is not None and self.prompt_rows:
            return range(self.count if self.reaches_end else self.prompt_rows)
        first = self.count - 1 - len(self.sequence.drafts)
        return range(first, self.count) if self.reaches_end else range(0)


class Scheduler:
    """Texts that are being written come first, a token each; then prompts are read, a piece at a time, in the order in
    which they came. A text gets blocks as it grows; when there are none the one that came last gives its blocks up and
    starts over later, with what it had as its prompt."""

    def __init__(self, pool: BlockPool, max_sequences: int, step_tokens: int) -> None:
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In the order in which they came."""
        self.num_preempted = 0
        self._max_sequences, self._step_tokens = max_sequences, step_tokens
        self._last_turn = 0

    def schedule(self, most_decoding: int, draft: Callable[[Sequence], list[int]]) -> list[Share]:
        """`most_decoding` texts at most advance by a token, in turns; `draft` guesses more tokens of one."""
        self._budget, self._rows, shares = self._step_tokens, PROMPT_ROWS, []
        preempted_before = self.num_preempted
        decoding = [sequence for sequence in self.running if sequence.is_decoding]
        turn = self._in_turn(decoding, min(most_decoding, self._step_tokens))
        for number, sequence in enumerate(turn, start=1):
            if sequence not in self.running:  # it has just given way to one before it
                continue
            # Guesses must leave a token for each text that is still to come.
            sequence.drafts = draft(sequence)[: max(0, self._budget - 1 - (len(turn) - number))]
            shares += self._share_of(sequence, 1 + len(sequence.drafts))
        for sequence in list(self.running):
            if not sequence.is_decoding and self._budget:
                shares += self._share_of(sequence, self._piece(sequence))
        # Nobody is admitted where somebody had to give way: it might be that text, which has a share already.
        while self.waiting and self._budget and self.num_preempted == preempted_before and self._admit():
            sequence = self.running[-1]
            shares += self._share_of(sequence, self._piece(sequence))
        return [share for share in shares if share.sequence in self.running]  # the others have been preempted since

    def remove(self, sequence: Sequence) -> None:
        """It has ended, or nobody wants it any more."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.pool.give_back(sequence.blocks)
            sequence.blocks = []
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def advance(self, share: Share) -> None:
        """The tokens of a share, drafts left out, have keys and values now."""
        sequence = share.sequence
        sequence.num_computed = min(sequence.num_computed + share.count, len(sequence.ids))
        sequence.num_remembered = self.pool.remember(
            sequence.blocks, sequence.ids, sequence.num_computed, sequence.num_remembered
        )

    def _in_turn(self, decoding: list[Sequence], most: int) -> list[Sequence]:
        if len(decoding) <= most:
            return decoding
        start = self._last_turn % len(decoding)
        self._last_turn = start + most
        return (decoding[start:] + decoding[:start])[:most]

    def _piece(self, sequence: Sequence) -> int:
        piece = min(sequence.num_new, self._budget)
        if sequence.request.prompt_logprobs is not None:
            piece = min(piece, self._rows)
            self._rows -= piece
        return piece

    def _share_of(self, sequence: Sequence, count: int) -> list[Share]:
        """Its share if it gets the blocks for it, which may cost others theirs."""
        if sequence not in self.running or not 0 < count <= self._budget:
            return []
        needed = -(-(sequence.num_computed + count) // BLOCK_TOKENS) - len(sequence.blocks)
        while needed > self.pool.num_free:
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return []
        sequence.blocks += self.pool.take(max(needed, 0))
        self._budget -= count
        return [Share(sequence, count)]

    def _admit(self) -> bool:
        """Whether the one that waits longest runs now: where there are blocks for all that it has."""
        if len(self.running) >= self._max_sequences:
            return False
        sequence = self.waiting[0]
        beginning = self.pool.take_beginning(sequence.ids) if sequence.may_reuse_beginning else []
        needed = -(-(len(sequence.ids) + 1) // BLOCK_TOKENS) - len(beginning)
        if needed > self.pool.num_free:
            self.pool.give_back(beginning)
            return False
        self.waiting.popleft()
        sequence.blocks, sequence.num_remembered = beginning, len(beginning)
        sequence.num_computed = len(beginning) * BLOCK_TOKENS
        if not sequence.num_counted:  # later, what it finds may be its own
            sequence.num_cached = sequence.num_computed
        self.running.append(sequence)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.give_back(sequence.blocks)
        sequence.start_over()
        self.waiting.appendleft(sequence)
        self.num_preempted += 1
