"""Clients that hang up, do not read, or are far too many, and a server that is told to stop in the middle of it."""

import gc
import importlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest
import torch
from uvicorn.protocols.http.h11_impl import H11Protocol

from moesaic.checkpoint.save import export_model
from moesaic.config import EngineConfig, MoEConfig
from moesaic.engine.engine import Engine
from moesaic.engine.request import Delta
from moesaic.server import streaming

from .helpers import CONFIG, Running, make_model, make_tokenizer, serving

CLIENTS = 200
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LONG = {"prompt": "abc", "ignore_eos": True, "temperature": 0}


class Steps:
    """What each step of an engine did, and how many texts were unwanted before it began."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.unwanted: list[int] = []
        self.submitted = 0
        self.log: list[tuple[int, int, list[int]]] = []
        """Texts that were cancelled before the step, blocks in use after it, handles of which it told something."""
        self.gate = threading.Event()
        self.gate.set()
        self._engine = engine
        self._step, self._cancel, self._submit_all = engine.step, engine.cancel, engine.submit_all
        for name in ("step", "cancel", "submit_all"):
            monkeypatch.setattr(engine, name, getattr(self, name))

    def step(self) -> list[tuple[int, Delta]]:
        self.gate.wait()
        before = len(self.unwanted)
        deltas = self._step()
        self.log.append((before, self._engine.scheduler.pool.num_used, [handle for handle, _ in deltas]))
        return deltas

    def cancel(self, handle: int) -> None:
        self._cancel(handle)
        self.unwanted.append(handle)

    def submit_all(self, requests: list[Any]) -> list[int]:
        handles = self._submit_all(requests)
        self.submitted += len(handles)
        return handles

    def check_all_ended_at_once(self, count: int) -> None:
        """One step after the last client's end was noticed nothing is in use, and no text goes on after its own."""
        assert len(set(self.unwanted)) == len(self.unwanted) == count
        first = next(index for index, (before, _, _) in enumerate(self.log) if before == count)
        assert self.log[first][1] == 0
        for before, _, told in self.log:
            assert not set(told) & set(self.unwanted[:before])


def send(server: Running, body: dict[str, Any], receive_buffer: int | None = None) -> socket.socket:
    text = json.dumps(body).encode()
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(60)
    connection.connect((server.host, server.port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
    connection.sendall(f"{head}\r\n\r\n".encode() + text)
    return connection


def hang_up(connections: list[socket.socket]) -> None:
    """Every second one without a word of farewell."""
    for index, connection in enumerate(connections):
        if index % 2:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


def open_connections() -> list[H11Protocol]:
    """Of all servers in this process."""
    found = [thing for thing in gc.get_objects() if type(thing) is H11Protocol]
    return [thing for thing in found if thing.transport is not None and thing.transport._sock is not None]  # type: ignore[attr-defined]


@contextmanager
def crowded(monkeypatch: pytest.MonkeyPatch, **more: Any) -> Iterator[tuple[Running, Steps]]:
    config = EngineConfig(
        **{"max_sequences": CLIENTS, "max_waiting": 2 * CLIENTS, "max_model_tokens": 1500, "prefix_cache": False} | more
    )
    with serving(config=config) as server:
        before = server.complete(max_tokens=20).json()["choices"]
        steps = Steps(server.service.engine, monkeypatch)
        yield server, steps
        server.wait_until(lambda: not server.service.engine.has_work)
        assert server.service.statistics().running == server.service.statistics().waiting == 0
        assert server.complete(max_tokens=20).json()["choices"] == before


def test_200_clients_that_hang_up_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    with crowded(monkeypatch) as (server, steps):
        body = LONG | {"max_tokens": 1400, "stream": True}
        connections = [send(server, body) for _ in range(CLIENTS)]
        for connection in connections:
            received = b""
            while b"data: " not in received:
                received += connection.recv(4096)
        assert server.service.statistics().running == CLIENTS
        assert server.service.statistics().kv_blocks_used >= CLIENTS
        start = time.perf_counter()
        hang_up(connections)
        server.wait_until(lambda: server.service.statistics().kv_blocks_used == 0)
        print(f"no block in use {1e3 * (time.perf_counter() - start):.0f} ms after the first of {CLIENTS} hung up")
        steps.check_all_ended_at_once(CLIENTS)
        assert server.service.statistics().finished["cancelled"] == CLIENTS


@pytest.mark.parametrize("max_sequences", [8, CLIENTS])
def test_200_clients_that_hang_up_before_the_first_token(monkeypatch: pytest.MonkeyPatch, max_sequences: int) -> None:
    """The engine stands still until the last one has gone, so that none can have had a token."""
    with crowded(monkeypatch, max_sequences=max_sequences) as (server, steps):
        steps.gate.clear()
        generated = server.service.statistics().generated_tokens
        bodies = [LONG | {"max_tokens": 1400, "stream": index % 3 > 0} for index in range(CLIENTS)]
        connections = [send(server, body) for body in bodies]
        server.wait_until(lambda: steps.submitted == CLIENTS)
        hang_up(connections)
        server.wait_until(lambda: len(steps.unwanted) == CLIENTS)
        steps.gate.set()
        server.wait_until(lambda: not server.service.engine.has_work)
        # The engine may have stood before its first step with texts, or already in it.
        steps.check_all_ended_at_once(CLIENTS)
        assert server.service.statistics().generated_tokens == generated


def test_clients_that_hang_up_while_they_send_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with crowded(monkeypatch) as (server, steps):
        connections = []
        for index in range(CLIENTS):
            connection = socket.create_connection((server.host, server.port))
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"[: index + 1])
            connections.append(connection)
        assert server.complete(max_tokens=1).status_code == 200  # all of them hold nobody up
        hang_up(connections)
        server.wait_until(lambda: len(open_connections()) <= 1)
        assert steps.submitted == 1


def test_slow_readers_hold_nobody_up_and_fill_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """They stop reading, or read a byte at a time; what they do not take waits in a buffer of bounded size."""
    count, most = 12, 2**17
    with crowded(monkeypatch) as (server, steps):
        expected = server.complete("fast", max_tokens=50, ignore_eos=True).json()["choices"]
        steps.gate.clear()
        large = LONG | {"max_tokens": 150, "stream": True, "n": 2, "logprobs": 20, "return_routed_experts": True}
        slow = [send(server, large, receive_buffer=4096) for _ in range(count)]
        server.wait_until(lambda: len(open_connections()) >= count)
        for each in open_connections():  # or the system would keep megabytes of each
            each.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        server.wait_until(lambda: steps.submitted == 1 + 2 * count)
        steps.gate.set()
        stop, largest = threading.Event(), 0

        def sip() -> None:
            while not stop.wait(0.02):
                for connection in slow[: count // 2]:
                    assert connection.recv(1)

        sipping = threading.Thread(target=sip)
        sipping.start()
        while not largest or server.service.statistics().running:
            answer = server.complete("fast", max_tokens=50, ignore_eos=True)
            assert answer.json()["choices"] == expected
            largest = max(largest, *(each.transport.get_write_buffer_size() for each in open_connections()))
        stop.set()
        sipping.join()
        print(f"largest buffer of {count} slow readers: {largest:,} bytes")
        assert server.service.statistics().finished["length"] >= 2 * count  # all were written to their ends
        assert largest < most
        assert sum(not each.transport.is_closing() for each in open_connections()) >= count  # and wait to be read
        hang_up(slow)
        server.wait_until(lambda: len(open_connections()) <= 1)


def test_whoever_never_reads_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server ends the answer; the system keeps what was written until the client reads it or is gone."""
    monkeypatch.setattr(streaming, "READ_SECONDS", 0.5)
    with serving(config=EngineConfig(max_sequences=8, max_model_tokens=1000), request_seconds=2) as server:
        body = LONG | {"max_tokens": 60, "stream": True, "n": 4, "logprobs": 20, "return_routed_experts": True}
        connection = send(server, body, receive_buffer=4096)
        server.wait_until(lambda: len(open_connections()) >= 1)
        for each in open_connections():
            each.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        server.wait_until(lambda: server.service.statistics().generated_tokens > 100)
        server.wait_until(lambda: server.service.statistics().kv_blocks_used == 0)
        assert any(each.transport.get_write_buffer_size() for each in open_connections())
        server.wait_until(lambda: all(each.transport.is_closing() for each in open_connections()))
        connection.close()
        server.wait_until(lambda: not open_connections())


@pytest.fixture(scope="module")
def model_directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model whose steps take some milliseconds."""
    torch.manual_seed(request.config.option.seed)
    moe = MoEConfig(num_experts=16, num_experts_per_tok=2, moe_intermediate_size=128)
    sizes: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 16, "moe": moe}
    directory = tmp_path_factory.mktemp("models") / "tiny"
    export_model(make_model(replace(CONFIG, **sizes, initializer_range=0.05)), make_tokenizer(), directory)
    return directory


@contextmanager
def process_of(directory: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`moesaic serve` and its port, once it takes requests."""
    log = directory.parent / f"serve {len(list(directory.parent.iterdir()))}.log"
    command = [sys.executable, "-m", "moesaic", "serve", str(directory), "--port", "0", "--no-prefix-cache", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("wb") as stderr, subprocess.Popen(command, stderr=stderr, env=environment) as process:
        try:
            deadline = time.monotonic() + 60
            while "serving " not in (text := log.read_text()):
                assert process.poll() is None, text
                assert time.monotonic() < deadline
                time.sleep(0.05)
            url = next(line for line in text.splitlines() if line.startswith("serving ")).split()[-1]
            with httpx.Client(base_url=url, trust_env=False) as http:
                while True:
                    try:
                        if http.get("/ready").status_code == 200:
                            break
                    except httpx.TransportError:
                        pass
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            yield process, int(url.rpartition(":")[2])
        finally:
            process.kill()


@pytest.fixture(scope="module")
def crowd() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("inference.crowd")


def test_ten_times_too_many_are_refused_and_nobody_is_lost(model_directory: Path, crowd: Any) -> None:
    """Medians, since this machine may have other work; the benchmark looks at the 99th percentile for a minute."""
    with process_of(model_directory, "--max-sequences", "8", "--max-waiting", "4", "--allowed-host", "x") as (_, port):
        crowd.Crowd(crowd.Load(port=port, seconds=0.5, clients=8)).told()
        alone = crowd.Crowd(crowd.Load(port=port, seconds=2, clients=8)).told()
        alone = [each for each in alone if each.status == 200]
        capacity = len(alone) / (max(each.last for each in alone) - alone[0].sent)
        told = crowd.Crowd(crowd.Load(port=port, seconds=5, per_second=10 * capacity)).told()
    admitted = [each for each in told if each.status == 200]
    refused = [each for each in told if each.status == 503]
    assert len(admitted) + len(refused) == len(told), Counter(each.status for each in told)
    assert all(each.complete for each in admitted)
    assert all(each.retry_after for each in refused)
    assert len(refused) > len(told) / 2
    assert len(admitted) > capacity  # one second's worth
    ratio = median(each.per_token for each in admitted) / median(each.per_token for each in alone)
    wait = median(each.to_status for each in refused)
    print(f"{len(told)} sent at 10 x {capacity:.0f}/s: time per token x {ratio:.2f}, refused in {1e3 * wait:.0f} ms")
    assert ratio < 4
    assert wait < 0.5


def test_sigterm_under_load_finishes_what_was_admitted(model_directory: Path, crowd: Any) -> None:
    drain = 30
    flags = ("--max-sequences", "4", "--max-waiting", "8", "--drain-timeout", str(drain), "--allowed-host", "x")
    with process_of(model_directory, *flags) as (process, port):
        load = crowd.Crowd(crowd.Load(port=port, seconds=3, per_second=60, new_tokens=64))
        time.sleep(1.5)
        told_to_stop = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=drain + 10) == 0
        took = time.monotonic() - told_to_stop
        told = load.told()
    assert took < drain
    begun = [each for each in told if each.sent < told_to_stop - 0.5]
    assert {each.status for each in begun} <= {200, 503}
    admitted = [each for each in told if each.status == 200]
    assert sum(each.last > told_to_stop for each in admitted) >= 4
    assert all(each.complete for each in admitted)
    end = max(each.last for each in admitted)
    late = [each for each in told if told_to_stop + 0.5 < each.sent < end - 0.5]
    assert {each.status for each in late} <= {503}
    assert all(each.retry_after for each in told if each.status == 503)
    assert all(each.sent > end - 0.5 for each in told if each.status == 0), "only when the rest was finished"
    assert {each.status for each in told} <= {200, 503, 0}
    print(
        f"{len(admitted)} of {len(told)} finished, the last {end - told_to_stop:.2f} s after the signal; {took:.2f} s"
    )
