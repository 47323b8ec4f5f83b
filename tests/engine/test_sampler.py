"""Sampling: the distribution, what is kept of it, penalties, seeds, log-probabilities. N rows, V vocabulary."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from moesaic.config import SamplingConfig
from moesaic.engine.sampler import Sampler, candidates, greedy_batch, logprob, logprobs
from moesaic.errors import MoesaicError, UsageError

V = 20


class Only:
    """A constraint that allows some tokens."""

    def __init__(self, *allowed: int, finished: bool = False) -> None:
        self.allowed, self.finished = allowed, finished

    def mask(self, bias_V: torch.Tensor) -> None:
        assert bias_V.dtype == torch.float32
        bias_V[[token_id for token_id in range(len(bias_V)) if token_id not in self.allowed]] = -math.inf

    def accept(self, token_id: int) -> None:
        raise AssertionError("the engine tells the constraint, not the sampler")


def sampler_of(prompt_ids: Sequence[int] = (), eos_ids: Sequence[int] = (), **settings: Any) -> Sampler:
    return Sampler(SamplingConfig(**settings), prompt_ids, eos_ids)


def draws(logits: torch.Tensor, count: int, **settings: Any) -> list[int]:
    sampler = sampler_of(**settings)
    return [sampler.draw(logits, index) for index in range(count)]


def tied_logits(size: int) -> torch.Tensor:
    """Half of them random, half of few different values."""
    logits = torch.randn(size) * 3
    return torch.where(torch.rand(size) < 0.5, logits.round(), logits)


def assert_frequencies(tokens: list[int], expected: torch.Tensor) -> None:
    """Within 5.5 standard deviations, which chance exceeds about once in 10^7 times for each token."""
    counts = torch.bincount(torch.tensor(tokens), minlength=len(expected)).double()
    expected, count = expected.double(), len(tokens)
    assert ((counts - count * expected).abs() <= 5.5 * (count * expected * (1 - expected)).sqrt() + 1).all()


def kept_by_definition(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> list[int]:
    weights = ((logits.double() - logits.double().max()) / temperature).exp().tolist()
    order = sorted(range(len(weights)), key=lambda token_id: (-float(logits[token_id]), token_id))
    order = order[: top_k or None]
    total, before, kept = math.fsum(weights[token_id] for token_id in order), 0.0, []
    for token_id in order:
        if top_p == 1 or before < top_p * total:
            kept.append(token_id)
        before += weights[token_id]
    return sorted(token_id for token_id in kept if weights[token_id] >= min_p)


def test_temperature_zero_takes_the_most_likely_and_the_first_of_equals() -> None:
    logits = torch.randn(V)
    assert set(draws(logits, 5, temperature=0.0)) == {int(logits.argmax())}
    first, second = sorted(torch.randperm(V)[:2].tolist())
    logits[[first, second]] = 9.0
    assert draws(logits, 1, temperature=0.0) == greedy_batch(logits[None]) == [first]
    assert draws(logits.bfloat16(), 1, temperature=0.0) == greedy_batch(logits.bfloat16()[None]) == [first]


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_frequencies_follow_the_tempered_distribution_over_the_tokens_and_over_seeds(temperature: float) -> None:
    logits = torch.randn(6)
    expected = (logits.double() / temperature).softmax(-1)
    assert_frequencies(draws(logits, 4000, temperature=temperature, seed=int(torch.randint(0, 2**62, ()))), expected)
    start, index = int(torch.randint(0, 2**31, ())), int(torch.randint(0, 1000, ()))
    over_seeds = [sampler_of(temperature=temperature, seed=start + i).draw(logits, index) for i in range(2000)]
    assert_frequencies(over_seeds, expected)


def test_neighbouring_tokens_and_seeds_are_drawn_independently() -> None:
    logits, start = torch.randn(3), int(torch.randint(0, 2**31, ()))
    pairs = torch.outer(logits.softmax(-1), logits.softmax(-1)).flatten()
    one, other = draws(logits, 4001, temperature=1.0, seed=start), draws(logits, 4001, temperature=1.0, seed=start + 1)
    assert_frequencies([3 * a + b for a, b in pairwise(one)][::2], pairs)
    assert_frequencies([3 * a + b for a, b in zip(one, other, strict=True)], pairs)


@pytest.mark.parametrize("size", [1, 7, 300])
@pytest.mark.parametrize("tied", [False, True])
def test_top_k_top_p_and_min_p_keep_what_their_definitions_say(size: int, tied: bool) -> None:
    for _ in range(40):
        logits = tied_logits(size) if tied else torch.randn(size) * 3
        if tied and size > 1:
            logits[int(torch.randint(size, ()))] = -math.inf
        temperature, top_k = float(torch.rand(()) * 3) + 0.05, int(torch.randint(0, size + 2, ()))
        top_p, min_p = (float(torch.rand(())) if torch.rand(()) < 0.7 else float(switch) for switch in (1, 0))
        config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p or 1.0, min_p=min_p * 0.1)
        ids, weights = candidates(logits.numpy(), config)
        assert ids.tolist() == kept_by_definition(logits, temperature, top_k, config.top_p, config.min_p), config
        expected = ((logits.double() - logits.double().max()) / temperature).exp()[torch.from_numpy(ids)]
        torch.testing.assert_close(torch.from_numpy(weights), expected)


@pytest.mark.parametrize("scale", [0.0, 1e-7, 1e-3, 1.0, 100.0])
def test_the_nucleus_is_right_for_flat_and_for_steep_distributions(scale: float) -> None:
    logits = torch.randn(2000) * scale
    for top_p in (1e-12, 0.1, 0.5, 0.95, 1 - 1e-9):
        ids, _ = candidates(logits.numpy(), SamplingConfig(temperature=1.0, top_p=top_p))
        assert ids.tolist() == kept_by_definition(logits, 1.0, 0, top_p, 0.0), top_p


def test_draws_stay_within_what_is_kept_and_follow_its_distribution() -> None:
    logits = torch.randn(V) * 2
    kept = torch.tensor(kept_by_definition(logits, 1.5, 8, 0.9, 0.05))
    expected = torch.zeros(V).index_copy(0, kept, (logits[kept] / 1.5).softmax(-1))
    assert_frequencies(draws(logits, 3000, temperature=1.5, top_k=8, top_p=0.9, min_p=0.05, seed=3), expected)


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-53])
def test_the_least_and_the_greatest_random_number_draw_no_impossible_token(
    number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesaic.engine.sampler._uniform", lambda seed, index: number)
    logits = torch.randn(V)
    logits[:3], logits[-3:] = -math.inf, -1e9
    assert draws(logits, 1, temperature=1.0) == [V - 4 if number else 3]


def test_extreme_temperatures_take_the_best_or_any() -> None:
    logits = torch.randn(V)
    assert set(draws(logits, 20, temperature=1e-320, top_p=0.9)) == {int(logits.argmax())}
    assert_frequencies(draws(logits, 3000, temperature=1e308), torch.full((V,), 1 / V))
    ids, _ = candidates(logits.numpy(), SamplingConfig(temperature=1e308, top_p=0.5))
    assert len(ids) == V / 2


def test_a_token_depends_on_the_seed_and_its_number_alone() -> None:
    logits = torch.randn(30, V)
    one, other = (sampler_of(temperature=1.0, seed=seed) for seed in (7, 8))
    forward = [one.draw(logits[i], i) for i in range(30)]
    again = sampler_of(prompt_ids=[1, 2], temperature=1.0, seed=7)
    assert [again.draw(logits[i], i) for i in reversed(range(30))] == forward[::-1]
    assert [other.draw(logits[i], i) for i in range(30)] != forward
    assert [one.draw(logits[i], i + 1) for i in range(30)] != forward


def test_logits_of_any_dtype_are_read_and_never_changed() -> None:
    settings: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.3, "logit_bias": {1: 3.0}}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        logits = torch.randn(V).to(dtype).requires_grad_()
        before, sampler = logits.detach().clone(), sampler_of(prompt_ids=[1, 3, 3], **settings)
        with torch.inference_mode():
            sampler.draw(logits + 0, 0, Only(1, 3))
        assert sampler.draw(logits, 5, Only(1, 3)) in (1, 3)
        assert torch.equal(logits, before)


def test_penalties_and_bias_follow_their_formulas() -> None:
    for _ in range(30):
        prompt, generated = torch.randint(V, (5,)).tolist(), torch.randint(V, (12,)).tolist()
        repetition, presence, frequency = (torch.rand(3) * torch.tensor([2.0, 4.0, 4.0])).tolist()
        presence, frequency = presence - 2, frequency - 2
        bias = {int(token_id): float(torch.randn(()) * 3) for token_id in torch.randperm(V)[:3]}
        sampler = sampler_of(
            prompt, temperature=0.0, repetition_penalty=repetition + 0.1, presence_penalty=presence,
            frequency_penalty=frequency, logit_bias=bias,
        )  # fmt: skip
        for token_id in generated:
            sampler.accept(token_id)
        for logits in torch.randn(5, V) * 3 + torch.tensor([-9.0, -3.0, 0.0, 3.0, 9.0])[:, None]:
            expected = logits.double().tolist()
            for token_id in range(V):
                value = expected[token_id] + bias.get(token_id, 0.0)
                if token_id in prompt + generated:
                    value = value / (repetition + 0.1) if value > 0 else value * (repetition + 0.1)
                if token_id in generated:
                    value -= presence + frequency * generated.count(token_id)
                expected[token_id] = value
            assert sampler.draw(logits, 12) == int(torch.tensor(expected).argmax())


def test_penalties_shift_the_distribution_before_the_temperature() -> None:
    logits, sampler = torch.randn(4), sampler_of(temperature=0.5, frequency_penalty=0.3, seed=11)
    for token_id in (0, 0, 2):
        sampler.accept(token_id)
    expected = ((logits - torch.tensor([0.6, 0.0, 0.3, 0.0])) / 0.5).softmax(-1)
    assert_frequencies([sampler.draw(logits, index) for index in range(3000)], expected)


def test_the_prompt_counts_for_the_repetition_penalty_alone() -> None:
    logits = torch.tensor([2.0, 1.9, 0.0])
    assert sampler_of([0, 0, 0], temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0).draw(logits, 0) == 0
    assert sampler_of([0], temperature=0.0, repetition_penalty=1.5).draw(logits, 0) == 1


@pytest.mark.parametrize("repetition_penalty", [1.0, 1e-320, 1e300])
@pytest.mark.parametrize("bias", [1e300, -1e300])
def test_extreme_penalties_and_biases_still_give_a_token(repetition_penalty: float, bias: float) -> None:
    for temperature in (0.0, 1.0, 1e-320):
        settings: dict[str, Any] = {"temperature": temperature, "repetition_penalty": repetition_penalty, "top_p": 0.9}
        tokens = {sampler_of(range(V), **settings, logit_bias={3: bias}).draw(torch.randn(V), i) for i in range(20)}
        assert tokens <= set(range(V))
        if repetition_penalty == 1.0:
            assert (tokens == {3}) if bias > 0 else (3 not in tokens)


def test_a_constraint_rules_tokens_out_before_the_best_are_chosen() -> None:
    logits = torch.randn(V)
    worst = logits.argsort()[:3].tolist()
    cases: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 2}, {"top_p": 0.01}]
    for settings in cases:
        sampler = sampler_of(**settings)
        drawn = {sampler.draw(logits, index, Only(*worst)) for index in range(40)}
        assert drawn <= set(worst)
        assert len(drawn) == settings.get("top_k", 1)


def test_after_a_finished_constraint_only_the_end_is_left() -> None:
    sampler = sampler_of(eos_ids=[4], temperature=1.0)
    assert {sampler.draw(torch.randn(V), index, Only(1, 2, finished=True)) for index in range(10)} == {4}


def test_when_nothing_is_allowed_the_error_says_so() -> None:
    for temperature in (0.0, 1.0):
        with pytest.raises(MoesaicError, match="none of the 20 tokens is allowed next"):
            sampler_of(temperature=temperature).draw(torch.randn(V), 0, Only())
        banned = dict.fromkeys(range(V), -math.inf)
        with pytest.raises(MoesaicError, match="none of the 20 tokens is allowed next"):
            sampler_of(temperature=temperature, logit_bias=banned).draw(torch.randn(V), 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}, {"repetition_penalty": 1.5}])
def test_what_is_no_number_is_refused(bad: float, settings: dict[str, Any]) -> None:
    logits = torch.randn(V)
    logits[int(torch.randint(V, ()))] = bad
    sampler = sampler_of(range(V), **settings)
    for constraint in (None, Only(*range(V))):
        with pytest.raises(MoesaicError, match="not numbers"):
            sampler.draw(logits, 0, constraint)


def test_biases_for_tokens_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UsageError, match="logit_bias of token -1 is 2"):
        sampler_of(logit_bias={-1: 2.0})
    with pytest.raises(UsageError, match="logit_bias of token 3 is nan"):
        sampler_of(logit_bias={3: math.nan})
    with pytest.raises(UsageError, match="logit_bias has token 20; the model has tokens below 20"):
        sampler_of(logit_bias={1: 2.0, 20: 2.0}).draw(torch.randn(V), 0)


def test_many_greedy_rows_are_drawn_as_each_alone_and_a_bad_one_spoils_no_other() -> None:
    logits = tied_logits(8 * V).reshape(8, V)
    logits[2, 5], logits[4, 0], logits[6] = math.nan, math.inf, -math.inf
    sampler = sampler_of(temperature=0.0)
    tokens = greedy_batch(logits)
    assert [row for row, token_id in enumerate(tokens) if token_id is None] == [2, 4, 6]
    assert all(token_id == sampler.draw(logits[i], 0) for i, token_id in enumerate(tokens) if token_id is not None)


def test_only_plain_requests_are_plain_greedy() -> None:
    assert sampler_of([1, 2], temperature=0.0, top_p=0.5, seed=3).is_plain_greedy
    assert not sampler_of(temperature=0.0, presence_penalty=1.0).is_plain_greedy
    assert not sampler_of(temperature=0.0, frequency_penalty=-1.0).is_plain_greedy
    assert not sampler_of(temperature=0.0, repetition_penalty=1.1).is_plain_greedy
    assert not sampler_of(temperature=0.0, logit_bias={1: 1.0}).is_plain_greedy
    assert not sampler_of(temperature=0.1).is_plain_greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_of_the_raw_logits_with_the_best_first_and_equal_ones_by_id(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesaic.engine.sampler._CHUNK", 3 * V)  # several pieces, the last one shorter
    logits = tied_logits(7 * V).reshape(7, V).to(dtype)
    logits[1, 4] = -math.inf
    token_ids = torch.randint(V, (7,)).tolist()
    expected = logits.double().log_softmax(-1)
    for num_top in (0, 1, 5, V, V + 3):
        found = logprobs(logits, token_ids, num_top)
        for i, (token_id, entry) in enumerate(zip(token_ids, found, strict=True)):
            assert entry.value == pytest.approx(float(expected[i, token_id]), abs=1e-5)
            order = np.argsort(-logits[i].float().numpy(), kind="stable")[:num_top].tolist()
            assert [top_id for top_id, _ in entry.top] == order
            assert [value for _, value in entry.top] == pytest.approx(expected[i, order].tolist(), abs=1e-5)
            assert logprob(logits[i], token_id, num_top) == entry
    with pytest.raises(MoesaicError, match="not numbers"):
        logprob(torch.full((V,), math.nan), 0, 2)
