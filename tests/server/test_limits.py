"""What strangers send: keys that are wrong, bodies that are too large, too deep or no JSON, clients that hang up."""

import json
import socket
import threading
import time

import httpx
import pytest

from moesaic.config import EngineConfig
from moesaic.server import limits

from .helpers import NAME, Running, data_events, error_of, serving

ROUTES = [
    ("GET", "/v1/models"), ("GET", f"/v1/models/{NAME}"), ("POST", "/v1/chat/completions"), ("GET", "/metrics"),
    ("POST", "/v1/completions"), ("POST", "/v1/responses"), ("POST", "/tokenize"), ("POST", "/detokenize"),
    ("GET", "/live"), ("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/redoc"), ("GET", "/nothing"),
    ("POST", "/health/"), ("GET", "/page/x/../../metrics"), ("GET", "/page/%2e%2e/metrics"), ("GET", "/page"),
]  # fmt: skip


def test_every_route_but_health_and_the_page_needs_a_key() -> None:
    with serving(api_keys=["first", "sécond"]) as server:
        for method, path in ROUTES:
            for headers in (
                {},
                {"Authorization": "Bearer firs"},
                {"Authorization": "Bearer first2"},
                {"Authorization": "Bearer"},
                {"Authorization": "Basic first"},
                {"Authorization": "first"},
                {"X-Api-Key": "first"},
            ):
                response = server.http.request(method, path, headers=headers)
                error = error_of(response, 401)
                assert error["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/ready", "/"):
            assert server.http.get(path).status_code == 200
        for key in (b"first", "sécond".encode()):
            headers = [(b"Authorization", b"Bearer " + key)]
            assert server.http.get("/v1/models", headers=headers).status_code == 200
        assert server.http.get("/docs", headers={"Authorization": "Bearer first"}).status_code == 404


def test_bodies_are_read_no_further_than_the_limit(server: Running) -> None:
    announced = server.http.post("/v1/completions", json={"prompt": "x" * (limits.MAX_BODY + 1)})
    assert error_of(announced, 413)["code"] == "body_too_large"

    sent = 0

    def pieces():
        nonlocal sent
        yield b'{"prompt": "'
        while True:
            sent += 2**16
            yield b"x" * 2**16

    try:
        response = server.http.post("/v1/completions", content=pieces(), headers={"Content-Type": "application/json"})
        assert error_of(response, 413)["code"] == "body_too_large"
    except httpx.NetworkError:  # the answer was lost with the connection that was still being written to
        pass
    assert sent < limits.MAX_BODY + 2**24
    assert server.complete(max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"nonsense", b"[1, 2", b'{"prompt": NaN}', b'{"prompt": "a", "temperature": Infinity}', b"\xff\xfe",
        b'{"prompt": "\\ud800"}', b'{"prompt": "\xff"}', b'{"prompt": ' + b"1" * 10_000 + b"}",
        b'{"prompt": "a", "temperature": 1e999}', b"null", b"3", b'"text"', b"[]",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"metadata": ' + b'{"a":' * 70 + b"1" + b"}" * 70 + b', "prompt": "a"}',
        b"[" + b"{}," * 100_000 + b"{}]",
        b"{" + b",".join(b'"%d":1' % i for i in range(100_000)) + b"}",
        b'{"prompt": [' + b"1.5," * 100_000 + b"1]}",
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused_at_once(server: Running, body: bytes) -> None:
    start = time.perf_counter()
    response = server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    error_of(response, 400)
    assert time.perf_counter() - start < 3


def test_depth_up_to_the_limit_is_accepted(server: Running) -> None:
    for levels, status in ((limits.MAX_DEPTH - 1, 200), (limits.MAX_DEPTH, 400)):
        nested = b"[" * levels + b"]" * levels
        body = b'{"prompt": "a", "max_tokens": 1, "metadata": ' + nested + b"}"
        response = server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == status, response.text


def test_forms_of_web_pages_are_not_read(server: Running) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        response = server.http.post("/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": kind})
        assert error_of(response, 415)["code"] == "unsupported_media_type"


def raw_request(server: Running, path: str, body: dict) -> socket.socket:
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    connection = socket.create_connection((server.host, server.port), timeout=30)
    connection.sendall(head.encode() + text)
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 4])
def test_a_client_that_hangs_up_frees_its_memory(server: Running, stream: bool, n: int) -> None:
    body = {"prompt": "abc", "max_tokens": 500, "ignore_eos": True, "stream": stream, "n": n}
    connection = raw_request(server, "/v1/completions", body)
    server.wait_until(lambda: server.service.statistics().kv_blocks_used > 0)
    if stream:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    before = server.service.statistics().generated_tokens
    connection.close()
    server.wait_until(lambda: server.service.statistics().kv_blocks_used == 0, seconds=5)
    assert server.service.statistics().running == 0
    assert server.service.statistics().generated_tokens - before < 500 * n


def test_many_clients_that_hang_up_leave_nothing_behind(server: Running) -> None:
    body = {"prompt": "abc", "max_tokens": 500, "ignore_eos": True, "stream": True}
    connections = [raw_request(server, "/v1/completions", body) for _ in range(40)]
    server.wait_until(lambda: server.service.statistics().running > 0)
    for connection in connections:
        connection.close()
    server.wait_until(lambda: server.service.statistics().running + server.service.statistics().waiting == 0)
    assert server.service.statistics().kv_blocks_used == 0


def test_a_client_that_reads_slowly_holds_up_nobody_and_loses_nothing(server: Running) -> None:
    body = {"prompt": "abc", "max_tokens": 400, "ignore_eos": True, "stream": True, "logprobs": 20, "temperature": 0}
    slow = raw_request(server, "/v1/completions", body)
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    start = time.perf_counter()
    fast = server.complete("abc", max_tokens=400, ignore_eos=True).json()
    assert time.perf_counter() - start < 30
    server.wait_until(lambda: server.service.statistics().running == 0)
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
    received = b""
    while b"[DONE]" not in received:
        received += slow.recv(4096)
    slow.close()
    lines = [line for line in received.decode().splitlines() if line.startswith("data: ")]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == fast["choices"][0]["text"]


def test_what_is_too_much_is_refused_at_once_and_what_was_admitted_is_finished() -> None:
    with serving(config=EngineConfig(max_sequences=1, max_waiting=2)) as server:
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(httpx.post(
                f"{server.url}/v1/completions", timeout=60, trust_env=False,
                json={"prompt": "abc", "max_tokens": 200, "ignore_eos": True},
            ))  # fmt: skip

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [answer for answer in answers if answer.status_code != 200]
        assert 0 < len(refused) < 12
        for answer in refused:
            assert error_of(answer, 503)["code"] == "overloaded"
            assert int(answer.headers["retry-after"]) >= 1
        for answer in answers:
            if answer.status_code == 200:
                assert answer.json()["usage"]["completion_tokens"] == 200


def test_an_answer_that_takes_too_long_ends() -> None:
    with serving(request_seconds=0.05) as server:
        asked = {"max_tokens": 500, "ignore_eos": True}
        assert error_of(server.complete("abc", **asked), 504)["type"] == "timeout_error"
        response = server.complete("abc", stream=True, **asked)
        if response.status_code == 200:
            *_, failure, done = data_events(response.text)
            assert failure["error"]["code"] == "timeout"
            assert done == "[DONE]"
        server.wait_until(lambda: server.service.statistics().kv_blocks_used == 0)


def test_a_body_that_does_not_come_is_not_waited_for(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.1)
    with socket.create_connection((server.host, server.port), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
