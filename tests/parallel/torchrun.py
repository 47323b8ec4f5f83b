"""Real jobs of torchrun, whose ranks a test may kill or stop."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


class Job:
    """`torchrun ... -m moesaic train CONFIG --out RUN --resume-if-there FLAGS`, ended with the block."""

    def __init__(self, config: Path, run: Path, *flags: str, ranks: int = 2, restarts: int = 0) -> None:
        self.run = run
        self._log = run.with_name(f"{run.name}.log").open("w+")
        command = [*TORCHRUN, "--nproc-per-node", str(ranks), "--max-restarts", str(restarts), "-m", "moesaic", "train"]
        self._process = subprocess.Popen(
            [*command, str(config), "--out", str(run), "--plain", "--resume-if-there", *flags],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=self._log, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.ranks.values():
            os.kill(process, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self._log.close()

    @property
    def ranks(self) -> dict[int, int]:
        """Process ids by rank, of those that are there now."""
        found = {}
        agent = self._process.pid
        try:
            children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
            for child in map(int, children):
                for variable in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                    if variable.startswith(b"RANK="):
                        found[int(variable[5:])] = child
        except OSError:  # one that has just ended
            return {}
        return found

    @property
    def output(self) -> str:
        return Path(self._log.name).read_text()

    def saved(self, step: int) -> bool:
        """Whether the state of `step`, or a later one, is there."""
        return any(int(path.name[5:]) >= step for path in (self.run / "states").glob("step-*"))

    def wait_until(self, there: Callable[[], bool], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not there():
            assert self._process.poll() is None, f"the job has ended:\n{self.output}"
            assert time.monotonic() < end, f"waited {seconds:.0f} s:\n{self.output}"
            time.sleep(0.02)

    def finish(self, seconds: float = 90.0) -> int:
        """Its exit status."""
        return self._process.wait(seconds)

    def succeed(self) -> None:
        status = self.finish()
        assert status == 0, self.output
