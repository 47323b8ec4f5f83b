"""Training on several ranks is training in one process, and goes on with any other number of them."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from moesaic.checkpoint.run_state import newest_run_state
from moesaic.config_io import read_train_config
from moesaic.errors import UsageError
from moesaic.train.run import run_training
from moesaic.train.screen import Screen

from .processes import MODEL, on_ranks

TIMEOUT = 100.0
CONFIG = (
    """
steps = 4
batch_size = 4
sequence_length = 16
evaluate_every = 2
evaluation_tokens = 80
device = "cpu"
[data]
source = "{text}"
"""
    + MODEL
    + """router = "sigmoid_topk"
[balance]
aux_loss_coef = 0.01
bias_update_rate = 0.01
[checkpoint]
save_every = 2
"""
)
SAME = ("loss", "aux_loss", "grad_norm", "val_loss", "bits_per_byte", "max_vio", "load", "router_entropy")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    text = tmp_path / "text.txt"
    words = [f"{number} is {number * number}. " for number in range(600)]
    text.write_text("".join(words), encoding="utf-8")
    path = tmp_path / "tiny.toml"
    path.write_text(CONFIG.format(text=text), encoding="utf-8")
    return path


def train(config: Path, out: Path, *flags: str, resume: bool = False) -> None:
    """In this process, as the rank of its process group if it has one."""
    quiet = Screen(Console(quiet=True), live=False)
    run_training(read_train_config(config, flags), out, quiet, resume=resume)


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_curve(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """To 1e-5: float32 sums in another order, which a step of AdamW does not make smaller."""
    assert [(row["kind"], row["step"]) for row in got] == [(row["kind"], row["step"]) for row in expected]
    for one, other in zip(got, expected, strict=True):
        for key in SAME:
            assert (key in one) == (key in other)
            if key in one:
                assert torch.tensor(one[key]).flatten().tolist() == pytest.approx(
                    torch.tensor(other[key]).flatten().tolist(), rel=1e-5, abs=1e-5
                ), f"{key} at step {one['step']}"


def test_ranks_draw_the_curve_of_one_process_and_states_go_both_ways(config: Path, tmp_path: Path) -> None:
    alone, spread, cut = tmp_path / "alone", tmp_path / "spread", tmp_path / "cut"
    train(config, alone)
    expected = rows_of(alone)
    on_ranks(2, train, config, spread, "--parallel.ep", "2")
    assert_same_curve(rows_of(spread), expected)
    one, other = (newest_run_state(run).load_tensors("model") for run in (alone, spread))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-4, msg=name)

    shutil.copytree(alone, cut)
    for run in (cut, spread):
        shutil.rmtree(run / "states" / "step-00000004")
    on_ranks(4, partial(train, resume=True), config, cut, "--parallel.fsdp", "2", "--parallel.ep", "2")
    assert_same_curve(rows_of(cut), expected)
    train(config, spread, resume=True)
    assert_same_curve(rows_of(spread), expected)
    shutil.rmtree(cut / "states" / "step-00000004")
    on_ranks(2, partial(train, resume=True), config, cut, "--parallel.dp", "2")
    assert_same_curve(rows_of(cut), expected)


def test_torchrun_starts_it_and_the_first_rank_alone_speaks(config: Path, tmp_path: Path) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moesaic"]
    flags = ["--out", str(tmp_path / "run"), "--plain", "--steps", "1", "--parallel.ep", "2"]
    done = subprocess.run(
        [*start, "train", str(config), *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=TIMEOUT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("step 1: state saved") == 1, done.stdout
    assert [row["kind"] for row in rows_of(tmp_path / "run")] == ["train", "eval"]


def test_a_layout_that_does_not_fit_the_processes_is_refused_with_the_numbers(config: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ep 2.*there is 1; start it with: torchrun --nproc-per-node 2"):
        train(config, tmp_path / "run", "--parallel.ep", "2")
    with pytest.raises(UsageError, match=r"parallel.ep is 6, but model.moe.num_experts is 5"):
        read_train_config(config, ["--parallel.ep", "6"])
    with pytest.raises(UsageError, match="muon needs whole matrices"):
        read_train_config(config, ["--parallel.fsdp", "2", "--optimizer.name", "muon"])
    assert not (tmp_path / "run").exists()
