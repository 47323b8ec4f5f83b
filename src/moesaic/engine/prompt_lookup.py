"""Guessing next tokens from what followed the same tokens before (prompt-lookup decoding), while that pays."""

from collections import defaultdict, deque
from collections.abc import Sequence

_LENGTHS = (3, 2)
_FIRST_STEPS = 4
_WINDOW = 8
_TRY_EVERY = 32


class PromptLookup:
    """Drafts for one text."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._after: dict[tuple[int, ...], int] = {}
        """Where the text goes on after the last occurrence of some tokens."""
        self._indexed = 0

    def draft(self, ids: Sequence[int]) -> list[int]:
        """At most `max_tokens` guesses of what follows `ids`, all of the text so far, which only grows between calls.

        They are what followed the last earlier occurrence of its last three tokens, or else of its last two, as if the
        text went on repeating itself; none where there is no such occurrence.
        """
        for end in range(max(self._indexed, 1), len(ids)):
            for length in _LENGTHS:
                if end >= length:
                    self._after[tuple(ids[end - length : end])] = end
        self._indexed = max(self._indexed, len(ids))
        for length in _LENGTHS:
            start = self._after.get(tuple(ids[-length:])) if len(ids) >= length else None
            if start is not None:
                known = list(ids[start : start + self._max_tokens])
                return [known[i % len(known)] for i in range(self._max_tokens)]
        return []


class DraftJudge:
    """Whether drafts pay, by the seconds per token of steps with and without them.

    Texts in the same step share its cost, so steps are only compared with others of as many texts. The way that
    loses is tried again now and then.
    """

    def __init__(self) -> None:
        self._ways: defaultdict[tuple[int, bool], _Way] = defaultdict(_Way)

    def observe(self, seconds: float, num_tokens: int, num_texts: int, drafted: bool) -> None:
        """Tell what a step took and how many tokens it added to `num_texts` texts. Steps that also read prompts do not
        count, and should not be told."""
        self._ways[num_texts, drafted].add(seconds, num_tokens)
        self._ways[num_texts, not drafted].steps_since += 1

    def wanted(self, num_texts: int) -> bool:
        """Whether the next step, of `num_texts` texts, should have drafts."""
        with_drafts, without = self._ways[num_texts, True], self._ways[num_texts, False]
        if min(len(with_drafts.steps), len(without.steps)) < _FIRST_STEPS:
            return len(with_drafts.steps) < _FIRST_STEPS
        pays = with_drafts.seconds_per_token < without.seconds_per_token
        loser = without if pays else with_drafts
        return pays != (loser.steps_since >= _TRY_EVERY - 1)


class _Way:
    """The last steps of one kind."""

    def __init__(self) -> None:
        self.steps: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self.steps_since = 0
        """Of the other kind."""
        self.seconds_per_token = 0.0

    def add(self, seconds: float, num_tokens: int) -> None:
        self.steps.append((seconds, num_tokens))
        self.steps_since = 0
        usual = sorted(self.steps)[: max(1, len(self.steps) - 1)]  # one slow step may have had other reasons
        self.seconds_per_token = sum(step[0] for step in usual) / max(1, sum(step[1] for step in usual))
