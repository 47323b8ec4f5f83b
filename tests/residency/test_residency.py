"""Models whose experts are on disk against the same in memory, and what happens when the disk fails."""

import gc
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moesaic
from moesaic.checkpoint import load_within as loading
from moesaic.checkpoint.quantize import quantize
from moesaic.checkpoint.save import export_model
from moesaic.config import EngineConfig, ModelConfig, MoEConfig, SamplingConfig
from moesaic.engine.engine import Engine
from moesaic.engine.generate import Generation, stream
from moesaic.engine.request import Request
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.transformer import Transformer
from moesaic.residency.foresight import Guess
from moesaic.residency.memory_plan import MemoryPlan, make_plan
from moesaic.residency.residency import LayerStore, Residency, residency_of
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
    read = statistics.misses + statistics.read_ahead + statistics.read_in_vain
    assert read >= (experts if slots < experts else 1)
    pending = len(residency(on_disk).cache._ahead.pending)
    assert 0 <= read * residency(on_disk).plan.slot_bytes - statistics.bytes_read <= pending


def test_text_is_the_same_token_for_token(tmp_path: Path, with_slots: Callable[[Path, int], Transformer]) -> None:
    directory = quantized(tmp_path)
    tokenizer = moesaic.load_tokenizer(directory)
    prompt = "many small experts, " * 30  # two pieces of prefill
    config = SamplingConfig(max_tokens=20, temperature=0.0)
    found: list[list[int]] = []
    for model in (moesaic.load(directory), with_slots(directory, 4)):
        generation = Generation(prompt_tokens=0)
        "".join(stream(model, tokenizer, tokenizer.encode(prompt, add_special_tokens=True), config, generation))
        found.append(generation.token_ids)
    assert found[0] == found[1]


def test_what_fits_is_read_once(tmp_path: Path) -> None:
    directory = quantized(tmp_path)
    model = moesaic.load(directory, memory="64GiB")
    tokens = torch.arange(257).unsqueeze(0)
    with torch.inference_mode():
        model(tokens)
        first = residency(model).statistics
        model(tokens)
    again = residency(model).statistics
    assert first.hits == first.read_ahead
    assert (again.misses, again.bytes_read, again.read_ahead) == (first.misses, first.bytes_read, first.read_ahead)
    assert again.hits == first.hits + first.misses + first.hits


@pytest.fixture
def tight(tmp_path: Path) -> Residency:
    """Of a model whose budget is exactly what it has, all its experts, and a prefill."""
    found = residency(moesaic.load(quantized(tmp_path), memory="64GiB"))
    found.plan = replace(found.plan, budget=sum(found.plan.parts.values()) + 24 * found.plan.slot_bytes)
    return found


KV_BYTES = 3 * 2 * 32 * 4  # layers, keys and values, width, bytes


def test_keys_and_values_take_the_place_of_experts(tight: Residency) -> None:
    assert tight.plan.slots == 24
    with tight.room(cached_tokens=20):
        assert tight.plan.slots == tight.cache.table.number < 24
        assert tight.plan.parts["keys and values of 20 tokens"] == 20 * KV_BYTES
    assert tight.plan.slots == tight.cache.table.number == 24
    with pytest.raises(UsageError, match=r"keys and values of 1,000,000 tokens"), tight.room(cached_tokens=10**6):
        pass
    with pytest.raises(UsageError, match=r"GiB activations .* less text"), tight.room(pass_tokens=10**6):
        pass
    assert tight.plan.slots == 24


def test_rooms_may_open_and_close_in_any_order(tight: Residency) -> None:
    prefill = tight.plan.parts["activations"]
    first, second = tight.room(cached_tokens=30), tight.room(cached_tokens=30)
    one = first.__enter__()
    one.resize(1)
    assert tight.plan.parts["activations"] < prefill
    second.__enter__()
    assert tight.plan.parts["activations"] >= prefill
    assert tight.plan.parts["keys and values of 60 tokens"] == 60 * KV_BYTES
    first.__exit__(None, None, None)
    assert tight.plan.parts["keys and values of 30 tokens"] == 30 * KV_BYTES
    second.__exit__(None, None, None)
    assert tight.plan.parts["activations"] < prefill
    assert tight.plan.slots == 24


def test_slots_change_after_the_pass_that_this_thread_has(
    tmp_path: Path, with_slots: Callable[[Path, int], Transformer]
) -> None:
    """The collector may close a text that was given up while another is computed."""
    cache = residency(with_slots(quantized(tmp_path), 24)).cache
    chunks = cache.chunks(0, [0, 1])
    next(chunks)
    cache.resize(5)
    assert cache.table.number == 24
    chunks.close()
    list(cache.chunks(1, [0, 1, 2, 3, 4, 5, 6]))
    assert cache.table.number == 5


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_torchs_default_type_changes_nothing(
    tmp_path: Path, with_slots: Callable[[Path, int], Transformer], default: torch.dtype
) -> None:
    directory, tokens = quantized(tmp_path), torch.randint(0, 257, (1, 40))
    in_memory, on_disk = moesaic.load(directory), with_slots(directory, 5)
    expected = in_memory(tokens)
    torch.set_default_dtype(default)
    try:
        assert torch.equal(on_disk(tokens), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("slots", [2, 5, 12])
def test_a_pass_that_was_interrupted_while_it_ended_is_ended_by_the_next(
    tmp_path: Path, with_slots: Callable[[Path, int], Transformer], monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    model, tokens = with_slots(quantized(tmp_path), slots), torch.randint(0, 257, (1, 40))
    expected, cache = model(tokens), residency(model).cache

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cache, "_submit", interrupted)
        patched.setattr(cache.table, "end_pass", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(tokens)
    assert torch.equal(model(tokens), expected)


@torch.inference_mode()
def test_guesses_are_read_ahead_while_they_come_true(
    tmp_path: Path, with_slots: Callable[[Path, int], Transformer]
) -> None:
    model = with_slots(quantized(tmp_path), 12)
    cache = residency(model).cache
    cache.foresight.precision = 0.0
    model(torch.randint(0, 257, (1, 1)))
    statistics = residency(model).statistics
    assert statistics.read_ahead == statistics.read_in_vain == 0
    first, second, last = (layer.experts.store for layer in model.moe_layers)
    for number, store in ((1, first), (2, second)):
        assert isinstance(store, LayerStore)
        assert store.ahead is not None
        guess = store.ahead.guess(torch.randn(1, 64), 3)
        assert guess is not None
        assert (guess.layer, len(guess.numbers)) == (number, 3)
        assert store.ahead.guess(torch.randn(40, 64), 120) == Guess(number, range(8), is_certain=True)
    assert isinstance(last, LayerStore)
    assert last.ahead is None


def test_a_pass_without_a_room_gets_what_it_needs(
    tmp_path: Path, with_slots: Callable[[Path, int], Transformer]
) -> None:
    model = with_slots(quantized(tmp_path), 24)
    found = residency(model)
    with found.room():
        prefill = found.plan.parts["activations"]
    assert found.plan.parts["activations"] < prefill
    model(torch.zeros(1, 600, dtype=torch.int64))
    assert found.plan.parts["activations"] > prefill
    model(torch.zeros(1, 5, dtype=torch.int64))
    assert found.plan.parts["activations"] > prefill  # experts would have to be read again
    with found.room(cached_tokens=1, pass_tokens=1):
        assert found.plan.parts["activations"] < prefill


def test_threads_share_a_model(tmp_path: Path, with_slots: Callable[[Path, int], Transformer]) -> None:
    model = with_slots(quantized(tmp_path), 3)
    inputs = [torch.randint(0, 257, (1, 30)) for _ in range(4)]
    alone = [model(tokens) for tokens in inputs]
    together: dict[int, list[bool]] = {}

    def compute(number: int) -> None:
        together[number] = [torch.equal(model(inputs[number]), alone[number]) for _ in range(10)]

    threads = [threading.Thread(target=compute, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == dict.fromkeys(range(4), [True] * 10)


@pytest.mark.parametrize(("name", "slots"), [("claim", 4), ("put", 4), ("let_go", 4), ("hold", 24)])
def test_an_interrupted_pass_leaves_the_cache_as_it_was(
    tmp_path: Path,
    with_slots: Callable[[Path, int], Transformer],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    slots: int,
) -> None:
    model, tokens = with_slots(quantized(tmp_path), slots), torch.randint(0, 257, (1, 40))
    expected = model(tokens)
    table = residency(model).cache.table
    real = getattr(table, name)

    def interrupted(*arguments: object) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(table, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(tokens)
    monkeypatch.setattr(table, name, real)
    with residency(model).room(cached_tokens=10):
        assert torch.equal(model(tokens), expected)


def test_a_model_that_is_replaced_on_disk_goes_on_from_the_old_files(
    tmp_path: Path, with_slots: Callable[[Path, int], Transformer]
) -> None:
    directory, other = quantized(tmp_path / "one"), quantized(tmp_path / "other")
    in_memory, on_disk = moesaic.load(directory), with_slots(directory, 4)
    os.replace(other / "model.safetensors", directory / "model.safetensors")
    tokens = torch.arange(40).unsqueeze(0)
    assert torch.equal(on_disk(tokens), in_memory(tokens))


def test_files_are_closed_with_the_model(tmp_path: Path) -> None:
    directory = quantized(tmp_path)
    opened = []
    for _ in range(3):
        model = moesaic.load(directory, memory="64GiB")
        model(torch.arange(5).unsqueeze(0))
        del model
        gc.collect()
        opened.append(len(os.listdir("/proc/self/fd")))
    assert opened[0] == opened[-1]


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
    with pytest.raises(UsageError, match=r"packed is quantised as int4 already; leave quantization out"):
        moesaic.load(tmp_path / "packed", memory="2GiB", quantization="int8")
    dense = quantized(tmp_path / "dense", replace(SPARSE, moe=None, intermediate_size=64))
    with pytest.raises(UsageError, match="has no experts, which alone can stay on disk"):
        moesaic.load(dense, memory="2GiB")


def test_a_model_on_disk_is_not_exported(tmp_path: Path) -> None:
    model = moesaic.load(quantized(tmp_path, scheme="int8"), memory="64GiB")
    with pytest.raises(UsageError, match="the model is quantised"):
        export_model(model, None, tmp_path / "out")


@pytest.mark.parametrize("expert_bytes", ["", "8KiB"])
def test_texts_side_by_side_are_those_of_the_model_in_memory(
    tmp_path: Path, with_slots: Callable[[Path, int], Transformer], expert_bytes: str
) -> None:
    directory = quantized(tmp_path)
    in_memory, on_disk = moesaic.load(directory, device="cpu"), with_slots(directory, 7)
    requests = [
        Request(
            prompt_ids=torch.randint(0, 257, (int(torch.randint(1, 90, ())),)).tolist(),
            sampling=SamplingConfig(max_tokens=12, temperature=0, ignore_eos=True),
        )
        for _ in range(8)
    ]
    config = EngineConfig(step_tokens=48, max_model_tokens=256, kv_memory="1MiB", expert_bytes=expert_bytes)
    texts = []
    for model in (in_memory, on_disk):
        engine = Engine(model, byte_tokenizer(), config)
        written: dict[int, list[int]] = {engine.submit(request): [] for request in requests}
        while engine.has_work:
            for handle, delta in engine.step():
                assert delta.error is None
                written[handle] += [token.id for token in delta.tokens]
        texts.append(list(written.values()))
        statistics = engine.statistics()
        engine.close()
    assert texts[0] == texts[1]
    assert statistics.misses > 0
    assert statistics.bytes_read > 0
    assert residency(on_disk).plan.parts.keys() >= {"activations"}
    assert not any("keys and values" in part for part in residency(on_disk).plan.parts)
