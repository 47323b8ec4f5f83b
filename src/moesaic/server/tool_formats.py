"""The forms in which chat templates let models call tools, and how each is read."""

import json
import random
import re
import string
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SPACE = " \t\r\n"


@dataclass(frozen=True)
class FunctionTool:
    """A tool that a request offers."""

    name: str
    parameters: Mapping[str, Any]
    """The JSON schema of its arguments, an object."""


Calls = list[tuple[str, Mapping[str, Any]]]
"""Names and arguments."""
Tools = Mapping[str, FunctionTool]


class MoreTextError(Exception):
    """The call may go on."""


class JsonValue:
    """Finds the end of a JSON object or array in text that grows, looking at each character once."""

    def __init__(self) -> None:
        self._start = self._place = -1
        self._depth = 0
        self._in_string = False

    def end(self, text: str, start: int) -> int | None:
        """Where the value that begins at `start` has ended, as far as brackets tell."""
        if start != self._start:
            self._start = self._place = start
            self._depth, self._in_string = 0, False
        while found := (_IN_STRING if self._in_string else _OUT_OF_STRING).search(text, self._place):
            character, self._place = found[0], found.end()
            if character == '"':
                self._in_string = not self._in_string
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self._start = -1
                    return self._place
        # A backslash at the very end belongs to a character that has not come yet.
        self._place = len(text) - (self._in_string and text.endswith("\\") and self._place < len(text))
        return None


_IN_STRING = re.compile(r'"|\\.', re.DOTALL)
_OUT_OF_STRING = re.compile(r'["{}\[\]]')


@dataclass
class Reading:
    """Text from the marker of a call on, and how far it was read. Raises ValueError where it is no call."""

    text: str
    place: int
    value: JsonValue
    last: bool

    def skip_space(self) -> None:
        self.place = len(self.text) - len(self.text[self.place :].lstrip(SPACE))

    def at(self, *wanted: str) -> str:
        """The one of these texts that comes next and is passed over; empty if none can."""
        rest = self.text[self.place : self.place + max(map(len, wanted))]
        for text in wanted:
            if rest.startswith(text):
                self.place += len(text)
                return text
        if any(text.startswith(rest) for text in wanted) and not self.last:
            raise MoreTextError
        return ""

    def expect(self, wanted: str) -> None:
        if not self.at(wanted):
            raise ValueError(f"{wanted} is missing")

    def close(self, wanted: str) -> None:
        """Passes over what closes a call, which the last one may lack."""
        self.skip_space()
        if not (self.last and self.place >= len(self.text)):
            self.expect(wanted)

    def until(self, wanted: str, most: int | None = None) -> str:
        """The text before `wanted`, at most so long; both are passed over."""
        end = self.text.find(wanted, self.place)
        if most is not None and (len(self.text) if end < 0 else end) - self.place > most:
            raise ValueError(f"no {wanted} where it belongs")
        if end < 0:
            self.expect_more()
        found, self.place = self.text[self.place : end], end + len(wanted)
        return found

    def json(self) -> Any:
        self.skip_space()
        if self.place >= len(self.text):
            self.expect_more()
        if self.text[self.place] not in "{[":
            raise ValueError("no object")
        end = self.value.end(self.text, self.place)
        if end is None:
            self.expect_more()
        value = read_json(self.text[self.place : end])
        self.place = end or 0
        return value

    def expect_more(self) -> None:
        if self.last:
            raise ValueError("the call is not complete")
        raise MoreTextError


def read_json(text: str) -> Any:
    """The value of JSON that can be written again. Raises ValueError or RecursionError for anything else."""
    return json.loads(text, parse_constant=_no_constant, parse_float=_finite)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    """Models may write 1e999, which is JSON but no float; the largest float stands for it."""
    return max(-sys.float_info.max, min(sys.float_info.max, float(text)))


def _call(tools: Tools, name: object, arguments: object) -> tuple[str, Mapping[str, Any]]:
    if isinstance(arguments, str):  # some models write the object as a text
        arguments = read_json(arguments)
    if not isinstance(name, str) or name not in tools or not isinstance(arguments, dict):
        raise ValueError("no call of a tool")
    return name, arguments


def _call_object(tools: Tools, value: object) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("no call of a tool")
    return _call(tools, value["name"], value.get("arguments", value.get("parameters", {})))


def _read_hermes(reading: Reading, tools: Tools) -> tuple[Calls, int]:
    call = _call_object(tools, reading.json())
    reading.close("</tool_call>")
    return [call], reading.place


def _read_bare(reading: Reading, tools: Tools) -> tuple[Calls, int]:
    if reading.text.startswith("{"):
        reading.place = 0
    value = reading.json()
    if isinstance(value, dict) and not {"arguments", "parameters"} & value.keys():
        raise ValueError("an object that is no call")  # nothing but its keys tells
    return [_call_object(tools, value)], reading.place


def _read_mistral(reading: Reading, tools: Tools) -> tuple[Calls, int]:
    reading.skip_space()
    if reading.at("["):
        reading.place -= 1
        return [_call_object(tools, value) for value in reading.json()], reading.place
    name = reading.until("{", most=200)
    reading.place -= 1
    name = re.split(r"\[CALL_ID\]|\[ARGS\]", name)[0]
    return [_call(tools, name.strip(), reading.json())], reading.place


def _read_deepseek(reading: Reading, tools: Tools) -> tuple[Calls, int]:
    name = reading.until("<｜tool▁sep｜>", most=100)
    fenced = name == "function"
    if fenced:
        name = reading.until("\n", most=100)
        reading.expect("```json")
    call = _call(tools, name.strip(), reading.json())
    if fenced:
        reading.skip_space()
        reading.expect("```")
    reading.close("<｜tool▁call▁end｜>")
    return [call], reading.place


def _read_glm4(reading: Reading, tools: Tools) -> tuple[Calls, int]:
    name, arguments = "", {}
    end = reading.text.find("<", reading.place)
    if end < 0:
        reading.expect_more()
    name, reading.place = reading.text[reading.place : end].strip(), end
    while reading.at("<arg_key>", "</tool_call>") == "<arg_key>":
        key = reading.until("</arg_key>").strip()
        reading.skip_space()
        reading.expect("<arg_value>")
        arguments[key] = _typed(tools.get(name), key, reading.until("</arg_value>"))
        reading.skip_space()
        if reading.last and reading.place >= len(reading.text):
            return [_call(tools, name, arguments)], reading.place
    if not reading.text.endswith("</tool_call>", 0, reading.place):
        raise ValueError("the call is not closed")
    return [_call(tools, name, arguments)], reading.place


def _read_qwen3_coder(reading: Reading, tools: Tools) -> tuple[Calls, int]:
    reading.skip_space()
    reading.expect("<function=")
    name, arguments = reading.until(">", most=100).strip(), {}
    reading.skip_space()
    while reading.at("<parameter=", "</function>") == "<parameter=":
        key = reading.until(">", most=300).strip()
        value = reading.until("</parameter>")
        arguments[key] = _typed(tools.get(name), key, value.removeprefix("\n").removesuffix("\n"))
        reading.skip_space()
    if not reading.text.endswith("</function>", 0, reading.place):
        raise ValueError("the call is not closed")
    reading.close("</tool_call>")
    return [_call(tools, name, arguments)], reading.place


def _typed(tool: FunctionTool | None, key: str, text: str) -> Any:
    """The value of an argument that is written without quotes: text where the tool says so, else JSON if it is any."""
    if tool is None or is_text(tool.parameters, key):
        return text
    try:
        return read_json(text)
    except (ValueError, RecursionError):
        return text


def is_text(parameters: Mapping[str, Any], key: str) -> bool:
    """Whether the schema says that this argument is a string."""
    properties = parameters.get("properties")
    schema = properties.get(key) if isinstance(properties, dict) else None
    return isinstance(schema, dict) and schema.get("type") == "string"


@dataclass(frozen=True)
class Form:
    """How calls are written."""

    read: Callable[[Reading, Tools], tuple[Calls, int]]
    markers: tuple[str, ...] = ()
    """Each begins a call."""
    around: tuple[str, ...] = ()
    """Texts around calls that mean nothing by themselves."""
    bare: bool = False
    """An answer that begins with { may be a call."""
    awaits: str = ""
    """What reads on only makes sense after; empty if any text may matter."""
    short_id: bool = False

    def new_id(self) -> str:
        """Ids only have to differ; templates of Mistral want nine letters and digits."""
        size = 9 if self.short_id else 24
        letters = "".join(random.SystemRandom().choices(string.ascii_letters + string.digits, k=size))
        return letters if self.short_id else f"call_{letters}"


_BLOCK = ("<tool_call>",)
FORMATS: Mapping[str, Form] = {
    "hermes": Form(_read_hermes, _BLOCK),
    "qwen3_coder": Form(_read_qwen3_coder, _BLOCK, awaits=">"),
    "glm4": Form(_read_glm4, _BLOCK, awaits=">"),
    "mistral": Form(_read_mistral, ("[TOOL_CALLS]",), short_id=True),
    "mistral_args": Form(_read_mistral, ("[TOOL_CALLS]",), short_id=True),
    "deepseek_v3": (
        deepseek := Form(
            _read_deepseek, ("<｜tool▁call▁begin｜>",), around=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
        )
    ),
    "deepseek_v31": deepseek,
    "llama3": Form(_read_bare, ("<|python_tag|>",), bare=True),
    "json": Form(_read_bare, bare=True),
}
"""The forms by the name that `tool_format` gives."""


def tool_format(template: str) -> str | None:
    """The name of the form in which models of this chat template call tools; None if it knows no tools.

    `json`, a bare object, stands for all forms that are not known here.
    """
    if "tools" not in template:
        return None
    for marker, name in _SIGNS:
        if marker in template:
            return name(template) if callable(name) else name
    return "json"


_SIGNS: tuple[tuple[str, str | Callable[[str], str]], ...] = (
    ("<arg_key>", "glm4"),
    ("<parameter=", "qwen3_coder"),
    ("<tool_call>", "hermes"),
    ("[TOOL_CALLS]", lambda template: "mistral_args" if "[ARGS]" in template else "mistral"),
    ("<｜tool▁calls▁begin｜>", lambda template: "deepseek_v3" if "```json" in template else "deepseek_v31"),
    ("<|python_tag|>", "llama3"),
)
"""What a template has that calls tools in a form, most telling first."""
