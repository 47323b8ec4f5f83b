"""`--trace` keeps what the routers decided for each token that a command had the model read. T tokens, E experts."""

import json
import random
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import moesaic as library
from moesaic.analysis.trace import Trace, read_trace
from moesaic.analysis.trace_writer import TraceWriter
from moesaic.cli.tracing import traced_engines, training_watch
from moesaic.config import DataConfig, EngineConfig, SamplingConfig, TrainConfig
from moesaic.engine.engine import Engine
from moesaic.engine.request import Request
from moesaic.errors import MoesaicError
from moesaic.model.transformer import Transformer
from moesaic.tokenizer import Tokenizer, byte_tokenizer
from moesaic.train.screen import Screen

from .test_inspect import CODE, SPARSE, place, run  # noqa: F401

CLEAR = 1e-4
"""Between the last expert chosen and the best refused: closer ones may change places with a batch's rounding."""
FEW_BLOCKS = EngineConfig(kv_memory=str(8 * 2 * 2 * 32 * 32 * 4), max_model_tokens=200)
"""Room for eight blocks of 32 tokens, so that texts give way to others."""


def require_the_experts_of(trace: Trace, sequence: int, model: Transformer, ids: Sequence[int]) -> int:
    """What a trace has of a sequence is what the routers decide when the model reads `ids` alone; how much that is."""
    places = np.flatnonzero(trace.tokens.sequence_ids == sequence)
    positions = trace.tokens.positions[places]
    assert trace.tokens.token_ids[places].tolist() == [ids[position] for position in positions]
    with library.record_routing(model) as alone:
        model(torch.tensor([ids]))
    checked = 0
    for layer, expected in enumerate(alone):
        logits_TE = expected.logits[positions]
        best_TE = logits_TE.sort(descending=True).values
        clear_T = (best_TE[:, 1] - best_TE[:, 2] > CLEAR).numpy()
        wanted_TK = expected.expert_ids.sort().values[positions].numpy()
        found_TK = np.sort(trace.layer(layer).expert_ids[places])
        assert np.array_equal(found_TK[clear_T], wanted_TK[clear_T])
        sums = trace.layer(layer).weights[places].sum(1)
        np.testing.assert_allclose(sums[clear_T], expected.weights.sum(1)[positions].numpy()[clear_T], rtol=1e-4)
        checked += int(clear_T.sum())
    assert checked > 0.9 * len(places) * len(alone)
    return len(places)


def test_what_was_evaluated_is_traced(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    model, told = library.load(place / "model"), ("--sequence-length", "50", "--batch-size", "3")
    arguments = ("eval", place / "model", "--data", place / "code.py", *told, "--json")
    code, plain, _ = run(capsys, *arguments)
    assert code == 0
    code, out, err = run(capsys, *arguments, "--trace", tmp_path / "t")
    assert code == 0, err
    assert out == plain
    trace = read_trace(tmp_path / "t")
    ids = list(CODE.encode())
    windows = (len(ids) - 1) // 50
    assert (trace.sources, len(trace)) == (["code"], windows * 50)
    for window in range(windows):
        assert require_the_experts_of(trace, window, model, ids[50 * window : 50 * window + 50]) == 50
    assert trace.tokens.text_offsets.tolist() == list(range(windows * 50))
    assert run(capsys, "inspect", tmp_path / "t", "--out", tmp_path / "page.html")[0] == 0


def test_what_was_generated_is_traced(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    arguments = ("generate", place / "model", "--prompt", "def read(path):", "--max-tokens", "20", "--json")
    code, plain, _ = run(capsys, *arguments)
    code, out, err = run(capsys, *arguments, "--trace", tmp_path / "t")
    assert code == 0, err
    written = [json.loads(one)["token_ids"] for one in (plain, out)]
    assert written[0] == written[1]
    ids = list(b"def read(path):") + written[0]
    trace = read_trace(tmp_path / "t")
    assert require_the_experts_of(trace, 0, library.load(place / "model"), ids[:-1]) == len(ids) - 1 == len(trace)
    assert trace.tokens.source_ids.tolist() == [0] * 15 + [1] * 19
    assert trace.tokens.text_offsets[:15].tolist() == list(range(15))
    assert run(capsys, "inspect", tmp_path / "t", "--out", tmp_path / "page.html")[0] == 0


@pytest.mark.parametrize(
    "config",
    [EngineConfig(), EngineConfig(step_tokens=24, max_sequences=3), FEW_BLOCKS, EngineConfig(prompt_lookup=3)],
    ids=["all at once", "in pieces", "with preemption", "with drafts"],
)
def test_texts_side_by_side_are_told_apart(place: Path, tmp_path: Path, config: EngineConfig) -> None:  # noqa: F811
    model, beginning = library.load(place / "model"), [random.randrange(256) for _ in range(70)]
    prompts = [[random.randrange(256) for _ in range(random.randint(1, 60))] for _ in range(6)]
    prompts = [*prompts, *(beginning + prompt for prompt in prompts[:3]), [65, 66] * 20]
    with traced_engines(tmp_path / "t", "model", model, byte_tokenizer()) as make_engine:
        engine = make_engine(model, byte_tokenizer(), config)
        sampling = SamplingConfig(max_tokens=40, temperature=0.0, ignore_eos=True)
        handles = engine.submit_all([Request(prompt_ids=prompt, sampling=sampling) for prompt in prompts])
        texts = dict(zip(handles, map(list, prompts), strict=True))
        ended = []
        while engine.has_work:
            for handle, delta in engine.step():
                texts[handle] += [token.id for token in delta.tokens]
                ended += [handle] * (delta.finish_reason is not None)
        assert (engine.scheduler.num_preempted > 0) == (config is FEW_BLOCKS)
        engine.close()
    trace = read_trace(tmp_path / "t")
    assert len(ended) == len(prompts)
    told = [require_the_experts_of(trace, number, model, texts[handle][:-1]) for number, handle in enumerate(ended)]
    known = [len(texts[handle]) - 1 - count for handle, count in zip(ended, told, strict=True)]
    assert all(beginning == texts[handle][:70] for handle, left in zip(ended, known, strict=True) if left)
    assert sum(known) == engine.statistics().cached_tokens


def test_what_a_run_trains_on_is_traced(place: Path, tmp_path: Path) -> None:  # noqa: F811
    from moesaic.train.run import run_training

    config = TrainConfig(
        model=SPARSE,
        data=DataConfig(source=str(place / "code.py"), validation=str(place / "prose.txt"), tokenizer="bytes"),
        steps=3,
        batch_size=4,
        sequence_length=32,
        evaluate_every=2,
        evaluation_tokens=64,
        micro_batch_size=2,
    )
    passes: list[tuple[bool, torch.Tensor]] = []

    def watch(model: Transformer, tokenizer: Tokenizer) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(training_watch(tmp_path / "t", "run")(model, tokenizer))
        handle = model.register_forward_pre_hook(lambda module, args: passes.append((module.training, args[0])))
        stack.callback(handle.remove)
        return stack

    run_training(config, tmp_path / "run", Screen(Console(quiet=True), live=False), watch=watch)
    trace = read_trace(tmp_path / "t")
    learned = [tokens for training, tokens in passes if training]
    tokens = torch.cat([tokens.flatten() for _, tokens in passes])
    assert sum(part.numel() for part in learned) == 3 * config.tokens_per_step
    assert trace.tokens.token_ids.tolist() == tokens.tolist()
    assert int((trace.tokens.source_ids == 0).sum()) == 3 * config.tokens_per_step
    assert trace.sources == ["training", "validation"]
    assert set(trace.tokens.positions.tolist()) == set(range(32))


def test_a_full_disk_ends_the_trace_and_no_text(
    place: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = library.load(place / "model")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TraceWriter, "add_chosen", full)
    request = Request(prompt_ids=[1, 2, 3], sampling=SamplingConfig(max_tokens=5))

    def write_two() -> None:
        with traced_engines(tmp_path / "t", "model", model, byte_tokenizer()) as make_engine:
            engine = make_engine(model, byte_tokenizer(), None)
            for _ in range(2):
                engine.submit(request)
                deltas = []
                while engine.has_work:
                    deltas += engine.step()
                assert deltas[-1][1].finish_reason in ("length", "stop")

    with pytest.raises(MoesaicError, match="no space left"):
        write_two()
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("command", [("eval", "--data", "code.py"), ("generate", "--prompt", "a")])
def test_what_cannot_be_traced_is_one_line(
    place: Path,  # noqa: F811
    command: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    verb, *rest = command
    for model, folder, words in (("dense", "t", "is dense"), ("nowhere", "folder.html", "exists and is not a trace")):
        code, _, told = run(capsys, verb, model, *rest, "--trace", folder)
        assert (code, told.count("\n")) == (2, 1)
        assert words in told
        assert not (place / "t").exists()


def test_without_a_folder_it_is_the_engine_itself(place: Path) -> None:  # noqa: F811
    model = library.load(place / "model")
    with traced_engines(None, "model", model, byte_tokenizer()) as make_engine:
        assert type(make_engine(model, byte_tokenizer(), None)) is Engine
