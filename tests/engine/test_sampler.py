"""Sampling: greedy, top-k, nucleus, seeds, and the distribution itself. V vocabulary."""

import pytest
import torch

from moesaic.config import SamplingConfig
from moesaic.engine.sampler import Sampler
from moesaic.errors import MoesaicError

V = 20


def draws(logits: torch.Tensor, count: int, **settings: float) -> list[int]:
    sampler = Sampler(SamplingConfig(**settings))  # type: ignore[arg-type]
    return [sampler.draw(logits) for _ in range(count)]


def test_temperature_zero_takes_the_most_likely() -> None:
    logits = torch.randn(V)
    assert set(draws(logits, 5, temperature=0.0)) == {int(logits.argmax())}


def test_frequencies_follow_the_tempered_distribution() -> None:
    logits = torch.randn(6)
    counts = torch.bincount(torch.tensor(draws(logits, 20000, temperature=0.7, seed=1)), minlength=6) / 20000
    torch.testing.assert_close(counts, (logits / 0.7).softmax(-1), rtol=0, atol=0.02)


def test_top_k_keeps_the_k_best() -> None:
    logits = torch.randn(V)
    assert set(draws(logits, 400, temperature=5.0, top_k=3)) == set(logits.topk(3).indices.tolist())


def test_top_p_keeps_the_fewest_that_hold_the_mass() -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    assert set(draws(logits, 300, temperature=1.0, top_p=0.7)) == {0, 1}
    assert set(draws(logits, 50, temperature=1.0, top_p=0.01)) == {0}


def test_the_same_seed_draws_the_same_tokens() -> None:
    logits = torch.randn(V)
    assert draws(logits, 30, temperature=1.0, seed=7) == draws(logits, 30, temperature=1.0, seed=7)
    assert draws(logits, 30, temperature=1.0, seed=7) != draws(logits, 30, temperature=1.0, seed=8)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_no_number_is_refused(temperature: float) -> None:
    logits = torch.randn(V)
    logits[3] = torch.nan
    with pytest.raises(MoesaicError, match="not numbers"):
        draws(logits, 1, temperature=temperature)
