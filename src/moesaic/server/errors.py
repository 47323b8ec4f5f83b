"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}, whatever went wrong."""

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from moesaic.engine.request import OverloadedError
from moesaic.errors import MoesaicError, UsageError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_CODES = {404: "not_found", 405: "method_not_allowed", 503: "overloaded", 504: "timeout"}
_ROUTING = {
    "Not Found": "there is nothing at this address; /openapi.json tells what there is",
    "Method Not Allowed": "this address does not take this method",
}
_INSTEAD = {
    "previous_response_id": "nothing is kept between requests; send the whole conversation as input",
    "conversation": "nothing is kept between requests; send the whole conversation as input",
    "functions": "send them as tools",
    "function_call": "send it as tool_choice",
    "audio": "this server reads and writes text only",
    "prompt": "there are no stored prompts; send instructions and input",
}
_MAX_MESSAGE = 500


class ApiError(Exception):
    """A request that is answered with `status` and one line of text; `param` names the field that is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or _CODES.get(status)
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status) or ("invalid_request_error" if self.status < 500 else "server_error")
        message = " ".join(self.message.split())
        if len(message) > _MAX_MESSAGE:
            message = f"{message[:_MAX_MESSAGE]} …"
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        # ASCII: a message may quote text of the request that cannot be written as UTF-8.
        return Response(json.dumps(self.body), self.status, self.headers, media_type="application/json")


def refuse(param: str, message: str) -> ApiError:
    """400, with the name of the field at the beginning of the message."""
    return ApiError(400, f"{param}: {message}", param=param)


def api_error(error: MoesaicError, param: str | None = None) -> ApiError:
    """What the engine refused or could not do."""
    if isinstance(error, OverloadedError):
        return ApiError(503, str(error), headers={"Retry-After": str(max(1, math.ceil(error.retry_after)))})
    return ApiError(400 if isinstance(error, UsageError) else 500, str(error), param=param)


_LOOKED_AT = 100
"""Errors of one body."""


def validation_error(error: ValidationError, data: object) -> ApiError:
    """The first thing that is wrong with a request's body."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)[:_LOOKED_AT]
    # Where a field may be one thing or another, an error behind the right type tells most, and then the furthest one.
    paths = [field_path(each["loc"], data, each["type"]) for each in errors]
    steps = [[int(step) if step.isdecimal() else -1 for step in re.findall(r"\w+", path)] for path in paths]
    first, param, _ = max(
        zip(errors, paths, steps, strict=True),
        key=lambda found: (not found[0]["type"].endswith("_type"), len(found[2]), found[2]),
    )
    if first["type"] == "extra_forbidden":
        return unknown_field(param)
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}" if param else message, param=param or None)


def unknown_field(name: str, known: Iterable[str] = ()) -> ApiError:
    name = name[:100]
    near = difflib.get_close_matches(name, known, n=1)
    fix = f"leave it out, or send {near[0]}" if near else "leave it out"
    return refuse(name, _INSTEAD.get(name, f"this field is unknown here, or not supported; {fix}"))


def field_path(location: tuple[int | str, ...], data: object, kind: str = "") -> str:
    """`messages[0].content`. Steps that are not in the data are names of pydantic's alternatives, and left out, unless
    it is the last one of a field that is missing."""
    path = ""
    for position, step in enumerate(location):
        missing = kind == "missing" and position == len(location) - 1
        if isinstance(data, dict) and (step in data or missing):
            path += f".{step}" if path else str(step)
            data = data.get(step)
        elif isinstance(data, list) and isinstance(step, int) and step < len(data):
            path += f"[{step}]"
            data = data[step]
    return path


def add_handlers(app: FastAPI) -> None:
    """Errors that are raised while a request is answered. Those that nobody expects end in `limits.Guard`."""

    async def answer(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):  # of the router: no such path, or not with this method
            message = _ROUTING.get(str(error.detail), str(error.detail))
            error = ApiError(error.status_code, message, headers=error.headers)
        elif isinstance(error, MoesaicError):
            match = re.match(r"([a-z_]+) (?:is|has) ", str(error))
            error = api_error(error, match[1] if match and isinstance(error, UsageError) else None)
        assert isinstance(error, ApiError)
        return error.response()

    for kind in (ApiError, MoesaicError, HTTPException):
        app.add_exception_handler(kind, answer)
