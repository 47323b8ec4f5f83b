"""The benchmarks measure what they say: the same model on all sides, turns that can be resumed, limits that are ones.

What needs llama.cpp is skipped where it is not installed: it takes minutes to build, and no other test needs it.
"""

import argparse
import importlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import moesaic
from moesaic.analysis.comparison import Comparison, RunCurve
from moesaic.checkpoint.save import export_model
from moesaic.config import ModelConfig, MoEConfig
from moesaic.model.transformer import Transformer
from moesaic.ops.device import measured_matmul_peak
from moesaic.train.evaluate import evaluate

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PEERS = "llama.cpp is not installed (pip install -e '.[peers]' builds it)"
TINY_RACE = ("--width", "16", "--layers", "1", "--inner", "32", "--head-dim", "8", "--vocabulary", "300",
             "--experts", "4", "--top-k", "2", "--batch", "4", "--length", "32", "--threads", "1")  # fmt: skip


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def module(name: str, needs: tuple[str, ...] = ()) -> Any:
    for package in needs:
        pytest.importorskip(package, reason=PEERS)
    return importlib.import_module(name)


def run(name: str, *flags: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--json", *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def random_model(model_type: str, **sizes: int) -> Transformer:
    fields: dict[str, int] = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, **sizes}
    config = ModelConfig(
        num_attention_heads=4,
        num_key_value_heads=4 if model_type == "olmoe" else 2,
        head_dim=fields["hidden_size"] // 4,
        max_position_embeddings=256,
        model_type=model_type,
        qk_norm="width" if model_type == "olmoe" else "head",
        moe=MoEConfig(
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=fields["hidden_size"],
            norm_topk_prob=model_type != "olmoe",
            routed_scaling_factor=2.0,
        ),
        **fields,  # type: ignore[arg-type]
    )
    model = Transformer(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(1.0, 0.1) if tensor.ndim == 1 else tensor.normal_(0.0, tensor.shape[-1] ** -0.5)
    return model


def exported(folder: Path, model_type: str, **sizes: int) -> Path:
    export_model(random_model(model_type, **sizes), None, folder / "hf")
    return folder / "hf"


@pytest.mark.parametrize("model_type", ["olmoe", "qwen3_moe"])
def test_gguf_transformers_and_ours_are_one_model(tmp_path: Path, model_type: str) -> None:
    gguf_model, llama = (module(f"inference.{name}", ("llama_cpp", "gguf")) for name in ("gguf_model", "llama"))
    directory = exported(tmp_path, model_type)
    ours = moesaic.load(directory)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    gguf_model.write_gguf(ours, tmp_path / "model.gguf")
    model = llama.LlamaModel(tmp_path / "model.gguf", threads=1, capacity=48, all_logits=True, exact=True)
    tokens_L = torch.randint(320, (48,))
    with torch.no_grad():
        expected_LV = ours(tokens_L[None])[0]
        of_transformers_LV = theirs(tokens_L[None]).logits[0]
    found_LV = torch.from_numpy(model.logits(tokens_L.numpy()))
    model.close()
    for logits_LV in (of_transformers_LV, found_LV):
        # Half of the positions: rounding turns a near tie of two experts now and then.
        assert (logits_LV - expected_LV).abs().amax(1).median() < 1e-3 * expected_LV.std()


def test_quantised_gguf_files_have_their_bits(tmp_path: Path) -> None:
    gguf_model, llama = (module(f"inference.{name}", ("llama_cpp", "gguf")) for name in ("gguf_model", "llama"))
    ours = moesaic.load(exported(tmp_path, "olmoe", hidden_size=256))
    gguf_model.write_gguf(ours, tmp_path / "model.gguf")
    tokens_L = torch.randint(320, (64,))
    with torch.no_grad():
        expected = ours(tokens_L[None])[0].numpy().ravel()
    matrices = sum(
        tensor.numel()
        for name, tensor in ours.state_dict().items()
        if tensor.ndim > 1 and "router" not in name and "embed_tokens" not in name
    )
    plain = sum(
        4 * tensor.numel() for name, tensor in ours.state_dict().items() if tensor.ndim == 1 or "router" in name
    )
    agreement = {}
    for name, bits in (("Q8_0", 8.5), ("Q4_0", 4.5)):
        path = tmp_path / f"{name}.gguf"
        gguf_model.quantize(tmp_path / "model.gguf", path, name, pure=True, threads=1)
        assert gguf_model.tensor_bytes(path) == matrices * bits / 8 + plain
        model = llama.LlamaModel(path, threads=1, capacity=64, all_logits=True)
        agreement[name] = np.corrcoef(expected, model.logits(tokens_L.numpy()).ravel())[0, 1]
        model.close()
    assert agreement["Q8_0"] > max(0.9, agreement["Q4_0"])


def test_a_gguf_file_is_refused_for_other_families(tmp_path: Path) -> None:
    gguf_model = module("inference.gguf_model", ("llama_cpp", "gguf"))
    with torch.device("meta"):
        model = Transformer(ModelConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                                        num_key_value_heads=1, head_dim=8, intermediate_size=8))  # fmt: skip
    with pytest.raises(SystemExit, match="olmoe"):
        gguf_model.write_gguf(model, tmp_path / "model.gguf")


def test_limits_are_of_the_size_that_torch_reaches() -> None:
    limits = module("inference.limits").measure_limits(1, seconds=0.01)
    reached = measured_matmul_peak("cpu", torch.float32, size=512, seconds=0.1)
    assert 0.3 < limits.float32 / reached < 30
    assert limits.bfloat16 >= limits.float32
    assert 0.5 < limits.int8 / limits.float32 < 64
    assert 1e8 < limits.read < 1e13


def test_sides_take_turns_in_processes_of_their_own(tmp_path: Path) -> None:
    sides, runners = module("inference.sides"), module("inference.runners")
    directory = exported(tmp_path, "olmoe")
    both = [
        sides.Side("ours", partial(runners.Ours, directory, 1)),
        sides.Side("transformers", partial(runners.Transformers, directory, 1, dtype="float32")),
    ]
    tokens = np.random.default_rng().integers(320, size=24)
    with torch.no_grad():
        expected_LV = moesaic.load(directory)(torch.from_numpy(tokens)[None])[0].numpy()
    with sides.Contest(both, threads=1) as contest:
        seconds = contest.take_turns("decode", [(tokens.reshape(3, 8)[:, :5], tokens.reshape(3, 8)[:, 5:])] * 3)
        assert {name: len(each) for name, each in seconds.items()} == {"ours": 2, "transformers": 2}
        assert all(value > 0 for each in seconds.values() for value in each)
        assert all(contest.ask(name, "prefill", tokens) > 0 for name in contest.names)
        for name in contest.names:
            error_L = np.abs(contest.ask(name, "logits", tokens) - expected_LV).max(1)
            assert np.median(error_L) < 1e-3 * expected_LV.std()
        with pytest.raises(RuntimeError, match=r"transformers: .*nothing"):
            contest.ask("transformers", "nothing")
    with (
        pytest.raises(RuntimeError, match="absent"),
        sides.Contest([sides.Side("ours", partial(runners.Ours, tmp_path / "absent", 1))], threads=1),
    ):
        pass


def test_a_decoded_step_reads_its_experts_and_all_else_once(tmp_path: Path) -> None:
    runner = module("inference.runners").Ours(exported(tmp_path, "olmoe"), 1)
    ours = runner.model.state_dict()
    experts = sum(4 * tensor.numel() for name, tensor in ours.items() if ".experts." in name)
    rest = sum(4 * tensor.numel() for name, tensor in ours.items() if ".experts." not in name and "embed" not in name)
    assert math.isclose(runner.bytes_per_step(1), rest + experts / 4)
    assert math.isclose(runner.bytes_per_step(2), rest + experts * 7 / 16)
    assert math.isclose(runner.bytes_per_step(1000), rest + experts)


def test_cpu_inference_runs_at_a_tiny_size() -> None:
    module("inference.gguf_model", ("llama_cpp", "gguf"))
    sizes = {"width": 64, "expert-width": 64, "experts": 8, "top-k": 2, "heads": 2, "vocabulary": 320, "prefill": 40}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    rows = run("cpu_inference", "--formats", "bf16", "--threads", "1", "--rounds", "2", *flags)["rows"]
    assert [row["work"].split(" (")[0] for row in rows] == ["bf16: prefill 40"] * 2 + ["bf16: decode, batch 1"] * 2
    assert {row["peer_name"].split()[0] for row in rows} == {"llama.cpp", "transformers"}
    assert all(row["met"] == (row["ratio"] >= row["goal"]) and row["limit"] > 0 for row in rows)


def test_divergence_is_zero_of_the_model_itself_and_grows_with_what_is_lost(tmp_path: Path) -> None:
    quantization = module("quantization", ("llama_cpp", "gguf"))
    reference, rounded = (moesaic.load(exported(tmp_path / name, "olmoe")) for name in "ab")
    rounded.load_state_dict(reference.state_dict())
    with torch.no_grad():
        for tensor in rounded.parameters():
            tensor.copy_(tensor.bfloat16())
    windows = [(torch.randint(320, (16,)).numpy(), torch.randint(320, (16,))) for _ in range(3)]
    same, other = (
        quantization._quality(reference, quantization._contender(model), windows) for model in (reference, rounded)
    )
    batches = [(torch.from_numpy(tokens)[None], targets[None], torch.zeros(1).long()) for tokens, targets in windows]
    assert same.divergence == 0.0
    assert 1e-9 < other.divergence < 0.1
    assert math.isclose(same.perplexity, evaluate(reference, batches, torch.ones(320)).perplexity, rel_tol=1e-5)
    assert math.isclose(same.bits, 32.0)


def some_text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, and again: " * 2000)
    return path


def race_flags(race: Any, *flags: str) -> argparse.Namespace:
    """As the script's own command line makes them."""
    caught: list[argparse.Namespace] = []

    def catch(arguments: argparse.Namespace) -> list[Any]:
        caught.append(arguments)
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["race.py", *TINY_RACE, *flags])
        with pytest.raises(SystemExit):
            race.run_benchmark("flags", catch, *race.FLAGS)
    return caught[0]


def test_twins_do_equal_work_on_equal_tokens() -> None:
    race = module("race")
    for flags in ((), ("--experts", "64", "--top-k", "8", "--width", "64", "--inner", "512"), ("--optimizer", "adamw")):
        twins = race.twins(race_flags(race, *flags), seed=3)
        race._require_equal_work(twins)
        dense, sparse = twins["dense"], twins["sparse"]
        assert (dense.seed, dense.data, dense.optimizer) == (sparse.seed, sparse.data, sparse.optimizer)
        assert dense.steps * dense.tokens_per_step >= 20 * race.count_parameters(dense.model).active
    with pytest.raises(SystemExit, match="MFLOP"):
        race._require_equal_work(
            race.twins(race_flags(race, "--inner", "60", "--top-k", "16", "--experts", "16", "--layers", "4"), seed=0)
        )


def test_a_race_that_was_stopped_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    race = module("race")
    flags = race_flags(race, "--quick", "--data", str(some_text(tmp_path)), "--batch", "1")
    config = race.twins(flags, seed=0)["sparse"]
    losses = []
    for name, parts in (("whole", (config.steps,)), ("parts", (2, 1, config.steps))):
        for steps in parts:
            racer = race._Racer("sparse", config, tmp_path / name, tmp_path / "data", 4000)
            racer.take_turn(steps)
        assert not racer.unfinished
        losses.append([(row["step"], row.get("val_loss"), row.get("loss")) for row in racer._rows()])
    assert losses[0] == losses[1]
    assert len({step for step, _, _ in losses[0]}) == config.steps > 4


def test_race_runs_at_a_tiny_size_and_keeps_what_it_found(tmp_path: Path) -> None:
    record, data = tmp_path / "race.md", some_text(tmp_path)
    flags = (*TINY_RACE, "--data", str(data), "--scratch", str(tmp_path / "scratch"), "--record", str(record))
    first, second = (run("race", *flags)["rows"] for _ in range(2))
    assert first == second
    (loss,) = re.findall("final loss ([0-9.]+)", first[0]["work"])
    assert f"| 0 | {loss} | " in record.read_text()
    assert record.with_suffix(".png").stat().st_size > 1000


def curve(name: str, losses: Mapping[int, float], seconds_per_step: float) -> RunCurve:
    rows = [
        {"kind": "eval", "step": step, "tokens": 100 * step, "seconds": seconds_per_step * step, "val_loss": loss}
        for step, loss in losses.items()
    ]
    return RunCurve(name=name, rows=rows, parameters_total=1, parameters_active=1, flops_per_token=1.0)


def test_ratios_of_a_race_are_those_of_its_clocks() -> None:
    race = module("race")
    dense = curve("dense", {1: 5.0, 2: 4.0, 4: 3.0}, seconds_per_step=1.0)
    sparse = curve("sparse", {1: 4.0, 2: 2.0}, seconds_per_step=1.5)
    comparison = Comparison(sparse=sparse, dense=dense)
    assert race.ratio_curve(comparison, points=3) == [(100, 1.5), (200, 0.75), (400, 2.25 / 4)]
    row = race._seed_row(0, comparison)
    assert (row.ours, row.peer, row.ratio, row.met) == (2.25, 4.0, 2.25 / 4, True)
    behind = Comparison(sparse=curve("sparse", {1: 4.5, 2: 3.5}, 1.0), dense=dense)
    assert race.ratio_curve(behind, points=3)[-1] == (400, None)
    assert (race._seed_row(1, behind).ratio, race._seed_row(1, behind).met) == (None, False)
    assert race._summary_row([comparison, behind]).met is False
    assert race._summary_row([comparison]).ratio == 2.25 / 4
