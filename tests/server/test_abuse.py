"""Requests that are meant to hurt: made up by a program, too large, too deep, with bombs in them or without a key. Each
is answered soon, and no other client is the worse for it."""

import importlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

import httpx
import pytest
import torch

from moesaic import chat_template
from moesaic.config import EngineConfig
from moesaic.server import limits
from moesaic.server.app import POSTS, create_app

from .helpers import CONFIG, NAME, TEMPLATE, Running, data_events, error_of, make_model, make_tokenizer, serving

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PATHS = [path for path, _, _ in POSTS]
ANSWER_SECONDS = 30.0
"""In which even the worst request has an answer on a machine that has much else to do."""
GAP_SECONDS = 3.0
"""The longest silence that another client may hear on such a machine; the benchmark measures it on a calm one."""
JSON = {"Content-Type": "application/json"}


class Bystander:
    """A client who asks for the same long text again and again, while others do their worst."""

    def __init__(self, server: Running) -> None:
        self.texts: set[str] = set()
        self.gaps: list[float] = []
        self._server, self._stop = server, False
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Bystander":
        self._thread.start()
        self._server.wait_until(lambda: len(self.gaps) > 10)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop = True
        self._thread.join()
        if error is None:
            assert len(self.texts) == 1
            assert max(self.gaps) < GAP_SECONDS
            print(f"largest silence {1e3 * max(self.gaps):.0f} ms, median {1e3 * median(self.gaps):.1f} ms")

    def _watch(self) -> None:
        body = {"prompt": "undisturbed", "max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": True}
        with httpx.Client(base_url=self._server.url, timeout=ANSWER_SECONDS, trust_env=False) as http:
            while not self._stop:
                lines, last = [], 0.0
                with http.stream("POST", "/v1/completions", json=body) as response:
                    for line in response.iter_lines():
                        now = time.perf_counter()
                        if line.startswith("data: {"):
                            lines.append(line)
                            self.gaps += [now - last] if last else []
                            last = now
                self.texts.add("".join(event["choices"][0]["text"] for event in data_events("\n".join(lines))))


def test_made_up_requests_have_answers_of_the_right_shape(seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        made_up = importlib.import_module("inference.made_up")
    with serving(config=EngineConfig(max_sequences=8, max_model_tokens=96)) as server:
        description = create_app(server.service, model_name=NAME).openapi()
        answers = made_up.ask_made_up(server.url, description, NAME, count=200, seed=seed)
        assert not answers.faults, "\n".join(answers.faults[:3])
        assert answers.count > 150
        assert answers.succeeded > 0.3 * answers.count
        assert answers.streams > 20
        assert answers.slowest < ANSWER_SECONDS
        server.wait_until(lambda: server.service.statistics().kv_blocks_used == 0)
        assert server.service.healthy


def no_requests() -> dict[str, bytes]:
    """Bodies that are refused on every route."""
    deep, digits = 100_000, b"9" * 100_000
    return {
        "arrays": b"[" * deep + b"]" * deep,
        "arrays without an end": b'{"model": ' + b"[" * deep,
        "objects": b'{"model": ' + b'{"a":' * deep + b"1" + b"}" * deep + b"}",
        "huge integer": b'{"model": ' + digits + b"}",
        "huge exponent": b'{"model": 1e' + digits + b"}",
        "huge fraction": b'{"model": 0.' + digits + b"}",
        "bytes": bytes(range(256)) * 100,
        "half a character": b'{"model": "\xe2\x82"}',
        "surrogate": b'{"model": "\\ud83d"}',
        "wrong key": b'{"\xff": 1}',
        "UTF-16": '{"model": "tiny"}'.encode("utf-16"),
        "many keys": b"{" + b",".join(b'"key %d": 1' % i for i in range(200_000)) + b"}",
        "the same key": b'{"model": "tiny"' + b', "model": 3' * 200_000 + b"}",
        "many values": b'{"model": [' + b"0," * 500_000 + b"0]}",
        "comments": b'{"model": "tiny" /* here */}',
        "two bodies": b"{}{}",
    }


TOO_MANY = {"objects", "many keys", "the same key", "text that is deep"}
"""Lists, objects and names, to be read at all."""


def test_what_is_no_request_is_refused_while_others_are_served(server: Running) -> None:
    with Bystander(server):
        for path in PATHS:
            for name, body in no_requests().items():
                start = time.perf_counter()
                response = server.http.post(path, content=body, headers=JSON)
                error_of(response, 413 if name in TOO_MANY else 400)
                assert time.perf_counter() - start < ANSWER_SECONDS, name
                assert len(response.content) < 2000


def test_of_equal_keys_the_last_one_counts(server: Running) -> None:
    body = b'{"prompt": "a", "max_tokens": 400, "max_tokens": 3, "max_tokens": 2, "ignore_eos": true}'
    answer = server.http.post("/v1/completions", content=body, headers=JSON).json()
    assert answer["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("chunked", [False, True])
def test_ten_megabytes_are_not_read(server: Running, chunked: bool) -> None:
    """Announced, nothing of the body is read; in pieces without an end, no more than the limit."""
    piece = b"x" * 2**16
    framed = b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {10 * 2**20}"
    with Bystander(server):
        for path in PATHS:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
            with socket.create_connection((server.host, server.port), timeout=ANSWER_SECONDS) as connection:
                connection.sendall(head.encode())
                sent, received = 0, b""
                try:
                    while chunked:
                        connection.sendall(framed)
                        sent += len(piece)
                        assert sent < limits.MAX_BODY + 2**24  # what lies between the two programs
                    while part := connection.recv(2**16):  # until the server closes
                        received += part
                except (ConnectionResetError, BrokenPipeError):
                    pass  # the server has closed in the middle of what we send
                if not chunked:
                    head, _, body = received.partition(b"\r\n\r\n")
                    assert head.startswith(b"HTTP/1.1 413 ")
                    assert json.loads(body)["error"]["code"] == "body_too_large"


CHAIN = {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(6000)} | {"6000": True}
BOMBS: dict[str, tuple[str, dict[str, Any]]] = {
    "references": ("/v1/completions", {"guided_json": {"$ref": "#/$defs/0", "$defs": CHAIN}}),
    "text that is deep": ("/v1/completions", {"guided_json": '{"not":' * 100_000 + "{}" + "}" * 100_000}),
    "enum": ("/v1/chat/completions", {"json_schema": {"enum": [f"value {i}" for i in range(100_000)]}}),
    "itself": ("/v1/responses", {"json_schema": {"$ref": "#"}}),
    "long array": ("/v1/responses", {"json_schema": {"type": "array", "minItems": 10**7, "items": {"const": 1}}}),
    "patterns": (
        "/v1/chat/completions",
        {"json_schema": {"allOf": [{"type": "string", "pattern": f"(.*a.{{{i}}}|b.*c.{{9}})"} for i in range(5, 40)]}},
    ),
    "states": ("/v1/completions", {"guided_regex": "(.|\n)*a(.|\n){2000}"}),
    "repetition": ("/v1/chat/completions", {"structured_outputs": {"regex": "(a{1000}){1000}{1000}"}}),
    "parentheses": ("/v1/completions", {"guided_regex": "(" * 50_000 + ")" * 50_000}),
    "ambiguity": ("/v1/completions", {"guided_grammar": 'start: e\ne: e e | e e e | "a" | '}),
    "doubling": (
        "/v1/chat/completions",
        {"guided_grammar": "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(60)) + '\na60: "a"?'},
    ),
    "choices": ("/v1/completions", {"guided_choice": [f"{i} {'c' * 1000}" for i in range(1000)]}),
    "tool": (
        "/v1/chat/completions",
        {"tool": {"properties": {"a": {"type": "string", "pattern": "(a{1000}){1000}{1000}"}}}},
    ),
}  # fmt: skip


def bomb(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The whole body."""
    fields = dict(fields)
    prompt: dict[str, Any] = {"prompt": "a", "max_tokens": 60}
    if path == "/v1/chat/completions":
        prompt = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 60}
    elif path == "/v1/responses":
        prompt = {"input": "a", "max_output_tokens": 60}
    if (schema := fields.pop("json_schema", None)) is not None:
        if path == "/v1/responses":
            fields["text"] = {"format": {"type": "json_schema", "name": "a", "schema": schema}}
        else:
            fields["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    if (parameters := fields.pop("tool", None)) is not None:
        function = {"name": "f", "parameters": {"type": "object", **parameters}}
        fields |= {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    return prompt | fields


def test_schemas_and_grammars_hurt_only_who_sends_them(server: Running) -> None:
    """A text may also begin and then turn out to cost too much: that is an error of its own text, with a reason."""
    server.complete(guided_regex="[a-z]{3}", max_tokens=5)  # from here on all that is needed runs
    with Bystander(server), ThreadPoolExecutor(len(BOMBS)) as clients:

        def ask(name: str) -> tuple[httpx.Response, float]:
            start = time.perf_counter()
            path, fields = BOMBS[name]
            response = httpx.post(
                server.url + path, json=bomb(path, fields), timeout=10 * ANSWER_SECONDS, trust_env=False
            )
            return response, time.perf_counter() - start

        for name, (response, seconds) in zip(BOMBS, clients.map(ask, BOMBS), strict=True):
            assert seconds < 4 * ANSWER_SECONDS, name  # one after the other, each with its 2 s of processor time
            if response.status_code == 500:
                assert "structured output" in error_of(response, 500)["message"], name
            elif response.status_code != 200:
                error_of(response, 413 if name in TOO_MANY else 400)
    assert server.complete(guided_regex="[a-z]{3}", max_tokens=5).json()["choices"][0]["finish_reason"] == "stop"


HOSTILE = (
    "{% set word = messages[0].content %}"
    "{% if word == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    "{% if word == 'memory' %}{{ ('x' * 2**29) ~ ('y' * 2**30) }}{% endif %}"
    "{% if word == 'text' %}{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}{% endif %}"
    "{% if word == 'python' %}{{ messages.__class__.__mro__[1].__subclasses__() }}{% endif %}"
    "{% if word == 'raise' %}{{ raise_exception('no ' * 9999) }}{% endif %}"
) + TEMPLATE


def test_templates_hurt_only_chats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose template runs without an end waits for its own end alone; prompts that need none are read meanwhile."""
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 1.0)
    words = ["loop", "loop", "memory", "text", "python", "raise"]
    with serving(tokenizer=make_tokenizer(HOSTILE)) as server, ThreadPoolExecutor(len(words)) as clients:
        before = server.chat("good", max_tokens=5).json()["choices"]
        with Bystander(server):

            def ask(word: str) -> httpx.Response:
                body = {"messages": [{"role": "user", "content": word}]}
                return httpx.post(
                    f"{server.url}/v1/chat/completions", json=body, timeout=2 * ANSWER_SECONDS, trust_env=False
                )

            asked = [clients.submit(ask, word) for word in words]
            time.sleep(0.3)
            assert server.complete("read at once", max_tokens=1).status_code == 200
            assert not all(each.done() for each in asked)
            for each in asked:
                error = error_of(each.result(), 400)
                assert error["param"] == "messages"
                assert "chat template" in error["message"]
        assert server.chat("good", max_tokens=5).json()["choices"] == before


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")
KEY = "sk-the-right-one"
WRONG: tuple[list[tuple[bytes, bytes]], ...] = (
    [],
    [(b"Authorization", b"Bearer sk-the-right-on")],
    [(b"Authorization", b"Bearer \xff\xfe")],
    [(b"Authorization", b"Bearer " + b"a" * 30_000)],
)


def test_without_the_key_every_route_and_method_says_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """Whether there is something at an address, or in a body, is not told."""
    caplog.set_level(logging.DEBUG, "moesaic")
    told = set()
    with serving(api_keys=[KEY]) as server:
        app = create_app(server.service, model_name=NAME, api_keys=[KEY])
        paths = {getattr(route, "path", "").replace("{name:path}", NAME) for route in app.routes}
        paths -= {"", "/", "/health", "/ready", "/page/{name}"}
        assert paths >= {*PATHS, "/v1/models", "/metrics", "/live"}
        for path in [*sorted(paths), "/v1/models/", "//v1/models", "/v1/nothing", "/page/a/b", f"/v1/models?key={KEY}"]:
            for method in METHODS:
                for wrong in WRONG:
                    response = server.http.request(method, path, headers=wrong)
                    assert response.status_code == 401, (method, path)
                    hidden = dict(response.headers) | {"date": ""}
                    told.add((response.text if method != "HEAD" else "", tuple(sorted(hidden.items()))))
                    if method != "HEAD":
                        assert error_of(response, 401)["type"] == "authentication_error"
        assert len({headers for _, headers in told}) == 1
        assert len({text for text, _ in told if text}) == 1
        assert KEY not in str(told)
        assert KEY not in caplog.text
        assert server.service.statistics().steps == 0


def test_a_body_of_a_stranger_is_not_looked_at(server: Running) -> None:
    with serving(api_keys=[KEY]) as guarded:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n{"
        with socket.create_connection((guarded.host, guarded.port), timeout=ANSWER_SECONDS) as connection:
            connection.sendall(head)
            assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compare, compared = limits.hmac.compare_digest, []

    def recorded(first: bytes, second: bytes) -> bool:
        compared.append(second)
        return compare(first, second)

    monkeypatch.setattr(limits.hmac, "compare_digest", recorded)
    keys = ["first", "second", "third"]
    with serving(api_keys=keys) as server:
        for shown in ("f", "first", "second", "third", "x" * 1000):
            compared.clear()
            status = server.http.get("/v1/models", headers={"Authorization": f"Bearer {shown}"}).status_code
            assert status == (200 if shown in keys else 401)
            assert compared == [key.encode() for key in keys]


@pytest.fixture
def poisoned() -> Iterator[tuple[Running, int]]:
    """A server whose model cannot compute one token."""
    model, poison = make_model(), 200
    with torch.no_grad():
        model.embed_tokens.weight[poison] = torch.nan
    with serving(model, config=EngineConfig(max_sequences=16, max_model_tokens=256)) as server:
        yield server, poison


def test_a_request_that_the_model_cannot_compute_fails_alone(poisoned: tuple[Running, int]) -> None:
    server, poison = poisoned
    asked: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True, "logit_bias": {str(poison): -100}}
    good = [torch.randint(0, poison, (n,)).tolist() for n in (3, 20, 70, 90)]
    alone = [server.complete(prompt, **asked).json()["choices"] for prompt in good]
    bad = [[*good[1][:17], poison, *good[1]], [poison], [*good[2], poison]]
    mixed = [prompt for pair in zip(good, [*bad, bad[0]], strict=True) for prompt in pair] * 2
    with ThreadPoolExecutor(len(mixed)) as clients:

        def ask(prompt: list[int]) -> httpx.Response:
            body = {"prompt": prompt, "temperature": 0, **asked}
            return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60, trust_env=False)

        for prompt, response in zip(mixed, clients.map(ask, mixed), strict=True):
            if poison in prompt:
                error = error_of(response, 500)
                assert error["type"] == "server_error"
                assert "numbers" in error["message"]
            else:
                assert response.json()["choices"] == alone[good.index(prompt)]
    streamed = server.complete(bad[1], stream=True, **asked)
    assert error_of(streamed, 500)["message"] == error["message"]
    statistics = server.service.statistics()
    assert statistics.finished["error"] == 9
    assert statistics.kv_blocks_used == 0
    assert server.service.healthy
    assert CONFIG.vocab_size > poison
