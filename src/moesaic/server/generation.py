"""Texts while the engine writes them, for one HTTP request: several side by side, within a time, while the client is
there."""

import asyncio
import time
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from moesaic.engine.request import Delta, FinishReason, PromptReport, Request, Token
from moesaic.errors import MoesaicError
from moesaic.server.context import Context
from moesaic.server.errors import ApiError, api_error

T = TypeVar("T")


@dataclass
class Answer:
    """One text, complete."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    num_told: int = 0
    prompt: PromptReport | None = None
    finish_reason: FinishReason | None = None

    @property
    def told_tokens(self) -> list[Token]:
        """Without those behind the place where a stop string has cut the text."""
        return self.tokens[: self.num_told]


class Texts:
    """The texts of some requests as they grow.

    What comes while nobody takes it is kept, and is taken as one: a client that reads slowly holds up nobody, and
    holds no more than what is left of its own texts. Leaving the context cancels what is not finished.
    """

    def __init__(self, context: Context, requests: Sequence[Request]) -> None:
        self._context, self._requests = context, requests

    async def __aenter__(self) -> "Texts":
        start = time.perf_counter()
        watches = [self._context.metrics.watch(start) for _ in self._requests]
        try:
            self._deltas = self._context.service.submit_all(
                self._requests, lambda number, delta: watches[number].saw(delta)
            )
        except MoesaicError as error:
            raise api_error(error) from None
        self._timer = asyncio.get_running_loop().call_later(self._context.request_seconds, self._expire)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._timer.cancel()
        self._deltas.close()

    @property
    def finished(self) -> bool:
        return self._deltas.finished

    async def take(self) -> list[tuple[int, Delta]]:
        """What is new, at most one delta for each text; waits until there is something.

        Raises ApiError when a text failed or all take too long.
        """
        news = await self._deltas.take()
        for _, delta in news:
            if delta.finish_reason in ("error", "cancelled"):
                raise _failure(delta)
        return news

    async def answers(self) -> list[Answer]:
        """All texts, when they are finished."""
        answers = [Answer() for _ in self._requests]
        pieces: list[list[str]] = [[] for _ in self._requests]
        while not self.finished:
            for index, delta in await self.take():
                answer = answers[index]
                pieces[index].append(delta.text)
                answer.tokens += delta.tokens
                answer.num_told += delta.num_told
                answer.prompt = delta.prompt or answer.prompt
                answer.finish_reason = delta.finish_reason or answer.finish_reason
        for answer, parts in zip(answers, pieces, strict=True):
            answer.text = "".join(parts)
        return answers

    def _expire(self) -> None:
        seconds = self._context.request_seconds
        self._deltas.fail(ApiError(504, f"the answer took longer than {seconds:g} s; ask for fewer tokens"))


def _failure(delta: Delta) -> ApiError:
    if delta.error is not None:
        return api_error(delta.error)
    if delta.finish_reason == "cancelled":
        return ApiError(503, "the server stopped before the text was finished; ask again", headers={"Retry-After": "5"})
    return ApiError(500, "the text could not be finished; the server's log says why", code="internal_error")


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up. Raises ClientDisconnect then."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def num_told(parts: Iterable[Answer | Delta], top_logprobs: int | None = None) -> int:
    """About how many values it takes to tell these."""
    count = 0
    for part in parts:
        prompt = part.prompt
        count += len(part.tokens) + (len(prompt.logprobs or ()) + len(prompt.routing or ()) if prompt else 0)
    return count * (1 + (top_logprobs or 0))


def usage(prompt: PromptReport | None, generated: int, num_prompt_tokens: int | None = None) -> dict[str, Any]:
    """OpenAI's count of tokens."""
    prompt_tokens = num_prompt_tokens if num_prompt_tokens is not None else prompt.num_tokens if prompt else 0
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": prompt.cached_tokens if prompt else 0},
    }
