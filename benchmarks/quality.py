"""Does the sparse model end below its dense twin? The demo's recipe, several seeds, one or two corpora.

Twins have equal active parameters and FLOPs per token, the same tokens in the same order, the same schedule. A row is
the margin in nats per token of held-out text (dense minus sparse, more is better) over the seeds. Which twin trains
first alternates with the seed, so that a machine whose speed drifts favours neither.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from common import Row, note, positive, run_benchmark
from rich.console import Console

from moesaic.analysis.comparison import Comparison, RunCurve
from moesaic.recipes import demo_config
from moesaic.train.metrics import read_metrics
from moesaic.train.run import run_training
from moesaic.train.screen import Screen

GOAL = 0.05
"""Nats per token, of every seed."""


def measure(arguments: argparse.Namespace) -> list[Row]:
    seeds = [0] if arguments.quick else list(range(arguments.seeds))
    minutes = 0.5 if arguments.quick else arguments.minutes
    corpora = {"standard library": "stdlib", **({"text": arguments.text} if arguments.text else {})}
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for corpus, source in corpora.items():
            results = [_race(Path(scratch) / corpus, source, seed, minutes) for seed in seeds]
            rows += _rows(corpus, results)
    return rows


def _race(folder: Path, source: str, seed: int, minutes: float) -> Comparison:
    curves = {}
    for twin in ("dense", "sparse") if seed % 2 == 0 else ("sparse", "dense"):
        config = demo_config(twin, minutes=minutes, seed=seed, source=source)
        run = folder / f"{twin}-{seed}"
        screen = Screen(Console(quiet=True), live=False)
        if run_training(config, run, screen, data_directory=folder / "data").stop_requested:
            raise SystemExit("stopped; a run that was cut short has no result")
        curves[twin] = RunCurve.of_run(twin, config, read_metrics(run / "metrics.jsonl"))
    comparison = Comparison(sparse=curves["sparse"], dense=curves["dense"])
    note(f"{folder.name}, seed {seed}: gain {comparison.gain:.4f}, time ratio {comparison.ratio('seconds')}")
    return comparison


def _rows(corpus: str, races: list[Comparison]) -> list[Row]:
    rows = [
        Row(
            work=f"{corpus}, seed {seed}: validation loss",
            unit="nats per token",
            ours=race.sparse.val_loss,
            peer=race.dense.val_loss,
            peer_name="dense twin",
            ratio=race.dense.val_loss / race.sparse.val_loss,
        )
        for seed, race in enumerate(races)
    ]
    gains = [race.gain for race in races]
    spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
    rows.append(
        Row(
            work=f"{corpus}: smallest margin of {len(gains)} (mean {statistics.mean(gains):.4f}, "
            f"standard deviation {spread:.4f})",
            unit="nats per token",
            ours=min(gains),
            peer_name="dense twin",
            goal=GOAL,
            met=min(gains) >= GOAL,
        )
    )
    ratios = [race.ratio("seconds") or float("inf") for race in races]
    rows.append(
        Row(
            work=f"{corpus}: wall clock to the dense twin's final loss against the dense twin's, median",
            unit="less is better",
            ours=statistics.median(ratios),
            peer=1.0,
            peer_name="dense twin",
            ratio=statistics.median(ratios),
        )
    )
    return rows


if __name__ == "__main__":
    run_benchmark(
        __doc__ or "",
        measure,
        ("--seeds", {"type": positive, "default": 3, "help": "seeds 0 to N-1"}),
        ("--minutes", {"type": float, "default": 5.0, "help": "length of one race, as in moesaic demo"}),
        ("--text", {"help": "a file or folder of text as a second corpus"}),
    )
