"""The files of the page, and the events behind its picture, over HTTP and under an engine that works."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import httpx
import numpy as np
import pytest

from moesaic.engine.request import EngineStatistics, OverloadedError
from moesaic.server import live
from moesaic.server.live import LiveEvents, encode

from .helpers import CONFIG, Running, error_of, serving


@contextlib.contextmanager
def listening(server: Running, headers: dict[str, str] | None = None) -> Iterator[Iterator[dict[str, Any]]]:
    """The events, as objects."""
    with server.http.stream("GET", "/live", headers=headers) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        lines = response.iter_lines()
        yield (json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: "))


def test_files_have_their_types_and_a_strict_policy() -> None:
    with serving() as server:
        for name, (body, _, _) in live.page_files().items():
            response = server.http.get("/" if name == "index.html" else f"/page/{name}")
            assert response.status_code == 200
            assert response.content == body
            kind = live.CONTENT_TYPES[name.rpartition(".")[2]]
            assert response.headers["content-type"] == kind
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["cache-control"] == "no-store"
            policy = response.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "script-src 'self';" in policy
            assert "unsafe" not in policy
            assert "*" not in policy
        assert {"index.html", "style.css", "main.js"} <= set(live.page_files())


@pytest.mark.parametrize("name", ["nothing.js", "..%2flive.py", "%2e%2e/live.py", "__pycache__", "live.py", "%00"])
def test_no_other_file_is_served(name: str) -> None:
    with serving() as server:
        error_of(server.http.get(f"/page/{name}"), 404)


def test_the_page_names_no_other_host() -> None:
    for name, (body, _, _) in live.page_files().items():
        text = body.decode().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, name
        assert "innerHTML" not in text, name


def test_events_tell_what_the_engine_does() -> None:
    with serving() as server:
        sending = threading.Thread(target=server.chat, kwargs={"max_tokens": 300, "ignore_eos": True})
        events = []
        with listening(server) as source:
            events.append(next(source))
            sending.start()
            for event in source:
                events.append(event)
                if event["running"] == 0 and event["tokens_per_second"] == 0 and event["expert_load_total"][0][0]:
                    break
        sending.join()
        statistics = server.service.statistics()
    assert events[0]["running"] == 0
    assert events[0]["recent"]["tokens"] == 0
    assert max(event["tokens_per_second"] for event in events) > 0
    assert max(event["kv_blocks_used"] for event in events) <= events[0]["kv_blocks"]
    told = sum(event["recent"]["tokens"] for event in events)
    assert told == statistics.prompt_tokens + statistics.generated_tokens > 300
    total_LE = np.array(statistics.expert_load)
    assert total_LE.shape == (CONFIG.num_hidden_layers, 4)
    shares_LE = total_LE / total_LE.sum(1, keepdims=True)
    assert np.allclose(events[-1]["expert_load_total"], shares_LE, atol=1e-5)
    # Put together by their weights, the shares of the looks are those of the whole.
    weighted_LE = sum(np.array(event["recent"]["expert_load"]) * event["recent"]["tokens"] for event in events) / told
    assert np.allclose(weighted_LE, shares_LE, atol=0.02)


def test_counts_are_told_since_the_start_and_since_the_event_before() -> None:
    before = EngineStatistics(
        generated_tokens=5, expert_load=[[2, 2], [0, 0]], hits=7, misses=1, bytes_read=100, stall_seconds=0.5
    )
    now = deepcopy(before)
    now.generated_tokens, now.expert_load = 9, [[3, 5], [0, 0]]
    now.hits, now.misses, now.bytes_read, now.stall_seconds = 8, 4, 350, 0.75
    event = json.loads(encode(now, before, (8.0, 0.0), 0.5).removeprefix(b"data: "))
    assert (event["hits"], event["misses"], event["bytes_read"], event["stall_seconds"]) == (8, 4, 350, 0.75)
    assert event["expert_load_total"] == [[0.375, 0.625], [0, 0]]
    assert event["recent"] == {
        "seconds": 0.5, "tokens": 4, "hits": 1, "misses": 3, "bytes_read": 250, "stall_seconds": 0.25,
        "expert_load": [[0.25, 0.75], [0, 0]],
    }  # fmt: skip


def test_listeners_are_counted_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MAX_LISTENERS", 2)
    with serving() as server:
        with listening(server) as first, listening(server) as second:
            assert next(first).keys() == next(second).keys()
            refused = server.http.get("/live")
            assert "2 pages" in error_of(refused, 503)["message"]
            assert int(refused.headers["retry-after"]) > 0

        def can_listen() -> bool:
            with server.http.stream("GET", "/live") as response:
                return response.status_code == 200

        server.wait_until(can_listen)


def test_events_end_when_the_server_takes_no_more_requests() -> None:
    with serving() as server:
        with listening(server) as source:
            next(source)
            server.service.ready = False
            assert list(source) == []
        error_of(server.http.get("/live"), 503)


def test_a_key_guards_the_events_and_not_the_page() -> None:
    with serving(api_keys=["right"]) as server:
        assert server.http.get("/").status_code == 200
        assert server.http.get("/page/main.js").status_code == 200
        error_of(server.http.get("/live"), 401)
        error_of(server.http.get("/live", headers={"Authorization": "Bearer wrong"}), 401)
        with listening(server, {"Authorization": "Bearer right"}) as source:
            assert next(source)["running"] == 0


class Counting:
    """What is watched, without an engine: every look finds one token more, up to `most`."""

    ready = True

    def __init__(self, most: int) -> None:
        self.looks, self.most = 0, most

    def statistics(self) -> EngineStatistics:
        self.looks += 1
        return EngineStatistics(generated_tokens=min(self.looks, self.most))


def test_who_reads_slowly_gets_the_newest_event() -> None:
    async def listen() -> tuple[int, dict[str, Any]]:
        service = Counting(50)
        events = LiveEvents(service, period=0.001)
        with events.listener() as queue:
            while service.looks < 40:
                await asyncio.sleep(0.001)
            assert queue.qsize() == 1
            event = await queue.get()
        assert event is not None
        return service.looks, json.loads(event.removeprefix(b"data: "))

    looks, event = asyncio.run(listen())
    assert looks >= 40
    assert event["recent"]["tokens"] == 1


def test_nobody_looks_while_nobody_listens_and_nothing_is_told_while_nothing_changes() -> None:
    async def listen() -> None:
        service = Counting(3)
        events = LiveEvents(service, period=0.001)
        with events.listener() as queue:
            while service.looks < 30:
                await asyncio.sleep(0.001)
            await queue.get()  # of the last change, or of the rates' return to zero
            seen = service.looks
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(queue.get(), 0.1)
            assert service.looks > seen
            with events.listener() as newcomer:  # is told at once how things are
                assert await asyncio.wait_for(newcomer.get(), 5) is not None
        assert events.num_listeners == 0
        await asyncio.sleep(0.05)
        seen = service.looks
        await asyncio.sleep(0.05)
        assert service.looks == seen

    asyncio.run(listen())


def test_an_engine_that_cannot_be_looked_at_ends_the_events(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        ready = True

        def statistics(self) -> EngineStatistics:
            raise OSError("gone")

    async def listen() -> bytes | None:
        with LiveEvents(Broken()).listener() as queue:
            return await asyncio.wait_for(queue.get(), 5)

    assert asyncio.run(listen()) is None
    assert "gone" in caplog.text


def test_a_stopping_server_refuses_listeners() -> None:
    service = Counting(1)
    service.ready = False
    with pytest.raises(OverloadedError, match="stopping"), LiveEvents(service).listener():
        pass


def test_a_hanging_listener_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "SEND_SECONDS", 0.05)

    async def hang() -> int:
        events = LiveEvents(Counting(1), period=0.001)

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(60)
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            await asyncio.sleep(60)

        scope = {"type": "http", "method": "GET", "path": "/live", "headers": [], "asgi": {"spec_version": "2.3"}}
        with contextlib.suppress(TimeoutError, httpx.HTTPError):
            await asyncio.wait_for(live.EventStream(events)(scope, receive, send), 5)
        return events.num_listeners

    assert asyncio.run(hang()) == 0
