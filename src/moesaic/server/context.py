"""What all endpoints share: the engine's service, its name to clients, threads for slow work, limits and metrics."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from moesaic.engine.engine import end_ids
from moesaic.engine.request import OverloadedError
from moesaic.engine.service import EngineService
from moesaic.server.errors import ApiError
from moesaic.server.limits import MAX_BODY
from moesaic.server.metrics import Metrics
from moesaic.server.token_texts import TokenTexts
from moesaic.server.tool_formats import tool_format
from moesaic.server.tool_grammars import visible_token_ids

if TYPE_CHECKING:
    from moesaic.engine.constraint import ConstraintCompiler

REQUEST_SECONDS = 600.0
_TEXT_THREADS = 2
_MAX_QUEUED = 256
"""Texts that wait for a thread; more are refused."""

P = ParamSpec("P")
R = TypeVar("R")


class Threads:
    """A few threads, and a queue in front of them that does not grow without end."""

    def __init__(self, count: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._queued = 0

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Raises OverloadedError where too many wait already. Cancelled work ends unseen."""
        if self._queued >= _MAX_QUEUED:
            raise OverloadedError(f"{self._queued} requests wait to be read; ask again later", 1.0)
        self._queued += 1
        future = self._pool.submit(function, *args, **kwargs)
        try:
            return await asyncio.wrap_future(future)
        finally:
            self._queued -= 1

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class Context:
    """Made once for each app."""

    def __init__(
        self,
        service: EngineService,
        model_name: str,
        *,
        request_seconds: float = REQUEST_SECONDS,
        max_body: int = MAX_BODY,
    ) -> None:
        self.service, self.model_name = service, model_name
        self.tokenizer = service.tokenizer
        self.token_texts = TokenTexts(service.tokenizer)
        self.tool_form = tool_format(service.tokenizer.tool_template)
        """How the model's chat template lets it call tools; None where that knows none."""
        self.tool_ids = () if self.tool_form is None else visible_token_ids(service.tokenizer, self.tool_form)
        """Special tokens that calls are made of."""
        self.max_model_tokens = service.engine.max_model_tokens
        self.created = int(time.time())
        self.request_seconds, self.max_body = request_seconds, max_body
        self.metrics = Metrics(service, model_name)
        self.texts = Threads(_TEXT_THREADS, "texts")
        self.templates = Threads(_TEXT_THREADS, "templates")
        """Apart from texts: a template may take seconds, and one at a time is rendered."""
        self.grammars = Threads(1, "grammars")
        """Apart from texts: a schema may take seconds, and prompts of others should not wait for it."""
        self._compiler: ConstraintCompiler | None = None
        self._compiler_lock = threading.Lock()

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model_name:
            raise ApiError(
                404, f"the model {name[:200]!r} is not served here; ask for {self.model_name!r}", param="model",
                code="model_not_found",
            )  # fmt: skip

    def check_room(self) -> None:
        """Refuses a request before anything is done for it, where the engine would refuse it in the end.

        Raises OverloadedError.
        """
        if self.service.ready:
            self.service.engine.require_room()

    def compiler(self) -> "ConstraintCompiler":
        """Made when it is first needed, which takes a moment: to be called on a thread of `grammars`."""
        from moesaic.engine.constraint import ConstraintCompiler

        with self._compiler_lock:
            if self._compiler is None:
                model = self.service.engine.model
                ends = sorted(end_ids(model, self.tokenizer))
                self._compiler = ConstraintCompiler(self.tokenizer, model.config.vocab_size, ends)
            return self._compiler

    def close(self) -> None:
        self.texts.close()
        self.templates.close()
        self.grammars.close()
