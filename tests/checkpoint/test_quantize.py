"""A quantised directory loads as the model that is packed in memory, and is written whole or not at all."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moesaic.checkpoint import quantize as quantizing
from moesaic.checkpoint.load import load, load_tokenizer
from moesaic.checkpoint.packed import pack_mxfp4
from moesaic.checkpoint.quantize import quantize
from moesaic.checkpoint.save import export_model
from moesaic.checkpoint.upcycle import Upcycling, upcycle
from moesaic.config import ModelConfig, MoEConfig
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.quantize import make_quantization, packed_weights, quantize_model
from moesaic.model.transformer import Transformer
from moesaic.ops.quantize import unpack
from moesaic.tokenizer import byte_tokenizer
from moesaic.weight_reader import WeightDirectory, read_safetensors
from moesaic.weights_io import write_safetensors

from .family_cases import FAMILY_CASES, GPT_OSS
from .helpers import BASE, CONFIGS, make_run, random_model, random_tokens, save_hf_model

FAMILIES = ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "deepseek_v2", "gpt_oss", "dbrx", "granitemoe",
            "llama4_text", "phimoe", "qwen3", "minimax_m2 whole heads turned, yarn, tied"]  # fmt: skip


def export(model: Transformer, directory: Path) -> None:
    export_model(model, byte_tokenizer() if model.config.vocab_size == 257 else None, directory)


def assert_same(one: Transformer, other: Transformer) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    tokens = random_tokens()
    with torch.no_grad():
        assert torch.equal(one(tokens), other(tokens))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_directory_holds_what_packing_in_memory_gives(tmp_path: Path, name: str, scheme: str) -> None:
    save_hf_model(FAMILY_CASES[name], tmp_path / "plain")
    made = quantize(tmp_path / "plain", tmp_path / "packed", scheme, group_size=32, max_shard_bytes=20_000)
    in_memory = load(tmp_path / "plain")
    tied = in_memory.config.tie_word_embeddings
    plain_numbers = sum(tensor.numel() for tensor in in_memory.state_dict().values())
    quantize_model(in_memory, make_quantization(scheme, in_memory.config))
    loaded = load(tmp_path / "packed")
    assert loaded.config == in_memory.config
    assert_same(loaded, in_memory)
    assert_same(load(tmp_path / "plain", quantization=scheme), in_memory)
    assert_same(load(tmp_path / "packed", quantization=scheme), in_memory)
    assert made.weights == plain_numbers + (97 * 32 if tied else 0)
    assert made.nbytes == sum(tensor.nbytes for tensor in loaded.state_dict().values())
    with WeightDirectory(tmp_path / "packed") as weights:
        assert len(list((tmp_path / "packed").glob("model-*.safetensors"))) > 1
        assert set(weights.names) == set(loaded.state_dict())
    for kind in made.kinds.values():
        assert kind.relative_error < {"int8": 0.01, "int4": 0.1}[kind.format]


def test_what_is_left_plain_may_change_its_type(tmp_path: Path) -> None:
    save_hf_model(FAMILY_CASES["deepseek_v3"], tmp_path / "plain")
    quantize(tmp_path / "plain", tmp_path / "packed", "int4", dtype="bfloat16")
    model = load(tmp_path / "packed", dtype="bfloat16")
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert types["embed_tokens.weight"] == types["layers.0.attention.kv_b_proj.weight"] == torch.bfloat16
    assert (
        types["layers.1.feed_forward.router.weight"]
        == types["layers.1.feed_forward.router.expert_bias"]
        == torch.float32
    )
    with torch.no_grad():
        assert model(random_tokens()).dtype == torch.bfloat16
    assert load(tmp_path / "packed").embed_tokens.weight.dtype == torch.float32


def test_a_published_mxfp4_model_stays_what_it_is(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 32}
    save_hf_model(transformers.GptOssConfig(**{**GPT_OSS, **sizes}), tmp_path / "published")
    file = tmp_path / "published" / "model.safetensors"
    tensors = read_safetensors(file)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = pack_mxfp4(tensors.pop(name))
    write_safetensors(file, tensors)
    plain = load(tmp_path / "published")
    quantize(tmp_path / "published", tmp_path / "packed", "mxfp4")
    packed = load(tmp_path / "packed")
    assert_same(packed, load(tmp_path / "published", quantization="mxfp4"))
    found = {name: weight for _, name, weight in packed_weights(packed)}
    assert len(found) == 2 * plain.config.num_hidden_layers
    for name, weight in found.items():
        assert torch.equal(unpack(weight, torch.bfloat16), plain.state_dict()[name].bfloat16())
    quantize(tmp_path / "published", tmp_path / "int4", "int4")
    assert load(tmp_path / "int4").config == plain.config


def test_a_run_becomes_a_quantised_directory(tmp_path: Path) -> None:
    config = replace(CONFIGS["sigmoid, shared, partial rope"], vocab_size=257)
    model = make_run(tmp_path / "run", config)
    made = quantize(tmp_path / "run", tmp_path / "packed", "int4", group_size=64)
    quantize_model(model, make_quantization("int4", config, 64))
    loaded = load(tmp_path / "packed")
    assert_same(loaded, model)
    assert loaded.config.eos_token_ids == (256,)
    assert load_tokenizer(tmp_path / "packed").to_json() == byte_tokenizer().to_json()
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["model_type"] == "glm4_moe"
    assert set(made.kinds) == {"experts", "shared_experts", "mlp", "attention", "lm_head"}
    formats = {weight.format for _, _, weight in packed_weights(load(tmp_path / "run", quantization="int8"))}
    assert formats == {"int8"}


def test_the_report_adds_up(tmp_path: Path) -> None:
    config = replace(ModelConfig(**BASE), hidden_size=128, vocab_size=300, moe=CONFIGS["softmax"].moe)
    export(random_model(config), tmp_path / "plain")
    made = quantize(tmp_path / "plain", tmp_path / "packed", "int4")
    experts, attention = made.kinds["experts"], made.kinds["attention"]
    assert experts.weights == 3 * 5 * 3 * 128 * 24
    assert experts.nbytes == 3 * 5 * (3 * 4 * (32 + 256) + 8 * 1 * (32 + 256))
    assert attention.weights == 3 * (2 * 128 * 64 + 2 * 128 * 32)
    assert 0.06 < experts.relative_error < 0.08
    assert 0.004 < attention.relative_error < 0.007
    head = 300 * 128
    assert made.plain_weights == made.weights - experts.weights - attention.weights - head
    assert made.packed_share == pytest.approx((experts.weights + attention.weights + head) / made.weights)
    assert made.plain_nbytes == 4 * made.weights
    assert made.dtype == torch.float32


def test_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(random_model(CONFIGS["softmax"]), tmp_path / "plain")
    quantize(tmp_path / "plain", tmp_path / "packed", "int8")
    out = tmp_path / "out"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("one")
    before = sorted(os.listdir(tmp_path))
    for call, message in (
        (lambda: quantize(tmp_path / "plain", tmp_path / "thesis", "int4"), "thesis exists and is not empty"),
        (
            lambda: quantize(tmp_path / "plain", out, "int3"),
            "quantization 'int3' is not known; choose int8, int4, mxfp4",
        ),
        (lambda: quantize(tmp_path / "plain", out, "int4", group_size=16), "group size 16 is not possible with int4"),
        (lambda: quantize(tmp_path / "plain", out, "int4", dtype="int8"), "dtype 'int8' is not known"),
        (lambda: quantize(tmp_path / "packed", out, "int4"), "packed is quantised (int8); name the model that it was"),
        (lambda: quantize(tmp_path / "nothing", out, "int4"), "nothing is neither a run directory"),
        (lambda: upcycle(tmp_path / "packed", out, Upcycling(num_experts=4, top_k=2)), "packed is quantised (int8)"),
        (lambda: load(tmp_path / "packed", quantization="int4"), "packed is quantised as int8 already"),
        (lambda: load(tmp_path / "plain", quantization="int3"), "quantization 'int3' is not known"),
        (
            lambda: export(load(tmp_path / "packed"), out),
            "the model is quantised, and an exported one has plain weights",
        ),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            call()
    with pytest.raises(MoesaicError, match=r"layers\.0\.feed_forward\.experts\.\w+: .* not of the form mxfp4"):
        quantize(tmp_path / "plain", out, "mxfp4")
    broken = random_model(CONFIGS["softmax"])
    with torch.no_grad():
        broken.moe_layers[2].experts.down[1, 2, 3] = torch.inf
    export(broken, tmp_path / "broken")
    for make in (
        lambda: quantize(tmp_path / "broken", out, "int4"),
        lambda: load(tmp_path / "broken", quantization="int8"),
    ):
        with pytest.raises(MoesaicError, match=r"layers\.2\.feed_forward\.experts\.down: .* not finite"):
            make()
    monkeypatch.setattr(quantizing, "quantize_model", lambda model, quantization: None)
    with pytest.raises(MoesaicError, match=r"layers\.0\.feed_forward\.experts\.gate_up would stay as they are"):
        quantize(tmp_path / "plain", out, "int4")
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "broken"])


def test_the_model_itself_stays_as_it_is(tmp_path: Path) -> None:
    export(random_model(CONFIGS["softmax"]), tmp_path / "plain")
    make_run(tmp_path / "run", replace(CONFIGS["softmax"], vocab_size=257))
    dense = random_model(CONFIGS["dense"])
    export(dense, tmp_path / "dense")
    (tmp_path / "link").symlink_to("plain")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for source, out in (("plain", "plain/a"), ("run", "run/states/a"), ("link", "plain/a"), ("plain", "link/a")):
        with pytest.raises(UsageError, match=f"lies inside the model .*{source}; name a directory outside"):
            quantize(tmp_path / source, tmp_path / out, "int4")
    with pytest.raises(UsageError, match="lies inside the model"):
        upcycle(tmp_path / "dense", tmp_path / "dense" / "sparse", Upcycling(num_experts=4, top_k=2))
    with pytest.raises(UsageError, match=r"exists and is not empty; name a new directory$"):
        quantize(tmp_path / "plain", tmp_path / "plain", "int4")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_file_of_the_model_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(random_model(CONFIGS["softmax"]), tmp_path / "plain")
    (tmp_path / "plain" / "merges.txt").write_text("a b")
    opened = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == tmp_path / "plain" / "merges.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(MoesaicError, match=r"cannot read .*plain/merges\.txt: Permission denied"):
        quantize(tmp_path / "plain", tmp_path / "out", "int4")
    assert os.listdir(tmp_path) == ["plain"]


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    export(random_model(CONFIGS["softmax"]), tmp_path / "plain")
    seen: list[tuple[str, int, int | None]] = []

    def interrupt(*counted: Any) -> None:
        seen.append(counted)
        if counted[1] == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tmp_path / "plain", tmp_path / "out", "int4", progress=interrupt)
    assert os.listdir(tmp_path) == ["plain"]
    total = len(load(tmp_path / "plain").state_dict())
    assert seen == [("tensors", number, total) for number in range(1, 21)]


SLOWLY = """
    import sys, time
    from pathlib import Path
    from moesaic.checkpoint.quantize import quantize

    plain, out = map(Path, sys.argv[1:])
    quantize(plain, out, "int4", progress=lambda *_: (print("one", flush=True), time.sleep(0.01)))
"""


@pytest.mark.parametrize("tensors", [1, 9, 25])
def test_a_kill_leaves_nothing_half_written(tmp_path: Path, tensors: int) -> None:
    export(random_model(CONFIGS["softmax"]), tmp_path / "plain")
    command = [sys.executable, "-c", textwrap.dedent(SLOWLY), tmp_path / "plain", tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(tensors):
            process.stdout.readline()
        time.sleep(torch.rand(()).item() * 0.05)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    quantize(tmp_path / "plain", tmp_path / "out", "int4")
    assert sorted(os.listdir(tmp_path)) == ["out", "plain"]
    load(tmp_path / "out")


PEAK = """
    import sys
    from pathlib import Path
    from moesaic.checkpoint.load import load
    from moesaic.checkpoint.quantize import quantize

    def memory(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    plain, small, out = map(Path, sys.argv[1:])
    quantize(small, out / "small", "int4")  # what is only made once
    load(small, quantization="int4")
    for make in (lambda: quantize(plain, out / "packed", "int4"), lambda: load(plain, quantization="int4")):
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        made = make()
        print(memory("VmHWM") - before)
"""


def test_memory_holds_one_plain_tensor_at_a_time(tmp_path: Path) -> None:
    moe = MoEConfig(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=512)
    config = replace(ModelConfig(**BASE), hidden_size=256, moe=moe)
    for name, layers in (("small", 1), ("plain", 12)):
        export_model(random_model(replace(config, num_hidden_layers=layers)).bfloat16(), None, tmp_path / name)
    plain_bytes = (tmp_path / "plain" / "model.safetensors").stat().st_size
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(PEAK),
        *(str(tmp_path / name) for name in ("plain", "small", "out")),
    ]
    quantizing_peak, loading_peak = map(int, subprocess.check_output(command, text=True).split())
    packed_bytes = (tmp_path / "out" / "packed" / "model.safetensors").stat().st_size
    assert quantizing_peak < 0.4 * plain_bytes
    assert loading_peak < packed_bytes + 0.4 * plain_bytes
