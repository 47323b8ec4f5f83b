"""Calls of tools: read from text cut anywhere, written under a grammar, and what is no call stays text."""

import json
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
import tokenizers
import torch

from moesaic.engine.constraint import ConstraintCompiler
from moesaic.errors import UsageError
from moesaic.server.tool_calls import MAX_CALLS, ToolCallParser, read_tools
from moesaic.server.tool_formats import FORMATS, tool_format
from moesaic.server.tool_grammars import tool_constraint, visible_token_ids
from moesaic.tokenizer import Tokenizer, byte_tokenizer

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 0, "maximum": 99},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "code": {"type": "string", "pattern": "^[a-z]{2}-[0-9]+$", "maxLength": 9},
        "flags": {"$ref": "#/$defs/flags"},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
}
EMPTY = {"type": "object", "properties": {}, "additionalProperties": False}


def offered(**functions: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "parameters": p}} for name, p in functions.items()]


TOOLS = read_tools(offered(get_weather=WEATHER, stop=EMPTY))
BYTES = byte_tokenizer()
COMPILER = ConstraintCompiler(BYTES, BYTES.vocab_size, [256])

PARIS, ROME = {"city": "Paris", "days": 3}, {"city": 'R"o{m}e</x>\n[]é', "days": 0, "flags": [True]}
HERMES = "<tool_call>\n{}\n</tool_call>"
DEEPSEEK = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"
V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
V31 = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"


def named(arguments: dict[str, Any], key: str = "arguments") -> str:
    return json.dumps({"name": "get_weather", key: arguments}, ensure_ascii=random.random() < 0.5)


def glm4(arguments: dict[str, Any]) -> str:
    lines = [f"<arg_key>{key}</arg_key>\n<arg_value>{shown(v)}</arg_value>\n" for key, v in arguments.items()]
    return f"<tool_call>get_weather\n{''.join(lines)}</tool_call>"


def qwen3_coder(arguments: dict[str, Any]) -> str:
    lines = [f"<parameter={key}>\n{shown(v)}\n</parameter>\n" for key, v in arguments.items()]
    return f"<tool_call>\n<function=get_weather>\n{''.join(lines)}</function>\n</tool_call>"


def shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def written(form: str) -> str:
    """Two calls, as models write them."""
    if form == "hermes":
        return "\n".join(HERMES.replace("{}", named(arguments)) for arguments in (PARIS, ROME))
    if form in ("glm4", "qwen3_coder"):
        return "\n".join({"glm4": glm4, "qwen3_coder": qwen3_coder}[form](arguments) for arguments in (PARIS, ROME))
    if form == "mistral":
        return f"[TOOL_CALLS] [{named(PARIS)}, {named(ROME)}]"
    if form == "mistral_args":
        return "".join(f"[TOOL_CALLS]get_weather[ARGS]{json.dumps(arguments)}" for arguments in (PARIS, ROME))
    if form == "deepseek_v3":
        calls = [V3.replace("{}", "get_weather", 1).replace("{}", json.dumps(a), 1) for a in (PARIS, ROME)]
        return DEEPSEEK.replace("{}", "\n".join(calls))
    if form == "deepseek_v31":
        calls = [V31.replace("{}", "get_weather", 1).replace("{}", json.dumps(a), 1) for a in (PARIS, ROME)]
        return DEEPSEEK.replace("{}", "".join(calls))
    if form == "llama3":
        return "<|python_tag|>" + "; ".join(named(arguments, "parameters") for arguments in (PARIS, ROME))
    return "; ".join(named(arguments) for arguments in (PARIS, ROME))


def cut(text: str) -> Iterator[str]:
    while text:
        size = random.choice([1, 1, 2, 5, 30])
        yield text[:size]
        text = text[size:]


def read(form: str, text: str) -> tuple[str, list[tuple[str, Any]]]:
    parser, content, calls = ToolCallParser(form, TOOLS), "", []
    for piece in cut(text):
        pieces = parser.push(piece)
        content += pieces.content
        calls += pieces.calls
    pieces = parser.flush()
    content += pieces.content
    calls += pieces.calls
    assert [call.index for call in calls] == list(range(len(calls))) == list(range(parser.count))
    assert len({call.id for call in calls}) == len(calls)
    return content, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("form", FORMATS)
def test_calls_are_found_wherever_the_text_is_cut(form: str) -> None:
    for _ in range(20):
        before = random.choice(["", "\n\n"]) if FORMATS[form].bare else random.choice(["", "Let me < see.\n\n", "[T"])
        content, calls = read(form, before + written(form) + random.choice(["", "\n"]))
        assert calls == [("get_weather", PARIS), ("get_weather", ROME)]
        assert content == before.rstrip()


@pytest.mark.parametrize("form", FORMATS)
def test_text_without_calls_stays_as_it_is(form: str) -> None:
    parts = [
        "<tool_call>",
        "</tool_call>",
        "{",
        "}",
        '"',
        "[TOOL_CALLS]",
        "[",
        " ",
        "\n",
        "<",
        "get_weathe",
        "word ",
        '{"name": "get_weathe"',
        "<arg_key>",
        "<function=",
        "<|python_tag|>",
        "\\",
        '{"name": "other", "arguments": {}}',
        "<｜tool▁call▁begin｜>",
        "function<｜tool▁sep｜>",
        "a\n```json\n",
        "<｜tool",
    ]
    for _ in range(100):
        text = "".join(random.choices(parts, k=random.randint(0, 12)))
        assert read(form, text) == (text, [])


@pytest.mark.parametrize("form", FORMATS)
def test_the_last_call_may_lack_its_end(form: str) -> None:
    text = written(form)
    for end in ("</tool_call>", "<｜tool▁calls▁end｜>"):
        text = text.removesuffix(end).rstrip()
    assert read(form, text)[1] == [("get_weather", PARIS), ("get_weather", ROME)]


@pytest.mark.parametrize(
    "call",
    [
        '{"name": "other", "arguments": {}}',
        '{"name": "get_weather", "arguments": [1]}',
        '{"name": "get_weather", "arguments": {"days": NaN}}',
        '{"name": "get_weather", "arguments": {,}}',
        '{"name": ["get_weather"], "arguments": {}}',
        '{"arguments": {}}',
        '{"name": "get_weather", "arguments": ' + '{"a":' * 5000 + "1" + "}" * 5000 + "}",
        '{"name": "get_weather", "arguments": {}} and more',
    ],
)
def test_malformed_calls_stay_text_and_later_ones_are_found(call: str) -> None:
    text = HERMES.replace("{}", call)
    after = HERMES.replace("{}", named(PARIS))
    assert read("hermes", f"{text}\n{after}") == (text, [("get_weather", PARIS)])


def test_arguments_are_always_json_that_can_be_sent() -> None:
    parser = ToolCallParser("hermes", TOOLS)
    call = '{"name": "stop", "arguments": {"a": "\\ud800", "b": 1e999, "c": "é"}}'
    (found,) = parser.push(HERMES.replace("{}", call)).calls
    assert found.arguments.encode()
    assert json.loads(found.arguments) == {"a": "\ud800", "b": 1.7976931348623157e308, "c": "é"}
    assert found.delta()["function"] == {"name": "stop", "arguments": found.arguments}
    (found,) = parser.push(HERMES.replace("{}", '{"name": "stop", "arguments": "{\\"a\\": 1}"}')).calls
    assert (found.index, json.loads(found.arguments)) == (1, {"a": 1})


@pytest.mark.parametrize(
    "text", ['{"name": "get_weather"}', 'The object {"name": "stop", "arguments": {}}', '[{"name": 1}]']
)
def test_other_json_is_no_call(text: str) -> None:
    assert read("json", text) == read("llama3", text) == (text, [])


def test_text_that_cannot_become_a_call_comes_at_once() -> None:
    parser = ToolCallParser("hermes", TOOLS)
    assert parser.push("a < b <tool").content == "a < b"
    assert parser.push("s").content == " <tools"
    assert parser.push(" <tool_call>x").content == " <tool_call>x"
    assert parser.push("\n").content == ""
    assert parser.flush().content == "\n"


def test_long_and_hostile_text_takes_little_time() -> None:
    started = time.thread_time()
    call = HERMES.replace("{}", '{"name": "stop", "arguments": {}}')
    many = ToolCallParser("hermes", TOOLS).push(call * (MAX_CALLS + 5))
    assert len(many.calls) == MAX_CALLS
    assert many.content == call * 5
    for form in FORMATS:
        for part in (
            '<tool_call>{"a',
            "<tool_call>stop<arg_key>",
            "{[",
            "[TOOL_CALLS][",
            "<｜tool▁call▁begin｜>function",
        ):
            assert read(form, part * 2000) == (part * 2000, [])
    assert time.thread_time() - started < 15  # some 3 s


@pytest.mark.parametrize("choice", ["required", "get_weather", "stop"])
@pytest.mark.parametrize("form", FORMATS)
def test_forced_calls_are_calls_whose_arguments_fit(form: str, choice: str) -> None:
    constraint = tool_constraint(TOOLS, choice, form, COMPILER)
    ids: list[int] = []
    while not constraint.finished:
        bias_V = torch.zeros(BYTES.vocab_size)
        constraint.mask(bias_V)
        allowed = (bias_V == 0).nonzero().flatten().tolist()
        if 256 in allowed and random.random() < 0.7:
            break
        ids.append(random.choice([token_id for token_id in allowed if token_id != 256]))
        constraint.accept(ids[-1])
        assert len(ids) < 20_000
    content, calls = read(form, BYTES.decode(ids))
    assert content == ""
    assert calls
    for name, arguments in calls:
        assert choice in ("required", name)
        if name == "stop":
            assert arguments == {}
            continue
        assert {"city", "days"} <= arguments.keys() <= WEATHER["properties"].keys()
        assert len(arguments["city"]) <= 8
        assert type(arguments["days"]) is int
        assert 0 <= arguments["days"] <= 99
        assert arguments.get("unit", "C") in "CF"
        assert arguments.get("code", "aa-1")[2] == "-"
        assert all(type(flag) is bool for flag in arguments.get("flags", []))


def test_forced_calls_begin_with_the_special_tokens_of_the_tokenizer() -> None:
    rust = tokenizers.Tokenizer.from_str(BYTES.to_json())
    rust.add_special_tokens(["[TOOL_CALLS]", "[ARGS]", "<other>"])
    tokenizer = Tokenizer(rust)
    assert visible_token_ids(tokenizer, "mistral_args") == (257, 258)
    assert visible_token_ids(tokenizer, "mistral") == (257,)
    assert visible_token_ids(tokenizer, "hermes") == visible_token_ids(BYTES, "mistral") == ()
    compiler = ConstraintCompiler(tokenizer, tokenizer.vocab_size, [256])
    constraint = tool_constraint(TOOLS, "stop", "mistral_args", compiler)
    for token_id in (257, *b"stop", 258, *b"{", *b"}"):
        bias_V = torch.zeros(tokenizer.vocab_size)
        constraint.mask(bias_V)
        assert bias_V[token_id] == 0
        assert bias_V[ord("[")] == -torch.inf
        constraint.accept(token_id)


def test_tools_that_cannot_be_forced_are_refused() -> None:
    with pytest.raises(UsageError, match=r"wants 'other'.*get_weather, stop"):
        tool_constraint(TOOLS, "other", "json", COMPILER)
    odd = read_tools(
        offered(odd={"type": "object", "anyOf": [{}]}, bad={"type": "object", "properties": {"a": {"type": "x"}}})
    )
    with pytest.raises(UsageError, match="'odd' have"):
        tool_constraint(odd, "odd", "glm4", COMPILER)
    with pytest.raises(UsageError, match="a tool's schema of parameters cannot be used: Invalid type: x"):
        tool_constraint(odd, "bad", "hermes", COMPILER)
    many = read_tools(offered(**{f"tool_{i}": WEATHER for i in range(128)}))
    for form in FORMATS:
        assert not tool_constraint(many, "required", form, COMPILER).finished


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ messages }}", None),
        ("{% if tools %}{{ tools }}{% endif %}", "json"),
        ('{% if tools %}<tool_call>\n{"name": ...}</tool_call>', "hermes"),
        ("{% if tools %}<tool_call>\n<function=f>\n<parameter=p>", "qwen3_coder"),
        ("{% if tools %}<tool_call>f\n<arg_key>k</arg_key>", "glm4"),
        ("{% if tools %}[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral"),
        ("{% if tools %}[TOOL_CALLS]f[ARGS]", "mistral_args"),
        ("{% if tools %}<｜tool▁calls▁begin｜>```json", "deepseek_v3"),
        ("{% if tools %}<｜tool▁calls▁begin｜>", "deepseek_v31"),
        ("{% if tools %}<|python_tag|>", "llama3"),
    ],
)
def test_the_form_is_found_in_the_template(template: str, form: str | None) -> None:
    assert tool_format(template) == form


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ({}, "must be a list"),
        (offered(**{f"t{i}": {} for i in range(129)}), "129 entries; at most 128"),
        ([{"type": "retrieval"}], r"tools\[0\] must be an object"),
        ([None], r"tools\[0\] must be an object"),
        (offered(**{"a b": {}}), r"'a b'; it must match"),
        (offered(**{"a" * 65: {}}), "must match"),
        (offered(a={}) * 2, r"tools\[1\].function.name is 'a', as that of another"),
        (offered(a={"type": "array"}), r"tools\[0\].function.parameters"),
        ([{"type": "function", "function": {"name": "a", "parameters": []}}], "parameters"),
        ([{"type": "function", "function": {"name": 3}}], "name is 3"),
    ],
)
def test_tools_are_checked(tools: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        read_tools(tools)
    assert read_tools([{"type": "function", "function": {"name": "a-B_9"}}])[0].name == "a-B_9"
