"""`moesaic upcycle` as a user meets it, from a dense run or a Hugging Face directory to text of the sparse model."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moesaic.checkpoint.load import load
from moesaic.checkpoint.save import export_model
from moesaic.config import ModelConfig
from moesaic.model.transformer import Transformer
from moesaic.tokenizer import byte_tokenizer

ROOT = Path(__file__).parents[2]
DENSE = ModelConfig(
    vocab_size=257, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    intermediate_size=48, initializer_range=0.2,
)  # fmt: skip


def moesaic(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "100"}
    command = [sys.executable, "-m", "moesaic", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    model = Transformer(DENSE)
    model.init_weights(seed=int(torch.randint(2**31, ())))
    export_model(model, byte_tokenizer(), tmp_path / "dense model")
    return tmp_path / "dense model"


def test_a_dense_directory_becomes_sparse_and_generates(dense: Path) -> None:
    out = dense.with_name("sparse model")
    flags = ["--num_experts", "12", "--top-k", "8", "--method", "granular", "--granularity", "4"]
    result = moesaic("upcycle", dense, out, *flags)
    assert result.returncode == 0, result.stderr
    assert "as qwen3_moe, 12 experts a layer, 8 a token" in result.stdout
    totals, actives = (line.replace(",", "").split() for line in result.stdout.splitlines()[1:3])
    before, after = (sum(parameter.numel() for parameter in load(path).parameters()) for path in (dense, out))
    mlp, routers = 2 * 3 * 32 * 48, 2 * 12 * 32
    assert [totals[-3], totals[-1]] == [str(before), str(after)]
    assert [actives[-3], actives[-1]] == [str(before), str(before + mlp + routers)]
    printed = shlex.split(result.stdout.split("-m moesaic ")[1])
    assert printed[:2] == ["generate", str(out)]
    greedy = ("--max-tokens", "8", "--temperature", "0")
    assert moesaic(*printed, *greedy).stdout == moesaic("generate", dense, *printed[2:], *greedy).stdout != ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num-experts 8 --top-k 9", "top_k is 9 but num_experts is 8"),
        ("--num-experts 8 --top-k 2 --granularity 2", "use method granular"),
        ("--num-experts 10 --top-k 5 --method granular --granularity 5", "intermediate_size 48"),
        ("--num-experts 8", "--top-k"),
    ],
)
def test_mistakes_get_one_line(dense: Path, flags: str, message: str) -> None:
    result = moesaic("upcycle", dense, dense.with_name("out"), *flags.split())
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert result.stdout == ""
    assert os.listdir(dense.parent) == ["dense model"]
