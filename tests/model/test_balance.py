"""Balance terms against their definitions, and the traps they are known for. T tokens, E experts, K per token."""

import pytest
import torch

from moesaic.config import MoEConfig
from moesaic.model.balance import max_vio, switch_loss, update_expert_bias, z_loss
from moesaic.model.router import ROUTERS, TopKRouter
from moesaic.ops import Routing

E, K = 6, 2


def route(logits: torch.Tensor, mask: torch.Tensor | None = None) -> Routing:
    keep = torch.ones(len(logits), dtype=torch.bool) if mask is None else mask
    ids = logits.topk(K).indices
    return Routing(
        token_ids=torch.arange(len(logits))[keep].repeat_interleave(K),
        expert_ids=ids[keep].flatten(),
        weights=torch.ones(int(keep.sum()) * K),
        logits=logits,
        num_experts=E,
        top_k=K if mask is None else None,
        mask=mask,
    )


def test_switch_loss_is_the_published_sum_and_k_does_not_enter() -> None:
    logits = torch.randn(40, E, dtype=torch.float64)
    routing = route(logits)
    expected = 0.0
    for expert in range(E):
        share = sum(int(expert in row) for row in logits.topk(K).indices.tolist()) / (40 * K)
        expected += E * share * float(logits.softmax(-1)[:, expert].mean())
    torch.testing.assert_close(float(switch_loss(routing, logits.softmax(-1))), expected)


def test_switch_loss_is_1_at_balance_and_e_over_k_at_collapse() -> None:
    even = torch.eye(E).repeat(4, 1) + torch.eye(E).roll(1, 1).repeat(4, 1)
    assert abs(float(switch_loss(route(even), even.softmax(-1))) - 1) < 1e-6
    collapsed = torch.full((12, E), -100.0)
    collapsed[:, :K] = 100.0
    torch.testing.assert_close(float(switch_loss(route(collapsed), collapsed.softmax(-1))), E / K)


def test_switch_loss_normalises_sigmoid_scores() -> None:
    even = torch.eye(E).repeat(4, 1) + torch.eye(E).roll(1, 1).repeat(4, 1)
    assert abs(float(switch_loss(route(even), even.sigmoid())) - 1) < 1e-6


def test_padding_counts_in_no_term() -> None:
    logits, mask = torch.randn(30, E), torch.rand(30) < 0.5
    padded, alone = route(logits, mask), route(logits[mask])
    torch.testing.assert_close(switch_loss(padded, logits.softmax(-1)), switch_loss(alone, logits[mask].softmax(-1)))
    torch.testing.assert_close(z_loss(padded), z_loss(alone))


def test_z_loss_is_the_mean_squared_log_partition() -> None:
    logits = torch.randn(30, E, dtype=torch.float64)
    expected = (logits.exp().sum(-1).log() ** 2).mean()
    torch.testing.assert_close(z_loss(route(logits)), expected)


def router_with_bias(name: str) -> TopKRouter:
    moe = MoEConfig(num_experts=E, num_experts_per_tok=K, moe_intermediate_size=4, router=name, expert_bias=True)  # type: ignore[arg-type]
    return ROUTERS[name](8, moe)


@pytest.mark.parametrize("name", ["softmax_topk", "sigmoid_topk"])
def test_bias_moves_against_the_load_and_stays_centred(name: str) -> None:
    router = router_with_bias(name)
    update_expert_bias(router, torch.tensor([9, 3, 3, 1, 1, 1]), 0.01)
    assert router.expert_bias is not None
    torch.testing.assert_close(router.expert_bias, torch.tensor([-0.01, 0.0, 0.0, 0.01, 0.01, 0.01]) - 0.02 / 6)


@pytest.mark.parametrize("name", ["softmax_topk", "sigmoid_topk"])
def test_the_bias_update_balances_a_skewed_router(name: str) -> None:
    router = router_with_bias(name)
    torch.nn.init.normal_(router.weight, std=0.3)  # scores short of 0 and 1, where a step of the bias moves few tokens
    x = torch.randn(512, 8) + 1.0
    before = max_vio(router(x).tokens_per_expert())
    for rate in [0.01] * 300 + [0.001] * 100:  # a fixed step ends in an oscillation of its own size
        update_expert_bias(router, router(x).tokens_per_expert(), rate)
    assert max_vio(router(x).tokens_per_expert()) < 0.2 < before


def test_max_vio_is_relative_to_the_mean_and_averaged_over_layers() -> None:
    assert max_vio(torch.tensor([4, 4, 4])) == 0.0
    assert abs(max_vio(torch.tensor([[6, 3, 3], [12, 0, 0]])) - (0.5 + 2.0) / 2) < 1e-12
