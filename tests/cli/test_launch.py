"""`moesaic launch` prints job files that a scheduler takes and that train the config."""

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from moesaic.cli import app
from moesaic.errors import UsageError

CONFIG = """
batch_size = 16
[model]
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 8
[model.moe]
num_experts = 8
num_experts_per_tok = 2
moe_intermediate_size = 8
"""
TRAIN = "-m moesaic train"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "My run's.toml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def launched(capsys: pytest.CaptureFixture[str], config: Path, *flags: str) -> str:
    status = app(["launch", str(config), *flags], exit_on_error=False, print_error=False, result_action="return_value")
    assert status == 0
    return capsys.readouterr().out


def words_of(command: str) -> list[str]:
    assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0, command
    return shlex.split(command)


def assert_trains(words: list[str], config: Path) -> None:
    module = words.index("-m")  # what torchrun runs on each rank, at each restart
    assert words[module : module + 4] == ["-m", "moesaic", "train", str(config)]
    assert words[words.index("--parallel.ep") + 1] == "4"
    assert "--resume-if-there" in words, "a job that is started again goes on"


def test_slurm(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = launched(capsys, config, "--slurm", "--nodes", "2", "--parallel.ep", "4")
    assert text.startswith("#!/bin/bash\n#SBATCH")
    assert "#SBATCH --nodes=2\n" in text
    command = shlex.split(text[text.index("srun") :])
    assert command[2:4] == ["bash", "-c"]
    assert_trains(words_of(command[4]), config)


def test_kubeflow(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = yaml.safe_load(launched(capsys, config, "--kubeflow", "--nodes", "2", "--parallel.ep", "4"))
    assert (job["kind"], job["metadata"]["name"]) == ("PyTorchJob", "my-run-s")
    roles = job["spec"]["pytorchReplicaSpecs"]
    assert {role: spec["replicas"] for role, spec in roles.items()} == {"Master": 1, "Worker": 1}
    container = roles["Worker"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert_trains(words_of(container["command"][2]), config)


def test_skypilot(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = yaml.safe_load(launched(capsys, config, "--skypilot", "--gpus-per-node", "4", "--parallel.ep", "4"))
    assert (job["num_nodes"], job["resources"]) == (1, {"accelerators": "H100:4"})
    assert_trains(words_of(job["run"]), config)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "add one of --slurm, --kubeflow, --skypilot"),
        (("--slurm", "--skypilot"), "2 kinds of job file"),
        (("--slurm", "--parallel.ep", "3"), "8 ranks cannot be dp any x fsdp 1 x ep 3"),
        (("--slurm", "--nodes", "3"), "24 ranks cannot share evenly; add --batch-size 24"),
        (("--slurm", "--nodes", "0"), "must be at least 1"),
    ],
)
def test_what_cannot_run_is_refused(
    flags: tuple[str, ...], message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=message):
        launched(capsys, config, *flags)
