"""`moesaic serve` in a process of its own."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

MODEL_NAME = "bench"
_START_SECONDS = 60.0


@contextlib.contextmanager
def serving(directory: Path, *flags: str, threads: int) -> Iterator[int]:
    """The port of a server that is ready and keeps no beginnings; it ends with the block, politely.

    Raises RuntimeError where it ends with another status than 0.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moesaic", "serve", str(directory), "--port", str(port), "--no-prefix-cache"]
    process = subprocess.Popen(
        [*command, "--served-model-name", MODEL_NAME, *flags],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_until_ready(process, port)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        if process.wait(_START_SECONDS):
            raise RuntimeError(f"the server ended with status {process.returncode}")


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"the server is not ready after {_START_SECONDS:.0f} s; its status is {process.poll()}")
