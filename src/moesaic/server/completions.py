"""POST /v1/completions: texts and token ids continued, several at a time, with log-probabilities of prompts too."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from moesaic.engine.request import Delta, PromptReport, Request, Token
from moesaic.server.chat import check_choices
from moesaic.server.context import Context
from moesaic.server.errors import refuse
from moesaic.server.generation import Answer, Texts, num_told, usage, while_connected
from moesaic.server.large_json import json_response, off_the_loop
from moesaic.server.limits import read_request
from moesaic.server.logprobs import CompletionLogprobs, ToldTokens, joined_logprobs
from moesaic.server.prompts import answer_room, text_prompt
from moesaic.server.routed_experts import RoutedExperts, first_told
from moesaic.server.sampling import compile_constraints, sampling_of, seed_of_choice, structure_of
from moesaic.server.schemas import MAX_PROMPTS, CompletionRequest
from moesaic.server.streaming import Events, TextEvent, event, event_stream

DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    text: str
    """As it was sent; of ids what they decode to."""


async def completions(context: Context, http: HttpRequest) -> Response:
    context.check_room()
    body = await read_request(http, CompletionRequest, max_body=context.max_body)
    context.check_model(body.model)
    completion = Completion(context, body)
    requests = await while_connected(http.receive, completion.prepare())
    if body.stream:
        return await event_stream(context, http, completion.stream(requests))
    return await while_connected(http.receive, completion.complete(requests))


class Completion:
    """One request: `n` choices for each of its prompts, in their order."""

    def __init__(self, context: Context, body: CompletionRequest) -> None:
        self._context, self._body = context, body
        self._id, self._created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self._prompts: list[Prompt] = []
        check_choices(body.n, body.best_of)
        self._n = body.n or 1
        self._nothing_new = body.max_tokens == 0
        """The engine writes at least one token, which is then kept from the client."""
        self._scores_prompt = bool(body.echo) and body.logprobs is not None and body.max_tokens == 1
        """Clients that score a prompt (lm-evaluation-harness) take one token off the end, and count on its being there
        when the text ends as well."""
        self._structure = structure_of(body)

    async def prepare(self) -> list[Request]:
        """One request for each choice. Raises ApiError for what cannot be done, before anything is answered."""
        body, context = self._body, self._context
        self._prompts = [await self._read(prompt) for prompt in _prompts(body.prompt)]
        count = len(self._prompts) * self._n
        if count > MAX_PROMPTS:
            raise refuse(
                "n", f"{len(self._prompts)} prompts times {self._n} are {count} texts; at most {MAX_PROMPTS} at a time"
            )
        constraints = iter(await compile_constraints(context, self._structure, count))
        vocab_size = context.service.model_config.vocab_size
        requests = []
        for prompt in self._prompts:
            asked = 1 if self._nothing_new else body.max_tokens
            max_tokens = answer_room(context, len(prompt.ids), asked, DEFAULT_MAX_TOKENS, "prompt max_tokens")
            sampling = sampling_of(body, max_tokens, vocab_size)
            sampling = replace(sampling, ignore_eos=sampling.ignore_eos or self._scores_prompt)
            requests += [
                Request(
                    prompt_ids=prompt.ids,
                    sampling=replace(sampling, seed=seed_of_choice(sampling.seed, choice)),
                    logprobs=body.logprobs,
                    prompt_logprobs=body.logprobs if body.echo else None,
                    routed_experts=bool(body.return_routed_experts),
                    routed_from=first_told(body.routed_experts_start_len, len(prompt.ids)),
                    constraint=next(constraints),
                )
                for choice in range(self._n)
            ]
        return requests

    async def _read(self, prompt: str | list[int]) -> Prompt:
        if isinstance(prompt, str):
            return Prompt(await text_prompt(self._context, prompt, self._body.add_special_tokens is not False), prompt)
        vocab_size, highest = self._context.service.model_config.vocab_size, max(prompt)
        if highest >= vocab_size:
            raise refuse("prompt", f"{highest} is not a token id; there are 0 to {vocab_size - 1}")
        text = await self._context.texts.run(self._context.tokenizer.decode, prompt) if self._body.echo else ""
        return Prompt(prompt, text)

    async def complete(self, requests: list[Request]) -> Response:
        async with Texts(self._context, requests) as texts:
            answers = await texts.answers()
        num_values = num_told(answers, self._body.logprobs)
        choices = await off_the_loop(
            num_values, lambda: [self._choice(index, answer) for index, answer in enumerate(answers)]
        )
        generated = 0 if self._nothing_new else sum(len(answer.tokens) for answer in answers)
        whole = self._frame(choices) | {"usage": self._usage([answer.prompt for answer in answers], generated)}
        return await json_response(whole, num_values)

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        told = _Told(self._context, self._body, self._prompts[index // self._n])
        text = told.text(answer.text, first=True)
        tokens = [] if self._nothing_new else answer.tokens
        return {
            "index": index,
            "text": text,
            "logprobs": told.logprobs(answer.prompt, answer.told_tokens),
            "finish_reason": "length" if self._nothing_new else answer.finish_reason,
            **told.routed(answer.prompt, tokens),
        }

    async def stream(self, requests: list[Request]) -> Events:
        told = [_Told(self._context, self._body, self._prompts[i // self._n]) for i in range(len(requests))]
        plain = [TextEvent(partial(self._plain_chunk, index)) for index in range(len(requests))]
        prompts: list[PromptReport | None] = [None] * len(requests)
        generated = 0
        async with Texts(self._context, requests) as texts:
            while not texts.finished:
                written = b""
                for index, delta in await texts.take():
                    prompts[index] = prompts[index] or delta.prompt
                    generated += 0 if self._nothing_new else len(delta.tokens)
                    if told[index].is_plain(delta):
                        written += plain[index](delta.text)
                    else:
                        written += await off_the_loop(num_told([delta]), self._event, index, told[index], delta)
                if written:
                    yield written
        if self._wants_usage:
            yield event(self._frame([]) | {"usage": self._usage(prompts, generated)})

    def _event(self, index: int, told: "_Told", delta: Delta) -> bytes:
        tokens = () if self._nothing_new else delta.tokens
        told_tokens = told.tokens.push(delta)
        first, told.began = not told.began, True
        text = told.text(delta.text, first=first)
        choice = {
            "index": index,
            "text": text,
            "logprobs": told.logprobs(delta.prompt, told_tokens),
            "finish_reason": "length" if self._nothing_new and delta.finish_reason else delta.finish_reason,
            **told.routed(delta.prompt, tokens),
        }
        says = text or told_tokens or (self._body.echo and delta.prompt) or choice["finish_reason"] is not None
        if not says and not (tokens and self._body.return_routed_experts):
            return b""  # the text of its tokens comes later
        return event(self._chunk(choice))

    def _plain_chunk(self, index: int, text: str) -> dict[str, Any]:
        return self._chunk({"index": index, "text": text, "logprobs": None, "finish_reason": None})

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        frame = self._frame([choice])
        return frame | {"usage": None} if self._wants_usage else frame

    @property
    def _wants_usage(self) -> bool:
        return self._body.stream_options is not None and bool(self._body.stream_options.include_usage)

    def _usage(self, prompts: Sequence[PromptReport | None], generated: int) -> dict[str, Any]:
        """A prompt counts once, however many choices it has."""
        each = prompts[:: self._n]
        total = PromptReport(
            num_tokens=sum(len(prompt.ids) for prompt in self._prompts),
            cached_tokens=sum(prompt.cached_tokens for prompt in each if prompt is not None),
        )
        return usage(total, generated)

    def _frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._context.model_name,
            "choices": choices,
        }


class _Told:
    """How far the telling of a choice has come: what was echoed, and at which character it is."""

    def __init__(self, context: Context, body: CompletionRequest, prompt: Prompt) -> None:
        self.began, self.tokens = False, ToldTokens()
        self._body, self._prompt = body, prompt
        self._nothing_new = body.max_tokens == 0
        self._routed = RoutedExperts(body.routed_experts_start_len)
        self._logprobs = None
        if body.logprobs is not None:
            self._logprobs = CompletionLogprobs(
                context.tokenizer, context.token_texts, body.logprobs, () if body.echo else prompt.ids
            )  # fmt: skip

    def is_plain(self, delta: Delta) -> bool:
        """Whether there is nothing to tell but a text in the middle."""
        asked = self._logprobs is not None or self._body.return_routed_experts or self._nothing_new
        return self.began and not asked and bool(delta.text) and delta.finish_reason is None

    def text(self, new: str, first: bool) -> str:
        new = "" if self._nothing_new else new
        return self._prompt.text + new if first and self._body.echo else new

    def logprobs(self, prompt: PromptReport | None, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        parts = []
        if self._body.echo and prompt is not None and prompt.logprobs is not None:
            parts.append(self._logprobs.of_prompt(self._prompt.ids, prompt.logprobs))
        parts.append(self._logprobs.of_tokens(() if self._nothing_new else tokens))
        return joined_logprobs(*parts)

    def routed(self, prompt: PromptReport | None, tokens: Sequence[Token]) -> dict[str, Any]:
        if not self._body.return_routed_experts:
            return {}
        return {"sgl_ext": self._routed.of(prompt, tokens)}


def _prompts(prompt: str | list[Any]) -> list[Any]:
    """A text, or a list of ids, is one prompt."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
