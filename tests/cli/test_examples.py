"""Every config in examples/ trains for a few steps."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))


@pytest.mark.parametrize("example", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_an_example_trains(example: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"{n} squared is {n * n}; its root is {n**0.5}." for n in range(9000))
    )
    flags = [
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--micro-batch-size",
        "1",
        "--data.source",
        str(tmp_path / "text.txt"),
    ]
    train = [sys.executable, "-m", "moesaic", "train"]
    if "init_from" in example.read_text():
        base = subprocess.run(
            [*train, str(EXAMPLES[0]), "--out", str(tmp_path / "base"), *flags], capture_output=True, text=True
        )
        assert base.returncode == 0, base.stderr
        flags += ["--init_from", str(tmp_path / "base")]
    command = [*train, str(example), "--out", str(tmp_path / "run"), *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "step 2/2" in result.stdout
