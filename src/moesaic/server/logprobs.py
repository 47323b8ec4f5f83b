"""Log-probabilities in the two forms that OpenAI's API has for them."""

from collections.abc import Iterable, Sequence
from typing import Any

from moesaic.engine.request import Delta, Logprob, Token
from moesaic.server.token_texts import TokenTexts
from moesaic.tokenizer import Tokenizer

_LEAST = -9999.0
"""Stands for minus infinity, which JSON cannot write."""


def chat_logprobs(tokens: Iterable[Token], texts: TokenTexts, count: int) -> dict[str, Any]:
    """Of a chat's choice, or of a chunk of it."""
    content = []
    for token in tokens:
        if token.logprob is not None:
            top = [_entry(token_id, value, texts) for token_id, value in token.logprob.top[:count]]
            content.append(_entry(token.id, token.logprob.value, texts) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _entry(token_id: int, value: float, texts: TokenTexts) -> dict[str, Any]:
    return {
        "token": texts.text_of(token_id),
        "logprob": max(value, _LEAST),
        "bytes": list(texts.bytes_of(token_id)),
    }


class ToldTokens:
    """Keeps tokens back until some of their text is told: a stop string may yet cut it off, and them with it."""

    def __init__(self) -> None:
        self._waiting: list[Token] = []

    def push(self, delta: Delta) -> list[Token]:
        """Those that can be told now."""
        waiting = self._waiting + list(delta.tokens)
        self._waiting = waiting[delta.num_told :]
        return waiting[: delta.num_told]


class CompletionLogprobs:
    """Of a completion's choice, which begins with its prompt or after the ids `after`; offsets count the characters
    before each token."""

    def __init__(self, tokenizer: Tokenizer, texts: TokenTexts, count: int, after: Sequence[int] = ()) -> None:
        self._texts, self._count = texts, count
        self._decoder = tokenizer.decoder(after)
        self._offset = 0

    def of_prompt(self, ids: Sequence[int], logprobs: Sequence[Logprob | None]) -> dict[str, Any]:
        return self._describe(list(zip(ids, logprobs, strict=True)))

    def of_tokens(self, tokens: Iterable[Token]) -> dict[str, Any]:
        return self._describe([(token.id, token.logprob) for token in tokens])

    def _describe(self, tokens: Sequence[tuple[int, Logprob | None]]) -> dict[str, Any]:
        told: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, logprob in tokens:
            told["tokens"].append(self._texts.text_of(token_id))
            told["token_logprobs"].append(None if logprob is None else max(logprob.value, _LEAST))
            told["top_logprobs"].append(None if logprob is None else self._top(token_id, logprob))
            told["text_offset"].append(self._offset)
            self._offset += len(self._decoder.push(token_id))
        return told

    def _top(self, token_id: int, logprob: Logprob) -> dict[str, float]:
        """The most likely tokens and the one that was taken, best first: of two with the same text the better one."""
        top: dict[str, float] = {}
        for other, value in (*logprob.top[: self._count], (token_id, logprob.value)):
            top.setdefault(self._texts.text_of(other), max(value, _LEAST))
        return top


def joined_logprobs(*parts: dict[str, Any]) -> dict[str, Any]:
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}
