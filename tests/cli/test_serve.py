"""`moesaic serve` as a user meets it: flags, signals, ports and warnings."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch

from moesaic.checkpoint.save import export_model
from tests.server.helpers import make_model, make_tokenizer


@pytest.fixture(scope="module")
def model_directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(request.config.option.seed)
    directory = tmp_path_factory.mktemp("models") / "tiny-model"
    export_model(make_model(), make_tokenizer(), directory)
    return directory


@contextmanager
def command(directory: Path, *flags: str, env: dict[str, str] | None = None) -> Iterator[tuple[subprocess.Popen, str]]:
    """`moesaic serve`, and where it answers."""
    arguments = [sys.executable, "-m", "moesaic", "serve", str(directory), "--port", "0", *flags]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=os.environ | (env or {})) as process:
        try:
            assert process.stderr is not None
            line = ""
            while not line.startswith("serving "):
                line = process.stderr.readline()
                assert line, process.wait()
            url = line.split()[-1]
            wait_ready(url)
            yield process, url
        finally:
            process.kill()


def wait_ready(url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            if httpx.get(f"{url}/ready", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sigterm_ends_the_server_after_what_was_begun(model_directory: Path) -> None:
    with command(model_directory, "--api-key", "one", env={"MOESAIC_API_KEY": "two"}) as (process, url):
        headers = {"Authorization": "Bearer two"}
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer one"}, trust_env=False).is_success
        body = {"prompt": "abc", "max_tokens": 500, "ignore_eos": True, "stream": True, "model": "tiny-model"}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60) as begun:
            lines = begun.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 10
            while httpx.get(f"{url}/ready", trust_env=False).status_code != 503:
                assert time.monotonic() < deadline
            refused = httpx.post(f"{url}/v1/completions", json=body, headers=headers, trust_env=False)
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
            data = [line.removeprefix("data: ") for line in lines if line]
        assert data[-1] == "[DONE]"
        assert json.loads(data[-2])["choices"][0]["finish_reason"] == "length"
        assert process.wait(timeout=30) == 0


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options)


def test_a_port_that_is_taken_is_one_line(model_directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run("-m", "moesaic", "serve", str(model_directory), "--port", port)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: cannot listen at 127.0.0.1:{port}: ")
    assert len(result.stderr.splitlines()) == 1


def test_without_the_extra_the_command_names_it(model_directory: Path) -> None:
    code = "import sys; sys.modules['fastapi'] = None; from moesaic.cli import main; main(['serve', sys.argv[1]])"
    result = run("-c", code, str(model_directory))
    assert result.returncode == 2
    assert result.stderr == "error: serving needs fastapi; install it: pip install 'moesaic[serve]'\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-sequences", "0"], "max_sequences is 0"),
        (["--port", "70000"], "--port is 70000"),
        (["--request-timeout", "0"], "--request-timeout is 0"),
        (["--api-key", " a"], "an API key"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
    ],
)
def test_wrong_flags_are_one_line(model_directory: Path, flags: list[str], message: str) -> None:
    result = run("-m", "moesaic", "serve", str(model_directory), *flags)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_open_door_without_a_key_is_warned_of(model_directory: Path) -> None:
    code = (
        "import sys; from moesaic.cli import main, options\n"
        "def load(*_): raise SystemExit(0)\n"
        "options.ModelOptions.load_over_ranks = load\n"
        "main(['serve', sys.argv[1], '--port', '0', '--host', *sys.argv[2:]])"
    )
    assert "anybody who reaches 0.0.0.0" in run("-c", code, str(model_directory), "0.0.0.0").stderr
    assert run("-c", code, str(model_directory), "127.0.0.1").stderr == ""
    assert run("-c", code, str(model_directory), "0.0.0.0", "--api-key", "x").stderr == ""


def test_a_server_without_a_key_answers_to_names_of_this_machine_alone(model_directory: Path) -> None:
    with command(model_directory, "--allowed-host", "proxy.example") as (_, url):
        for host, status in (("proxy.example", 200), ("localhost:1", 200), ("evil.example", 403)):
            answer = httpx.get(f"{url}/v1/models", headers={"Host": host}, trust_env=False)
            assert answer.status_code == status
        assert answer.json()["error"]["message"].endswith("or start it with --allowed-host evil.example")
    with command(model_directory, "--api-key", "k") as (_, url):
        headers = {"Host": "evil.example", "Authorization": "Bearer k"}
        assert httpx.get(f"{url}/v1/models", headers=headers, trust_env=False).status_code == 200


def test_who_still_waits_after_the_drain_is_told(model_directory: Path) -> None:
    flags = ("--drain-timeout", "0.01", "--max-sequences", "1")
    with command(model_directory, *flags) as (process, url):
        body = {"prompt": ["abc"] * 40, "max_tokens": 1500, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60, trust_env=False) as begun:
            lines = begun.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            data = [line.removeprefix("data: ") for line in lines if line]
        assert data[-1] == "[DONE]"
        assert "stopped before the text was finished" in json.loads(data[-2])["error"]["message"]
        assert process.wait(timeout=30) == 0
