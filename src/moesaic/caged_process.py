"""Processes that do what strangers ask for: a module of this package run as a program, with nothing but two pipes.

What it may use it limits itself, before it reads what is not ours; how long an answer may take is limited here.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

_KEPT_ENVIRONMENT = ("TZ", "LD_LIBRARY_PATH", "SYSTEMROOT")


def start_caged(module: str, **environment: str) -> "subprocess.Popen[bytes]":
    """Runs `python -m module` with this program's packages, and hardly any other variable than `environment`."""
    kept = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    package = str(Path(__file__).parents[1])
    kept["PYTHONPATH"] = os.pathsep.join([package, *filter(os.path.isabs, sys.path)])
    return subprocess.Popen(
        [sys.executable, "-P", "-s", "-m", module],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=kept | environment,
        start_new_session=True,  # Ctrl-C is for us; what we do about it reaches the process
    )


def ask_caged(
    process: "subprocess.Popen[bytes]", request: str, seconds: float, max_bytes: int
) -> tuple[bytes | None, bool]:
    """One line to the process, and its answer, one line too; None where it ended instead, or wrote more than
    `max_bytes`. And whether it was late, and has been killed."""
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    assert process.stdin is not None
    assert process.stdout is not None
    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    answer, unsent = bytearray(), memoryview(request.encode() + b"\n")
    try:
        while unsent:
            unsent = unsent[process.stdin.write(unsent) :]
        while not answer.endswith(b"\n") and len(answer) < max_bytes and (part := process.stdout.read(2**16)):
            answer += part
    except BrokenPipeError:
        pass  # it has ended, which the answer shows
    finally:
        timer.cancel()
    return bytes(answer) if answer.endswith(b"\n") else None, late.is_set()


def end_caged(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    close_pipes(process)


def close_pipes(process: "subprocess.Popen[bytes]") -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
