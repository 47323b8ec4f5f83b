"""`moesaic quantize` as a user meets it, and every command on what it made."""

import json
import os
import shlex
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moesaic.checkpoint.save import export_model
from moesaic.config import ModelConfig, MoEConfig
from moesaic.model.transformer import Transformer
from moesaic.tokenizer import byte_tokenizer

from .test_cli import start
from .test_upcycle import moesaic

SPARSE = ModelConfig(
    vocab_size=257, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
    initializer_range=0.2, moe=MoEConfig(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=64),
)  # fmt: skip
GREEDY = ("--prompt", "def ", "--max-tokens", "8", "--temperature", "0")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    model = Transformer(SPARSE)
    model.init_weights(seed=int(torch.randint(2**31, ())))
    export_model(model, byte_tokenizer(), tmp_path / "plain model")
    return tmp_path / "plain model"


def test_a_quantised_directory_takes_the_place_of_the_model(plain: Path) -> None:
    out = plain.with_name("packed model")
    result = moesaic("quantize", plain, out, "--scheme", "int4", "--group_size", "64")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"wrote {out} as int4: ")
    assert lines[0].endswith(" kB in float32 -> " + lines[0].rpartition("-> ")[2])
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:6]}
    assert rows["experts"][:3] == ["int4", f"{2 * 6 * 3 * 64 * 64:,}", "4.25"]
    assert (rows["attention"][0], rows["head"][0]) == ("int8", "int4")
    assert 7 < float(rows["experts"][3].rstrip("%")) < 9
    assert rows["the"][:2] == ["rest", "float32"]
    assert "% of the bytes were packed" in lines[6]
    printed = shlex.split(result.stdout.split("-m moesaic ")[1])
    assert printed[:2] == ["generate", str(out)]
    text = moesaic(*printed, *GREEDY[2:])
    assert text.returncode == 0, text.stderr
    assert text.stdout
    (plain.parent / "text").write_text("import os, sys\n" * 40)
    scored = moesaic("eval", out, "--data", plain.parent / "text", "--sequence-length", "64", "--json")
    assert json.loads(scored.stdout)["perplexity"] > 1
    refused = moesaic("export", out, plain.with_name("exported"))
    assert refused.returncode == 2
    assert "the model is quantised" in refused.stderr


def test_a_budget_of_memory_changes_nothing_of_the_text(plain: Path) -> None:
    out = plain.with_name("out")
    assert moesaic("quantize", plain, out, "--scheme", "int4").returncode == 0
    whole, within = (moesaic("generate", out, *GREEDY, "--json", *budget) for budget in ((), ("--memory", "2GiB")))
    assert within.returncode == 0, within.stderr
    report = json.loads(within.stdout)
    assert report["token_ids"] == json.loads(whole.stdout)["token_ids"]
    assert 0 < report["hit_rate"] < 1
    assert report["bytes_read"] == sum(layer["bytes_read"] for layer in report["expert_cache"]) > 0
    assert report["peak_bytes"] < 2 * 2**30
    (plain.parent / "text").write_text("import os, sys\n" * 40)
    score = ("--data", plain.parent / "text", "--sequence-length", "64", "--json")
    assert moesaic("eval", out, *score).stdout == moesaic("eval", out, *score, "--memory", "2GiB").stdout != ""
    for memory, fault in (("10MiB", "too little: the model needs at least"), ("lots", "is not a size")):
        refused = moesaic("generate", out, *GREEDY, "--memory", memory)
        assert refused.returncode == 2
        assert fault in refused.stderr


def test_weights_are_packed_while_they_are_read(plain: Path) -> None:
    out = plain.with_name("out")
    assert moesaic("quantize", plain, out, "--scheme", "int8").returncode == 0
    before, packed = moesaic("generate", out, *GREEDY), moesaic("generate", plain, *GREEDY, "--quantization", "int8")
    assert packed.returncode == 0, packed.stderr
    assert packed.stdout == before.stdout != ""


def test_experts_that_a_record_used_most_get_more_bits(plain: Path) -> None:
    counts = [[70, 1, 60, 1, 0, 1], [20, 20, 20, 20, 50, 20]]
    uses = plain.with_name("uses.json")
    uses.write_text(json.dumps({"tokens_per_expert": counts}))
    out = plain.with_name("mixed")
    result = moesaic("quantize", plain, out, "--scheme", "int4", "--hot", uses, "--bits", "5.6")
    assert result.returncode == 0, result.stderr
    rows = {line[:11].strip(): line[11:].split() for line in result.stdout.splitlines()[2:7]}
    one = 3 * 64 * 64
    assert rows["experts"][:3] == ["int4", f"{9 * one:,}", "4.50"]
    assert rows["hot experts"][:3] == ["int8", f"{3 * one:,}", "8.50"]
    assert float(rows["hot experts"][3].rstrip("%")) < 1 < float(rows["experts"][3].rstrip("%"))
    share = (130 / 133 + 50 / 150) / 2
    assert f"3 of 12 experts are hot and took {share:.0%} of the assignments of the record; 5.50 bits" in result.stdout
    assert "\nhot ones of 6, by layer: 2 1\n" in result.stdout
    stored = json.loads((out / "config.json").read_text())["quantization_config"]
    assert stored["hot_experts"] == [[0, 2], [4]]
    text = moesaic("generate", out, *GREEDY)
    assert text.returncode == 0, text.stderr
    assert text.stdout
    refused = moesaic("generate", out, *GREEDY, "--memory", "2GiB")
    assert (refused.returncode, refused.stderr.count("\n"), refused.stdout) == (2, 1, "")
    assert "quantise the model without --hot, or leave memory out" in refused.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--scheme int4 --hot-share 0.3", "--hot-share gives 8 bits to the experts that were used most, and no record"),
        ("--scheme int4 --hot uses.json", "neither is given; give one: --hot-share 0.25"),
        ("--scheme int8 --hot uses.json --bits 5", "scheme int8 has none of these; choose scheme int4"),
        ("--scheme int4 --hot uses.json --bits 5", "record one: moesaic inspect"),
        ("--scheme int3", "int3"),
        ("--scheme int4 --group-size 48", "48"),
        ("", "--scheme"),
        ("--scheme mxfp4", "not of the form mxfp4"),
        ("--scheme int4 --dtype int8", "int8"),
    ],
)
def test_mistakes_get_one_line(plain: Path, flags: str, message: str) -> None:
    result = moesaic("quantize", plain, plain.with_name("out"), *flags.split())
    assert result.returncode == (1 if "mxfp4" in flags else 2), result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert result.stdout == ""
    assert os.listdir(plain.parent) == ["plain model"]


def test_ctrl_c_says_so_and_leaves_nothing(plain: Path) -> None:
    many = MoEConfig(num_experts=64, num_experts_per_tok=2, moe_intermediate_size=192)
    model = Transformer(replace(SPARSE, num_hidden_layers=24, moe=many))
    model.init_weights(seed=0)
    export_model(model, byte_tokenizer(), plain.with_name("large"))
    for number in range(10):  # on a busy machine the command may end before this process looks
        result = plain.with_name(f"out-{number}")
        with start("quantize", plain.with_name("large"), result, "--scheme", "int4") as process:
            while process.poll() is None and not list(plain.parent.glob(".out-*.writing-*")):
                time.sleep(0.001)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate()
        if process.returncode != 0:
            break
        shutil.rmtree(result)
    assert (process.returncode, out, err) == (130, "", "error: interrupted\n")
    assert sorted(os.listdir(plain.parent)) == ["large", "plain model"]


def test_nothing_is_overwritten_or_quantised_twice(plain: Path) -> None:
    out = plain.with_name("out")
    assert moesaic("quantize", plain, out, "--scheme", "int8").returncode == 0
    again = moesaic("quantize", plain, out, "--scheme", "int4")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "exists and is not empty" in again.stderr
    twice = moesaic("quantize", out, plain.with_name("twice"), "--scheme", "int4")
    assert (twice.returncode, twice.stderr.count("\n")) == (2, 1)
    assert "is quantised (int8); name the model that it was made from" in twice.stderr
    both = moesaic("generate", out, *GREEDY, "--quantization", "int4")
    assert (both.returncode, both.stderr.count("\n")) == (2, 1)
    assert "is quantised as int8 already" in both.stderr
