"""Grammars for answers that must call a tool, in the form of the chat template, with arguments as its schema says."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moesaic.engine.constraint import ConstraintCompiler, GrammarConstraint, json_rule, literal, regex_rule
from moesaic.errors import UsageError
from moesaic.server.tool_formats import FORMATS, FunctionTool, is_text
from moesaic.tokenizer import Tokenizer

_MOST_CALLS = 16  # in one answer; a model that repeats itself should come to an end
_APPLICATORS = ("$ref", "anyOf", "oneOf", "allOf")
_FURTHER_MARKERS = {
    "hermes": ("</tool_call>",),
    "qwen3_coder": ("</tool_call>",),
    "glm4": ("</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    "mistral_args": ("[ARGS]", "[CALL_ID]"),
    "deepseek_v3": ("<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    "deepseek_v31": ("<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
}


def visible_token_ids(tokenizer: Tokenizer, form: str) -> tuple[int, ...]:
    """The ids of special tokens that calls are made of: their names have to be in the text that is read for calls."""
    marks = {*FORMATS[form].markers, *FORMATS[form].around, *_FURTHER_MARKERS.get(form, ())}
    added = json.loads(tokenizer.to_json())["added_tokens"]
    return tuple(token["id"] for token in added if token["special"] and token["content"] in marks)


def tool_constraint(
    tools: Sequence[FunctionTool],
    tool_choice: str,
    form: str,
    compiler: ConstraintCompiler,
    *,
    parallel: bool = True,
) -> GrammarConstraint:
    """An answer that is one call of the tool named `tool_choice`, or with "required" of any, or several of them.

    Special tokens are used where the tokenizer has them for the form, so `visible_token_ids` have to be visible. In
    the forms that write arguments without quotes, the `format` of a string is not looked at. Raises UsageError where
    there is no such tool, and for schemas that cannot be used.
    """
    chosen = [tool for tool in tools if tool_choice in ("required", tool.name)]
    if not chosen:
        names = ", ".join(tool.name for tool in tools) or "none"
        raise UsageError(f"tool_choice wants {tool_choice!r:.80}, and the tools are: {names:.200}")
    grammar = _Grammar(compiler)
    many = parallel and tool_choice == "required"
    text = _WRITERS[form](grammar, chosen, _MOST_CALLS - 1 if many else 0)
    return compiler.grammar("\n".join([f"start: {text}", *grammar.rules]), "a tool's schema of parameters")


class _Grammar:
    """Rules beside `start`, by number."""

    def __init__(self, compiler: ConstraintCompiler) -> None:
        self.rules: list[str] = []
        self._compiler = compiler

    def mark(self, text: str) -> str:
        """A special token where there is one of this name, else the text."""
        token_id = self._compiler.special_id(text)
        return literal(text) if token_id is None else f"<[{token_id}]>"

    def rule(self, body: str, options: str = "", terminal: bool = False) -> str:
        name = f"{'T' if terminal else 'r'}{len(self.rules)}"
        self.rules.append(f"{name}{options}: {body}")
        return name

    def one_of(self, bodies: Sequence[str]) -> str:
        return self.rule(" | ".join(self.rule(body) for body in bodies))

    def text_until(self, schema: Mapping[str, Any], close: str) -> str:
        """Text as a schema of type string says, and the closing mark."""
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if values is not None:
            texts = [literal(value) for value in values if isinstance(value, str) and value]
            if not texts:
                raise UsageError("an argument of type string has an enum without texts; add one")
            return f"({' | '.join(texts)}) {self.mark(close)}"
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        kinds = [f"/(?s:.){{{least},{most}}}/" if least or most != "" else "/(?s:.)*/"]
        if isinstance(pattern := schema.get("pattern"), str):
            begin, end = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
            core = pattern[begin : len(pattern) - end]
            kinds.append(regex_rule(f"{'' if begin else '(?s:.)*'}(?:{core}){'' if end else '(?s:.)*'}"))
        terminal = self.rule(" & ".join(kinds), terminal=True)
        if (mark := self.mark(close)).startswith("<["):
            return f"{terminal} {mark}"
        return self.rule(terminal, f"[suffix={mark}]")


def _json_of(tool: FunctionTool) -> str:
    return json_rule({"type": "object", **tool.parameters})


def _json_object(tool: FunctionTool, key: str) -> str:
    """{"name": …, key: …}"""
    head = f"{{{literal('name')}: {literal(tool.name)}, {literal(key)}: "
    return f"{literal(head)} {_json_of(tool)} {literal('}')}"


def _several(call: str, more: int, between: str = "") -> str:
    return f"{call} ({between} {call}){{0,{more}}}" if more else call


def _hermes(grammar: _Grammar, tools: Sequence[FunctionTool], more: int) -> str:
    objects = grammar.one_of([_json_object(tool, "arguments") for tool in tools])
    line = literal("\n")
    call = grammar.rule(f"{grammar.mark('<tool_call>')} {line} {objects} {line} {grammar.mark('</tool_call>')}")
    return _several(call, more, line)


def _bare(key: str) -> Callable[[_Grammar, Sequence[FunctionTool], int], str]:
    """One call: nothing would divide it from the next."""
    return lambda grammar, tools, more: grammar.one_of([_json_object(tool, key) for tool in tools])


def _mistral(grammar: _Grammar, tools: Sequence[FunctionTool], more: int) -> str:
    objects = grammar.one_of([_json_object(tool, "arguments") for tool in tools])
    return f'{grammar.mark("[TOOL_CALLS]")} " "? "[" {_several(objects, more, literal(", "))} "]"'


def _mistral_args(grammar: _Grammar, tools: Sequence[FunctionTool], more: int) -> str:
    begin, args = grammar.mark("[TOOL_CALLS]"), grammar.mark("[ARGS]")
    return _several(grammar.one_of([f"{begin} {literal(t.name)} {args} {_json_of(t)}" for t in tools]), more)


def _deepseek(fenced: bool) -> Callable[[_Grammar, Sequence[FunctionTool], int], str]:
    def write(grammar: _Grammar, tools: Sequence[FunctionTool], more: int) -> str:
        def mark(name: str) -> str:
            return grammar.mark(f"<｜tool▁{name}｜>")

        def call(tool: FunctionTool) -> str:
            if not fenced:
                return f"{literal(tool.name)} {mark('sep')} {_json_of(tool)}"
            head, tail = literal(f"{tool.name}\n```json\n"), literal("\n```")
            return f"{literal('function')} {mark('sep')} {head} {_json_of(tool)} {tail}"

        calls = grammar.one_of([call(tool) for tool in tools])
        whole = grammar.rule(f"{mark('call▁begin')} {calls} {mark('call▁end')}")
        several = _several(whole, more, literal("\n") if fenced else "")
        return f"{mark('calls▁begin')} {several} {mark('calls▁end')}"

    return write


def _arguments(tool: FunctionTool, one: Callable[[str, Mapping[str, Any] | bool], str]) -> str:
    """The arguments one after the other, without those that may be missing or with them."""
    schema = tool.parameters
    if any(key in schema for key in _APPLICATORS):
        raise UsageError(
            f"the parameters of the tool {tool.name!r} have {' '.join(_APPLICATORS)} beside properties, which this "
            "model's form of calls has no grammar for; list them as properties, or use tool_choice auto"
        )
    required = schema.get("required", ())
    properties = {**schema.get("properties", {})}
    properties |= {key: True for key in required if key not in properties}
    known = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    parts = []
    for key, value in properties.items():
        rule = one(key, {**known, **value} if isinstance(value, dict) else value)
        parts.append(rule if key in required else f"({rule})?")
    return " ".join(parts)


def _glm4(grammar: _Grammar, tools: Sequence[FunctionTool], more: int) -> str:
    line = literal("\n")

    def call(tool: FunctionTool) -> str:
        def one(key: str, schema: Mapping[str, Any] | bool) -> str:
            head = f"{grammar.mark('<arg_key>')} {literal(key)} {grammar.mark('</arg_key>')} {line}"
            if isinstance(schema, dict) and is_text(tool.parameters, key):
                value = grammar.text_until(schema, "</arg_value>")
            else:
                value = f"{json_rule(schema)} {grammar.mark('</arg_value>')}"
            return grammar.rule(f"{head} {grammar.mark('<arg_value>')} {value} {line}")

        arguments = _arguments(tool, one)
        name = literal(f"{tool.name}\n")
        return f"{grammar.mark('<tool_call>')} {name} {arguments} {grammar.mark('</tool_call>')}"

    return _several(grammar.one_of([call(tool) for tool in tools]), more, line)


def _qwen3_coder(grammar: _Grammar, tools: Sequence[FunctionTool], more: int) -> str:
    line, close = literal("\n"), "\n</parameter>\n"

    def call(tool: FunctionTool) -> str:
        def one(key: str, schema: Mapping[str, Any] | bool) -> str:
            if isinstance(schema, dict) and is_text(tool.parameters, key):
                value = grammar.text_until(schema, close)
            else:
                value = f"{json_rule(schema)} {literal(close)}"
            return grammar.rule(f"{literal(f'<parameter={key}>{chr(10)}')} {value}")

        begin, end = literal(f"\n<function={tool.name}>\n"), literal("</function>\n")
        arguments = _arguments(tool, one)
        return f"{grammar.mark('<tool_call>')} {begin} {arguments} {end} {grammar.mark('</tool_call>')}"

    return _several(grammar.one_of([call(tool) for tool in tools]), more, line)


_WRITERS: Mapping[str, Callable[[_Grammar, Sequence[FunctionTool], int], str]] = {
    "hermes": _hermes,
    "qwen3_coder": _qwen3_coder,
    "glm4": _glm4,
    "mistral": _mistral,
    "mistral_args": _mistral_args,
    "deepseek_v3": _deepseek(fenced=True),
    "deepseek_v31": _deepseek(fenced=False),
    "llama3": _bare("parameters"),
    "json": _bare("arguments"),
}
