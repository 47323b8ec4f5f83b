"""However a batch lies on ranks: the loss, gradients, norm, biases and statistics of one process.

The last axis of tests/train/test_invariance.py: EP 1, 2, 4 x FSDP 1, 2, over two steps of plain gradient descent.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.config import BalanceConfig, ModelConfig, ParallelConfig
from moesaic.parallel.gradients import clip_gradients, gradient_norm, sum_gradients
from moesaic.parallel.ranks import Ranks, make_ranks
from moesaic.parallel.shard import spread
from moesaic.train.objective import Batch, accumulate_gradients, update_after_step

from .processes import on_ranks
from .test_expert_parallel import B, L, V, build, with_moe
from .whole import whole_tensors

GLOBAL = BalanceConfig(aux_loss_coef=0.1, z_loss_coef=0.01)
BIAS = replace(GLOBAL, aux_loss_scope="sequence", bias_update_rate=0.05)
CASES: dict[str, tuple[dict[str, Any], BalanceConfig]] = {
    "global loss": ({"router": "softmax_topk"}, GLOBAL),
    "sequence loss, bias": ({"router": "sigmoid_topk", "n_shared_experts": 1}, BIAS),
    "quantile bias": ({"router": "sigmoid_topk"}, replace(BIAS, bias_update_rule="quantile")),
    "relu": ({"router": "relu"}, BalanceConfig(z_loss_coef=0.01)),
    "capacity, noise": ({"router": "noisy_topk", "capacity_factor": 1.0}, GLOBAL),
}
LAYOUTS = {"global loss": [(1, 1, 4), (1, 2, 2), (2, 2, 1), (1, 1, 2), (1, 2, 1)]}
STEPS = 2


def draw(seed: int) -> Batch:
    """Sequences of unequal lengths, the last one nothing but padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BL, targets_BL = torch.randint(0, V, (2, B, L), generator=generator)
    positions_BL = torch.arange(L).repeat(B, 1)
    positions_BL[1, 3:] = -1
    positions_BL[B - 1] = -1
    return Batch(tokens_BL, targets_BL, positions_BL, torch.arange(B))


def observe(
    config: ModelConfig, balance: BalanceConfig, layout: tuple[int, int, int] | None, seed: int
) -> tuple[list[Any], dict[str, Tensor]]:
    """Scalars and statistics by step, and the weights after the last one; in one process without a layout."""
    dp, fsdp, ep = layout or (1, 1, 1)
    parallel = ParallelConfig(dp=dp, fsdp=fsdp, ep=ep)
    ranks = make_ranks(parallel) if layout else Ranks()
    model = build(config, seed)
    spread(model, ranks, parallel)
    seen: list[Any] = []
    for _ in range(STEPS):
        model.zero_grad(set_to_none=True)
        share = ranks.share(B)
        mine = draw(seed).split(B // ranks.count)[share.start * ranks.count // B]
        result = accumulate_gradients(model, [mine], balance, ranks=ranks)
        sum_gradients(model, ranks)
        norm = gradient_norm(model, ranks)
        clip_gradients(model, 1.0, norm)
        torch.optim.SGD(model.parameters(), lr=0.3).step()
        update_after_step(model, result, balance)
        seen.append([result.loss, result.aux_loss, result.z_loss, result.l1_loss, float(norm)])
        seen.append(result.statistics.row())
    return seen, {name: value.detach() for name, value in whole_tensors(model, model.state_dict(), ranks).items()}


@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for name in CASES for layout in LAYOUTS.get(name, [(1, 1, 2), (1, 2, 1)])]
)
def test_no_layout_changes_what_a_batch_teaches(name: str, layout: tuple[int, int, int], seed: int) -> None:
    settings, balance = CASES[name]
    config = with_moe(**settings)
    expected, weights = observe(config, balance, None, seed)
    answers = on_ranks(math.prod(layout), observe, config, balance, layout, seed)
    for seen, _ in answers:
        for one, other in zip(seen, expected, strict=True):
            assert one == (pytest.approx(other, rel=1e-10, abs=1e-12) if isinstance(other, list) else other)
    got = answers[0][1]
    assert got.keys() == weights.keys()
    for key, value in weights.items():
        torch.testing.assert_close(got[key], value, rtol=1e-10, atol=1e-10, msg=key)
