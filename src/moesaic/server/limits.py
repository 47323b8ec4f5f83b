"""What keeps strangers from hurting the server: keys, sizes and depths of bodies, and errors that tell them nothing."""

import asyncio
import hmac
import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moesaic.server.errors import ApiError, unknown_field, validation_error
from moesaic.server.large_json import check_counts

MAX_BODY = 8 * 2**20
MAX_DEPTH = 64
BODY_SECONDS = 60.0
"""In which a body must arrive."""
_LARGE_BODY = 32 * 2**10
"""Bytes from which on a body is parsed on another thread."""

_log = logging.getLogger("moesaic.server")
Model = TypeVar("Model", bound=BaseModel)


async def read_request(request: Request, model: type[Model], *, max_body: int = MAX_BODY) -> Model:
    """The body as `model`. Raises ApiError when it is too large or too slow, not JSON, or not such a request."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, f"the Content-Type is {kind[:80]!r}; send application/json", code="unsupported_media_type")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await _read_body(request, max_body)
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive in {BODY_SECONDS:.0f} s", code="timeout", headers={"Connection": "close"}
        ) from None
    if len(body) < _LARGE_BODY:
        return _parse(body, model)
    return await asyncio.to_thread(_parse_large, body, model)


async def _read_body(request: Request, max_body: int) -> bytes:
    """Never holds more than `max_body`, whatever the headers say."""
    too_large = ApiError(
        413,
        f"the body has more than {max_body:,} bytes, the most that is accepted; send less at a time",
        code="body_too_large",
        headers={"Connection": "close"},  # the rest of the body is not read
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 15 or int(announced) > max_body):
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_body:
            raise too_large
    return bytes(body)


def _parse_large(body: bytes, model: type[Model]) -> Model:
    check_counts(body)
    return _parse(body, model)


def _parse(body: bytes, model: type[Model]) -> Model:
    try:
        data = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    _check_depth(data)
    if isinstance(data, dict):
        # Before pydantic looks at them, which would make an error of each of a million.
        names = {field.alias or name for name, field in model.model_fields.items()}
        data = {name: value for name, value in data.items() if value is not None}
        unknown = next((name for name in data if name not in names), None)
        if unknown is not None:
            raise unknown_field(unknown, names)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise validation_error(error, data) from None


def _check_depth(data: object) -> None:
    level = [data]
    for _ in range(MAX_DEPTH):
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        if not parts:
            return
        level = [inner for part in parts for inner in part if isinstance(inner, dict | list)]
    if level:
        raise ApiError(400, f"the body is nested deeper than {MAX_DEPTH} levels; flatten it", code="invalid_json")


class Keys:
    """Lets those through who show one of the keys, and everybody where `is_public(path)` says so."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], is_public: Callable[[str], bool]) -> None:
        self._app, self._is_public = app, is_public
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_public(scope["path"]) or self._has_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            error = ApiError(
                401,
                "this server asks for a key; send the header Authorization: Bearer KEY with the right one",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.response()(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _has_key(self, scope: Scope) -> bool:
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, shown = header.strip().partition(b" ")
        shown = shown.strip()
        # All are compared: how long that takes says nothing about which one is nearly right.
        matches = [hmac.compare_digest(shown, known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


class Guard:
    """The outermost layer: what nobody expected goes to the log, and a short text to the client."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except ClientDisconnect:
            pass  # nobody is left to answer
        except Exception:
            if scope["type"] != "http":
                raise
            _log.exception("%s %s failed", scope["method"], scope["path"])
            if started:  # nothing can be added to half an answer; the connection is closed
                raise
            error = ApiError(500, "the server failed at this request; its log says why", code="internal_error")
            await error.response()(scope, receive, send)


def request_body(model: type[BaseModel]) -> dict[str, Any]:
    """For the OpenAPI description, since bodies are read by `read_request`."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
