"""The one form of every benchmark: flags, hardware, rows, table or JSON."""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from moesaic.errors import MoesaicError, UsageError
from moesaic.ops.device import device_name, resolve_device
from moesaic.ops.instruction_set import instruction_set

ROOT = Path(__file__).parents[1]
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantiles of Student's t with 1, 2, … degrees of freedom."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured work: ours beside a peer, and what was hoped for."""

    work: str
    unit: str
    ours: float
    peer: float | None = None
    peer_name: str | None = None
    limit: float | None = None
    """The physical limit, measured in the same run."""
    ratio: float | None = None
    """Ours to peer, so that more than 1 is better unless `work` says otherwise."""
    goal: float | None = None
    """Of the ratio where there is one, else of ours."""
    met: bool | None = None


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its 95 % confidence interval, which one seed does not give."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        count = len(values)
        if count < 2:
            return cls(values[0], math.inf)
        quantile = T_QUANTILES[min(count - 1, len(T_QUANTILES)) - 1]
        return cls(statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(count))

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (f" ± {self.half:.4f}" if math.isfinite(self.half) else "")


def hardware() -> str:
    name, cores, threads = device_name(resolve_device("auto")), os.cpu_count(), torch.get_num_threads()
    return f"{name}, {cores} cores, {instruction_set()}, {threads} threads, torch {torch.__version__}"


def commit() -> str:
    result = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def positive(text: str) -> int:
    """A flag's number, of which at least one is needed."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 1 or more")
    return int(text)


def run_benchmark(
    description: str, measure: Callable[[argparse.Namespace], Sequence[Row]], *flags: tuple[str, dict[str, object]]
) -> None:
    """Parse --quick, --json and the script's own flags, measure, and print the rows.

    Exits 0 whatever the outcome, 2 for flags that make no sense, and 1 where something is missing.
    """
    parser = argparse.ArgumentParser(description=description.strip().splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less work, under two minutes")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    for name, options in flags:
        parser.add_argument(name, **options)  # type: ignore[arg-type]
    arguments = parser.parse_args()
    try:
        rows = list(measure(arguments))
    except UsageError as error:
        parser.error(str(error))
    except MoesaicError as error:
        raise SystemExit(f"error: {error}") from None
    if arguments.json:
        print(json.dumps({"hardware": hardware(), "commit": commit(), "rows": [asdict(row) for row in rows]}))
        return
    table = Table(title=f"{Path(sys.argv[0]).stem} on {hardware()} at {commit()}", title_justify="left")
    for column in ("work", "unit", "ours", "peer", "peer name", "limit", "ratio", "goal", "met"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("-" if value is None else _shown(value) for value in asdict(row).values()))
    Console(width=max(Console().width, 120)).print(table)


def note(text: str) -> None:
    """Progress, on stderr, so that --json stays one object."""
    print(text, file=sys.stderr, flush=True)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
