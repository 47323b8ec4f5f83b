"""POST /v1/chat/completions."""

import time
import uuid
from dataclasses import replace
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from moesaic.engine.request import Delta, PromptReport, Request, Token
from moesaic.server.context import Context
from moesaic.server.errors import refuse
from moesaic.server.generation import Answer, Texts, num_told, usage, while_connected
from moesaic.server.large_json import json_response, off_the_loop
from moesaic.server.limits import read_request
from moesaic.server.logprobs import ToldTokens, chat_logprobs
from moesaic.server.prompts import answer_room, chat_prompt, template_messages, template_tools
from moesaic.server.replies import Reply, Tools
from moesaic.server.routed_experts import RoutedExperts, first_told
from moesaic.server.sampling import compile_constraints, sampling_of, seed_of_choice, structure_of
from moesaic.server.schemas import ChatRequest, NamedTool
from moesaic.server.streaming import Events, TextEvent, event, event_stream


async def chat_completions(context: Context, http: HttpRequest) -> Response:
    context.check_room()
    body = await read_request(http, ChatRequest, max_body=context.max_body)
    context.check_model(body.model)
    chat = Chat(context, body)
    requests = await while_connected(http.receive, chat.prepare())
    if body.stream:
        return await event_stream(context, http, chat.stream(requests))
    return await while_connected(http.receive, chat.complete(requests))


class Chat:
    """One request: how its choices are asked of the engine, and told to the client."""

    def __init__(self, context: Context, body: ChatRequest) -> None:
        self._context, self._body = context, body
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        if body.top_logprobs and not body.logprobs:
            raise refuse("top_logprobs", "it needs logprobs: true")
        check_choices(body.n, body.best_of)
        choice, parallel = body.tool_choice, body.parallel_tool_calls
        if isinstance(choice, NamedTool):
            self._tools = Tools(context, body.tools or [], choice.function.name, parallel, named=True)
        else:
            self._tools = Tools(context, body.tools or [], choice, parallel)
        self._structure = structure_of(body)
        if self._structure is not None and self._tools.forced:
            raise refuse(self._structure.param, "tool_choice says already what the text must be; send one of them")

    async def prepare(self) -> list[Request]:
        """One request for each choice. Raises ApiError for what cannot be done, before anything is answered."""
        body, context = self._body, self._context
        variables = dict(body.chat_template_kwargs or {})
        if body.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", body.reasoning_effort)
        check_variables(variables)
        prompt_ids = await chat_prompt(
            context,
            lambda: template_messages(body.messages),
            tools=template_tools(body.tools) if self._tools.offered else None,
            variables=variables,
            add_generation_prompt=body.add_generation_prompt is not False,
            add_special_tokens=bool(body.add_special_tokens),
        )
        asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        length_field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        if asked == 0:
            raise refuse(length_field, "it is 0; ask for at least one token")
        max_tokens = answer_room(context, len(prompt_ids), asked, None, f"messages {length_field}")
        sampling = sampling_of(body, max_tokens, context.service.model_config.vocab_size)
        count = body.n or 1
        if self._tools.forced:
            constraints = await self._tools.constraints(context, count)
        else:
            constraints = await compile_constraints(context, self._structure, count)
        return [
            Request(
                prompt_ids=prompt_ids,
                sampling=replace(sampling, seed=seed_of_choice(sampling.seed, choice)),
                logprobs=(body.top_logprobs or 0) if body.logprobs else None,
                routed_experts=bool(body.return_routed_experts),
                routed_from=first_told(body.routed_experts_start_len, len(prompt_ids)),
                visible_ids=self._tools.visible_ids,
                new_message=True,
                constraint=constraint,
            )
            for choice, constraint in enumerate(constraints)
        ]

    async def complete(self, requests: list[Request]) -> Response:
        async with Texts(self._context, requests) as texts:
            answers = await texts.answers()
        num_values = num_told(answers, self._body.top_logprobs)
        choices = await off_the_loop(
            num_values, lambda: [self._choice(index, answer) for index, answer in enumerate(answers)]
        )
        whole = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._context.model_name,
            "choices": choices,
            "usage": usage(answers[0].prompt, sum(len(answer.tokens) for answer in answers)),
            "service_tier": None,
            "system_fingerprint": None,
        }
        return await json_response(whole, num_values)

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        reply = self._tools.reply()
        message = reply.whole(answer.text)
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "refusal": None} | message,
            "logprobs": None,
            "finish_reason": reply.finish_reason(answer.finish_reason),
        }
        if self._body.logprobs:
            choice["logprobs"] = self.logprobs(answer.told_tokens)
        if self._body.return_routed_experts:
            choice["sgl_ext"] = RoutedExperts(self._body.routed_experts_start_len).of(answer.prompt, answer.tokens)
        return choice

    async def stream(self, requests: list[Request]) -> Events:
        choices = [_Streamed(self, self._body, index, self._tools.reply()) for index in range(len(requests))]
        prompt: PromptReport | None = None
        generated = 0
        async with Texts(self._context, requests) as texts:
            while not texts.finished:
                told = b""
                for index, delta in await texts.take():
                    prompt, generated = prompt or delta.prompt, generated + len(delta.tokens)
                    told += await off_the_loop(num_told([delta]), choices[index].tell, delta)
                if told:
                    yield told
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            yield event(self._frame([]) | {"usage": usage(prompt, generated)})

    def logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        return chat_logprobs(tokens, self._context.token_texts, self._body.top_logprobs or 0)

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        frame = self._frame([choice])
        options = self._body.stream_options
        return frame | {"usage": None} if options is not None and options.include_usage else frame

    def _frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._context.model_name,
            "choices": choices,
        }


class _Streamed:
    """A choice on its way to the client: the role first, then text and calls, and the reason of the end."""

    def __init__(self, chat: Chat, body: ChatRequest, index: int, reply: Reply) -> None:
        self._chat, self._body, self._index, self._reply = chat, body, index, reply
        self._began, self._told_tokens = False, ToldTokens()
        self._routed = RoutedExperts(body.routed_experts_start_len)
        self._text = TextEvent(lambda text: self._chunk({"content": text}))

    def tell(self, delta: Delta) -> bytes:
        """The events of a delta."""
        told = b""
        if not self._began:
            self._began = True
            told += event(self._chunk({"role": "assistant", "content": "", "refusal": None}))
        messages = self._reply.push(delta.text)
        if delta.finish_reason is not None:
            messages += self._reply.finish()
        extras: dict[str, Any] = {}
        tokens = self._told_tokens.push(delta)
        if self._body.logprobs and tokens:
            extras["logprobs"] = self._chat.logprobs(tokens)
        if self._body.return_routed_experts and (delta.tokens or delta.prompt):
            extras["sgl_ext"] = self._routed.of(delta.prompt, delta.tokens)
        if extras and not messages:
            messages = [{"content": ""}]
        for message in messages:
            plain = not extras and "content" in message
            told += self._text(message["content"]) if plain else event(self._chunk(message, **extras))
            extras = {}
        if delta.finish_reason is not None:
            told += event(self._chunk({}, finish_reason=self._reply.finish_reason(delta.finish_reason)))
        return told

    def _chunk(self, message: dict[str, Any], **fields: Any) -> dict[str, Any]:
        choice = {"index": self._index, "delta": message, "logprobs": None, "finish_reason": None, **fields}
        return self._chat.chunk(choice)


def check_choices(n: int | None, best_of: int | None) -> None:
    if best_of is not None and best_of != (n or 1):
        raise refuse("best_of", f"it is {best_of} and n is {n or 1}; texts are not compared here, so set both alike")


OURS = ("messages", "tools", "documents", "add_generation_prompt", "self")


def check_variables(variables: dict[str, Any]) -> None:
    """What the server gives to templates is not for clients to change, nor are large values."""
    for name, value in variables.items():
        where = f"chat_template_kwargs.{name[:40]}"
        if not name.isidentifier() or name in OURS or name.endswith("_token"):
            raise refuse(where, "a template takes no variable of this name from a request")
        if isinstance(value, str) and len(value) > 1000:
            raise refuse(where, f"it has {len(value):,} characters; at most 1,000 are accepted")
