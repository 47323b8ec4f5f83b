"""Answers as server-sent events."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moesaic.server.context import Context
from moesaic.server.errors import ApiError
from moesaic.server.generation import while_connected
from moesaic.server.large_json import encode_in_pieces

READ_SECONDS = 60.0
"""A client that has not read all so long after the last moment of the answer is let go."""
DONE = b"data: [DONE]\n\n"

_SLOT = "\0 the text \0"
_encoder = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"), allow_nan=False)
_log = logging.getLogger("moesaic.server")
Events = AsyncGenerator[bytes, None]


def event(data: dict[str, Any], name: str | None = None, *, in_pieces: bool = False) -> bytes:
    line = f"data: {encode_in_pieces(data) if in_pieces else _encoder.encode(data)}\n\n"
    return (f"event: {name}\n{line}" if name else line).encode("ascii")


class TextEvent:
    """Events that differ in one text alone, which most are: the rest is written out once."""

    def __init__(self, describe: Callable[[str], dict[str, Any]]) -> None:
        self._head, self._tail = event(describe(_SLOT)).split(_encoder.encode(_SLOT).encode("ascii"))

    def __call__(self, text: str) -> bytes:
        return b"%b%b%b" % (self._head, _encoder.encode(text).encode("ascii"), self._tail)


def error_event(error: ApiError) -> bytes:
    return event(error.body)


async def event_stream(
    context: Context,
    request: Request,
    source: Events,
    describe_error: Callable[[ApiError], bytes] = error_event,
    end: bytes = DONE,
) -> Response:
    """The response, once there is something to say: what goes wrong before is an ordinary error."""
    first = await while_connected(request.receive, anext(source))
    return EventStream(first, source, describe_error, end, context.request_seconds + READ_SECONDS)


class EventStream(Response):
    """Writes while the client reads, and ends the source when it hangs up."""

    media_type = "text/event-stream"

    def __init__(
        self,
        first: bytes,
        source: Events,
        describe_error: Callable[[ApiError], bytes],
        end: bytes,
        seconds: float,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first, self._source, self._describe_error, self._end = first, source, describe_error, end
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with asyncio.timeout(self._seconds):
                await while_connected(receive, self._write(send))
        except TimeoutError:
            raise ClientDisconnect from None
        finally:
            await self._source.aclose()

    async def _write(self, send: Send) -> None:
        await _send(send, self._first)
        try:
            async for piece in self._source:
                await _send(send, piece)
        except ApiError as error:
            await _send(send, self._describe_error(error))
        except (ClientDisconnect, asyncio.CancelledError):
            raise
        except Exception:
            _log.exception("an answer failed in the middle")
            error = ApiError(500, "the server failed at this request; its log says why", code="internal_error")
            await _send(send, self._describe_error(error))
        await _send(send, self._end, more=False)


async def _send(send: Send, body: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
