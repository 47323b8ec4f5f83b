"""The command line as a user meets it: real processes, their output, exit codes and errors."""

import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = """
steps = 24
batch_size = 4
sequence_length = 32
evaluate_every = 12
evaluation_tokens = 256
[data]
source = "{text}"
[model]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
[model.moe]
num_experts = 4
num_experts_per_tok = 2
moe_intermediate_size = 16
router = "sigmoid_topk"
[balance]
bias_update_rate = 0.01
[checkpoint]
save_every = 6
"""


def start(*arguments: str | Path, **options: object) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "100"}
    return subprocess.Popen(
        [sys.executable, "-m", "moesaic", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def moesaic(*arguments: str | Path, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    with start(*arguments, stdin=subprocess.PIPE) as process:
        out, err = process.communicate(stdin)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def assert_refused(result: "subprocess.CompletedProcess[str]", code: int, *words: str) -> None:
    """One line on stderr with these words, nothing on stdout, no traceback."""
    assert result.returncode == code, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text.txt, config.toml and a finished run."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text("\n\n".join(f"line {number} of a text\n" * 4 for number in range(400)))
    (folder / "config.toml").write_text(CONFIG.format(text=folder / "text.txt"))
    result = moesaic("train", folder / "config.toml", "--out", folder / "run")
    assert result.returncode == 0, result.stderr
    assert "validation loss" in result.stdout
    assert "\x1b" not in result.stdout
    return folder


def newest(run: Path) -> Path:
    return max((run / "states").glob("step-*"))


def test_generate_prints_text_or_json_and_greedy_repeats(trained: Path) -> None:
    arguments = ("generate", trained / "run", "--prompt", "line 7", "--max_tokens", "12", "--temperature", "0")
    plain, as_json = moesaic(*arguments), moesaic(*arguments, "--json")
    report = json.loads(as_json.stdout)
    assert plain.stdout == report["text"] + "\n"
    assert len(report["token_ids"]) == 12
    assert report["prompt_tokens"] == 6
    assert report["prefill_tokens_per_second"] > 0
    assert report["decode_tokens_per_second"] > 0
    assert report["peak_bytes"] > 2**20
    alias = moesaic(
        "generate", trained / "run", "--prompt", "-", "--max-new-tokens=12", "--temperature=0", stdin="line 7"
    )
    assert alias.stdout == plain.stdout


def test_eval_reports_perplexity_bits_per_byte_and_balance(trained: Path) -> None:
    """Against transformers-free arithmetic: the model's own log-likelihood of the same windows."""
    import torch

    import moesaic as package

    arguments = ("eval", trained / "run", "--data", trained / "text.txt", "--sequence-length", "50")
    report = json.loads(moesaic(*arguments, "--json").stdout)
    model, tokenizer = package.load(trained / "run"), package.load_tokenizer(trained / "run")
    ids = torch.tensor(tokenizer.encode((trained / "text.txt").read_text()))
    windows = ids[: (len(ids) - 1) // 50 * 50].view(-1, 50)
    targets = ids[1 : windows.numel() + 1].view(-1, 50)
    with torch.no_grad():
        nats = -model(windows).double().log_softmax(-1).gather(-1, targets[..., None]).mean()
    assert report["perplexity"] == pytest.approx(float(nats.exp()), rel=0.02)
    assert report["bits_per_byte"] == pytest.approx(float(nats) / math.log(2), rel=0.02)
    assert report["loss"] == pytest.approx(math.log(report["perplexity"]), rel=1e-6)
    assert report["max_vio"] >= 0
    assert "bits per byte" in moesaic(*arguments).stdout


def test_export_opens_in_transformers_and_generates_the_same(trained: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import moesaic as package

    result = moesaic("export", trained / "run", trained / "hf")
    assert "glm4_moe" in result.stdout, result.stderr
    theirs = AutoModelForCausalLM.from_pretrained(trained / "hf", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(trained / "hf")("line 9 of", return_tensors="pt").input_ids
    ours, again = package.load(trained / "run"), package.load(trained / "hf")
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-4
        assert torch.equal(again(ids), ours(ids))
    assert_refused(moesaic("export", trained / "run", trained / "hf"), 2, "not empty")


def test_chat_continues_and_ends_with_its_input(trained: Path) -> None:
    result = moesaic(
        "chat", trained / "run", "--max-tokens", "8", stdin="line 1\n/clear\n\nline 2\n/quit\nnever read\n"
    )
    assert result.returncode == 0, result.stderr
    assert "no chat template" in result.stdout
    assert len(result.stdout.splitlines()) >= 3


def test_doctor_names_the_backend_and_the_instruction_set() -> None:
    report = json.loads(moesaic("doctor", "--json").stdout)
    assert report["backend"] in ("native", "grouped")
    assert report["instruction_set"]
    assert report["gflops"]["float32"] > 0
    assert "backend reference" in moesaic("doctor").stdout


REFUSALS: list[tuple[list[str], int, list[str]]] = [
    (["generat"], 2, ["generate"]),
    (["generate", "{run}"], 2, ["--prompt"]),
    (["generate", "{run}", "--prompt", "x", "--max-tokens", "many"], 2, ["many"]),
    (["generate", "{run}", "--prompt", "x", "--top-p", "0"], 2, ["top_p is 0"]),
    (["generate", "{run}", "--prompt", ""], 2, ["prompt is empty"]),
    (["generate", "{run}", "--prompt", "x", "--max-tokens", "9999"], 2, ["lower --max-tokens to 2047"]),
    (
        ["generate", "{run}", "--prompt", "x", "--backend", "cuda"],
        2,
        ["choose auto, native, grouped, packed, reference"],
    ),
    (["generate", "{folder}/nothing", "--prompt", "x"], 2, ["neither a run directory"]),
    (["generate", "no-one/nothing", "--prompt", "x", "--offline"], 1, ["not in the local cache", "without --offline"]),
    (["chat", "no-one/nothing", "--offline"], 1, ["not in the local cache", "without --offline"]),
    (["eval", "no-one/x", "--data", "{config}", "--offline", "--revision", "v2"], 1, ["revision v2 of no-one/x"]),
    (["export", "no-one/x", "{folder}/new", "--offline"], 1, ["not in the local cache", "without --offline"]),
    (["generate", "{run}", "--prompt", "x", "--revision", "v2"], 2, ["has no revision v2"]),
    (["eval", "{run}", "--data", "{folder}/nothing"], 2, ["is not a file"]),
    (["train", "{folder}/nothing.toml"], 2, ["nothing.toml"]),
    (["train", "{config}", "--out", "{run}"], 2, ["--resume"]),
    (["train", "{config}", "--out", "{folder}/new", "--resume"], 2, ["no saved state"]),
    (["train", "{config}", "--out", "{folder}/new", "--model.moe.num-expert", "8"], 2, ["did you mean num_experts?"]),
    (["train", "{config}", "--out", "{folder}/new", "--model.moe.num-experts", "1"], 2, ["at most 1"]),
    (["train", "{config}", "--out", "{folder}/new", "--model.num-key-value-heads", "3"], 2, ["must divide"]),
    (["train", "{config}", "--out", "{folder}/new", "--sequence-length", "2000000"], 2, ["max_position_embeddings"]),
    (["train", "{config}", "--out", "{folder}/new", "--data.source", "{folder}/empty.txt"], 2, ["empty"]),
    (["train", "{config}", "--out", "{folder}/new", "--data.source", "{folder}/latin1.txt"], 1, ["UTF-8", "byte"]),
    (["train", "{config}", "--out", "{folder}/new", "--data.source", "{folder}/short.txt"], 2, ["10 for training"]),
    (["train", "{config}", "--out", "{folder}/text.txt"], 2, ["cannot write to"]),
    (["train", "{config}", "--out", "{folder}/text.txt/run"], 2, ["cannot write to"]),
    (["train", "{config}", "--out", "{folder}/new", "--backend", "fast"], 2, ["choose auto, native, grouped"]),
    (["train", "{config}", "--out", "{folder}/new", "--optimizer.lr", "inf"], 2, ["lr is inf"]),
    (["train", "{config}", "--out", "{folder}/new", "--steps", "9" * 5000], 2, ["steps"]),
    (["train", "{config}", "--out", "{folder}/new", "--seed", "9" * 20], 2, ["2^63"]),
    (["train", "{config}", "--out", "{folder}/new", "--model.hidden-size", "4000000"], 2, ["GiB"]),
    (["train", "{config}", "--out", "{folder}/new", "--batch-size", "100000000"], 2, ["GiB", "set micro_batch_size"]),
    (["train", "{config}", "--out", "{folder}/model"], 2, ["holds a model (model.safetensors); name another"]),
    (["demo", "--minutes", "0.01", "--out", "{folder}/model"], 2, ["holds a model (model.safetensors); name another"]),
    (["train", "{config}", "--out", "{folder}/new", "--optimizer.expert-every", "0"], 2, ["expert_every is 0"]),
    (["train", "{config}", "--out", "{folder}/new", "--device", "meta"], 2, ["this machine has cpu"]),
    (["eval", "{run}", "--data", "{folder}/text.txt", "--sequence-length", "0"], 2, ["1 or more"]),
    (["eval", "{run}", "--data", "{folder}/text.txt", "--sequence-length", "4096"], 2, ["2048 positions"]),
    (["eval", "{run}", "--data", "{folder}/empty.txt"], 2, ["empty.txt holds no text"]),
    (["export", "{run}", "{run}/hf"], 2, ["lies inside the model"]),
    (["export", "{run}", "{folder}/new", "--quantization", "int4"], 2, ["--quantization"]),
    (["quantize", "{run}", "{run}", "--scheme", "int4"], 2, ["exists and is not empty; name a new directory"]),
    (["quantize", "{run}", "{run}/states/int4", "--scheme", "int4"], 2, ["lies inside the model"]),
    (["generate", "{run}", "--prompt", "x", "--seed", "-1"], 2, ["seed is -1"]),
    (["demo", "--minutes", "nan"], 2, ["above 0"]),
    (["bench", "nothing"], 2, ["there are", "resume"]),
    (["demo", "--minutes", "-1"], 2, ["above 0"]),
]


@pytest.mark.parametrize(("arguments", "code", "words"), REFUSALS, ids=[" ".join(row[0]) for row in REFUSALS])
def test_mistakes_get_one_line(trained: Path, arguments: list[str], code: int, words: list[str]) -> None:
    (trained / "empty.txt").write_text("")
    (trained / "short.txt").write_text("too short")
    (trained / "model").mkdir(exist_ok=True)
    (trained / "model" / "model.safetensors").write_bytes(b"somebody's")
    (trained / "latin1.txt").write_bytes("caf\xe9 ".encode("latin-1") * 100)
    names = {"folder": trained, "run": trained / "run", "config": trained / "config.toml"}
    assert_refused(moesaic(*(argument.format(**names) for argument in arguments)), code, *words)


def test_ctrl_c_saves_and_resume_goes_on_bitwise(trained: Path) -> None:
    config, run = trained / "config.toml", trained / "interrupted"
    with start("train", config, "--out", run, "--steps", "200", "--checkpoint.save-every", "1000") as process:
        metrics = run / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 5):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130, err
    printed = shlex.split(out.split("go on with: ")[1].split("-m moesaic ")[1])
    assert 0 < int(newest(run).name[5:]) < 200
    assert moesaic(*printed).returncode == 0
    moesaic("train", config, "--out", trained / "whole", "--steps", "200", "--checkpoint.save-every", "1000")
    for name in ("model.safetensors", "optimizer.safetensors", "random.safetensors"):
        assert (newest(run) / name).read_bytes() == (newest(trained / "whole") / name).read_bytes()


def test_a_damaged_state_is_said_and_an_older_one_used(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    damaged = newest(run) / "optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    damaged.write_bytes(content)
    result = moesaic("train", trained / "config.toml", "--out", run, "--resume")
    assert result.returncode == 0, result.stderr
    assert "damaged" in result.stdout
    assert "going back to step 18" in result.stdout
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (newest(run) / name).read_bytes() == (newest(trained / "run") / name).read_bytes()


def test_twenty_sigkills_at_random_moments_end_in_the_undisturbed_state() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(ROOT / "benchmarks" / "resume.py"), "--kills", "20", "--json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout)["rows"]
    assert row["met"] is True, result.stderr
    assert "20 SIGKILLs, 10 of them among steps" in row["work"]
    assert "left 1 different states" not in row["work"]
