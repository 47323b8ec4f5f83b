"""Names under which a server is asked for: those of this machine, and those that were allowed."""

import socket

import pytest

from moesaic.server.hosts import is_loopback, name_of

from .helpers import Running, error_of, serving


def asked_as(server: Running, host: str, path: str = "/v1/models") -> int:
    response = server.http.get(path, headers={"Host": host})
    if response.status_code != 200:
        error = error_of(response, 403)
        assert error["type"] == "permission_error"
        assert error["code"] == "host_not_allowed"
        assert f"--allowed-host {name_of(host)}" in error["message"]
    return response.status_code


def test_only_names_of_this_machine_and_allowed_ones_are_answered() -> None:
    with serving(hosts=["Proxy.Example"]) as server:
        port = server.port
        for host in ("localhost", f"LOCALHOST:{port}", "localhost.:1", "127.0.0.1", f"127.0.0.9:{port}", "[::1]",
                     f"[::1]:{port}", "proxy.example", "proxy.EXAMPLE:443"):  # fmt: skip
            assert asked_as(server, host) == 200
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example",
                     "0.0.0.0", "192.168.0.1:8000", "[fe80::1]:80", "notlocalhost", "proxy.example.evil"):  # fmt: skip
            for path in ("/v1/models", "/", "/health", "/metrics", "/live", "/openapi.json", "/nothing"):
                assert asked_as(server, host, path) == 403
        refused = server.http.post("/v1/completions", json={"prompt": "a"}, headers={"Host": "evil.example"})
        assert error_of(refused, 403)
        with socket.create_connection((server.host, port)) as connection:  # which browsers never send
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200")


def test_without_names_all_are_answered(server: Running) -> None:
    assert asked_as(server, "any.example") == 200


@pytest.mark.parametrize(
    ("host", "name", "loopback"),
    [
        ("a.b:80", "a.b", False),
        ("[::1]:80", "::1", True),
        ("[::1", "::1", True),
        ("", "", False),
        (":80", "", False),
        ("127.1.2.3", "127.1.2.3", True),
        ("localhost.", "localhost", True),
    ],
)
def test_names_are_without_their_ports(host: str, name: str, loopback: bool) -> None:
    assert name_of(host) == name
    assert is_loopback(name) == loopback
