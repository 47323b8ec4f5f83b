"""What chat templates may do, compared with transformers."""

import json
import random
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moesaic.chat_template import ChatTemplate, named_templates, read_text, template_files
from moesaic.errors import UsageError
from moesaic.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer

CHATML = """\
{%- if messages[0]['role'] != 'system' -%}
    {{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message.role == 'assistant' -%}
        {% generation %}{{ message['content'] }}{{ '<|im_end|>' }}{% endgeneration %}
    {%- else -%}
        {{ message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{ '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
INST = """\
{% set ns = namespace(system='', first=true) %}
{% for message in messages %}
{% if message.role == 'system' %}{% set ns.system = message.content | trim %}{% continue %}{% endif %}
{% if message.role == 'user' %}
{{ bos_token + '[INST] ' }}{% if ns.first and ns.system %}<<SYS>>
{{ ns.system }}
<</SYS>>

{% endif %}{% set ns.first = false %}{{ message.content | trim }} [/INST]
{%- elif message.role == 'assistant' %}
{{ ' ' ~ message.content | trim ~ ' ' ~ eos_token }}
{%- else %}{{ raise_exception('no role ' ~ message.role) }}{% endif %}
{% endfor %}"""
HEADERS = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system_message = "" %}{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" + system_message }}
{%- if tools is not none %}
    {{- "Functions:\\n" }}{% for t in tools %}{{ t | tojson(indent=4) }}{{ "\\n\\n" }}{% endfor %}
{%- endif %}{{ "<|eot_id|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}{{ raise_exception("one tool call at once") }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' ~ call.name ~ '", "parameters": ' }}
        {{- call.arguments | tojson }}{{ "}<|eot_id|>" }}
    {%- elif message.role == "tool" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {{- message.content | tojson if message.content is mapping else message.content }}{{ "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
THINKING = """\
{%- macro text_of(content) -%}
    {%- if content is string -%}{{ content }}
    {%- elif content is iterable -%}{% for part in content if part.type == 'text' %}{{ part.text }}{% endfor %}
    {%- endif -%}
{%- endmacro -%}
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}{{ "\\n" }}{{ tool | tojson }}{% endfor %}{{ "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- if documents %}
    {%- for d in documents %}{{ loop.index ~ ': ' ~ d.title ~ '\\n' ~ d.text ~ '\\n' }}{% endfor %}
{%- endif %}
{%- set ns = namespace(last=messages | length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = messages | length - 1 - loop.index0 %}
    {%- if ns.searching and message.role == "user" %}
        {%- set ns.searching = false %}{% set ns.last = index %}{% break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = text_of(message.content) %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}{% set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}{{ content }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{ call.name }}{{ '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}{{ '}\\n</tool_call>' }}
        {%- endfor %}{{ '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- else %}{{ '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
TEMPLATES = {"chatml": CHATML, "inst": INST, "headers": HEADERS, "thinking": THINKING}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What the weather is like: <b>é</b> & 'more'",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"minimum": 1.5}}},
    },
}
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    directory = tmp_path_factory.mktemp("theirs")
    byte_tokenizer().save(directory)
    return AutoTokenizer.from_pretrained(directory, bos_token="<s>", eos_token="</s>")


def with_templates(templates: object) -> Tokenizer:
    rust = byte_tokenizer()._rust
    return Tokenizer(rust, {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": templates})


def random_text() -> str:
    pieces = [
        "<think>a</think>",
        "'",
        '"',
        "<b>&amp;",
        "\n",
        "\n\n",
        " ",
        "é日🙂",
        "{{ x }}",
        "{% if %}",
        "\\n",
        "word",
        "1",
    ]
    return "".join(random.choices(pieces, k=random.randrange(1, 8)))


def random_messages(template: str) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": random_text()}] * random.randrange(2)
    for _ in range(random.randrange(1, 4)):
        messages.append({"role": "user", "content": random_text()})
        answer: dict[str, Any] = {"role": "assistant", "content": random_text()}
        if template in ("headers", "thinking"):
            arguments = {"city": random_text(), "days": random.random(), "deep": [None, True, {"a": 1}]}
            call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
            called = {"role": "assistant", "content": "", "tool_calls": [call]}
            messages += [called, {"role": "tool", "content": random_text()}] * random.randrange(2)
            answer |= random.choice([{}, {"tool_calls": None}])
        if template == "thinking":
            answer |= random.choice([{}, {"reasoning_content": random_text()}])
            messages[-1]["content"] = [{"type": "text", "text": random_text()}, {"type": "text", "text": "x"}]
        messages.append(answer)
    return messages[: len(messages) - random.randrange(2)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_published_kinds_of_templates_render_as_in_transformers(name: str, theirs: PreTrainedTokenizerBase) -> None:
    ours = with_templates(TEMPLATES[name])
    for _ in range(8):
        options: dict[str, Any] = {"add_generation_prompt": random.random() < 0.5}
        options |= random.choice([{}, {"tools": [TOOL] * random.randrange(1, 3)}])
        options |= random.choice([{}, {"documents": [{"title": random_text(), "text": random_text()}]}])
        options |= random.choice([{}, {"enable_thinking": random.random() < 0.5}, {"date_string": "1 May"}])
        messages = random_messages(name)
        expected = theirs.apply_chat_template(messages, chat_template=TEMPLATES[name], tokenize=False, **options)
        assert ours.apply_chat_template(messages, **options) == expected
        assert "hat" in str(expected) or len(str(expected)) > 10


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ {'b': '<é>', 'a': [1]} | tojson }}", '{"b": "<é>", "a": [1]}'),
        ("{{ {'b': 'é', 'a': [1]} | tojson(indent=1, sort_keys=true) }}", '{\n "a": [\n  1\n ],\n "b": "é"\n}'),
        ("{{ 'é' | tojson(ensure_ascii=true) }}{{ [1, 2] | tojson(separators=(',', ':')) }}", '"\\u00e9"[1,2]'),
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02345678"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% for i in range(9) %}{% generation %}{{ i }}{% break %}{% endgeneration %}{% endfor %}", "0"),
        ("{%- generation -%} a {%- endgeneration -%} b", "ab"),
        ("{% set ns = namespace(a=1, **{'b': 2}) %}{% set ns.a = ns.b + 5 %}{{ ns.a }}", "7"),
        ("{{ namespace([('c', 3)], self=4).c }}", "3"),
        ("{{ dict(a=1).items() | list }}{{ dict([('b', 2)]).b }}", "[('a', 1)]2"),
        ("{{ tools is none }} {{ documents is none }} {{ pad_token is defined }}", "True True False"),
        ("{{ messages[0].content.title() }}{{ messages[0]['content'][1:-1] }}{{ extra }}", "Helloell[1, 2]"),
        ("a\r\nb\n", "a\nb"),
        ("{{ '\\ud800' }}", "\ud800"),
        ("", ""),
    ],
)  # fmt: skip
def test_what_templates_use(template: str, expected: str) -> None:
    assert with_templates(template).apply_chat_template(HELLO["messages"], extra=[1, 2]) == expected


def test_the_date_is_that_of_this_machine() -> None:
    before = datetime.now().strftime("%d %b %Y %H")
    shown = ChatTemplate("{{ strftime_now('%d %b %Y %H') }}").render({})
    assert shown in (before, datetime.now().strftime("%d %b %Y %H"))


def test_later_calls_are_quick() -> None:
    tokenizer = with_templates(THINKING)
    messages = random_messages("thinking")
    tokenizer.apply_chat_template(messages)
    seconds = []
    for _ in range(100):
        started = time.perf_counter()
        tokenizer.apply_chat_template(messages)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.002


def test_sizes_are_limited() -> None:
    with pytest.raises(UsageError, match="1,048,577 characters"):
        ChatTemplate("x" * (2**20 + 1))
    assert ChatTemplate("x" * 2**20).render({}) == "x" * 2**20
    long = "🙂" * 2**22
    assert ChatTemplate("{{ text }}").render({"text": long}) == long


@pytest.mark.parametrize("value", [object(), {1, 2}, b"x", pytest, {(1, 2): 3}])
def test_variables_must_be_json(value: object) -> None:
    deep: list[object] = []
    deep.append(deep)
    for variable in (value, deep):
        with pytest.raises(UsageError, match="JSON"):
            ChatTemplate("").render({"x": variable})


def test_named_templates() -> None:
    assert named_templates(None) == {}
    assert named_templates("a") == {"default": "a"}
    assert named_templates([{"name": "x", "template": "a"}, {"name": "default", "template": "b", "more": 1}]) == {
        "x": "a",
        "default": "b",
    }
    for wrong in (1, {}, {"default": "a"}, ["a"], [{"name": "x"}], [{"name": 1, "template": "a"}], [None], True):
        with pytest.raises(UsageError, match="neither a text nor a list"):
            named_templates(wrong)


def test_files_and_names_as_transformers_reads_them(tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    in_settings = [{"name": "default", "template": "settings"}, {"name": "tool_use", "template": "settings tools"}]
    extra = tmp_path / "additional_chat_templates"

    def both(tools: list[Any] | None = None) -> str:
        ours = load_tokenizer(tmp_path).apply_chat_template(HELLO["messages"], tools=tools)
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        assert theirs.apply_chat_template(HELLO["messages"], tools=tools, tokenize=False) == ours
        load_tokenizer(tmp_path).save(tmp_path / "copy")
        assert load_tokenizer(tmp_path / "copy").apply_chat_template(HELLO["messages"], tools=tools) == ours
        return ours

    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": in_settings}))
    assert (both(), both([TOOL])) == ("settings", "settings tools")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert (both(), both([TOOL])) == ("file", "file")
    extra.mkdir()
    (extra / "tool_use.jinja").write_text("file tools")
    (extra / "default.jinja").write_text("never")
    (extra / "readme.txt").write_text("never")
    assert template_files(tmp_path) == {"default": "file", "tool_use": "file tools"}
    (extra / "default.jinja").unlink()
    assert (both(), both([TOOL])) == ("file", "file tools")
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "settings"}))
    ours = load_tokenizer(tmp_path)
    assert ours.apply_chat_template(HELLO["messages"]) == "settings"
    assert ours.apply_chat_template(HELLO["messages"], tools=[TOOL]) == "file tools"


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path)
    file = tmp_path / "chat_template.jinja"
    sizes = ((b"x" * 2**21, "2,097,152 characters"), (b"x" * 2**23, "8,388,608 bytes"))
    for content, message in ((b"\xff", "UTF-8 at byte 0"), *sizes):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=message) as caught:
            load_tokenizer(tmp_path)
        assert str(tmp_path) in str(caught.value)
    with pytest.raises(UsageError, match="not a file"):
        read_text(tmp_path, 10)
