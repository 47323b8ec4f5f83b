"""From token ids to text that nothing later can change, up to a stop string."""

from collections import deque
from collections.abc import Collection, Sequence

from moesaic.tokenizer import Tokenizer

_MOST_UNFINISHED = 64
"""Tokens in a row without text after which no character is waited for: each one costs decoding those before it."""


class TextAssembly:
    """The text of one answer as its tokens arrive.

    What may become part of a stop string, or of a longer character, is held back. Special tokens are no text, but for
    those of `visible_ids`. It begins as it goes on after the ids `after`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        visible_ids: Collection[int] = (),
        after: Sequence[int] = (),
    ) -> None:
        self.stopped = False
        """Whether a stop string has occurred; the text ends before it, and nothing more comes."""
        self._decoder = tokenizer.decoder(after)
        self._visible = {token_id: tokenizer.name_of(token_id) for token_id in visible_ids}
        self._searches = [_Search(text) for text in stop]
        self._held = ""
        self._unfinished = 0
        self._decoded = self._told = 0
        """Characters; what is told is certain."""
        self._starts: deque[int] = deque()
        """Of the tokens that are not told yet: how many characters come before each."""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token, often empty."""
        if self.stopped:
            return ""
        self._starts.append(self._decoded)
        if token_id in self._visible:
            return self._certain(self._decoder.flush() + self._visible[token_id])
        new = self._decoder.push(token_id)
        self._unfinished = 0 if new else self._unfinished + 1
        if self._unfinished == _MOST_UNFINISHED:
            new, self._unfinished = self._decoder.flush(), 0
        return self._certain(new)

    def flush(self) -> str:
        """What is still held back, when no more tokens come."""
        if self.stopped:
            return ""
        text = self._certain(self._decoder.flush())
        if not self.stopped:
            text, self._held = text + self._held, ""
            self._told = self._decoded + 1  # tokens without text at the end are told too
        return text

    def take_told(self) -> int:
        """How many more tokens, from the first on, begin in the text so far. All do in the end, but those behind the
        place where a stop string has cut it."""
        count = 0
        while self._starts and self._starts[0] < self._told:
            self._starts.popleft()
            count += 1
        return count

    def _certain(self, new: str) -> str:
        self._decoded += len(new)
        text = self._before_stops(new)
        self._told += len(text)
        return text

    def _before_stops(self, new: str) -> str:
        if not self._searches:
            return new
        if not new:
            return ""
        text = self._held + new
        found = [start for search in self._searches if (start := search.push(new)) is not None]
        self.stopped = bool(found)
        # Starts count from the new text, and lie before it where a stop string began in what was held.
        certain = len(self._held) + (min(found) if found else len(new) - max(s.matched for s in self._searches))
        self._held = "" if found else text[certain:]
        return text[:certain]


class _Search:
    """Finds one text in pieces of another, looking at each character once (Knuth, Morris and Pratt 1977)."""

    def __init__(self, wanted: str) -> None:
        self.matched = 0
        """How many characters of `wanted` the pieces so far end with."""
        self._wanted = wanted
        self._shorter = [0] * len(wanted)
        """At i: how many characters `wanted[: i + 1]` both begins and ends with, itself not counted."""
        length = 0
        for i in range(1, len(wanted)):
            while length and wanted[i] != wanted[length]:
                length = self._shorter[length - 1]
            length += wanted[i] == wanted[length]
            self._shorter[i] = length

    def push(self, piece: str) -> int | None:
        """Where the first occurrence begins, counted from the start of `piece`; None when it is not complete."""
        for i, character in enumerate(piece):
            while self.matched and character != self._wanted[self.matched]:
                self.matched = self._shorter[self.matched - 1]
            self.matched += character == self._wanted[self.matched]
            if self.matched == len(self._wanted):
                return i + 1 - self.matched
        return None
