"""Ranks that are killed, that stand still or that are refused: named, and the job goes on where it was."""

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from moesaic.checkpoint.run_state import newest_run_state

from .test_train import CONFIG
from .torchrun import Job

STEPS = 60
FLAGS = (
    "--steps", str(STEPS), "--evaluate-every", "30", "--checkpoint.save-every", "5", "--parallel.timeout-seconds", "6",
    "--parallel.ep", "2",
)  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    text, path = folder / "text.txt", folder / "tiny.toml"
    text.write_text("".join(f"{number} is {number * number}. " for number in range(600)), encoding="utf-8")
    path.write_text(CONFIG.format(text=text), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    with Job(config, run, *FLAGS) as job:
        job.succeed()
    return run


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(run: Path, other: Path) -> None:
    """Bitwise: all tensors of the last state, and every recorded loss and load."""
    state, expected = newest_run_state(run), newest_run_state(other)
    assert state.step == expected.step == STEPS
    files = sorted(path.name for path in expected.directory.glob("*.safetensors"))
    for name in files:
        assert (state.directory / name).read_bytes() == (expected.directory / name).read_bytes(), name
    kept = ("kind", "step", "loss", "val_loss", "grad_norm", "load")
    assert [[row.get(key) for key in kept] for row in rows_of(run)] == [
        [row.get(key) for key in kept] for row in rows_of(other)
    ]


def test_killed_ranks_cost_nothing_but_time(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    """One while it trains and saves in the background, one just after the restart."""
    run = tmp_path / "run"
    with Job(config, run, *FLAGS, "--checkpoint.background", "true", restarts=2) as job:
        step = random.randrange(5, 40)
        job.wait_until(lambda: job.saved(step))
        first, before = random.randrange(2), job.ranks
        os.kill(before[first], signal.SIGKILL)
        job.wait_until(lambda: len(job.ranks) == 2 and not {*job.ranks.values()} & {*before.values()})
        os.kill(job.ranks[random.randrange(2)], signal.SIGKILL)
        job.succeed()
    assert f"error: rank {first} on " in job.output, job.output
    assert_same_run(run, undisturbed)


def test_a_rank_that_stands_still_is_named_and_the_job_goes_on(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Job(config, run, *FLAGS, restarts=1) as job:
        job.wait_until(lambda: job.saved(5))
        stopped = random.randrange(2)
        os.kill(job.ranks[stopped], signal.SIGSTOP)
        job.wait_until(lambda: f"error: rank {stopped} on " in job.output)
        job.succeed()
    assert_same_run(run, undisturbed)


def test_a_job_goes_on_with_another_number_of_ranks(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Killed at FSDP 2 x EP 2, it goes on as one process: the same token stream, in sums of another order."""
    run = tmp_path / "run"
    with Job(config, run, *FLAGS, "--parallel.fsdp", "2", ranks=4) as job:
        job.wait_until(lambda: job.saved(5))
    reached = newest_run_state(run).step
    assert 0 < reached < STEPS
    with Job(config, run, *FLAGS, "--parallel.ep", "1", ranks=1) as job:
        job.succeed()
    losses, expected = ([row["loss"] for row in rows_of(each) if row["kind"] == "train"] for each in (run, undisturbed))
    assert losses == pytest.approx(expected, rel=1e-3)
    assert len(losses) == STEPS


def test_the_first_rank_alone_says_why_a_run_is_refused(config: Path, tmp_path: Path) -> None:
    """It alone looks into the directory; the others wait for it, and go without a word."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"model_type": "qwen3"}')
    (tmp_path / "run" / "model.safetensors").write_bytes(b"")
    with Job(config, tmp_path / "run", *FLAGS) as job:
        assert job.finish() != 0
    assert job.output.count("error: ") == 1, job.output
    assert "moesaic/train" not in job.output, "no traceback of a rank"
