"""The engine on a thread of its own, for programs on an event loop."""

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from functools import partial
from threading import Event, Thread

from moesaic.engine.engine import Engine
from moesaic.engine.request import Delta, EngineStatistics, OverloadedError, Request
from moesaic.errors import MoesaicError

Observe = Callable[[int, Delta], None]

_LOG = logging.getLogger(__name__)
_RETRY_AFTER = 5.0
"""Seconds after which another server may have taken our place."""


class EngineService:
    """Steps the engine while there is work. Who reads slowly gets the text of several steps at once; nobody waits."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokenizer, self.model_config = engine.tokenizer, engine.model.config
        self.ready = False
        self._readers: dict[int, tuple[Deltas, int]] = {}
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

    def submit_all(self, requests: Sequence[Request], observe: Observe = lambda number, delta: None) -> "Deltas":
        """What comes of them, for somebody on the event loop, who closes it; none is taken where one is refused.
        `observe` is told of every delta, and of which request it is, as it leaves the engine.

        Raises UsageError and OverloadedError as `Engine.submit_all` does.
        """
        if not self._thread.is_alive():
            raise OverloadedError("the engine has stopped after a failure; restart the server", _RETRY_AFTER)
        if not self.ready:
            raise OverloadedError("the server is shutting down and takes no more requests", _RETRY_AFTER)
        handles = self.engine.submit_all(requests)
        deltas = Deltas(len(handles), observe, partial(self._forget, handles))
        self._readers.update((handle, (deltas, number)) for number, handle in enumerate(handles))
        if self._failure is not None:  # since the question above
            self._fail(self._failure)
        self._work.set()
        return deltas

    def _forget(self, handles: Sequence[int], unfinished: Collection[int]) -> None:
        for number, handle in enumerate(handles):
            del self._readers[handle]
            if number in unfinished:
                self.engine.cancel(handle)
        self._work.set()

    def statistics(self) -> EngineStatistics:
        return self.engine.statistics()

    async def drain(self, timeout: float) -> None:
        """Takes no more requests, and waits until those that were admitted have ended, or for so many seconds."""
        self.ready = False
        deadline = asyncio.get_running_loop().time() + timeout
        while self._readers and self.healthy and asyncio.get_running_loop().time() < deadline:
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
            if handle in self._readers:
                reader, number = self._readers[handle]
                reader.push(number, delta)

    def _fail(self, failure: Delta) -> None:
        self._deliver([(handle, failure) for handle in self._readers])


class Deltas:
    """What comes of requests that were submitted together. Of each, what nobody has taken yet is taken as one."""

    def __init__(self, count: int, observe: Observe, forget: Callable[[Collection[int]], None]) -> None:
        """`forget` is called once, with the numbers of those that have not ended."""
        self._observe, self._forget = observe, forget
        self._unfinished = set(range(count))
        self._untaken: dict[int, Delta] = {}
        self._arrived = asyncio.Event()
        self._failure: Exception | None = None
        self._closed = False

    @property
    def finished(self) -> bool:
        """Whether all have ended, and all that came has been taken."""
        return not self._unfinished and not self._untaken

    def push(self, number: int, delta: Delta) -> None:
        if number not in self._unfinished:  # nothing comes after a last delta, whatever happens to the engine
            return
        if delta.finish_reason is not None:
            self._unfinished.remove(number)
        untaken = self._untaken.get(number)
        self._untaken[number] = delta if untaken is None else untaken + delta
        self._arrived.set()
        try:
            self._observe(number, delta)
        except Exception as error:  # which is of this reader alone
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Whoever takes next gets this error."""
        self._failure = self._failure or error
        self._arrived.set()

    async def take(self) -> list[tuple[int, Delta]]:
        """What is new, at most one delta for each request, by their numbers; waits until there is something.

        Raises what `fail` was told.
        """
        await self._arrived.wait()
        self._arrived.clear()
        if self._failure is not None:
            raise self._failure
        untaken, self._untaken = self._untaken, {}
        return sorted(untaken.items())

    def close(self) -> None:
        """Cancels what has not ended."""
        if not self._closed:
            self._closed = True
            self._forget(self._unfinished)
