"""The server's addresses: which function answers where, and what every request passes on its way."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from moesaic import __version__
from moesaic.engine.service import EngineService
from moesaic.server import live
from moesaic.server.chat import chat_completions
from moesaic.server.completions import completions
from moesaic.server.context import REQUEST_SECONDS, Context
from moesaic.server.errors import ApiError, add_handlers
from moesaic.server.hosts import Hosts
from moesaic.server.limits import MAX_BODY, Guard, Keys, request_body
from moesaic.server.metrics import CONTENT_TYPE
from moesaic.server.responses import responses
from moesaic.server.responses_schemas import ResponseRequest
from moesaic.server.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from moesaic.server.tokens import detokenize, tokenize

Endpoint = Callable[[Context, HttpRequest], Awaitable[Response]]
POSTS: tuple[tuple[str, Endpoint, type[BaseModel]], ...] = (
    ("/v1/chat/completions", chat_completions, ChatRequest),
    ("/v1/completions", completions, CompletionRequest),
    ("/v1/responses", responses, ResponseRequest),
    ("/tokenize", tokenize, TokenizeRequest),
    ("/detokenize", detokenize, DetokenizeRequest),
)
PUBLIC = {"/", "/health", "/ready"}
"""Addresses that nobody needs a key for, beside the files of the page."""


def create_app(
    service: EngineService,
    *,
    model_name: str,
    api_keys: Sequence[str] = (),
    hosts: Sequence[str] | None = None,
    request_seconds: float = REQUEST_SECONDS,
    max_body: int = MAX_BODY,
) -> FastAPI:
    """OpenAI's API for `service`, which is started and closed with the app.

    With `api_keys` every address but health, readiness and the files of the page asks for one of them. With `hosts`,
    requests must name one of these as their host, or this machine. A request may take `request_seconds`, and its body
    `max_body` bytes.
    """
    context = Context(service, model_name, request_seconds=request_seconds, max_body=max_body)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.close()
            context.close()

    app = FastAPI(
        title="moesaic", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    for path, endpoint, model in POSTS:
        _add_post(app, context, path, endpoint, model)
    _add_gets(app, context)
    live.add_page(app, service)
    add_handlers(app)
    if api_keys:
        app.add_middleware(Keys, keys=api_keys, is_public=_is_public)
    if hosts is not None:
        app.add_middleware(Hosts, names=hosts)
    app.add_middleware(Guard)
    _describe_bodies(app)
    return app


def _add_post(app: FastAPI, context: Context, path: str, endpoint: Endpoint, model: type[BaseModel]) -> None:
    async def answer(request: HttpRequest) -> Response:
        return await endpoint(context, request)

    app.add_api_route(
        path, answer, methods=["POST"], response_model=None, openapi_extra=request_body(model), name=path
    )  # fmt: skip


def _add_gets(app: FastAPI, context: Context) -> None:
    service = context.service

    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(context)]})

    async def model(name: str) -> Response:
        context.check_model(name)
        return JSONResponse(_model(context))

    async def health() -> Response:
        return _state(service.healthy, "the engine has died; start the server again, and look in its log")

    async def ready() -> Response:
        return _state(service.healthy and service.ready, "this server takes no requests now")

    async def metrics() -> Response:
        return Response(await asyncio.to_thread(context.metrics.render), media_type=CONTENT_TYPE)

    async def description() -> Response:
        return JSONResponse(await asyncio.to_thread(app.openapi))

    app.add_api_route("/v1/models", models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{name:path}", model, methods=["GET"], response_model=None)
    app.add_api_route("/health", health, methods=["GET"], response_model=None)
    app.add_api_route("/ready", ready, methods=["GET"], response_model=None)
    for path, state in (("/health", health), ("/ready", ready)):
        app.add_api_route(path, state, methods=["HEAD"], include_in_schema=False)
    app.add_api_route("/metrics", metrics, methods=["GET"], response_model=None)
    app.add_api_route("/openapi.json", description, methods=["GET"], include_in_schema=False)


def _model(context: Context) -> dict[str, Any]:
    return {
        "id": context.model_name,
        "object": "model",
        "created": context.created,
        "owned_by": "moesaic",
        "max_model_len": context.max_model_tokens,
        "moesaic": _experts(context),
    }


def _experts(context: Context) -> dict[str, Any]:
    """What the page needs to know of the model."""
    moe = context.service.model_config.moe
    return {
        "layers_of_experts": len(context.service.engine.model.moe_layers),
        "num_experts": moe.num_experts if moe else 0,
        "experts_per_token": moe.num_experts_per_tok if moe else 0,
        "has_chat_template": context.tokenizer.has_chat_template,
        "max_model_tokens": context.max_model_tokens,
    }


def _state(good: bool, otherwise: str) -> Response:
    if not good:
        raise ApiError(503, otherwise, headers={"Retry-After": "5"})
    return JSONResponse({"status": "ok"})


def _is_public(path: str) -> bool:
    return path in PUBLIC or (path.startswith("/page/") and path.count("/") == 2)


def _describe_bodies(app: FastAPI) -> None:
    """Bodies are read by `read_request` and not by FastAPI, so that it has to be told of their schemas."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        description = describe()
        models = [(model, "validation") for _, _, model in POSTS]
        _, schemas = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
        description.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        return description

    app.openapi = openapi  # type: ignore[method-assign]
