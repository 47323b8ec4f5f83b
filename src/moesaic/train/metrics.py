"""What is written down about a run: one JSON object a line, and TensorBoard events when asked for."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moesaic.errors import UsageError

LAYER_CURVES = ("max_vio_layers",)
"""Lists of one number per layer that get a TensorBoard curve for each layer."""


class MetricsLog:
    """Appends rows to `metrics.jsonl`. A resumed run first drops the rows after the step it resumes from."""

    def __init__(self, run_directory: Path, *, resume_step: int, tensorboard: bool = False) -> None:
        self.path = run_directory / "metrics.jsonl"
        self._keep_until(resume_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._tensorboard = _tensorboard_writer(run_directory, resume_step) if tensorboard else None

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for key, value in _curves(row):
                self._tensorboard.add_scalar(f"{row['kind']}/{key}", value, row["step"])

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _keep_until(self, step: int) -> None:
        """Drop later rows; whoever is killed meanwhile leaves the old file or the new one."""
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        partial = self.path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, without lines that a killed process or a bad disk left unreadable."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int) and "kind" in row:
                rows.append(row)
    return rows


def _curves(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a row that make a curve."""
    for key, value in row.items():
        if key in LAYER_CURVES and value is not None:
            yield from ((f"{key}/{layer}", number) for layer, number in enumerate(value))
        elif key == "load" and row["kind"] == "eval" and value is not None:
            for layer, shares in enumerate(value):
                yield from ((f"load/{layer}/{expert}", share) for expert, share in enumerate(shares))
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
            yield key, value


def _tensorboard_writer(run_directory: Path, resume_step: int) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        raise UsageError("tensorboard = true needs the extra: pip install 'moesaic[tensorboard]'") from None
    return SummaryWriter(str(run_directory / "tensorboard"), purge_step=resume_step + 1)
