"""The engine on a thread of its own, for programs on an event loop."""

import asyncio
import logging
from collections.abc import AsyncGenerator
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
        self._streams: dict[int, _Stream] = {}
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
        if not self._thread.is_alive():
            raise OverloadedError("the engine has stopped after a failure; restart the server", _RETRY_AFTER)
        if not self.ready:
            raise OverloadedError("the server is shutting down and takes no more requests", _RETRY_AFTER)
        handle = self.engine.submit(request)
        stream = self._streams[handle] = _Stream()
        if self._failure is not None:  # between the two lines above
            stream.push(self._failure)
        self._work.set()
        ended = False
        try:
            while not ended:
                delta = await stream.next()
                ended = delta.finish_reason is not None
                yield delta
        finally:
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
        """Ends the thread after its step; what is not finished is dropped."""
        self.ready, self._stopping = False, True
        self._work.set()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
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


class _Stream:
    """Deltas of one request that nobody has read yet, as one."""

    def __init__(self) -> None:
        self._unread: Delta | None = None
        self._arrived = asyncio.Event()

    def push(self, delta: Delta) -> None:
        self._unread = delta if self._unread is None else self._unread + delta
        self._arrived.set()

    async def next(self) -> Delta:
        await self._arrived.wait()
        self._arrived.clear()
        delta, self._unread = self._unread, None
        assert delta is not None
        return delta
