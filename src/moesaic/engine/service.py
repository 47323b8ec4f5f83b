"""The engine on a thread of its own, for programs on an event loop."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from threading import Event, Thread

from moesaic.engine.engine import Engine
from moesaic.engine.request import Delta, EngineStatistics, OverloadedError, Request
from moesaic.errors import MoesaicError

_LOG = logging.getLogger(__name__)
_RETRY_AFTER = 5.0
"""Seconds after which another server may have taken our place."""


class EngineService:
    """Steps the engine while there is work. Who reads slowly gets the text of several steps at once; nobody waits."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokenizer, self.model_config = engine.tokenizer, engine.model.config
        self.ready = False
        self._streams: dict[int, DeltaStream] = {}
        self._work, self._stopping = Event(), False
        self._thread = Thread(target=self._step_on, name="moesaic-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: Delta | None = None

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive() and not self.engine.is_failing

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self.ready = True

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """What comes of a request; whoever stops reading cancels it.

        Raises UsageError and OverloadedError, before the first delta, as `Engine.submit` does.
        """
        (stream,) = self.submit_all([request])
        with contextlib.closing(stream):
            async for delta in stream:
                yield delta

    def submit_all(self, requests: Sequence[Request]) -> "list[DeltaStream]":
        """What comes of each, for somebody on the event loop, who closes them all; none is taken where one is refused.

        Raises UsageError and OverloadedError as `Engine.submit_all` does.
        """
        if not self._thread.is_alive():
            raise OverloadedError("the engine has stopped after a failure; restart the server", _RETRY_AFTER)
        if not self.ready:
            raise OverloadedError("the server is shutting down and takes no more requests", _RETRY_AFTER)
        handles = self.engine.submit_all(requests)
        streams = [DeltaStream(partial(self._forget, handle)) for handle in handles]
        self._streams.update(zip(handles, streams, strict=True))
        if self._failure is not None:  # since the question above
            self._fail(self._failure)
        self._work.set()
        return streams

    def _forget(self, handle: int, ended: bool) -> None:
        del self._streams[handle]
        if not ended:
            self.engine.cancel(handle)
            self._work.set()

    def statistics(self) -> EngineStatistics:
        return self.engine.statistics()

    async def drain(self, timeout: float) -> None:
        """Takes no more requests, and waits until those that were admitted have ended, or for so many seconds."""
        self.ready = False
        deadline = asyncio.get_running_loop().time() + timeout
        while self._streams and self.healthy and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """Ends the thread after its step; what is not finished ends with the reason `cancelled`."""
        self.ready, self._stopping = False, True
        self._work.set()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        self._fail(Delta(finish_reason="cancelled"))
        self.engine.close()

    def _step_on(self) -> None:
        assert self._loop is not None
        try:
            while not self._stopping:
                if not self.engine.has_work:
                    self._work.wait()
                    self._work.clear()
                    continue
                deltas = self.engine.step()
                if deltas:
                    self._loop.call_soon_threadsafe(self._deliver, deltas)
        except Exception as error:
            _LOG.exception("the engine has failed")
            self._failure = Delta(finish_reason="error", error=MoesaicError(f"the engine has failed: {error}"))
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._fail, self._failure)

    def _deliver(self, deltas: list[tuple[int, Delta]]) -> None:
        for handle, delta in deltas:
            stream = self._streams.get(handle)
            if stream is not None:
                stream.push(delta)

    def _fail(self, failure: Delta) -> None:
        self._deliver([(handle, failure) for handle in self._streams])


class DeltaStream:
    """What comes of one request, until its last delta. Those that nobody has read yet come as one."""

    def __init__(self, forget: Callable[[bool], None]) -> None:
        self._forget = forget
        """Called once, with whether the request has ended."""
        self._unread: Delta | None = None
        self._arrived = asyncio.Event()
        self._ended = self._read_all = self._closed = False

    def push(self, delta: Delta) -> None:
        if self._ended:  # nothing comes after a last delta, whatever happens to the engine
            return
        self._ended = delta.finish_reason is not None
        self._unread = delta if self._unread is None else self._unread + delta
        self._arrived.set()

    def close(self) -> None:
        """Cancels the request, where it has not ended."""
        if not self._closed:
            self._closed = True
            self._forget(self._ended)

    def __aiter__(self) -> "DeltaStream":
        return self

    async def __anext__(self) -> Delta:
        if self._read_all:
            raise StopAsyncIteration
        await self._arrived.wait()
        self._arrived.clear()
        delta, self._unread = self._unread, None
        assert delta is not None
        self._read_all = delta.finish_reason is not None
        return delta
