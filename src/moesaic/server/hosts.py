"""Under which names a server may be reached: a page of a stranger may have its own name point to this machine, and then
a browser here lets it read all that the server says (DNS rebinding)."""

import ipaddress
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from moesaic.server.errors import ApiError


class Hosts:
    """Lets requests through that name this machine, or one of `names`, as their host."""

    def __init__(self, app: ASGIApp, names: Iterable[str]) -> None:
        self._app = app
        self._names = {name.strip("[]").rstrip(".").lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Every browser names a host.
        wrong = [host for name, host in scope.get("headers", ()) if name == b"host" and not self._is_known(host)]
        if not wrong:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            name = name_of(wrong[0].decode("latin-1"))[:100]
            error = ApiError(
                403,
                f"this server does not answer to the name {name!r}; ask for localhost, or start it with "
                f"--allowed-host {name}",
                code="host_not_allowed",
            )
            await error.response()(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _is_known(self, host: bytes) -> bool:
        name = name_of(host.decode("latin-1"))
        return is_loopback(name) or name in self._names


def name_of(host: str) -> str:
    """Without its port: `[::1]:8000` is ::1."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".")


def is_loopback(name: str) -> bool:
    """Whether a name or an address is that of the machine itself, for everybody."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
