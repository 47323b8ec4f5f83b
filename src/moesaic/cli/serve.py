"""`moesaic serve`: a model over HTTP, as OpenAI's API."""

import asyncio
import logging
import os
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from moesaic.cli.options import ModelOptions
from moesaic.cli.ranks import is_first_rank
from moesaic.config import EngineConfig
from moesaic.errors import MoesaicError, UsageError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from moesaic.engine.service import EngineService

KEY_VARIABLE = "MOESAIC_API_KEY"
_DEAD_AFTER_MS = 120_000


_MODEL, _ENGINE = ModelOptions(), EngineConfig()


def serve(
    model: str,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    allowed_host: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    served_model_name: str | None = None,
    request_timeout: float = 600.0,
    drain_timeout: float = 30.0,
    trace: Path | None = None,
    loading: ModelOptions = _MODEL,
    engine: Annotated[EngineConfig, Parameter(name="*")] = _ENGINE,
) -> None:
    """Serve MODEL over HTTP: OpenAI's API under /v1, and a page at / that shows the experts at work.

    Ctrl-C or SIGTERM: nothing new is taken, what was begun is finished, and the exit status is 0.

    Parameters
    ----------
    model
        A run directory, a Hugging Face directory, or a hub id.
    host
        The address to listen at; 0.0.0.0 lets others in, who should need a key. Port 0 is a free one.
    api_key
        A key that clients have to show; may be given several times. MOESAIC_API_KEY in the environment is one too, and
        does not show in the list of processes.
    allowed_host
        A name besides localhost that clients may ask for, such as a proxy's; may be given several times. Where only
        this machine can connect and there is no key, others are refused: a stranger's page could point its name here.
    served_model_name
        What clients call the model; otherwise the last part of MODEL.
    request_timeout
        Seconds that an answer may take.
    drain_timeout
        Seconds for what was begun before the end.
    trace
        Keep the routing of all texts in this folder, for `moesaic inspect FOLDER`; it is there when the server ends.
    """
    _require_extra()
    keys = _keys(api_key)
    _require_seconds(request_timeout=request_timeout, drain_timeout=drain_timeout)
    if not is_first_rank():
        loading.load_over_ranks(model)
    listener = _listen(host, port)
    hosts = _checked_hosts(listener, host, allowed_host, keys)
    # Before the model, so that a budget of memory counts what they take.
    from moesaic.cli.tracing import traced_engines
    from moesaic.engine.service import EngineService
    from moesaic.server.app import create_app

    transformer, tokenizer = loading.load_over_ranks(model, trace)
    with traced_engines(trace, model, transformer, tokenizer) as make_engine:
        service = EngineService(make_engine(transformer, tokenizer, engine))
        _begin(listener, host, port)
        name = served_model_name or Path(model.rstrip("/")).name or model
        app = create_app(service, model_name=name, api_keys=keys, hosts=hosts, request_seconds=request_timeout)
        _run(app, service, listener, name, drain_timeout)


def _checked_hosts(
    listener: socket.socket, host: str, allowed: tuple[str, ...], keys: tuple[str, ...]
) -> tuple[str, ...] | None:
    """The names that clients may ask for; None: any. Warns where anybody may come in."""
    from moesaic.server.hosts import is_loopback

    is_local = is_loopback(listener.getsockname()[0])
    if not keys and not is_local:
        fix = f"give it a key: --api-key KEY, or {KEY_VARIABLE}"
        print(f"warning: anybody who reaches {host} may use this server; {fix}", file=sys.stderr)
    return (host, *allowed) if allowed or (is_local and not keys) else None


def _run(app: "FastAPI", service: "EngineService", listener: socket.socket, name: str, drain_timeout: float) -> None:
    import uvicorn

    from moesaic.parallel.inference import leader_of

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    leader = leader_of(service.engine.model)

    def has_lost_ranks() -> bool:
        return leader is not None and leader.failure is not None

    sys.setswitchinterval(5e-4)  # who waits for the engine's thread to let go of Python waits so long, and not 5 ms

    class Server(uvicorn.Server):
        """At a signal requests are refused, not connections: clients and load balancers are told to go elsewhere
        while what was begun is finished. A second signal ends that."""

        draining: asyncio.Task[None] | None = None

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                host, port = listener.getsockname()[:2]
                address = f"[{host}]" if ":" in host else host
                print(f"serving {name} at http://{address}:{port}", file=sys.stderr, flush=True)

        async def on_tick(self, counter: int) -> bool:
            if self.draining is None and has_lost_ranks():
                self._stop()
            return await super().on_tick(counter)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            asyncio.get_running_loop().call_soon_threadsafe(self._stop)

        def _stop(self) -> None:
            if self.draining is not None and has_lost_ranks():
                return  # torchrun's signal to a rank that ends already
            if self.draining is not None:
                print("stopped, without finishing what was begun", file=sys.stderr, flush=True)
                os._exit(1)  # a server has nothing to save
            self.draining = asyncio.create_task(self._drain())

        async def _drain(self) -> None:
            try:
                await service.drain(drain_timeout)
                await service.close()  # tells those who still wait, while their connections are there
            finally:
                self.should_exit = True

    async def main() -> None:
        server = Server(uvicorn.Config(app, **_uvicorn_settings()))
        await server.serve(sockets=[listener])
        if not server.started:
            raise MoesaicError("the server did not start; its log says why")
        if leader is not None and leader.failure is not None:
            raise leader.failure

    asyncio.run(main())


def _uvicorn_settings() -> dict[str, Any]:
    return {
        "http": "h11",
        "loop": "asyncio",
        "ws": "none",
        "lifespan": "on",
        "log_config": None,
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "timeout_graceful_shutdown": 2,  # what was begun has been waited for already
    }


def _require_extra() -> None:
    try:
        import fastapi
        import prometheus_client
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(f"serving needs {error.name}; install it: pip install 'moesaic[serve]'") from None
    del fastapi, prometheus_client


def _require_seconds(**values: float) -> None:
    for name, seconds in values.items():
        if not 0 < seconds < 10**7:
            raise UsageError(f"--{name.replace('_', '-')} is {seconds:g}; it must be a number of seconds above 0")


def _keys(given: tuple[str, ...]) -> tuple[str, ...]:
    keys = (*given, *filter(None, [os.environ.get(KEY_VARIABLE, "")]))
    if not all(key.strip() == key and key for key in keys):
        raise UsageError("an API key is empty, or has spaces around it; give another one")
    return keys


def _listen(host: str, port: int) -> socket.socket:
    """Before the model is loaded: a port that is taken should be told at once."""
    if not 0 <= port < 2**16:
        raise UsageError(f"--port is {port}; it must lie between 0 and {2**16 - 1}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise UsageError(f"--host {host} is not an address of this machine: {error.strerror}") from None
    listener = socket.socket(family, kind, protocol)
    if os.name == "posix":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # a client that takes nothing for so long has gone
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD_AFTER_MS)
    try:
        listener.bind(address)  # uvicorn listens, once the model is there: until then connections are refused
    except OSError as error:
        listener.close()
        raise _is_taken(host, port, error) from None
    return listener


def _begin(listener: socket.socket, host: str, port: int) -> None:
    """Somebody else may have begun to, while the model was loaded."""
    try:
        listener.listen()
    except OSError as error:
        raise _is_taken(host, port, error) from None


def _is_taken(host: str, port: int, error: OSError) -> MoesaicError:
    return MoesaicError(
        f"cannot listen at {host}:{port}: {error.strerror}; stop what is there, or choose another --port"
    )
