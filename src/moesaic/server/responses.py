"""POST /v1/responses: the same answers in the form of OpenAI's newer interface. Nothing is kept between requests."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from moesaic.engine.request import FinishReason, PromptReport, Request, Token
from moesaic.server.chat import check_variables
from moesaic.server.context import Context
from moesaic.server.errors import ApiError, refuse
from moesaic.server.generation import Texts, num_told, while_connected
from moesaic.server.large_json import json_response, off_the_loop
from moesaic.server.limits import read_request
from moesaic.server.logprobs import ToldTokens, chat_logprobs
from moesaic.server.prompts import answer_room, chat_prompt, joined_text, template_call, template_tools
from moesaic.server.replies import Tools
from moesaic.server.response_items import Items
from moesaic.server.responses_schemas import InputItem, NamedFunction, ResponseRequest, TextFormat
from moesaic.server.routed_experts import RoutedExperts, first_told
from moesaic.server.sampling import Structure, compile_constraints, sampling_of
from moesaic.server.schemas import Function, Tool
from moesaic.server.streaming import event, event_stream

Event = dict[str, Any]
_LOGPROBS = "message.output_text.logprobs"


async def responses(context: Context, http: HttpRequest) -> Response:
    context.check_room()
    body = await read_request(http, ResponseRequest, max_body=context.max_body)
    context.check_model(body.model)
    asked = AskedResponse(context, body)
    request = await while_connected(http.receive, asked.prepare())
    if body.stream:
        return await event_stream(context, http, asked.stream(request), asked.describe_error, end=b"")
    return await while_connected(http.receive, asked.complete(request))


class AskedResponse:
    """One request: how it is asked of the engine, and told to the client."""

    def __init__(self, context: Context, body: ResponseRequest) -> None:
        self._context, self._body = context, body
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._wants_logprobs = _LOGPROBS in (body.include or []) or body.top_logprobs is not None
        self._functions = [_function(tool, i) for i, tool in enumerate(body.tools or []) if tool.type == "function"]
        choice, parallel = body.tool_choice, body.parallel_tool_calls
        if isinstance(choice, NamedFunction):
            self._tools = Tools(context, self._functions, choice.name, parallel, named=True)
        else:
            self._tools = Tools(context, self._functions, choice, parallel)
        self._structure = _structure(body.text.format if body.text is not None else None)
        if self._structure is not None and self._tools.forced:
            raise refuse("text.format", "tool_choice says already what the text must be; send one of them")
        self._number = -1
        self._num_values = 0
        """About how many have been told."""

    async def prepare(self) -> Request:
        """Raises ApiError for what cannot be done, before anything is answered."""
        body, context = self._body, self._context
        variables = dict(body.chat_template_kwargs or {})
        if body.reasoning is not None and body.reasoning.effort is not None:
            variables.setdefault("reasoning_effort", body.reasoning.effort)
        check_variables(variables)
        prompt_ids = await chat_prompt(
            context,
            lambda: _messages(body),
            tools=template_tools(self._functions) if self._tools.offered else None,
            variables=variables,
            param="input",
        )
        max_tokens = answer_room(context, len(prompt_ids), body.max_output_tokens, None, "input max_output_tokens")
        if self._tools.forced:
            constraints = await self._tools.constraints(context, 1)
        else:
            constraints = await compile_constraints(context, self._structure, 1)
        return Request(
            prompt_ids=prompt_ids,
            sampling=sampling_of(body, max_tokens, context.service.model_config.vocab_size),
            logprobs=(body.top_logprobs or 0) if self._wants_logprobs else None,
            routed_experts=bool(body.return_routed_experts),
            routed_from=first_told(body.routed_experts_start_len, len(prompt_ids)),
            visible_ids=self._tools.visible_ids,
            new_message=True,
            constraint=constraints[0],
        )

    async def complete(self, request: Request) -> Response:
        final: dict[str, Any] = {}
        async for batch in self._events(request):
            for told in batch:
                final = told.get("response", final)
        return await json_response(final, self._num_values)

    async def stream(self, request: Request) -> AsyncGenerator[bytes, None]:
        async for batch in self._events(request):
            # The last events have all that was told before.
            num_values = self._num_values if "response" in batch[-1] else 0
            yield await off_the_loop(num_values, lambda batch=batch: b"".join(map(self._numbered, batch)))

    def describe_error(self, error: ApiError) -> bytes:
        failed = self._response("failed", error={"code": error.code or "server_error", "message": error.message})
        return self._numbered({"type": "response.failed", "response": failed}) + event(error.body)

    def _numbered(self, told: Event) -> bytes:
        self._number += 1
        return event({**told, "sequence_number": self._number}, told["type"], in_pieces="response" in told)

    async def _events(self, request: Request) -> AsyncGenerator[list[Event], None]:
        """What happens, a step's worth at a time."""
        body, items, reply, told_tokens = self._body, Items(), self._tools.reply(), ToldTokens()
        routed = RoutedExperts(body.routed_experts_start_len)
        prompt: PromptReport | None = None
        generated, tokens = 0, list[Token]()
        batch = [self._lifecycle("created", "in_progress"), self._lifecycle("in_progress", "in_progress")]
        async with Texts(self._context, [request]) as texts:
            while not texts.finished:
                for _, delta in await texts.take():
                    prompt, generated = prompt or delta.prompt, generated + len(delta.tokens)
                    self._num_values += num_told([delta], body.top_logprobs)
                    if body.return_routed_experts:
                        tokens += delta.tokens
                    batch += items.push(reply.push(delta.text), self._logprobs(told_tokens.push(delta)))
                    if delta.finish_reason is not None:
                        batch += items.push(reply.finish(), [])
                        batch += items.close("incomplete" if delta.finish_reason == "length" else "completed")
                        extras: dict[str, Any] = {"usage": _usage(prompt, generated)}
                        if body.return_routed_experts:
                            extras["sgl_ext"] = await off_the_loop(self._num_values, routed.of, prompt, tokens)
                        batch.append(self._end(delta.finish_reason, items.output, extras))
                if batch:
                    yield batch
                batch = []

    def _logprobs(self, tokens: list[Token]) -> list[dict[str, Any]]:
        if not self._wants_logprobs:
            return []
        return chat_logprobs(tokens, self._context.token_texts, self._body.top_logprobs or 0)["content"]

    def _end(self, reason: FinishReason, output: list[Event], extras: dict[str, Any]) -> Event:
        if reason == "length":
            details = {"reason": "max_output_tokens"}
            return self._lifecycle("incomplete", "incomplete", output=output, incomplete_details=details, **extras)
        return self._lifecycle("completed", "completed", output=output, **extras)

    def _lifecycle(self, name: str, status: str, **fields: Any) -> Event:
        return {"type": f"response.{name}", "response": self._response(status, **fields)}

    def _response(self, status: str, **fields: Any) -> dict[str, Any]:
        body = self._body
        asked_format = body.text.format if body.text is not None and body.text.format is not None else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._context.model_name,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning is not None else None, "summary": None},
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {
                "format": asked_format.model_dump(by_alias=True, exclude_none=True)
                if asked_format
                else {"type": "text"}
            },
            "tool_choice": body.tool_choice.model_dump()
            if body.tool_choice is not None and not isinstance(body.tool_choice, str)
            else body.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or [] if tool.type == "function"],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None,
            **fields,
        }


def _usage(prompt: PromptReport | None, generated: int) -> dict[str, Any]:
    read, cached = (prompt.num_tokens, prompt.cached_tokens) if prompt is not None else (0, 0)
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": generated,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + generated,
    }


def _function(tool: Any, position: int) -> Tool:
    if tool.name is None:
        raise refuse(f"tools[{position}].name", "it is missing; a function needs one")
    return Tool(
        type="function",
        function=Function(
            name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
        ),
    )  # fmt: skip


def _structure(asked: TextFormat | None) -> Structure | None:
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return Structure("text.format", "json_object")
    if asked.schema_ is None:
        raise refuse("text.format.schema", "json_schema needs a schema")
    return Structure("text.format", "json_schema", asked.schema_)


def _messages(body: ResponseRequest) -> list[dict[str, Any]]:
    """As chat templates expect them; a row of calls is one message of the assistant."""
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for i, item in enumerate(body.input):
        where = f"input[{i}]"
        if item.type == "message":
            messages.append(_message(item, where))
        elif item.type == "function_call":
            _add_call(messages, item, where)
        elif item.type == "function_call_output":
            if item.output is None:
                raise refuse(f"{where}.output", "it is missing; give what the function returned")
            text = joined_text(item.output, f"{where}.output")
            messages.append({"role": "tool", "content": text, "tool_call_id": item.call_id})
        elif item.type != "reasoning":  # which is for the client to read
            raise refuse(f"{where}.type", f"{item.type[:40]!r} is not supported; send messages and function calls")
    return messages


def _message(item: InputItem, where: str) -> dict[str, Any]:
    if item.role is None or item.content is None:
        missing = "role" if item.role is None else "content"
        raise refuse(f"{where}.{missing}", "it is missing; a message has role and content")
    role = "system" if item.role == "developer" else item.role
    return {"role": role, "content": joined_text(item.content, f"{where}.content")}


def _add_call(messages: Sequence[dict[str, Any]], item: InputItem, where: str) -> None:
    assert isinstance(messages, list)
    if item.name is None or item.arguments is None:
        missing = "name" if item.name is None else "arguments"
        raise refuse(f"{where}.{missing}", "it is missing; a call has name and arguments")
    if not messages or "tool_calls" not in messages[-1]:
        if messages and messages[-1]["role"] == "assistant":
            messages[-1]["tool_calls"] = []
        else:
            messages.append({"role": "assistant", "content": "", "tool_calls": []})
    messages[-1]["tool_calls"].append(template_call(item.call_id, item.name, item.arguments, where))
