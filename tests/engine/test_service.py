"""The engine on its thread: streams, cancellation, draining, and what a failure does."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import closing

import pytest

from moesaic.config import EngineConfig
from moesaic.engine.engine import Engine
from moesaic.engine.request import Delta, OverloadedError, Request
from moesaic.engine.service import Deltas, EngineService
from moesaic.errors import UsageError

from .helpers import TOKENIZER, alone, greedy, ids_of, make_model, random_ids


def with_service(act: Callable[[EngineService], Awaitable[None]], config: EngineConfig | None = None) -> None:
    async def run() -> None:
        service = EngineService(Engine(make_model(), TOKENIZER, config))
        await service.start()
        try:
            await act(service)
        finally:
            await service.close()

    asyncio.run(asyncio.wait_for(run(), 60))


async def collected(service: EngineService, request: Request) -> list[Delta]:
    return [delta async for delta in generated(service, request)]


async def generated(service: EngineService, request: Request) -> AsyncGenerator[Delta, None]:
    with closing(service.submit_all([request])) as deltas:
        while not deltas.finished:
            for _, delta in await deltas.take():
                yield delta


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_many_streams_at_once_are_those_of_each_alone() -> None:
    async def act(service: EngineService) -> None:
        requests = [greedy(random_ids(10 + number), max_tokens=12) for number in range(20)]
        results = await asyncio.gather(*(collected(service, request) for request in requests))
        for request, deltas in zip(requests, results, strict=True):
            assert ids_of(deltas) == alone(service.engine.model, request)
            assert [delta.finish_reason for delta in deltas][-1] == "length"
        assert service.statistics().finished == {"length": 20}

    with_service(act)


def test_whoever_stops_reading_frees_the_memory() -> None:
    async def act(service: EngineService) -> None:
        stream = generated(service, greedy(random_ids(40), max_tokens=400))
        await anext(stream)
        assert service.statistics().kv_blocks_used > 0
        await stream.aclose()
        await until(lambda: service.statistics().kv_blocks_used == 0)
        task = asyncio.create_task(collected(service, greedy(random_ids(40), max_tokens=400)))
        await until(lambda: service.statistics().running == 1)
        task.cancel()
        await until(lambda: service.statistics().kv_blocks_used == 0)
        assert service.statistics().finished == {"cancelled": 2}

    with_service(act, EngineConfig(prefix_cache=False))


def test_a_slow_reader_gets_all_of_it_and_holds_nobody_up() -> None:
    async def act(service: EngineService) -> None:
        slow = generated(service, greedy(random_ids(5), max_tokens=60))
        first = await anext(slow)
        await collected(service, greedy(random_ids(5), max_tokens=100))
        rest = [delta async for delta in slow]
        assert len(ids_of([first, *rest])) == 60
        assert len(rest) < 10

    with_service(act)


def test_draining_ends_what_was_admitted_and_takes_no_more() -> None:
    async def act(service: EngineService) -> None:
        admitted = [asyncio.create_task(collected(service, greedy(random_ids(9), max_tokens=30))) for _ in range(4)]
        await until(lambda: service.statistics().running == 4)
        draining = asyncio.create_task(service.drain(30))
        await until(lambda: not service.ready)
        with pytest.raises(OverloadedError, match="shutting down"):
            await collected(service, greedy([1]))
        await draining
        for task in admitted:
            assert (await task)[-1].finish_reason == "length"

    with_service(act)


def test_refusals_come_before_the_first_delta() -> None:
    async def act(service: EngineService) -> None:
        with pytest.raises(UsageError, match="prompt is empty"):
            await collected(service, greedy([]))
        assert not service.statistics().finished

    with_service(act)


def test_a_failing_engine_ends_every_stream_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(service: EngineService) -> None:
        tasks = [asyncio.create_task(collected(service, greedy(random_ids(9), max_tokens=400))) for _ in range(3)]
        await until(lambda: service.statistics().running == 3)

        def broken(*_: object) -> None:
            raise RuntimeError("a wheel came off")

        monkeypatch.setattr(service.engine.scheduler, "schedule", broken)
        for task in tasks:
            last = (await task)[-1]
            assert last.finish_reason == "error"
            assert "a wheel came off" in str(last.error)
        await until(lambda: not service.healthy)
        with pytest.raises(OverloadedError, match="engine has stopped"):
            await collected(service, greedy([1]))

    with_service(act)


def test_requests_come_together_or_not_at_all() -> None:
    async def act(service: EngineService) -> None:
        with pytest.raises(UsageError, match="prompt is empty"):
            service.submit_all([greedy([1]), greedy([])])
        requests = [greedy(random_ids(5), max_tokens=number) for number in (3, 4, 300)]
        deltas = service.submit_all(requests)
        told: list[list[Delta]] = [[], [], []]
        while not all(each and each[-1].finish_reason for each in told[:2]):
            for number, delta in await deltas.take():
                told[number].append(delta)
        for each, request in zip(told[:2], requests[:2], strict=True):
            assert ids_of(each) == alone(service.engine.model, request)
        for _ in range(2):
            deltas.close()
        await until(lambda: service.statistics().kv_blocks_used == 0)
        assert service.statistics().finished == {"length": 2, "cancelled": 1}

    with_service(act, EngineConfig(prefix_cache=False))


def test_closing_ends_open_streams_as_cancelled_and_leaves_ended_ones() -> None:
    async def act(service: EngineService) -> None:
        short = service.submit_all([greedy(random_ids(9), max_tokens=2)])
        await until(lambda: service.statistics().finished == {"length": 1})
        long = service.submit_all([greedy(random_ids(9), 400)] * 2)
        reading = asyncio.create_task(last_of(long, 2))
        await service.close()
        assert await reading == ["cancelled"] * 2
        assert await last_of(short, 1) == ["length"]
        await service.close()
        assert not service.healthy

    async def last_of(deltas: Deltas, count: int) -> list[str | None]:
        reasons: list[str | None] = [None] * count
        while not deltas.finished:
            for number, delta in await deltas.take():
                reasons[number] = delta.finish_reason
        return reasons

    with_service(act)
