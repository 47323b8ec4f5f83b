"""Messages and texts of requests as token ids; all of it on threads, since templates and long texts take their time."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moesaic.errors import UsageError
from moesaic.server.context import Context
from moesaic.server.errors import ApiError, refuse
from moesaic.server.large_json import check_counts
from moesaic.server.schemas import Message, TextPart, Tool


async def chat_prompt(
    context: Context,
    messages: Callable[[], Sequence[Mapping[str, Any]]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    add_special_tokens: bool = False,
    param: str = "messages",
) -> list[int]:
    """The ids of a chat, as the model's template writes it; `messages` gives what it takes, on a thread.

    Raises ApiError where they are refused.
    """
    tokenizer = context.tokenizer

    def render() -> list[int]:
        text = tokenizer.apply_chat_template(
            messages(), add_generation_prompt=add_generation_prompt, tools=tools, **(variables or {})
        )
        return tokenizer.encode(text, add_special_tokens=add_special_tokens, parse_special_tokens=True)

    if tools is not None and not tokenizer.has_chat_template:
        raise refuse("tools", "this model has no chat template, which would tell it of tools; leave them out")
    try:
        return await context.templates.run(render)
    except UsageError as error:
        raise ApiError(400, f"{param}: {error}", param=param) from None


async def text_prompt(context: Context, text: str, add_special_tokens: bool, param: str = "prompt") -> list[int]:
    try:
        return await context.texts.run(context.tokenizer.encode, text, add_special_tokens=add_special_tokens)
    except UsageError as error:
        raise ApiError(400, f"{param}: {error}", param=param) from None


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As chat templates expect them: text, no developers, and arguments of functions as objects."""
    return [_template_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _template_message(message: Message, where: str) -> dict[str, Any]:
    told: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    if message.content is not None:
        told["content"] = joined_text(message.content, f"{where}.content")
    elif not message.tool_calls:
        raise refuse(f"{where}.content", "it is missing; give a text")
    told |= {
        name: value
        for name in ("name", "tool_call_id", "reasoning_content")
        if (value := getattr(message, name)) is not None
    }
    if message.tool_calls:
        told.setdefault("content", "")
        told["tool_calls"] = [
            template_call(call.id, call.function.name, call.function.arguments, f"{where}.tool_calls[{i}]")
            for i, call in enumerate(message.tool_calls)
        ]
    return told


def template_call(call_id: str | None, name: str, arguments: str, where: str) -> dict[str, Any]:
    check_counts(arguments.encode("utf-8", "replace"))
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise refuse(f"{where}.function.arguments", "this is not a JSON object")
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": parsed}}


def template_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """None without tools; a tool without parameters takes none."""
    if not tools:
        return None
    empty = {"type": "object", "properties": {}}
    return [
        {
            "type": "function",
            "function": {
                "name": tool.function.name,
                "description": tool.function.description or "",
                "parameters": tool.function.parameters or empty,
            },
        }
        for tool in tools
    ]


def joined_text(content: str | Sequence[TextPart], where: str) -> str:
    if isinstance(content, str):
        return content
    texts = [part.text if part.text is not None else part.refusal for part in content]
    for i, text in enumerate(texts):
        if text is None:
            raise refuse(f"{where}[{i}].text", "it is missing; give a text")
    return "\n".join(text for text in texts if text is not None)


def answer_room(context: Context, num_prompt: int, asked: int | None, default: int | None, params: str) -> int:
    """How many tokens the answer may have. `params` names the fields of prompt and length, for the message.

    Raises ApiError where the prompt, or what was asked for beside it, is longer than the context.
    """
    room = context.max_model_tokens - num_prompt
    prompt_field, length_field = params.split()
    if not num_prompt:
        raise refuse(prompt_field, "it is empty; give at least one token of text")
    if room <= 0 or (asked or 0) > room:
        more = f" and {length_field} is {asked}" if asked else ""
        fix = f"lower {length_field} to {room}" if room > 0 else "shorten the prompt"
        raise ApiError(
            400,
            f"the prompt has {num_prompt} tokens{more}, but this model takes {context.max_model_tokens} for prompt and "
            f"answer together; {fix}",
            param=length_field if room > 0 else prompt_field,
            code="context_length_exceeded",
        )
    return min(room, default if default is not None else room) if asked is None else asked
