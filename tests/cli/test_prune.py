"""`moesaic prune` as a user meets it: numbers that hold when they are measured again, and mistakes in one line."""

import json
import os
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from moesaic.checkpoint.load import load
from moesaic.checkpoint.save import export_model
from moesaic.cli import main
from moesaic.config import ModelConfig, MoEConfig
from moesaic.model.transformer import Transformer
from moesaic.tokenizer import byte_tokenizer

from .test_upcycle import moesaic as in_a_process

SPARSE = ModelConfig(
    vocab_size=257, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    intermediate_size=48, initializer_range=0.2,
    moe=MoEConfig(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1),
)  # fmt: skip
Command = Callable[..., "CompletedProcess[str]"]
SHORT = ("--sequence-length", "32", "--tokens", "640")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    model = Transformer(SPARSE)
    model.init_weights(seed=int(torch.randint(2**31, ())))
    export_model(model, byte_tokenizer(), tmp_path / "plain model")
    (tmp_path / "text.txt").write_text("".join(f"def f{number}(x): return x * {number}\n" for number in range(100)))
    return tmp_path / "plain model"


@pytest.fixture
def moesaic(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command, in this process: starting one takes longer than most of what is tested."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def run(*arguments: str | Path) -> "CompletedProcess[str]":
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return CompletedProcess(arguments, int(end.value.code or 0), printed.out, printed.err)

    return run


def test_the_report_is_true(moesaic: Command, plain: Path) -> None:
    text, out = plain.with_name("text.txt"), plain.with_name("pruned")
    result = moesaic("prune", plain, out, "--keep", "4", "--data", text, *SHORT, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["family"], report["by"]) == ("qwen3_moe", "reap")
    assert report["experts"] == {"before": 6, "after": 4}
    assert report["tokens"]["scored"] == 640
    sizes = report["bytes"]
    assert sizes["saved"] == sizes["before"] - sizes["after"] == 2 * 2 * (3 * 32 * 32 + 32) * 4
    assert sizes["after"] == sum(tensor.nbytes for tensor in load(out).state_dict().values())
    assert list(report["kept"]) == list(report["dropped"]) == list(report["scores"]) == ["1", "2"]
    for layer, scores in report["scores"].items():
        best = sorted(range(6), key=lambda expert, scores=scores: -scores[expert])
        assert report["kept"][layer] == sorted(best[:4])
        assert report["dropped"][layer] == sorted(best[4:])
    # The last tenth of the windows, measured by another command.
    ids = byte_tokenizer().encode(text.read_text())
    windows = len(ids) // 32
    start = (windows - windows // 10) * 32
    plain.with_name("tail.txt").write_bytes(text.read_bytes()[start : start + windows // 10 * 32 + 1])
    for model, when in ((plain, "before"), (out, "after")):
        score = moesaic("eval", model, "--data", plain.with_name("tail.txt"), "--sequence-length", "32", "--json")
        measured = json.loads(score.stdout)
        assert measured["perplexity"] == pytest.approx(report["perplexity"][when])
        assert measured["tokens"] == report["tokens"]["measured"] == windows // 10 * 32


def test_it_is_said_in_words_and_the_next_command_runs(moesaic: Command, plain: Path) -> None:
    out = plain.with_name("pruned model")
    result = moesaic("prune", plain, out, "--keep", "3", "--by", "random", "--seed", "5")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"wrote {out} as qwen3_moe, 3 of 6 experts a layer, by random"
    assert "saved (" in lines[1]
    assert [line.split(" without ")[0] for line in lines[2:4]] == ["  layer 1", "  layer 2"]
    assert "perplexity" not in result.stdout  # nothing to measure it on
    printed = shlex.split(result.stdout.split("-m moesaic ")[1])
    text = in_a_process(*printed, "--max-tokens", "4")
    assert text.returncode == 0, text.stderr
    again = plain.with_name("again")
    assert moesaic("prune", plain, again, "--keep", "3", "--by", "random", "--seed", "5").returncode == 0
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_list_says_what_stays(moesaic: Command, plain: Path) -> None:
    named, out = plain.with_name("kept.json"), plain.with_name("pruned")
    named.write_text('{"2": [5, 0, 1], "1": [2, 3, 4]}')
    text = plain.with_name("text.txt")
    first = moesaic("prune", plain, out, "--by", "list", "--experts", named, "--data", text, *SHORT, "--json")
    assert first.returncode == 0, first.stderr
    report = json.loads(first.stdout)
    assert report["kept"] == {"1": [2, 3, 4], "2": [0, 1, 5]}
    assert report["scores"] == {}
    assert set(report["perplexity"]) == {"before", "after"}
    plain.with_name("report.json").write_text(first.stdout)
    second = ("prune", plain, plain.with_name("again"), "--by", "list", "--experts", plain.with_name("report.json"))
    assert moesaic(*second).returncode == 0
    assert (plain.with_name("again") / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_experts_on_disk_and_packed_ones_can_be_scored(moesaic: Command, plain: Path) -> None:
    text = plain.with_name("text.txt")
    common = ("prune", plain, "--keep", "4", "--data", text, "--eval-data", text, *SHORT, "--json", "--by", "frequency")
    reports = []
    for number, flags in enumerate(((), ("--memory", "2GiB"), ("--quantization", "int8", "--memory", "2GiB"))):
        result = moesaic(*common[:2], plain.with_name(f"out-{number}"), *common[2:], *flags)
        assert result.returncode == 0, result.stderr
        reports.append(json.loads(result.stdout))
    assert reports[1]["kept"] == reports[0]["kept"]
    assert reports[1]["perplexity"]["after"] == pytest.approx(reports[0]["perplexity"]["after"], rel=1e-4)
    assert reports[2]["perplexity"]["before"] == pytest.approx(reports[0]["perplexity"]["before"], rel=0.1)
    assert reports[2]["bytes"] == reports[0]["bytes"]  # what is written is not packed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data TEXT", "nothing says how many experts stay in each layer; add --keep N"),
        ("--keep 4", "--by reap scores the experts on a text; add --data FILE"),
        ("--keep 6 --data TEXT", "keep is 6 and each layer has 6 experts; keep from 2 to 5"),
        ("--keep 1 --data TEXT", "keep is 1, but a token visits 2 experts; keep 2 or more"),
        ("--keep 4 --data nowhere.txt", "--data nowhere.txt is not a file"),
        ("--keep 4 --data TEXT --eval-data nowhere.txt", "--eval-data nowhere.txt is not a file"),
        ("--keep 4 --data TEXT --tokens 0", "--tokens is 0; it must be 1 or more"),
        ("--keep 4 --data TEXT --tokens 100", "--tokens is 100, less than one window of 256; raise it"),
        ("--keep 4 --data TEXT --batch-size 0", "--batch-size is 0"),
        ("--keep 4 --data SHORT", "holds 10 tokens, and 2 windows of --sequence-length 256 take 513; lower it"),
        ("--keep 4 --data TEXT --eval-data SHORT", "holds 10 tokens, and 1 window of --sequence-length 256 takes 257"),
        ("--keep 4 --data TEXT --sequence-length 9000 --tokens 9000", "--sequence-length is 9000 but the model has"),
        ("--keep 4 --data TEXT --by size", "size"),
        ("--keep 4 --by random --seed -1", "seed is -1"),
        ("--by list", "--by list and --experts FILE belong together"),
        ("--keep 4 --data TEXT --experts LIST", "--by list and --experts FILE belong together"),
        (
            "--by list --experts LIST --keep 4",
            "--keep is 4, but --experts keeps 3 in its first layer; leave --keep out",
        ),
        ("--by list --experts SHORT", "is not valid JSON"),
        ("--by list --experts STRANGE", 'is not of the form {"0": [1, 5, 6], "1": [0, 2, 3]}'),
        ("--by list --experts LIST", "layer 2 is to keep expert 6, but has experts 0 to 5"),
    ],
)
def test_mistakes_get_one_line(moesaic: Command, plain: Path, flags: str, message: str) -> None:
    folder = plain.parent
    (folder / "short").write_text("too short")
    (folder / "list.json").write_text('{"1": [0, 1, 2], "2": [0, 1, 6]}')
    (folder / "strange.json").write_text('{"1": [0, 1, "2"]}')
    names = {"TEXT": "text.txt", "SHORT": "short", "LIST": "list.json", "STRANGE": "strange.json"}
    before = sorted(os.listdir(folder))
    words = [str(folder / names[word]) if word in names else word for word in flags.split()]
    result = moesaic("prune", plain, folder / "out", *words)
    assert result.returncode == (1 if "JSON" in message else 2), result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert result.stdout == ""
    assert sorted(os.listdir(folder)) == before


def test_nothing_is_overwritten(moesaic: Command, plain: Path) -> None:
    common = ("--keep", "4", "--by", "random")
    for out, message in ((plain, "exists and is not empty"), (plain / "inside", "lies inside the model")):
        refused = moesaic("prune", plain, out, *common)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert message in refused.stderr
    packed = plain.with_name("packed")
    assert moesaic("quantize", plain, packed, "--scheme", "int8").returncode == 0
    refused = moesaic("prune", packed, plain.with_name("out"), *common)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "is quantised (int8); name the model that it was made from" in refused.stderr
