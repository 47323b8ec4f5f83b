"""The metrics file and the TensorBoard curves of a run."""

import json
from pathlib import Path
from typing import Any

import pytest

from moesaic.train import metrics
from moesaic.train.metrics import MetricsLog, read_metrics
from moesaic.train.routing_statistics import RoutingStatistics


def row(step: int, **changes: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 2.5, "skipped": False, **changes}


def test_a_resumed_run_drops_the_rows_after_the_step_it_resumes_from(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, resume_step=0)
    for step in range(1, 6):
        log.write(row(step))
    log.close()
    log = MetricsLog(tmp_path, resume_step=3)
    log.write(row(4, loss=1.0))
    log.close()
    assert [(each["step"], each["loss"]) for each in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 2.5), (2, 2.5), (3, 2.5), (4, 1.0),
    ]  # fmt: skip


def test_lines_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{json.dumps(row(1))}\n{{"kind": "train", "st\n[1]\n{json.dumps(row(2))}\n')
    assert [each["step"] for each in read_metrics(path)] == [1, 2]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_tensorboard_gets_every_number_and_a_curve_of_max_vio_for_each_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Writer:
        def __init__(self) -> None:
            self.curves: dict[str, list[tuple[int, float]]] = {}

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.curves.setdefault(name, []).append((step, value))

        def close(self) -> None:
            pass

    writer = Writer()
    monkeypatch.setattr(metrics, "_tensorboard_writer", lambda *_: writer)
    log = MetricsLog(tmp_path, resume_step=0, tensorboard=True)
    routing = {
        "max_vio": 0.4, "max_vio_layers": [0.3, 0.5], "load": [[0.5, 0.5]] * 2, "dead_experts": 0, "dropped": 0.1,
        "experts_per_token": 1.8, "router_entropy": 0.9, "router_logit_rms": 1.5, "router_logit_max": 9.0,
    }  # fmt: skip
    assert routing.keys() == RoutingStatistics(0).row().keys()
    log.write(row(1, **routing))
    log.write(row(2) | RoutingStatistics(0).row())
    log.write({"kind": "eval", "step": 2, "load": [[0.25, 0.75], [1.0, 0.0]]})
    log.close()
    numbers = {name: value for name, value in routing.items() if not isinstance(value, list)}
    expected = {f"train/{name}": [(1, value)] for name, value in numbers.items()}
    expected |= {"train/max_vio_layers/0": [(1, 0.3)], "train/max_vio_layers/1": [(1, 0.5)]}
    expected |= {"eval/load/0/0": [(2, 0.25)], "eval/load/0/1": [(2, 0.75)]}
    expected |= {"eval/load/1/0": [(2, 1.0)], "eval/load/1/1": [(2, 0.0)]}
    assert writer.curves == expected | {"train/loss": [(1, 2.5), (2, 2.5)]}
