"""Gradients of a model that is spread over ranks are those of one process, and are counted once."""

import math

import pytest
import torch
from torch import Tensor

from moesaic.config import ParallelConfig
from moesaic.parallel.gradients import clip_gradients, gradient_norm, local, sum_gradients
from moesaic.parallel.ranks import make_ranks
from moesaic.parallel.shard import spread

from .processes import on_ranks
from .test_expert_parallel import BASE, B, build, learn

LAYOUTS = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 2, 2), (2, 1, 2), (2, 2, 1)]


def stepped_on_ranks(layout: tuple[int, int, int], seed: int, clip: float) -> tuple[float, dict[str, Tensor]]:
    """The norm, and rank 0's parts of the parameters after a step of plain gradient descent of rate 1."""
    dp, fsdp, ep = layout
    config = ParallelConfig(dp=dp, fsdp=fsdp, ep=ep)
    ranks = make_ranks(config)
    model = build(BASE, seed)
    spread(model, ranks, config)
    learn(model, seed, ranks.share(B))
    sum_gradients(model, ranks)
    norm = gradient_norm(model, ranks)
    clip_gradients(model, clip, norm)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    return float(norm), {name: local(each).detach() for name, each in model.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_of_gradient_descent_is_that_of_one_process(layout: tuple[int, int, int], seed: int) -> None:
    """Plain descent, which unlike AdamW shows a gradient that is too large by a factor."""
    model = build(BASE, seed)
    learn(model, seed, slice(None))
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    expected = dict(model.named_parameters())
    for got_norm, parameters in on_ranks(math.prod(layout), stepped_on_ranks, layout, seed, 0.5)[:1]:
        assert got_norm == pytest.approx(norm, rel=1e-12)
        for name, value in parameters.items():  # rank 0 has the first rows
            torch.testing.assert_close(value, expected[name][: len(value)].detach(), rtol=0, atol=1e-12)


def norm_of_golden_example() -> tuple[float, float]:
    """The norm, and that of what this rank holds."""
    ranks = make_ranks(ParallelConfig(ep=2))
    model = build(BASE, 0)
    spread(model, ranks, ParallelConfig(ep=2))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gradient = model.moe_layers[0].experts.down.grad
    assert gradient is not None
    gradient.flatten()[:5] = 2.0 if ranks.is_first else 20**0.5
    own = torch.nn.utils.get_total_norm([each.grad for each in model.parameters() if each.grad is not None])
    return float(gradient_norm(model, ranks)), float(own)


def test_the_norm_counts_every_expert_once() -> None:
    """Experts of norm sqrt(20) here and 10 there: sqrt(120), where the mean of both is 7.236 (DeepSpeed #8478)."""
    (norm, own), (norm_there, own_there) = on_ranks(2, norm_of_golden_example)
    assert (own + own_there) / 2 == pytest.approx(7.236, abs=1e-3)
    assert norm == norm_there == pytest.approx(10.954, abs=1e-3)
