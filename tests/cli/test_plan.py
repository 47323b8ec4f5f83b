"""`moesaic plan` as a user meets it: real processes, their output, exit codes and errors."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "80"}


def plan(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "moesaic", "plan", *map(str, arguments)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )


def test_the_keys_that_scripts_read() -> None:
    result = plan("mixtral-8x7b", "--cluster", "8xH100", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["parameters"] == {"total": 46_702_792_704, "active": 12_879_925_248}
    assert report["bytes"]["weights"] == 2 * 46_702_792_704
    assert report["bytes"]["kv_per_token"] == 131_072
    assert report["options"][0]["fits"]


def test_a_training_run_is_planned_in_a_second_or_two() -> None:
    start = time.perf_counter()
    result = plan("deepseek-v3", "--cluster", "2048xH800:ib400", "--train-tokens", "14.8T", "--batch-tokens", "62.9M",
                  "--precision", "float8", "--json")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert time.perf_counter() - start < 15, "with the machine's other work; alone it takes one"
    best = json.loads(result.stdout)["options"][0]
    assert best["device_hours"] == pytest.approx(2.664e6, rel=0.25)
    assert best["dollars_range"][0] < 5.328e6 < best["dollars_range"][1]


def test_planning_a_preset_does_not_load_torch() -> None:
    code = (
        "import sys; from moesaic.cli import main\n"
        "try: main(['plan', 'mixtral-8x7b'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_table_fits_eighty_columns_and_names_what_binds() -> None:
    result = plan("qwen3-30b-a3b", "--cluster", "8xH100", "--train-tokens", "1T")
    assert result.returncode == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    for word in ("bound by", "the fastest that fits", "MFU", "kWh", "Uncertainty"):
        assert word in result.stdout


def test_two_models_side_by_side() -> None:
    result = plan("mixtral-8x7b", "--against", "llama-2-70b", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["against"]["name"] == "llama-2-70b"
    assert {line["name"].split(",")[0] for line in report["lines"]} >= {"parameters", "weights", "prefill", "decode"}
    assert plan("mixtral-8x7b", "--against", "llama-2-70b").returncode == 0


def test_a_page_is_written(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    result = plan("olmoe-1b-7b", "--cluster", "laptop:3GiB:ddr5", "--precision", "int4", "--html", page)
    assert result.returncode == 0, result.stderr
    assert "experts on disk" in result.stdout.replace("\n", " ").replace("  ", " ") or "disk" in result.stdout
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("name a model",)),
        (("mixtrl-8x7b",), ("did you mean mixtral-8x7b",)),
        (("mixtral-8x7b", "--cluster", "8xH1000"), ("H1000", "did you mean H100")),
        (("mixtral-8x7b", "--cluster", "laptop:32GB:ddr6"), ("ddr6", "ddr5")),
        (("mixtral-8x7b", "--parallel", "ep=3"), ("8 experts", "divisor")),
        (("mixtral-8x7b", "--parallel", "dp=3"), ("= 3 devices", "has 8")),
        (("llama-2-7b", "--parallel", "ep=2"), ("dense",)),
        (("mixtral-8x7b", "--parallel", "zp=2"), ("--parallel",)),
        (("mixtral-8x7b", "--precision", "int3"), ("int3", "int4")),
        (("mixtral-8x7b", "--train-tokens", "many"), ("--train-tokens", "15T")),
        (("mixtral-8x7b", "--train-tokens", "1T", "--precision", "int4"), ("bfloat16 or float8",)),
        (("mixtral-8x7b", "--train-tokens", "1T", "--phase", "decode"), ("--train-tokens", "decode")),
        (("mixtral-8x7b", "--train-tokens", "1T", "--batch-tokens", "1k"), ("--batch-tokens",)),
        (("mixtral-8x7b", "--batch", "0"), ("--batch is 0",)),
        (("mixtral-8x7b", "--context", "-5"), ("--context is -5",)),
        (("mixtral-8x7b", "--max-vio", "nan"), ("--max-vio",)),
        (("mixtral-8x7b", "--max-vio", "missing"), ("--max-vio missing", "inspect")),
        (("llama-2-7b", "--max-vio", "."), ("no experts",)),
        (("mixtral-8x7b", "--max-vio", ".", "--against", "llama-2-7b"), ("--against",)),
        (("mixtral-8x7b", "--train-tokens", "1e99T"), ("--train-tokens",)),
        (("mixtral-8x7b", "--hit-rate", "2"), ("--hit-rate is 2",)),
        (("mixtral-8x7b", "--against", "mixtral-8x22"), ("did you mean mixtral-8x22b",)),
        (("mixtral-8x7b", "--against", "llama-2-7b", "--parallel", "tp=8"), ("--against",)),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    result = plan(*arguments)
    assert result.returncode == 2, result.stdout
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    result = plan("olmoe-1b-7b", "--html", tmp_path / "missing" / "plan.html")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1


def test_imbalance_may_come_from_a_trace(tmp_path: Path) -> None:
    counts_LE = np.random.default_rng(random.randrange(2**31)).integers(1, 100, size=(32, 8))
    (tmp_path / "trace.json").write_text(json.dumps({"tokens_per_expert": counts_LE.tolist()}))
    result = plan("mixtral-8x7b", "--max-vio", tmp_path, "--parallel", "ep=8", "--json")
    assert result.returncode == 0, result.stderr
    layers = [max(layer) * len(layer) / sum(layer) - 1 for layer in counts_LE.tolist()]
    assert json.loads(result.stdout)["task"]["max_vio"] == pytest.approx(sum(layers) / 32)
    wrong = plan("qwen3-30b-a3b", "--max-vio", tmp_path)
    assert wrong.returncode == 2
    assert "32 x 8 layers and experts" in wrong.stderr


@pytest.mark.parametrize(
    ("text", "word"),
    [("latency_us = -3", "latency_us"), ("disk_gb = inf", "disk_gb"), ("count = 'x'", "count"), ("nodes = 3", "nodes")],
)
def test_a_cluster_file_with_a_mistake_is_one_line(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "own.toml"
    path.write_text(f"cluster = '8xH100'\n{text}\n")
    result = plan("mixtral-8x7b", "--cluster", path)
    assert result.returncode == 2
    assert word in result.stderr
    assert result.stderr.count("\n") == 1


def test_ranks_under_torchrun_measure_together_and_one_speaks() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moesaic",
               "plan", "--calibrate", "--json"]  # fmt: skip
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["ranks"] == 2
    assert found["link"] > 1e6
    assert 0 < found["latency"] < 10
