"""Models whose experts are on disk against the same in memory, and what happens when the disk fails."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moesaic
from moesaic.checkpoint import load_within as loading
from moesaic.checkpoint.quantize import quantize
from moesaic.checkpoint.save import export_model
from moesaic.config import ModelConfig, MoEConfig
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.transformer import Transformer
from moesaic.residency.memory_plan import MemoryPlan, make_plan
from moesaic.residency.residency import Residency, residency_of
from moesaic.tokenizer import byte_tokenizer

MOE = MoEConfig(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=64)
SPARSE = ModelConfig(
    vocab_size=257, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
    initializer_range=0.2, max_position_embeddings=2048,
    moe=MOE,
)  # fmt: skip
CONFIGS = {
    "softmax": SPARSE,
    "tied": replace(SPARSE, tie_word_embeddings=True),
    "a dense layer first": replace(SPARSE, moe=replace(MOE, first_k_dense_replace=1), intermediate_size=64),
}


def quantized(directory: Path, config: ModelConfig = SPARSE, scheme: str = "int4") -> Path:
    model = Transformer(config)
    model.init_weights(seed=int(torch.randint(2**31, ())))
    export_model(model, byte_tokenizer(), directory / "plain")
    quantize(directory / "plain", directory / "packed", scheme)
    return directory / "packed"


@pytest.fixture
def with_slots(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], Transformer]:
    """Loads a model with room for so many experts, however little that is of this process's memory."""

    def load(directory: Path, slots: int) -> Transformer:
        def few(*arguments: object) -> MemoryPlan:
            return replace(make_plan(*arguments), slots=slots)  # type: ignore[arg-type]

        monkeypatch.setattr(loading, "make_plan", few)
        return moesaic.load(directory, memory="64GiB", device="cpu")

    return load


def residency(model: Transformer) -> Residency:
    found = residency_of(model)
    assert found is not None
    return found


@pytest.mark.parametrize("slots", [1, 2, 5, 24])
@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_logits_equal_those_of_the_model_in_memory(
    tmp_path: Path, name: str, scheme: str, slots: int, with_slots: Callable[[Path, int], Transformer]
) -> None:
    directory = quantized(tmp_path, CONFIGS[name], scheme)
    in_memory, on_disk = moesaic.load(directory), with_slots(directory, slots)
    assert residency_of(in_memory) is None
    for length in (1, 3, 40):
        tokens = torch.randint(0, 257, (2, length))
        assert torch.equal(on_disk(tokens), in_memory(tokens))
    statistics = residency(on_disk).statistics
    experts = 8 * len(on_disk.moe_layers)
    assert statistics.misses >= (experts if slots < experts else 1)
    assert statistics.bytes_read == statistics.misses * residency(on_disk).plan.slot_bytes


def test_text_is_the_same_token_for_token(tmp_path: Path, with_slots: Callable[[Path, int], Transformer]) -> None:
    directory = quantized(tmp_path)
    tokenizer = moesaic.load_tokenizer(directory)
    prompt = "many small experts, " * 30  # two pieces of prefill
    texts = [
        moesaic.generate(model, tokenizer, prompt, max_tokens=20, temperature=0.0)
        for model in (moesaic.load(directory), with_slots(directory, 4))
    ]
    assert texts[0] == texts[1] != ""


def test_what_fits_is_read_once(tmp_path: Path) -> None:
    directory = quantized(tmp_path)
    model = moesaic.load(directory, memory="64GiB")
    tokens = torch.arange(257).unsqueeze(0)
    with torch.inference_mode():
        model(tokens)
        first = residency(model).statistics
        model(tokens)
    again = residency(model).statistics
    assert first.hits == 0
    assert (again.misses, again.bytes_read) == (first.misses, first.bytes_read)
    assert again.hits == first.misses


def test_keys_and_values_take_the_place_of_experts(tmp_path: Path) -> None:
    directory = quantized(tmp_path)
    model = moesaic.load(directory, memory="64GiB")
    found = residency(model)
    assert found.plan.slots == 24
    found.plan = replace(found.plan, budget=sum(found.plan.parts.values()) + 24 * found.plan.slot_bytes)
    kv_bytes = 3 * 2 * 32 * 4  # layers, keys and values, width, bytes
    with found.room_for_text(tokens=2 * found.plan.slot_bytes // kv_bytes):
        assert found.plan.slots == found.cache.table.number == 22
    assert found.plan.slots == found.cache.table.number == 24
    with pytest.raises(UsageError, match=r"MiB keys and values of 1,000,000 tokens"), found.room_for_text(10**6):
        pass
    with pytest.raises(UsageError, match=r"GiB activations .* less text"), found.room_for_pass(10**6, 1):
        pass


def damaged(directory: Path, how: str) -> None:
    path = directory / "model.safetensors"
    if how == "cut short":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(0, 0))


@pytest.mark.parametrize("how", ["cut short", "written to"])
def test_a_failing_read_fails_that_pass_alone(
    tmp_path: Path, how: str, with_slots: Callable[[Path, int], Transformer]
) -> None:
    directory = quantized(tmp_path)
    model = with_slots(directory, 4)
    tokens = torch.arange(40).unsqueeze(0)
    content = (directory / "model.safetensors").read_bytes()
    status = os.stat(directory / "model.safetensors")
    with torch.inference_mode():
        expected = model(tokens)
        damaged(directory, how)
        with pytest.raises(MoesaicError, match=r"model\.safetensors .* while it was in use; load the model again"):
            model(tokens)
        with open(directory / "model.safetensors", "r+b") as file:
            file.write(content)
        os.utime(directory / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
        assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize(
    ("memory", "message"),
    [("64MiB", "memory 64 MiB is too little: the model needs"), ("much", "is not a size")],
)
def test_budgets_that_do_not_do_are_refused(tmp_path: Path, memory: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        moesaic.load(quantized(tmp_path), memory=memory)


def test_what_cannot_stay_on_disk_is_refused_with_a_way_out(tmp_path: Path) -> None:
    quantized(tmp_path)
    with pytest.raises(UsageError, match=r"plain is not quantised.*moesaic quantize MODEL OUT --scheme int4"):
        moesaic.load(tmp_path / "plain", memory="2GiB")
    with pytest.raises(UsageError, match="experts are read from a quantised directory"):
        moesaic.load(tmp_path / "plain", memory="2GiB", quantization="int4")
    dense = quantized(tmp_path / "dense", replace(SPARSE, moe=None, intermediate_size=64))
    with pytest.raises(UsageError, match="has no experts, which alone can stay on disk"):
        moesaic.load(dense, memory="2GiB")


def test_a_model_on_disk_is_not_exported(tmp_path: Path) -> None:
    model = moesaic.load(quantized(tmp_path, scheme="int8"), memory="64GiB")
    with pytest.raises(UsageError, match="the model is quantised"):
        export_model(model, None, tmp_path / "out")
