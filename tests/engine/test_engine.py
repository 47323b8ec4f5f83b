"""Texts that are written side by side are those that are written alone."""

import random
from dataclasses import replace

import pytest
import torch

from moesaic.config import EngineConfig, SamplingConfig
from moesaic.engine.engine import Engine
from moesaic.engine.request import OverloadedError, Request
from moesaic.errors import MoesaicError, UsageError

from .helpers import CONFIG, TOKENIZER, alone, greedy, ids_of, make_model, random_ids, run

BLOCK = 32


def many_requests(count: int = 12) -> list[Request]:
    """Some begin alike, and some grow to several times their prompt."""
    beginning = random_ids(70)
    requests = [greedy(random_ids(30), max_tokens=70) for _ in range(5)]
    for number in range(count):
        ids = random_ids(random.randint(1, 150))
        requests.append(greedy(beginning + ids if number % 3 == 0 else ids, max_tokens=random.randint(1, 40)))
    return requests


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(),
        EngineConfig(step_tokens=24, max_sequences=5),
        EngineConfig(kv_memory=str(12 * 3 * 2 * 2 * 16 * BLOCK * 4), max_model_tokens=300),
        EngineConfig(prompt_lookup=3, step_tokens=70),
    ],
    ids=["all at once", "in pieces", "with preemption", "with drafts"],
)
def test_a_text_is_the_same_alone_and_among_others(quantization: str | None, config: EngineConfig) -> None:
    model, requests = make_model(quantization=quantization), many_requests()
    engine = Engine(model, TOKENIZER, config)
    for _ in range(2):  # the second time beginnings are known
        got = [ids_of(deltas) for deltas in run(engine, requests).values()]
        assert got == [alone(model, request) for request in requests]
    statistics = engine.statistics()
    assert statistics.kv_blocks_used == 0
    assert statistics.finished == {"length": 2 * len(requests)}
    assert statistics.cached_tokens > 0
    assert (statistics.preemptions > 0) == (engine.scheduler.pool.num_blocks == 12)


def test_one_text_is_that_of_a_loop_of_full_passes() -> None:
    model, request = make_model(), greedy(random_ids(50), max_tokens=20)
    expected = list(request.prompt_ids)
    for _ in range(20):
        expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    assert alone(model, request) == expected[50:]


def test_a_drawn_text_depends_on_its_seed_and_not_on_the_others() -> None:
    model = make_model(quantization="int4")
    requests = [
        Request(
            prompt_ids=random_ids(20),
            sampling=SamplingConfig(max_tokens=30, temperature=1.0, top_p=0.9, seed=seed % 4, frequency_penalty=0.3),
        )
        for seed in range(8)
    ]
    for config in (EngineConfig(), EngineConfig(prompt_lookup=2), EngineConfig(step_tokens=16)):
        got = [ids_of(deltas) for deltas in run(Engine(model, TOKENIZER, config), requests).values()]
        assert got == [alone(model, request) for request in requests]
    other = replace(requests[0], sampling=replace(requests[0].sampling, seed=99))
    assert alone(model, other) != alone(model, requests[0])


def test_known_beginnings_are_not_computed_again() -> None:
    engine, ids = Engine(make_model(), TOKENIZER), random_ids(100)
    first, second, third = (
        next(iter(run(engine, [greedy(prompt)]).values()))[0].prompt for prompt in (ids, ids, ids[:64])
    )
    assert first is not None
    assert second is not None
    assert third is not None
    assert (first.cached_tokens, second.cached_tokens, third.cached_tokens) == (0, 96, 32)
    assert engine.statistics().prompt_tokens == 100 + 4 + 32
    without = Engine(make_model(), TOKENIZER, EngineConfig(prefix_cache=False))
    for _ in range(2):
        run(without, [greedy(ids)])
    assert without.statistics().prompt_tokens == 200


def test_a_cancelled_text_gives_its_memory_back_within_a_step() -> None:
    engine = Engine(make_model(), TOKENIZER, EngineConfig(prefix_cache=False))
    handles = [engine.submit(greedy(random_ids(40), max_tokens=400)) for _ in range(3)]
    for _ in range(5):
        engine.step()
    assert engine.statistics().kv_blocks_used == 6
    for handle in handles[:2]:
        engine.cancel(handle)
    told = {handle for handle, _ in engine.step()}
    assert told == {handles[2]}
    assert engine.statistics().kv_blocks_used == 2
    assert engine.statistics().finished == {"cancelled": 2}


def test_stop_strings_and_the_end_of_the_text_end_it() -> None:
    model, prompt = make_model(), random_ids(9)
    ids = alone(model, greedy(prompt, max_tokens=30))
    text = TOKENIZER.decode(ids)
    ascii_at = [i for i in range(3, 28) if ids[i] < 128 and ids[i + 1] < 128]
    if not ascii_at:
        pytest.skip("this random text has no two plain characters")
    stop = TOKENIZER.decode(ids[ascii_at[0] : ascii_at[0] + 2])
    sampling = SamplingConfig(max_tokens=30, temperature=0, ignore_eos=True, stop=(stop,))
    engine = Engine(model, TOKENIZER)
    (deltas,) = run(engine, [Request(prompt_ids=prompt, sampling=sampling)]).values()
    assert "".join(delta.text for delta in deltas) == text[: text.index(stop)]
    assert deltas[-1].finish_reason == "stop"
    ending = make_model(replace(CONFIG, eos_token_ids=(ids[4],)))
    ending.load_state_dict(model.state_dict())
    until_eos = Request(prompt_ids=prompt, sampling=SamplingConfig(max_tokens=30, temperature=0))
    (deltas,) = run(Engine(ending, TOKENIZER), [until_eos]).values()
    assert ids_of(deltas) == ids[: ids.index(ids[4])]
    assert deltas[-1].finish_reason == "stop"


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_log_probabilities_and_experts_are_those_of_a_full_pass(quantization: str | None) -> None:
    model, prompt = make_model(quantization=quantization), random_ids(130)
    engine = Engine(model, TOKENIZER, EngineConfig(step_tokens=50))
    asked = greedy(prompt, max_tokens=6, logprobs=3, prompt_logprobs=2, routed_experts=True)
    others = [greedy(random_ids(30), max_tokens=20) for _ in range(3)]
    for _ in range(2):
        deltas = next(iter(run(engine, [asked, *others]).values()))
        report, tokens = deltas[0].prompt, [token for delta in deltas for token in delta.tokens]
        assert report is not None
        assert report.logprobs is not None
        assert report.routing is not None
        ids = prompt + [token.id for token in tokens]
        routings: list = []
        full_LV = model(torch.tensor([ids]), routings=routings)[0].log_softmax(-1)
        told = report.logprobs[1:] + [token.logprob for token in tokens]
        assert report.logprobs[0] is None
        assert len(told) == len(ids) - 1
        for position, logprob in enumerate(told):
            assert logprob is not None
            assert abs(logprob.value - float(full_LV[position, ids[position + 1]])) < (0.2 if quantization else 1e-3)
            assert len(logprob.top) == (2 if position < 129 else 3)
        routed = report.routing + [token.routing for token in tokens]
        same = 0
        for position, routing in enumerate(routed):
            assert routing is not None
            assert len(routing.experts) == 3
            for layer, (experts, weights) in enumerate(zip(routing.experts, routing.weights, strict=True)):
                expected = routings[layer].expert_ids.view(-1, 2)[position].tolist()
                same += sorted(experts) == sorted(expected)
                assert len(weights) == 2
        assert same > 0.9 * 3 * len(routed)  # a near tie may go the other way


def test_experts_are_told_from_a_token_on_and_known_beginnings_stay_known() -> None:
    model, prompt = make_model(quantization="int4"), random_ids(100)
    engine = Engine(model, TOKENIZER)
    everything = next(iter(run(engine, [greedy(prompt, routed_experts=True)]).values()))
    for start in (0, 40, 99, 5000):
        deltas = next(iter(run(engine, [greedy(prompt, routed_experts=True, routed_from=start)]).values()))
        report, whole = deltas[0].prompt, everything[0].prompt
        assert report is not None
        assert whole is not None
        assert whole.routing is not None
        assert report.routing == whole.routing[start:]
        assert report.cached_tokens == (96 if start >= 99 else 0)
        assert [token.routing for delta in deltas for token in delta.tokens] == [
            token.routing for delta in everything for token in delta.tokens
        ]


def test_what_cannot_be_served_is_refused_with_the_numbers() -> None:
    engine = Engine(make_model(), TOKENIZER, EngineConfig(max_sequences=1, max_waiting=1, max_model_tokens=100))
    with pytest.raises(UsageError, match="prompt is empty"):
        engine.submit(greedy([]))
    with pytest.raises(UsageError, match="prompt has 100 tokens, and texts of at most 100"):
        engine.submit(greedy(random_ids(100)))
    with pytest.raises(UsageError, match="token ids are 5 to 300, and the model has 0 to 256"):
        engine.submit(greedy([5, 300]))
    for _ in range(2):
        engine.submit(greedy([1]))
    with pytest.raises(OverloadedError, match="1 requests with 1 tokens are waiting") as caught:
        engine.submit(greedy([1]))
    assert caught.value.retry_after >= 1
    with pytest.raises(UsageError, match="kv_memory is 1KiB"):
        Engine(make_model(), TOKENIZER, EngineConfig(kv_memory="1KiB"))


def test_a_text_that_makes_the_engine_fail_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, requests = make_model(), [greedy(random_ids(20), max_tokens=12) for _ in range(4)]
    expected = [alone(model, request) for request in requests]
    poison = 255
    requests[1] = greedy([*random_ids(10), poison], max_tokens=12)
    for index, request in enumerate(requests):
        requests[index] = replace(request, prompt_ids=[i if i != poison else 1 for i in request.prompt_ids])
    requests[1] = replace(requests[1], prompt_ids=[*requests[1].prompt_ids, poison])
    expected = [alone(model, request) for request in requests]
    with torch.no_grad():
        model.embed_tokens.weight[poison] = torch.nan
    engine = Engine(model, TOKENIZER)
    results = list(run(engine, requests).values())
    assert results[1][-1].finish_reason == "error"
    assert "not numbers" in str(results[1][-1].error)
    for index in (0, 2, 3):
        if poison not in expected[index]:
            assert ids_of(results[index]) == expected[index]
    # Its blocks are used again, and what it left in them harms nobody.
    again = list(run(engine, [requests[0], requests[2]]).values())
    for index, deltas in zip((0, 2), again, strict=True):
        if poison not in expected[index]:
            assert ids_of(deltas) == expected[index]

    original = model.forward

    def fails_on_three(tokens: torch.Tensor, *arguments: object, **more: object) -> torch.Tensor:
        if bool((tokens == 3).any()):
            raise RuntimeError("no threes")
        return original(tokens, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "forward", fails_on_three)
    harmless = [greedy([i for i in random_ids(20) if i not in (3, poison)] or [1], max_tokens=1) for _ in range(3)]
    results = list(run(engine, [*harmless, greedy([3, 1])]).values())
    assert [deltas[-1].finish_reason for deltas in results] == ["length", "length", "length", "error"]
    assert isinstance(results[3][-1].error, MoesaicError)
    assert "failed on this text with RuntimeError" in str(results[3][-1].error)
    run(engine, [greedy([3, 1]) for _ in range(8)])
    assert engine.is_failing
    run(engine, harmless[:1])
    assert not engine.is_failing
    assert engine.statistics().kv_blocks_used == 0


def test_guesses_starve_nobody_and_stop_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.engine.engine.DraftJudge.wanted", lambda *_: True)
    model = make_model()
    few = EngineConfig(max_sequences=2, step_tokens=8, prompt_lookup=8)
    request = greedy([1, 2, 3, 4] * 8, max_tokens=30)
    ((_, deltas),) = run(Engine(model, TOKENIZER, few), [request], most_steps=100).items()
    assert ids_of(deltas) == alone(model, request)
    engine = Engine(model, TOKENIZER, EngineConfig(max_sequences=4, step_tokens=12, prompt_lookup=7))
    handles = [engine.submit(greedy([number, 7] * 5, max_tokens=200)) for number in range(4)]
    told = [{handle for handle, delta in engine.step() if delta.tokens} for _ in range(40)]
    assert all(step == set(handles) for step in told[8:])


def test_guesses_preemption_and_scoring_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.engine.engine.DraftJudge.wanted", lambda *_: True)
    model = make_model(quantization="int4")
    for _ in range(6):
        blocks = random.randint(10, 14)
        config = EngineConfig(
            step_tokens=random.randint(40, 200), prompt_lookup=random.randint(4, 32), prefix_cache=False,
            kv_memory=str(blocks * 3 * 2 * 2 * 16 * BLOCK * 4), max_model_tokens=320,
        )  # fmt: skip
        requests = [
            greedy(random_ids(random.randint(150, 290)), max_tokens=5, prompt_logprobs=1),
            *(greedy(random_ids(3) * random.randint(1, 20), max_tokens=random.randint(5, 60)) for _ in range(4)),
        ]
        engine = Engine(model, TOKENIZER, config)
        results = list(run(engine, requests).values())
        assert [ids_of(deltas) for deltas in results] == [alone(model, request) for request in requests]
        assert all(sum(delta.finish_reason is not None for delta in deltas) == 1 for deltas in results)
        assert engine.statistics().finished == {"length": len(requests)}
        assert engine.statistics().kv_blocks_used == 0


def test_a_stop_string_that_is_no_special_token_is_text() -> None:
    model, prompt = make_model(), random_ids(9)
    sampling = SamplingConfig(max_tokens=20, temperature=0, ignore_eos=True, stop=("é", TOKENIZER.name_of(0xE9)))
    (deltas,) = run(Engine(model, TOKENIZER), [Request(prompt_ids=prompt, sampling=sampling)]).values()
    text = TOKENIZER.decode(alone(model, greedy(prompt, max_tokens=20)))
    cut = min((text.index(stop) for stop in sampling.stop if stop in text), default=len(text))
    assert "".join(delta.text for delta in deltas) == text[:cut]


def test_requests_come_together_or_not_at_all() -> None:
    engine = Engine(make_model(), TOKENIZER, EngineConfig(max_sequences=2, max_waiting=3, max_waiting_tokens=1000))
    requests = [greedy(random_ids(9), max_tokens=4) for _ in range(5)]
    with pytest.raises(UsageError, match="prompt is empty"):
        engine.submit_all([*requests[:2], greedy([])])
    assert not engine.has_work
    with pytest.raises(UsageError, match=r"6 texts .* 5 fit .*--max-waiting 4$"):
        engine.submit_all([*requests, greedy([1])])
    first = engine.submit_all(requests[:2])
    with pytest.raises(OverloadedError, match="0 requests with 0 tokens are waiting already, and 4 more do not fit"):
        engine.submit_all(requests[:4])
    assert engine.statistics().waiting == 2
    second = engine.submit_all(requests[2:])
    assert len({*first, *second}) == 5
    with pytest.raises(OverloadedError, match="3 requests with 27 tokens are waiting already;"):
        engine.submit(requests[0])
    finished = {handle for _ in range(30) for handle, delta in engine.step() if delta.finish_reason}
    assert finished == {*first, *second}
    assert len(engine.submit_all(requests)) == 5


def test_tokens_of_prompts_count_once_though_they_are_computed_again() -> None:
    """Two long prompts are read in pieces with room for little more than one, so that the second gives way in the
    middle of its prompt; what it finds of its own then is not what others left it."""
    preempted = 0
    for _ in range(4):
        blocks = random.randint(10, 12)
        config = EngineConfig(
            step_tokens=random.randint(16, 40), kv_memory=str(blocks * 3 * 2 * 2 * 16 * BLOCK * 4), max_model_tokens=300
        )
        engine, known = Engine(make_model(), TOKENIZER, config), random_ids(70)
        requests = [greedy([*known, *random_ids(150)], max_tokens=random.randint(20, 60)) for _ in range(3)]
        told = run(engine, requests)
        statistics = engine.statistics()
        assert statistics.prompt_tokens + statistics.cached_tokens == 3 * 220
        reports = [delta.prompt for deltas in told.values() for delta in deltas if delta.prompt is not None]
        assert len(reports) == 3
        assert sum(report.cached_tokens for report in reports) == statistics.cached_tokens
        assert {report.cached_tokens for report in reports} <= {0, 64}
        preempted += statistics.preemptions
    assert preempted


class Counted(list):
    """How many entries were copied out of it."""

    copied = 0

    def __getitem__(self, key):  # type: ignore[override]
        value = super().__getitem__(key)
        self.copied += len(value) if isinstance(key, slice) else 0
        return value

    def __add__(self, other):  # type: ignore[override]
        self.copied += len(self)
        return super().__add__(other)


@pytest.mark.parametrize("prompt_lookup", [0, 4])
def test_a_step_copies_no_more_of_a_text_than_it_computes(prompt_lookup: int) -> None:
    engine = Engine(make_model(), TOKENIZER, EngineConfig(prompt_lookup=prompt_lookup))
    engine.submit(greedy(random_ids(400), max_tokens=64))
    engine.step()
    (sequence,) = engine.scheduler.running
    sequence.ids = Counted(sequence.ids)
    engine.step()  # guesses index what is there when they begin
    sequence.ids.copied = 0
    for _ in range(10):
        engine.step()
    assert 10 <= sequence.ids.copied < 10 * (32 + 40)  # a full block is remembered, and guesses look at the end
