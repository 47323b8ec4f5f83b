"""Kill ranks of a torchrun job with SIGKILL at random moments, and stop one; the job must end as if nothing had been.

Every job is a real `torchrun -m moesaic train` on two ranks that share out the experts and save in the background; the
kills fall anywhere: start-up, steps, saving. Also: what writing a state in pieces takes of the first rank's memory.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import ROOT, Row, note, positive, run_benchmark

from moesaic.checkpoint.run_state import Crew, save_pieces
from moesaic.config import ParallelConfig
from moesaic.parallel.ranks import make_ranks
from moesaic.parallel.shard import Part

KILLS_IN_A_JOB = 10
"""The rest of a job's steps come after its last kill, so a long one would wait for all of them."""
TIMEOUT_S = 10
STATE_MB, PIECES_ON = 256, 4
CONFIG = """
steps = {steps}
batch_size = 4
sequence_length = 16
evaluate_every = 50
evaluation_tokens = 80
device = "cpu"
[data]
source = "{text}"
tokenizer = "bytes"
[model]
hidden_size = 16
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 8
[model.moe]
num_experts = 5
num_experts_per_tok = 2
moe_intermediate_size = 8
router = "sigmoid_topk"
[balance]
bias_update_rate = 0.01
[checkpoint]
save_every = 3
background = true
[parallel]
ep = 2
timeout_seconds = {timeout}
"""


class Job:
    """One torchrun, its ranks and what it says."""

    def __init__(self, config: Path, run: Path, restarts: int) -> None:
        self.run = run
        self._log = run.with_name(f"{run.name}.log")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["--max-restarts", str(restarts), "-m", "moesaic", "train", str(config), "--out", str(run)]
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, "--plain", "--resume-if-there"],
                env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self._log.read_text()

    def ranks(self) -> list[int]:
        """Process ids of both, or nothing while one is missing."""
        agent = self.process.pid
        try:
            children = [int(child) for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]
            ranks = [child for child in children if b"\0RANK=" in Path(f"/proc/{child}/environ").read_bytes()]
        except OSError:
            return []
        return ranks if len(ranks) == 2 else []

    def new_ranks(self, old: list[int]) -> list[int]:
        while self.process.poll() is None:
            ranks = self.ranks()
            if ranks and not set(ranks) & set(old):
                return ranks
            time.sleep(0.01)
        raise SystemExit(f"the job ended by itself; raise the steps\n{self.output[-2000:]}")

    def finish(self) -> None:
        if self.process.wait():
            raise SystemExit(self.output[-4000:])


def measure(arguments: argparse.Namespace) -> list[Row]:
    kills = arguments.kills or (4 if arguments.quick else 50)
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(2**31)
    note(f"{kills} kills, random moments from seed {seed}")
    with tempfile.TemporaryDirectory() as scratch:
        return [*_faults(Path(scratch), kills, random.Random(seed)), _memory(Path(scratch))]


def _faults(scratch: Path, kills: int, moments: random.Random) -> list[Row]:
    text, config = scratch / "text.txt", scratch / "config.toml"
    text.write_text("\n\n".join(path.read_text() for path in sorted((ROOT / "src").rglob("*.py"))))
    config.write_text(CONFIG.format(steps=120, text=text, timeout=TIMEOUT_S))
    undisturbed = scratch / "undisturbed"
    start = time.monotonic()
    Job(config, undisturbed, 0).finish()
    whole = time.monotonic() - start
    expected = _fingerprint(undisturbed)

    equal, named, done = 0, 0, 0
    while done < kills:
        count = min(KILLS_IN_A_JOB, kills - done)
        job = Job(config, scratch / f"killed-{done}", count)
        ranks: list[int] = []
        for number in range(count):
            ranks = job.new_ranks(ranks)
            # Half of them anywhere from the first moment of the processes, half while they train and save.
            if number % 2:
                _wait(job, _moved(job.run))
                time.sleep(moments.uniform(0, 0.5))
            else:
                time.sleep(moments.uniform(0, 0.6 * whole))
            if job.process.poll() is None and set(ranks) <= set(job.ranks()):
                os.kill(moments.choice(ranks), signal.SIGKILL)
                done += 1
            else:
                break
        job.finish()
        named += job.output.count("ended or stopped")
        equal += _fingerprint(job.run) == expected
        note(f"{done} kills, {equal} jobs equal, {named} named by the ranks themselves")
    jobs = len(list(scratch.glob("killed-*.log")))
    silence = _stop_one(config, scratch / "stopped")
    stopped = _fingerprint(scratch / "stopped") == expected
    return [
        Row(
            work=f"{done} SIGKILLs in {jobs} jobs: those that end bitwise equal to an undisturbed one",
            unit="share", ours=equal / jobs, goal=1.0, met=equal == jobs,
        ),
        Row(
            work=f"a stopped rank, with timeout_seconds {TIMEOUT_S}: named after so long; the job ends equal",
            unit="s", ours=silence, goal=TIMEOUT_S * 1.5, met=stopped and silence <= TIMEOUT_S * 1.5,
        ),
    ]  # fmt: skip


def _stop_one(config: Path, run: Path) -> float:
    job = Job(config, run, 1)
    ranks = job.new_ranks([])
    _wait(job, _moved(run))
    os.kill(ranks[1], signal.SIGSTOP)
    start = time.monotonic()
    _wait(job, lambda: "has not moved" in job.output or "ended or stopped" in job.output)
    silence = time.monotonic() - start
    job.finish()
    return silence


def _wait(job: Job, there: Callable[[], bool]) -> None:
    while not there() and job.process.poll() is None:
        time.sleep(0.01)


def _moved(run: Path) -> Callable[[], bool]:
    """Whether a step was made since now."""
    metrics = run / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    return lambda: metrics.exists() and metrics.stat().st_mtime_ns != before and metrics.stat().st_size > 0


def _fingerprint(run: Path) -> tuple[dict[str, str], list[tuple[object, ...]]]:
    """Hashes of the last state's tensors, and every recorded loss and load."""
    newest = max((run / "states").glob("step-*"))
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in newest.glob("*.safetensors")}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("kind", "step", "loss", "val_loss", "grad_norm", "load")
    return hashes, [tuple(str(row.get(key)) for key in kept) for row in rows]


def _memory(scratch: Path) -> Row:
    """Peak of the first rank beyond its own part, while 4 ranks save a state of which each holds a quarter."""
    context = mp.get_context("spawn")
    results = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_save_quarter, args=(rank, port, str(scratch / "memory"), results))
        for rank in range(PIECES_ON)
    ]
    for process in processes:
        process.start()
    grown = dict(results.get(timeout=120) for _ in processes)[0]
    for process in processes:
        process.join()
    quarter = STATE_MB / PIECES_ON
    return Row(
        work=f"memory that the first rank of {PIECES_ON} takes to save a state of {STATE_MB} MB, beyond its own "
        f"{quarter:.0f} MB; gathering takes the rest of the state",
        unit="MB", ours=grown, peer=STATE_MB - quarter, peer_name="gathered (computed)",
        ratio=(STATE_MB - quarter) / max(grown, 1.0), goal=quarter / 4, met=grown <= quarter / 4,
    )  # fmt: skip


def _save_quarter(rank: int, port: int, folder: str, results: "mp.Queue[tuple[int, float]]") -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=PIECES_ON)
    ranks = make_ranks(ParallelConfig())
    rows = STATE_MB * 10**6 // PIECES_ON // 4096
    part = Part(torch.randn(rows, 1024), rank * rows, rows * PIECES_ON)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    save_pieces(Path(folder), 1, {"model.x": part}, {}, Crew(ranks.store(), rank, PIECES_ON))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results.put((rank, (after - before) * 1024 / 1e6))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_benchmark(
        __doc__ or "",
        measure,
        ("--kills", {"type": positive, "help": "how many ranks are killed (default 50, quick 4)"}),
        ("--seed", {"type": int, "help": "seed of the moments; default: fresh"}),
    )
