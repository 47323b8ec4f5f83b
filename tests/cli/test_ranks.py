"""Commands under torchrun: the first rank speaks, the others lend it their experts."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from moesaic.checkpoint.load import load, load_tokenizer
from moesaic.checkpoint.save import export_model
from moesaic.engine.generate import generate
from tests.server.helpers import make_model, make_tokenizer

PROMPT = "many small experts"
COMPLETION = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    export_model(make_model(), make_tokenizer(), tmp_path / "tiny")
    return tmp_path / "tiny"


def torchrun(*arguments: str) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*start, "-m", "moesaic", *arguments]


def answer(url: str, seconds: float = 60.0) -> Any:
    """As soon as the server is there."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            response = httpx.post(f"{url}/v1/completions", json=COMPLETION, trust_env=False, timeout=seconds)
            return response.raise_for_status().json()["choices"][0]["text"]
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def workers(agent: int) -> dict[str, int]:
    """Processes by rank."""
    found = {}
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        rank = re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{child}/environ").read_bytes())
        if rank is not None:
            found[rank[1].decode()] = int(child)
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
@pytest.mark.parametrize(("rank", "number", "ends_well"), [("0", signal.SIGTERM, True), ("1", signal.SIGKILL, False)])
def test_a_server_on_two_ranks_ends_with_them(
    directory: Path, rank: str, number: signal.Signals, ends_well: bool
) -> None:
    expected = generate(load(directory), load_tokenizer(directory), PROMPT, max_tokens=12, temperature=0)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(
        torchrun("serve", str(directory), "--port", str(port)), stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert answer(url) == expected
            os.kill(workers(process.pid)[rank], number)
            assert (process.wait(timeout=40) == 0) == ends_well
        finally:
            process.terminate()
        assert process.stderr is not None
        said = process.stderr.read()
    assert said.count(f"serving tiny at {url}") == 1
    assert ("Traceback" in said) != ends_well  # torchrun's own


def test_a_refusal_is_said_once_with_its_exit_status(directory: Path) -> None:
    done = subprocess.run(
        torchrun("generate", str(directory), "--prompt", "a", "--memory", "1GiB"),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode != 0
    assert re.findall("error: (.*)", done.stderr) == [
        "memory is for one process, and there are 2 ranks, each with a share of the experts in memory; leave it out"
    ]
    assert re.search(r"exitcode +: 2 \(pid", done.stderr)
