"""`moesaic inspect` as a user meets it."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import moesaic as library
from moesaic.analysis.trace import read_trace
from moesaic.checkpoint.quantize import quantize
from moesaic.checkpoint.save import export_model
from moesaic.cli import main
from moesaic.config import ModelConfig, MoEConfig
from moesaic.model.transformer import Transformer
from moesaic.tokenizer import byte_tokenizer

from .test_upcycle import moesaic

SPARSE = ModelConfig(
    vocab_size=257, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
    initializer_range=0.2, moe=MoEConfig(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=64),
)  # fmt: skip
CODE = "import os, sys\n\n\ndef read(path):\n    return [int(x) + 17 for x in open(path)]\n" * 12
PROSE = "The weather was fine, and nobody asked whether it would stay so.\n" * 14


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, `packed` of it in 4 bits, `dense`, and texts."""
    place = tmp_path_factory.mktemp("inspect")
    torch.manual_seed(np.random.SeedSequence().entropy % 2**31)  # type: ignore[operator]
    for name, config in (("model", SPARSE), ("dense", replace(SPARSE, moe=None, intermediate_size=64))):
        model = Transformer(config)
        model.init_weights(seed=int(torch.randint(2**31, ())))
        export_model(model, byte_tokenizer(), place / name)
    (place / "code.py").write_text(CODE)
    (place / "prose.txt").write_text(PROSE)
    (place / "empty.txt").write_text("")
    (place / "latin.txt").write_bytes(b"caf\xe9 " * 50)
    (place / "folder.html").mkdir()
    return place


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, and what was printed, of a command in this process."""
    shown = warnings.showwarning
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    warnings.showwarning = shown
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out, told.err


def texts(place: Path) -> tuple[str, ...]:
    return ("--data", f"code={place / 'code.py'}", f"prose={place / 'prose.txt'}", "--sequence-length", "64")


def test_a_model_is_inspected_and_its_numbers_are_right(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    written = ("--trace", tmp_path / "trace", "--out", tmp_path / "page.html", "--png", tmp_path / "png")
    result = moesaic("inspect", place / "model", *texts(place), *written, "--tokens", "1000", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    model = library.load(place / "model")
    loads = np.zeros((2, 6), int)
    for text in (CODE, PROSE):
        ids = torch.tensor(list(text.encode())[:500])
        for window in ids.split(64):
            with library.record_routing(model) as trace:
                model(window[None])
            loads += torch.stack([layer.tokens_per_expert() for layer in trace]).numpy()
    assert (report["tokens"], report["sources"]) == (1000, ["code", "prose"])
    assert [layer["load"] for layer in report["layers"]] == loads.tolist()
    assert report["layers"][0]["max_vio"] == pytest.approx(loads[0].max() / loads[0].mean() - 1, rel=1e-5)
    trace = read_trace(tmp_path / "trace")
    assert np.bincount(trace.columns(1)["expert"], minlength=6).tolist() == loads[1].tolist()
    offsets, sources = trace.tokens.text_offsets, trace.tokens.source_ids
    for source, text in enumerate((CODE, PROSE)):
        told = b"".join(trace.vocabulary[int(token)] for token in trace.tokens.token_ids[sources == source])
        assert told == text.encode()[:500]
        assert offsets[sources == source].tolist() == list(range(500))
    assert "<!doctype html>" in (tmp_path / "page.html").read_text()
    assert sorted(path.stem for path in (tmp_path / "png").iterdir()) == [
        "cache",
        "domains",
        "information",
        "load",
        "pairs",
    ]
    assert list((tmp_path / "tmp").glob("moesaic-trace-*")) == []


def test_a_trace_is_read_again_and_compared(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize(place / "model", tmp_path / "packed", "int4")
    page = ("--out", tmp_path / "page.html")
    code, out, err = run(
        capsys, "inspect", place / "model", *texts(place), *page, "--trace", tmp_path / "one", "--json"
    )
    assert code == 0, err
    first = json.loads(out)
    code, out, err = run(capsys, "inspect", tmp_path / "one", *page, "--json")
    assert code == 0, err
    again = json.loads(out)
    for layer in (*first["layers"], *again["layers"]):
        for key in ("duplicates", "compared", "numbers"):
            layer.pop(key, None)
    assert again["layers"] == first["layers"]
    code, out, err = run(capsys, "inspect", tmp_path / "one", "--against", tmp_path / "packed", *page, "--json")
    assert code == 0, err
    moved = json.loads(out)["layers"][1]["movement"]
    assert 0 < moved["changed"] < 1
    assert moved["kept"] > 0.5
    code, out, err = run(capsys, "inspect", tmp_path / "one", "--against", tmp_path / "one", *page)
    assert code == 0, err
    assert "0.0%" in out
    assert f"page: {tmp_path / 'page.html'}" in out


def test_a_budget_of_memory_changes_no_number(place: Path, tmp_path: Path) -> None:
    quantize(place / "model", tmp_path / "packed", "int4")
    arguments = ("inspect", tmp_path / "packed", *texts(place), "--out", tmp_path / "page.html", "--json")
    whole, within = moesaic(*arguments), moesaic(*arguments, "--memory", "2GiB")
    assert within.returncode == 0, within.stderr
    assert json.loads(within.stdout) == json.loads(whole.stdout)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["model"], 2, ["--data NAME=FILE"]),
        (["dense", "--data", "a=code.py"], 2, ["is dense", "moesaic upcycle"]),
        (["model", "--data", "a=nowhere.txt"], 2, ["no data at", "nowhere.txt"]),
        (["model", "--data", "=code.py"], 2, ["is no NAME=FILE"]),
        (["model", "--data", "a=code.py", "a=prose.txt"], 2, ["has a twice"]),
        (["model", "--data", "a=empty.txt"], 2, ["a=empty.txt gives 0 tokens"]),
        (["model", "--data", "a=latin.txt"], 1, ["latin.txt is not UTF-8 at byte 3"]),
        (["model", "--data", "a=code.py", "--out", "folder.html"], 2, ["folder.html is a folder"]),
        (["model", "--data", "a=code.py", "--out", "no/page.html"], 2, ["in no folder that exists"]),
        (["model", "--data", "a=code.py", "--tokens", "0"], 2, ["--tokens is 0"]),
        (["model", "--data", "a=code.py", "--sequence-length", "100000"], 2, ["positions; lower it"]),
        (["model", "--data", "a=code.py", "--trace", "folder.html"], 2, ["is not a trace"]),
        (["model", "--data", "a=code.py", "--against", "dense"], 2, ["is dense"]),
        (["nowhere", "--data", "a=code.py"], 2, ["nowhere"]),
    ],
)
def test_mistakes_get_one_line(
    place: Path, arguments: list[str], code: int, words: list[str],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(place)
    status, _, told = run(capsys, "inspect", *arguments)
    assert status == code, told
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    for word in words:
        assert word in told
    assert not (place / "inspect.html").exists()


def test_a_damaged_trace_is_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = ("--out", tmp_path / "page.html")
    assert run(capsys, "inspect", place / "model", *texts(place), *page, "--trace", tmp_path / "t")[0] == 0
    shard = tmp_path / "t" / "trace-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    code, _, told = run(capsys, "inspect", tmp_path / "t", *page)
    assert code == 1
    assert told.count("\n") == 1
    assert "is damaged" in told
    assert "trace-00001" in told
    code, _, told = run(capsys, "inspect", tmp_path / "t", "--data", "a=b", *page)
    assert code == 2
    assert "leave --data out" in told
