"""A server among those who mean it harm: made-up requests, ten times too many clients, hang-ups, hostile bodies.

Ours is `moesaic serve` in a process of its own with one thread for the model, a random model of 43 million parameters,
and room for 8 texts at a time and 2 that wait; clients are in other processes and speak HTTP by hand.

*Unloaded* is a full server with an empty queue: 8 clients, each of which asks again when it has its answer. Ten times
too many is an open load of ten times the answers per second that those got. The wait for the first token of who waits
in the queue is that of the queue, so it is also set beside a queue that is full without anybody being refused.
"""

import argparse
import json
import socket
import struct
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from common import Row, note, run_benchmark
from inference.crowd import Crowd, Load, Told, quantile
from inference.serving import MODEL_NAME, serving

from moesaic.config import ModelConfig, MoEConfig
from moesaic.tokenizer import Tokenizer, byte_tokenizer

SIDE_BY_SIDE, WAITING = 8, 2
OVERLOAD = 10
CLIENTS = 200
CONFIG = ModelConfig(
    vocab_size=257,
    hidden_size=512,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=2048,
    moe=MoEConfig(num_experts=16, num_experts_per_tok=2, moe_intermediate_size=256),
)
TEMPLATE = "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}[assistant]"


def measure(arguments: argparse.Namespace) -> Sequence[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        small, large = Path(temporary) / "small", Path(temporary) / "large"
        write_model(small, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
        write_model(large)
        if arguments.only in (None, "made-up"):
            with serving(small, "--max-model-tokens", "96", threads=1) as port:
                rows += made_up(port, 400 if arguments.quick else 10_500)
        flags = ("--max-sequences", str(SIDE_BY_SIDE), "--max-waiting", str(WAITING), "--max-model-tokens", "256")
        if arguments.only in (None, "overload"):
            with serving(large, *flags, threads=1) as port:
                rows += overload(port, 8.0 if arguments.quick else 60.0)
        flags = ("--max-sequences", str(CLIENTS), "--max-waiting", str(2 * CLIENTS), "--max-model-tokens", "1500")
        if arguments.only in (None, "hang-ups"):
            with serving(small, *flags, threads=1) as port:
                rows += hang_ups(port)
        if arguments.only in (None, "bodies"):
            with serving(large, "--max-model-tokens", "2048", threads=1) as port:
                rows += bodies(port)
    return rows


def write_model(directory: Path, **sizes: int) -> None:
    from dataclasses import replace

    from moesaic.checkpoint.save import export_model
    from moesaic.model.transformer import Transformer

    model = Transformer(replace(CONFIG, **sizes))  # type: ignore[arg-type]
    model.init_weights(0)
    export_model(model, Tokenizer(byte_tokenizer()._rust, {"chat_template": TEMPLATE}), directory)


def made_up(port: int, count: int) -> Iterator[Row]:
    """By two processes, since making requests up takes longer than answering them."""
    note(f"{count:,} made-up requests")
    start = time.perf_counter()
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        parts = list(pool.map(partial(_made_up, port, count // 2), (1, 2)))
    seconds = time.perf_counter() - start
    statuses = sum((part.statuses for part in parts), Counter[int]())
    faults = [fault for part in parts for fault in part.faults]
    for fault in faults[:5]:
        note(fault)
    shown = ", ".join(f"{number} x {status}" for status, number in sorted(statuses.items()))
    note(f"{statuses.total():,} answers in {seconds:.0f} s: {shown}; {sum(part.streams for part in parts)} streams")
    work = f"{statuses.total():,} made-up requests"
    share = statuses[200] / statuses.total()
    yield Row(work=f"{work}: failures and errors of another shape", unit="", ours=len(faults), goal=0, met=not faults)
    yield Row(work=f"{work}: share that succeeded", unit="", ours=share, goal=0.25, met=share >= 0.25)
    slowest = max(part.slowest for part in parts)
    yield Row(work=f"{work}: the longest wait", unit="s", ours=slowest, goal=10, met=slowest <= 10)


def _made_up(port: int, count: int, seed: int) -> Any:
    from inference.made_up import ask_made_up

    url = f"http://127.0.0.1:{port}"
    description = _description()
    return ask_made_up(url, description, MODEL_NAME, count, seed)


def _description() -> dict[str, Any]:
    from types import SimpleNamespace
    from typing import cast

    from moesaic.engine.service import EngineService
    from moesaic.server.app import create_app

    engine = SimpleNamespace(max_model_tokens=96)
    service = SimpleNamespace(tokenizer=byte_tokenizer(), engine=engine, statistics=None)
    return create_app(cast(EngineService, service), model_name=MODEL_NAME).openapi()


def overload(port: int, seconds: float) -> Iterator[Row]:
    note("a full server with an empty queue")
    Crowd(Load(port=port, seconds=1, clients=SIDE_BY_SIDE)).told()
    unloaded = _admitted(Crowd(Load(port=port, seconds=seconds / 2, clients=SIDE_BY_SIDE)).told())
    capacity = len(unloaded) / (max(one.last for one in unloaded) - unloaded[0].sent)
    note("a full server with a full queue")
    queued = _admitted(Crowd(Load(port=port, seconds=seconds / 4, clients=SIDE_BY_SIDE + WAITING)).told())
    note(f"{OVERLOAD} x {capacity:.1f} requests/s for {seconds:g} s")
    told = Crowd(Load(port=port, seconds=seconds, per_second=OVERLOAD * capacity, seed=1)).told()
    admitted, refused = _admitted(told), [one for one in told if one.status == 503 and one.retry_after]
    finished = [one for one in admitted if one.complete]
    note(f"{len(told)} sent, {len(finished)} finished, {len(refused)} refused")
    lost = len(told) - len(finished) - len(refused)
    load = f"{OVERLOAD} x {capacity:.1f} requests/s for {seconds:g} s"
    yield Row(work=f"{load}, {len(told):,} sent: lost", unit="", ours=lost, goal=0, met=lost == 0)
    for label, of, others, name in (
        ("time per token", lambda one: one.per_token, unloaded, "unloaded"),
        ("whole answer", lambda one: one.to_end, unloaded, "unloaded"),
        ("wait for the first token", lambda one: one.to_first_token, unloaded, "unloaded"),
        ("wait for the first token", lambda one: one.to_first_token, queued, "full queue, nobody refused"),
    ):
        ours, peer = quantile(finished, 0.99, of), quantile(others, 0.99, of)
        yield Row(
            work=f"{load}, admitted: 99th percentile of the {label} (less is better)", unit="ms", ours=1e3 * ours,
            peer=1e3 * peer, peer_name=name, ratio=ours / peer, goal=2, met=ours <= 2 * peer,
        )  # fmt: skip
    wait = 1e3 * quantile(refused, 0.99, lambda one: one.to_status)
    yield Row(work=f"{load}: 99th percentile until refused", unit="ms", ours=wait, goal=50, met=wait <= 50)


def _admitted(told: Sequence[Told]) -> list[Told]:
    return [one for one in told if one.status == 200]


def hang_ups(port: int) -> Iterator[Row]:
    for when in ("in the middle", "before the first token"):
        note(f"{CLIENTS} clients that hang up {when}")
        body = {"prompt": "abc", "max_tokens": 1400, "ignore_eos": True, "stream": True}
        connections = [send(port, "/v1/completions", json.dumps(body).encode()) for _ in range(CLIENTS)]
        if when == "in the middle":
            for connection in connections:
                while b"data: " not in connection.recv(4096):
                    pass
        for connection in connections:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        gone, steps = time.perf_counter(), metric(port, "moesaic:steps_total")
        while metric(port, "vllm:kv_cache_usage_perc") or metric(port, "vllm:num_requests_waiting"):
            if time.perf_counter() - gone > 60:
                raise RuntimeError("blocks are in use a minute after all clients have gone")
        seconds = time.perf_counter() - gone
        note(f"{metric(port, 'moesaic:steps_total') - steps:.0f} steps since the last one hung up")
        work = f"{CLIENTS} clients hang up {when}: until no block is in use"
        yield Row(work=work, unit="ms", ours=1e3 * seconds, goal=1000, met=seconds <= 1)


def metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name))


def send(port: int, path: str, body: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def hostile() -> dict[str, bytes]:
    most = 8 * 2**20 - 100
    long_schema = {"type": "string", "minLength": 10**7, "maxLength": 10**7}
    patterns = [{"type": "string", "pattern": f"(.*a.{{{i}}}|b.*c.{{{i}}})"} for i in range(5, 40)]
    doubling = "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(60)) + '\na60: "a"?'
    constrained = {
        "long schema": {"guided_json": long_schema},
        "patterns": {"guided_json": {"allOf": patterns}},
        "states": {"guided_regex": "(.|\n)*a(.|\n){2000}"},
        "doubling": {"guided_grammar": doubling},
    }
    return {
        "8 MB of levels": b"[" * most,
        "8 MB of numbers": b'{"prompt": [' + b"0," * (most // 2 - 10) + b"0]}",
        "8 MB of objects": b'{"prompt": [' + b"{}," * (most // 3 - 10) + b"0]}",
        "8 MB of keys": b"{" + b",".join(b'"%d":1' % i for i in range(most // 11)) + b"}",
        "8 MB of text": b'{"prompt": "' + b"a" * (most - 20) + b'"}',
        **{
            name: json.dumps({"prompt": "a", "max_tokens": 60, **fields}).encode()
            for name, fields in constrained.items()
        },
    }


def bodies(port: int) -> Iterator[Row]:
    """Each five times, beside a client who listens for silence."""
    for name, body in {"nothing": b"", **hostile()}.items():
        listening = Crowd(Load(port=port, seconds=3, clients=1, new_tokens=200))
        time.sleep(0.5)
        slowest = 0.0
        for _ in range(5 if body else 0):
            start = time.perf_counter()
            with send(port, "/v1/completions", body) as connection:
                answer = connection.recv(4096)
                while connection.recv(65536):
                    pass
            slowest = max(slowest, time.perf_counter() - start)
            if answer[9:12] not in (b"200", b"400", b"413"):
                raise RuntimeError(f"{name} was answered {answer[:200]!r}")
        told = listening.told()
        if not all(one.complete for one in told):
            raise RuntimeError(f"beside {name} a text was not finished")
        gap = max(one.largest_gap for one in told)
        note(f"{name}: answered in {slowest:.2f} s at most")
        yield Row(
            work=f"{name}: the longest silence that another client hears", unit="ms", ours=1e3 * gap,
            goal=250 if body else None, met=gap <= 0.25 if body else None,
        )  # fmt: skip


if __name__ == "__main__":
    run_benchmark(
        __doc__ or "",
        measure,
        ("--only", {"choices": ["made-up", "overload", "hang-ups", "bodies"], "help": "a part of it"}),
    )
