"""The page of the server, and the events that keep its picture of the experts alive.

    GET /             the page
    GET /page/{name}  its style and scripts: files of page/, read once
    GET /live         what the engine does, as server-sent events of one JSON object each

An event is sent about twice a second while something changes. Its fields: `running`, `waiting`, `tokens_per_second` and
`prompt_tokens_per_second` of the last seconds, `kv_blocks`, `kv_blocks_used`; `hits`, `misses`, `bytes_read` and
`stall_seconds` since the start; `expert_load_total`, for each layer each expert's share of the layer's work since the
start; and under `recent`, what came since the event before: `seconds`, `tokens`, `hits`, `misses`, `bytes_read`,
`stall_seconds`, `expert_load`.
"""

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import Any, Protocol

import numpy as np
from fastapi import FastAPI, HTTPException
from fastapi.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from moesaic.engine.request import EngineStatistics, OverloadedError

PERIOD = 0.5
"""Seconds between two looks at the engine."""
HEARTBEAT = 10.0
"""Seconds of silence after which a comment tells both sides that the connection lives."""
SEND_SECONDS = 30.0
"""A listener that has not taken an event for so long is let go."""
RATE_LOOKS = 5
"""Rates are those between now and so many looks ago: two seconds."""
MAX_LISTENERS = 32

CONTENT_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

_log = logging.getLogger("moesaic.server")


class Watched(Protocol):
    """What is asked of the service."""

    @property
    def ready(self) -> bool: ...
    def statistics(self) -> EngineStatistics: ...


def add_page(app: FastAPI, service: Watched) -> None:
    """Give `app` the page and the events. Who may see /live is for the app to say."""
    files = page_files()
    live = LiveEvents(service)

    async def index() -> Response:
        return Response(*files["index.html"])

    async def file(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, f"the page has no file {name!r}; it starts at /")
        return Response(*files[name])

    async def events() -> Response:
        return EventStream(live)

    app.add_api_route("/", index, methods=["GET", "HEAD"], include_in_schema=False)
    app.add_api_route("/page/{name}", file, methods=["GET", "HEAD"], include_in_schema=False)
    app.add_api_route("/live", events, methods=["GET"], include_in_schema=False)


def page_files() -> dict[str, tuple[bytes, int, dict[str, str]]]:
    """Body, status and headers of each file of the page, by its name."""
    files = {}
    for path in (resources.files("moesaic.server") / "page").iterdir():
        kind = CONTENT_TYPES.get(path.name.rpartition(".")[2])
        if kind:
            files[path.name] = path.read_bytes(), 200, {**HEADERS, "Content-Type": kind}
    return files


class LiveEvents:
    """Looks at the engine while somebody listens, and tells all listeners the same."""

    def __init__(self, service: Watched, period: float = PERIOD, clock: Callable[[], float] = time.monotonic) -> None:
        self._service = service
        self._period = period
        self._clock = clock
        self._listeners: set[asyncio.Queue[bytes | None]] = set()
        self._watching: asyncio.Task[None] | None = None
        self._newcomer = False

    @property
    def num_listeners(self) -> int:
        return len(self._listeners)

    @contextmanager
    def listener(self) -> Iterator[asyncio.Queue[bytes | None]]:
        """A queue that holds the newest event, or None after the last one. Raises OverloadedError where there are too
        many, or the server is about to stop."""
        if not self._service.ready:
            raise OverloadedError("the server is stopping; open the page again once it is back", 5.0)
        if len(self._listeners) >= MAX_LISTENERS:
            raise OverloadedError(f"{MAX_LISTENERS} pages already watch this server; close one", 5.0)
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=1)
        self._listeners.add(queue)
        self._newcomer = True
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())
        try:
            yield queue
        finally:
            self._listeners.discard(queue)

    async def _watch(self) -> None:
        """Ends with the last listener, and when the engine takes no more requests: a server stops only once its
        connections are closed."""
        looks: deque[tuple[float, EngineStatistics]] = deque(maxlen=RATE_LOOKS)
        told_rates = (0.0, 0.0)
        try:
            while self._listeners and self._service.ready:
                looks.append((self._clock(), self._service.statistics()))
                before, now = looks[max(-2, -len(looks))], looks[-1]
                rates = _rates(looks[0], now)
                if self._newcomer or now[1] != before[1] or rates != told_rates:
                    self._newcomer, told_rates = False, rates
                    # 64 layers of 512 experts take a while to write out; other requests need not wait for that.
                    self._tell(await asyncio.to_thread(encode, now[1], before[1], rates, now[0] - before[0]))
                await asyncio.sleep(self._period)
        except Exception:
            _log.exception("the engine cannot be watched; its listeners are sent away")
        finally:
            self._tell(None)

    def _tell(self, event: bytes | None) -> None:
        for queue in self._listeners:
            # Who reads slowly gets the newest event and misses those between.
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)


class EventStream(Response):
    """The events, for one listener."""

    def __init__(self, live: LiveEvents) -> None:
        super().__init__()
        self._live = live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            await asyncio.wait_for(send(message), SEND_SECONDS)

        with self._live.listener() as queue:
            headers = {**HEADERS, "Content-Type": "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no"}
            await StreamingResponse(_until_the_end(queue), headers=headers)(scope, receive, send_in_time)


async def _until_the_end(queue: asyncio.Queue[bytes | None]) -> AsyncIterator[bytes]:
    while True:
        try:
            event = await asyncio.wait_for(queue.get(), HEARTBEAT)
        except TimeoutError:
            yield b": still here\n\n"
            continue
        if event is None:
            return
        yield event


def encode(now: EngineStatistics, before: EngineStatistics, rates: tuple[float, float], seconds: float) -> bytes:
    """One event: what is known now, and what came since `before`, `seconds` ago."""
    event: dict[str, Any] = {
        "running": now.running,
        "waiting": now.waiting,
        "tokens_per_second": round(rates[0], 2),
        "prompt_tokens_per_second": round(rates[1], 2),
        "kv_blocks": now.kv_blocks,
        "kv_blocks_used": now.kv_blocks_used,
        "hits": now.hits,
        "misses": now.misses,
        "bytes_read": now.bytes_read,
        "stall_seconds": round(now.stall_seconds, 3),
        "expert_load_total": _shares(now.expert_load, []),
        "recent": {
            "seconds": round(seconds, 3),
            "tokens": _tokens(now) - _tokens(before),
            "hits": now.hits - before.hits,
            "misses": now.misses - before.misses,
            "bytes_read": now.bytes_read - before.bytes_read,
            "stall_seconds": round(now.stall_seconds - before.stall_seconds, 3),
            "expert_load": _shares(now.expert_load, before.expert_load),
        },
    }
    return b"data: " + json.dumps(event, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"


def _tokens(statistics: EngineStatistics) -> int:
    return statistics.prompt_tokens + statistics.generated_tokens


def _rates(old: tuple[float, EngineStatistics], new: tuple[float, EngineStatistics]) -> tuple[float, float]:
    """Generated and prompt tokens per second."""
    seconds = max(new[0] - old[0], 1e-9)
    generated = new[1].generated_tokens - old[1].generated_tokens
    return generated / seconds, (new[1].prompt_tokens - old[1].prompt_tokens) / seconds


def _shares(now: Sequence[Sequence[int]], before: Sequence[Sequence[int]]) -> list[list[float]]:
    """Of each layer's work, what each expert did; zeros where there was none."""
    shares = []
    for layer, load in enumerate(now):
        load_E = np.asarray(load, np.int64)
        if layer < len(before):
            load_E = load_E - np.asarray(before[layer], np.int64)
        shares.append(np.round(load_E / max(int(load_E.sum()), 1), 5).tolist())
    return shares
