"""Tools that a request offers, and the calls of them in what a model writes, found as the text streams."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from moesaic.errors import UsageError
from moesaic.server.tool_formats import FORMATS, SPACE, Calls, FunctionTool, JsonValue, MoreTextError, Reading

MAX_TOOLS = 128
MAX_CALLS = 64
"""In one answer; what comes after them is text."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MAX_ATTEMPTS = 64  # what begins like a call and is none; each may cost as much as the rest of the text is long


@dataclass(frozen=True)
class ToolCall:
    """One whole call."""

    index: int
    id: str
    name: str
    arguments: str
    """A JSON object."""

    def delta(self) -> dict[str, Any]:
        """As in `delta.tool_calls` of OpenAI's streams; without `index` as in a message."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


class Pieces(NamedTuple):
    """What a piece of text turned out to be."""

    content: str
    calls: tuple[ToolCall, ...]


def read_tools(value: object) -> tuple[FunctionTool, ...]:
    """The `tools` of a request. Raises UsageError for what is not OpenAI's form."""
    if not isinstance(value, list):
        raise UsageError(f"tools is a {type(value).__name__}; it must be a list")
    if len(value) > MAX_TOOLS:
        raise UsageError(f"tools has {len(value):,} entries; at most {MAX_TOOLS} are accepted")
    tools: dict[str, FunctionTool] = {}
    for place, entry in enumerate(value):
        function = entry.get("function") if isinstance(entry, dict) and entry.get("type") == "function" else None
        if not isinstance(function, dict):
            raise UsageError(f'tools[{place}] must be an object with "type": "function" and the object "function"')
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UsageError(f"tools[{place}].function.name is {name!r:.80}; it must match [A-Za-z0-9_-]{{1,64}}")
        if name in tools:
            raise UsageError(f"tools[{place}].function.name is {name!r}, as that of another tool; rename one")
        parameters = {"type": "object", "properties": {}} if parameters is None else parameters
        if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
            raise UsageError(f'tools[{place}].function.parameters must be a JSON schema with "type": "object"')
        tools[name] = FunctionTool(name, parameters)
    return tuple(tools.values())


class ToolCallParser:
    """Takes an answer's text piece by piece and gives back content and calls.

    Text that may become a call is held back, and is content after all if it does not: calls that are malformed, that
    name no tool of the request, or whose arguments are no JSON object. White space around calls is dropped.
    """

    def __init__(self, form: str, tools: Sequence[FunctionTool]) -> None:
        self._form = FORMATS[form]
        self._tools = {tool.name: tool for tool in tools}
        self._buffer = ""
        self._marker = ""
        """What the call that is being read began with."""
        self._value = JsonValue()
        self._seen = 0
        """How much of the buffer was read when there was not enough of it."""
        self._space = ""
        self._spoken = False
        self._attempts = 0
        self.count = 0
        """Calls so far."""

    def push(self, text: str) -> Pieces:
        """What became certain with this text."""
        self._buffer += text
        return self._advance(last=False)

    def flush(self) -> Pieces:
        """What is still held back, when no more text comes. A last call may lack what closes it."""
        pieces = self._advance(last=True)
        space, self._space = ("" if self.count else self._space), ""
        return Pieces(pieces.content + space, pieces.calls)

    def _advance(self, last: bool) -> Pieces:
        content, calls = "", []
        while self._buffer:
            if not self._marker:
                content += self._said(self._before_call(last))
                if not self._marker:
                    break
            try:
                found, end = self._read(last)
                if self.count + len(found) > MAX_CALLS:
                    raise ValueError("too many calls")
                calls += [self._numbered(name, arguments) for name, arguments in found]
            except MoreTextError:
                break
            except (ValueError, RecursionError):
                self._attempts += 1
                end = len(self._marker)
                content += self._said(self._buffer[:end])
            self._buffer, self._marker, self._value = self._buffer[end:], "", JsonValue()
            self._seen = 0
        return Pieces(content, tuple(calls))

    def _read(self, last: bool) -> tuple[Calls, int]:
        """The calls at the start of the buffer, where the marker is, and where they end."""
        if self._marker in self._form.around:
            return [], len(self._marker)
        if self._form.awaits and not last and self._form.awaits not in self._buffer[self._seen :]:
            raise MoreTextError
        self._seen = len(self._buffer)
        return self._form.read(Reading(self._buffer, len(self._marker), self._value, last), self._tools)

    def _before_call(self, last: bool) -> str:
        """Takes the text before the next call off the buffer, as far as it is certain; sets `_marker` at one."""
        if self._form.bare and not self._spoken and self._attempts < _MAX_ATTEMPTS:
            rest = self._buffer.lstrip(SPACE + (";," if self.count else ""))
            if rest.startswith("{"):
                before = self._buffer[: -len(rest)]
                self._buffer, self._marker = rest, "{"
                return "" if self.count else before
            if not rest and not last:
                return ""
        markers = (*self._form.markers, *self._form.around)
        markers = markers if self._attempts < _MAX_ATTEMPTS and self.count < MAX_CALLS else ()
        starts = {marker: place for marker in markers if (place := self._buffer.find(marker)) >= 0}
        if starts:
            self._marker = min(starts, key=lambda marker: starts[marker])
            end = starts[self._marker]
        else:
            end = len(self._buffer) - (0 if last else max((_overlap(self._buffer, m) for m in markers), default=0))
        before, self._buffer = self._buffer[:end], self._buffer[end:]
        return before

    def _said(self, text: str) -> str:
        text = self._space + text
        shown = text.rstrip(SPACE)
        self._space = text[len(shown) :]
        self._spoken = self._spoken or bool(shown)
        return shown

    def _numbered(self, name: str, arguments: Mapping[str, Any]) -> ToolCall:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        if any("\ud800" <= character <= "\udfff" for character in text):
            text = json.dumps(arguments)  # halves of characters, which cannot be sent but as escapes
        call = ToolCall(self.count, self._form.new_id(), name, text)
        self._space, self.count = "", self.count + 1
        return call


def _overlap(text: str, marker: str) -> int:
    """How many characters at the end of the text the marker begins with."""
    return next((size for size in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:size])), 0)
