"""JSON with many values, in and out: Python reads and writes a JSON text without a pause in which other threads could
answer, so bodies with too many values are refused unread, and long answers are written a part at a time."""

import asyncio
from collections.abc import Callable, Iterator
from json import JSONEncoder
from typing import Any, ParamSpec, TypeVar

import numpy as np
from starlette.responses import JSONResponse, Response

from moesaic.server.errors import ApiError

MAX_VALUES = 2**20
"""Of lists and objects in a body together: numbers of token ids, say."""
MAX_PARTS = 2**17
"""Lists, objects and names in a body."""
_MANY = 2048
"""Values that are written at a time; as many on the event loop take less than a millisecond."""
_FEW = 64
"""Entries of a list or object each of which may be long itself."""

_encode = JSONEncoder(ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode

P = ParamSpec("P")
T = TypeVar("T")


def check_counts(body: bytes) -> None:
    """Raises ApiError where reading it would take too long. Counts what is punctuation, and not part of a text."""
    marks = np.frombuffer(body.replace(b"\\\\", b"__").replace(b'\\"', b"__"), np.uint8)
    is_outside = np.cumsum(marks == ord('"'), dtype=np.uint8) & 1 == 0  # an overflow keeps what is odd
    values, parts = (
        sum(int(np.count_nonzero((marks == mark) & is_outside)) for mark in marks_of) for marks_of in (b",", b"[{:")
    )
    for count, most, kind in ((values, MAX_VALUES, "values"), (parts, MAX_PARTS, "lists, objects and names")):
        if count > most:
            raise ApiError(
                413, f"the body has {count:,} {kind}, and at most {most:,} are read; send less at a time",
                code="body_too_large",
            )  # fmt: skip


async def json_response(told: Any, num_values: int) -> Response:
    """`told` as JSON; where it has many values it is written on another thread."""
    if num_values <= _MANY:
        return JSONResponse(told)
    text = await asyncio.to_thread(encode_in_pieces, told)
    return Response(text.encode("ascii"), media_type="application/json")


async def off_the_loop(num_values: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of `function`, on another thread where it works on many values."""
    if num_values <= _MANY:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)


def encode_in_pieces(told: Any) -> str:
    """JSON, written so that other threads run in between."""
    return "".join(_pieces(told))


def _pieces(value: Any) -> Iterator[str]:
    if isinstance(value, dict) and len(value) <= _FEW:
        for number, (name, inner) in enumerate(value.items()):
            yield f"{',' if number else '{'}{_encode(name)}:"
            yield from _pieces(inner)
        yield "}" if value else "{}"
    elif isinstance(value, list) and len(value) <= _FEW:
        for number, inner in enumerate(value):
            yield "," if number else "["
            yield from _pieces(inner)
        yield "]" if value else "[]"
    elif isinstance(value, list):
        for start in range(0, len(value), _MANY):
            yield f"{',' if start else '['}{_encode(value[start : start + _MANY])[1:-1]}"
        yield "]"
    else:
        yield _encode(value)
