"""Routers against their definitions, written token by token in float64, and against the modules of transformers.

T tokens, E experts, K experts per token, D hidden size. Tokens whose choice hangs on less than MARGIN are drawn again,
because there two correct float32 programs may choose differently.
"""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers.models.dbrx.modeling_dbrx import DbrxFFN
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.dots1.modeling_dots1 import Dots1TopkRouter
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeTopKRouter
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moesaic.config import MoEConfig
from moesaic.model.router import ROUTERS, TopKRouter, limit_to_groups
from moesaic.ops import Routing

T, D, E = 29, 12, 8
MARGIN = 1e-3

GROUPS_V2 = {"n_group": 4, "topk_group": 2, "group_score": "max"}
GROUPS_V3 = {"n_group": 4, "topk_group": 2, "group_score": "top2_sum"}
CASES: dict[str, dict[str, object]] = {
    "softmax": {"router": "softmax_topk", "norm_topk_prob": False},
    "softmax, normalised, scaled": {"router": "softmax_topk", "routed_scaling_factor": 2.5},
    "softmax, selection bias, norm with a minimum": {
        "router": "softmax_topk", "expert_bias": True, "norm_topk_min": 0.5,
    },
    "softmax, 2-norm": {"router": "softmax_topk", "norm_topk_order": 2.0},
    "softmax, groups by their best": {"router": "softmax_topk", "norm_topk_prob": False, **GROUPS_V2},
    "softmax, groups by their best two, router bias": {"router": "softmax_topk", "router_bias": True, **GROUPS_V3},
    "top-k, then softmax": {"router": "topk_softmax"},
    "top-k, then softmax, router bias, scaled": {
        "router": "topk_softmax", "router_bias": True, "routed_scaling_factor": 0.5,
    },
    "sigmoid": {"router": "sigmoid_topk", "norm_topk_prob": False},
    "sigmoid, without selection bias": {"router": "sigmoid_topk", "expert_bias": False},
    "sigmoid, 3-norm": {"router": "sigmoid_topk", "norm_topk_order": 3.0},
    "sigmoid, groups by their best two, scaled": {"router": "sigmoid_topk", "routed_scaling_factor": 2.5, **GROUPS_V3},
    "sigmoid, groups by their best": {"router": "sigmoid_topk", "router_bias": True, **GROUPS_V2},
    "top-k, then sigmoid": {"router": "topk_sigmoid_input"},
    "top-k, then sigmoid, router bias": {"router": "topk_sigmoid_input", "router_bias": True},
    "sparse mixer": {"router": "sparsemixer"},
    "sparse mixer, wide, router bias": {"router": "sparsemixer", "router_jitter_noise": 0.4, "router_bias": True},
    "sparse mixer, without jitter": {"router": "sparsemixer", "router_jitter_noise": 0.0},
}  # fmt: skip


def make_config(**settings: object) -> MoEConfig:
    top_k = 2 if settings["router"] == "sparsemixer" else 3
    return MoEConfig(**{"num_experts": E, "num_experts_per_tok": top_k, "moe_intermediate_size": 4} | settings)  # type: ignore[arg-type]


def make_router(moe: MoEConfig, bias_scale: float = 0.5) -> TopKRouter:
    router = ROUTERS[moe.router](D, moe)
    nn.init.normal_(router.weight, std=D**-0.5)
    if router.bias is not None:
        nn.init.normal_(router.bias)
    if router.expert_bias is not None:
        router.expert_bias.normal_(std=bias_scale)
    return router


class Oracle:
    """The definition, for one token in float64; `margin` is the smallest gap that decided anything."""

    def __init__(self, moe: MoEConfig, expert_bias: Tensor | None) -> None:
        self.moe = moe
        self.expert_bias = [0.0] * moe.num_experts if expert_bias is None else expert_bias.tolist()
        self.margin = float("inf")

    def route(self, logits: Tensor) -> dict[int, Tensor]:
        """Expert ids and their weights, best first."""
        moe = self.moe
        if moe.router == "sparsemixer":
            weights = self._sparse_mixer(logits)
        elif moe.router in ("topk_softmax", "topk_sigmoid_input"):
            chosen = self._best(range(moe.num_experts), logits.tolist(), moe.num_experts_per_tok)
            over_chosen = logits[chosen].softmax(0) if moe.router == "topk_softmax" else logits[chosen].sigmoid()
            weights = dict(zip(chosen, over_chosen, strict=True))
        else:
            scores = logits.softmax(0) if moe.router == "softmax_topk" else logits.sigmoid()
            selection = [score + bias for score, bias in zip(scores.tolist(), self.expert_bias, strict=True)]
            chosen = self._best(self._candidates(selection), selection, moe.num_experts_per_tok)
            weights = {expert: scores[expert] for expert in chosen}
            if moe.norm_topk_prob:
                order = moe.norm_topk_order
                norm = torch.stack([weight**order for weight in weights.values()]).sum() ** (1 / order)
                self.margin = min(self.margin, abs(float(norm.detach()) - moe.norm_topk_min))
                weights = {expert: weight / max(norm, moe.norm_topk_min) for expert, weight in weights.items()}
        return {expert: weight * moe.routed_scaling_factor for expert, weight in weights.items()}

    def _candidates(self, selection: list[float]) -> list[int]:
        size = len(selection) // self.moe.n_group
        groups = [list(range(first, first + size)) for first in range(0, len(selection), size)]
        counted = 1 if self.moe.group_score == "max" else 2
        worth = [sum(sorted((selection[expert] for expert in group), reverse=True)[:counted]) for group in groups]
        best = self._best(range(len(groups)), worth, self.moe.topk_group)
        return [expert for group in best for expert in groups[group]]

    def _sparse_mixer(self, logits: Tensor) -> dict[int, Tensor]:
        left, weights = list(range(len(logits))), {}
        values = logits.tolist()
        for _ in range(2):
            best = self._best(left, values, 1)[0]
            close = []
            for expert in left:
                room = 2 * self.moe.router_jitter_noise * max(abs(values[expert]), values[best])
                if expert != best:
                    self.margin = min(self.margin, abs(values[best] - values[expert] - room))
                if values[best] - values[expert] <= room:
                    close.append(expert)
            weights[best] = logits[close].softmax(0)[close.index(best)]
            left.remove(best)
        return weights

    def _best(self, ids, values: list[float], count: int) -> list[int]:
        ranked = sorted(ids, key=lambda index: -values[index])
        if count < len(ranked):
            self.margin = min(self.margin, values[ranked[count - 1]] - values[ranked[count]])
        return ranked[:count]


def draw_tokens(router: TopKRouter, moe: MoEConfig, num_tokens: int = T) -> Tensor:
    """(T, D) float32 whose routing hangs on no gap below MARGIN."""
    kept: list[Tensor] = []
    while len(kept) < num_tokens:
        x_D = torch.randn(D)
        oracle = Oracle(moe, router.expert_bias)
        oracle.route(exact_logits(router, x_D))
        if oracle.margin > MARGIN:
            kept.append(x_D)
    return torch.stack(kept)


def exact_logits(router: TopKRouter, x: Tensor) -> Tensor:
    return nn.functional.linear(
        x.double(), router.weight.double(), None if router.bias is None else router.bias.double()
    )


def rows_of(routing: Routing, token: int) -> dict[int, float]:
    rows = routing.token_ids == token
    return dict(zip(routing.expert_ids[rows].tolist(), routing.weights[rows].tolist(), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_choice_and_weights_follow_the_definition_token_by_token(name: str) -> None:
    moe = make_config(**CASES[name])
    router = make_router(moe)
    x_TD = draw_tokens(router, moe)
    routing = router(x_TD)
    assert routing.top_k == moe.num_experts_per_tok
    assert routing.token_ids.tolist() == [token for token in range(T) for _ in range(moe.num_experts_per_tok)]
    assert routing.logits.dtype == routing.weights.dtype == torch.float32
    for token in range(T):
        expected = Oracle(moe, router.expert_bias).route(exact_logits(router, x_TD[token]))
        actual = rows_of(routing, token)
        assert actual.keys() == expected.keys()
        for expert, weight in expected.items():
            assert actual[expert] == pytest.approx(float(weight.detach()), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_definition(name: str) -> None:
    moe = make_config(**CASES[name])
    router = make_router(moe)
    x_TD = draw_tokens(router, moe)
    router.double()
    mix_TE = torch.randn(T, E, dtype=torch.float64)
    inputs = [router.weight, *([router.bias] if router.bias is not None else []), x_TD.double().requires_grad_()]

    routing = router(inputs[-1])
    assert routing.weights.dtype == torch.float64
    loss = (routing.weights * mix_TE[routing.token_ids, routing.expert_ids]).sum()
    actual = torch.autograd.grad(loss, inputs)

    expected_loss = torch.zeros((), dtype=torch.float64)
    for token in range(T):
        weights = Oracle(moe, router.expert_bias).route(exact_logits(router, inputs[-1][token]))
        expected_loss = expected_loss + sum(mix_TE[token, expert] * weight for expert, weight in weights.items())
    expected = torch.autograd.grad(expected_loss, inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


Peer = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x (T, D) -> weights and ids, both (T, K)."""


def peer_config(moe: MoEConfig) -> SimpleNamespace:
    """What the routers of transformers read from their configs."""
    return SimpleNamespace(
        hidden_size=D, num_experts=E, num_local_experts=E, num_experts_per_tok=moe.num_experts_per_tok,
        norm_topk_prob=moe.norm_topk_prob, routed_scaling_factor=moe.routed_scaling_factor,
        n_group=moe.n_group, topk_group=moe.topk_group, moe_norm_min=moe.norm_topk_min,
        topk_method="group_limited_greedy" if moe.n_group > 1 else "greedy",
        router_jitter_noise=moe.router_jitter_noise, input_jitter_noise=0.0,
    )  # fmt: skip


def plain_peer(peer_class: type[nn.Module]) -> Callable[[TopKRouter, MoEConfig], Peer]:
    """For modules that return logits, weights and ids."""

    def make(router: TopKRouter, moe: MoEConfig) -> Peer:
        module = peer_class(peer_config(moe)).eval()
        state = {"weight": router.weight.detach()} | ({} if router.bias is None else {"bias": router.bias.detach()})
        missing = module.load_state_dict(state, strict=False)
        assert not missing.unexpected_keys
        for key in missing.missing_keys:
            assert key.endswith("e_score_correction_bias")
            assert router.expert_bias is not None
            target = module.get_submodule(key.rpartition(".")[0]).e_score_correction_bias
            target.data.copy_(router.expert_bias)  # type: ignore[union-attr, operator]
        return lambda x: module(x)[1:]

    return make


def minimax_peer(router: TopKRouter, moe: MoEConfig) -> Peer:
    module = MiniMaxM2TopKRouter(peer_config(moe))
    module.load_state_dict({"weight": router.weight.detach()})
    return lambda x: module(x, router.expert_bias)[1:]


def llama4_peer(router: TopKRouter, moe: MoEConfig) -> Peer:
    module = Llama4Router(peer_config(moe))
    module.load_state_dict({"weight": router.weight.detach()})
    return lambda x: module(x)[0].topk(moe.num_experts_per_tok, dim=-1)


def dbrx_peer(router: TopKRouter, moe: MoEConfig) -> Peer:
    settings = SimpleNamespace(moe_normalize_expert_weights=moe.norm_topk_order, top_k=moe.num_experts_per_tok)
    return lambda x: DbrxFFN.route_tokens_to_experts(settings, x @ router.weight.T)  # type: ignore[arg-type]


FAMILIES: dict[str, tuple[Callable[[TopKRouter, MoEConfig], Peer], dict[str, object]]] = {
    "mixtral": (plain_peer(MixtralTopKRouter), {"router": "softmax_topk"}),
    "qwen2_moe": (plain_peer(Qwen2MoeTopKRouter), {"router": "softmax_topk", "norm_topk_prob": False}),
    "qwen3_moe": (plain_peer(Qwen3MoeTopKRouter), {"router": "softmax_topk"}),
    "dbrx": (dbrx_peer, {"router": "softmax_topk", "norm_topk_order": 2.0}),
    "deepseek_v2, greedy": (
        plain_peer(DeepseekV2TopkRouter),
        {"router": "softmax_topk", "norm_topk_prob": False, "routed_scaling_factor": 1.5},
    ),
    "deepseek_v2, groups": (
        plain_peer(DeepseekV2TopkRouter), {"router": "softmax_topk", "norm_topk_prob": False, **GROUPS_V2},
    ),
    "ernie4_5_moe": (
        plain_peer(Ernie4_5_MoeTopKRouter),
        {"router": "softmax_topk", "expert_bias": True, "norm_topk_min": 0.6},
    ),
    "deepseek_v3": (
        plain_peer(DeepseekV3TopkRouter), {"router": "sigmoid_topk", "routed_scaling_factor": 2.5, **GROUPS_V3},
    ),
    "deepseek_v3, weights as they are": (
        plain_peer(DeepseekV3TopkRouter), {"router": "sigmoid_topk", "norm_topk_prob": False, **GROUPS_V3},
    ),
    "glm4_moe": (plain_peer(Glm4MoeTopkRouter), {"router": "sigmoid_topk"}),
    "dots1": (plain_peer(Dots1TopkRouter), {"router": "sigmoid_topk", **GROUPS_V3}),
    "minimax_m2": (minimax_peer, {"router": "sigmoid_topk"}),
    "granitemoe": (plain_peer(GraniteMoeTopKRouter), {"router": "topk_softmax"}),
    "gpt_oss": (plain_peer(GptOssTopKRouter), {"router": "topk_softmax", "router_bias": True}),
    "llama4": (llama4_peer, {"router": "topk_sigmoid_input", "num_experts_per_tok": 1}),
    "phimoe": (plain_peer(PhimoeTopKRouter), {"router": "sparsemixer"}),
    "phimoe, wide": (plain_peer(PhimoeTopKRouter), {"router": "sparsemixer", "router_jitter_noise": 0.4}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_choice_weights_and_gradients_equal_those_of_transformers(name: str) -> None:
    make_peer, settings = FAMILIES[name]
    moe = make_config(**settings)
    router = make_router(moe, bias_scale=2.0)  # so that the scores of whole groups are negative
    x_TD = draw_tokens(router, moe).requires_grad_()
    routing = router(x_TD)
    weights_TK, ids_TK = make_peer(router, moe)(x_TD)
    actual_TE = torch.zeros(T, E).index_put((routing.token_ids, routing.expert_ids), routing.weights)
    expected_TE = torch.zeros(T, E).scatter(1, ids_TK, weights_TK)
    assert torch.equal(actual_TE > 0, expected_TE > 0)
    torch.testing.assert_close(actual_TE, expected_TE, rtol=1e-5, atol=1e-6)
    mix_TE = torch.randn(T, E)
    actual, expected = (torch.autograd.grad((mix_TE * one).sum(), x_TD)[0] for one in (actual_TE, expected_TE))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_groups_of_negative_scores_still_win() -> None:
    selection = torch.tensor([[-1.0, -2.0, -9.0, -9.0, -0.5, -8.0]])
    by_two = limit_to_groups(selection, n_group=3, topk_group=1, group_score="top2_sum")
    by_best = limit_to_groups(selection, n_group=3, topk_group=1, group_score="max")
    assert by_two.topk(2).indices.tolist() == [[0, 1]]
    assert by_best.topk(2).indices.tolist() == [[4, 5]]


@pytest.mark.parametrize("name", ["softmax_topk", "sigmoid_topk"])
def test_the_selection_bias_selects_but_never_weighs(name: str) -> None:
    router = make_router(make_config(router=name, norm_topk_prob=False, expert_bias=True))
    x_TD = torch.randn(T, D)
    assert router.expert_bias is not None
    router.expert_bias.zero_()
    router.expert_bias[5] = 10.0
    routing = router(x_TD)
    chosen = routing.expert_ids == 5
    assert int(chosen.sum()) == T
    torch.testing.assert_close(routing.weights[chosen], router.scores(x_TD @ router.weight.T)[:, 5])


def test_only_the_routers_that_ask_for_it_have_a_selection_bias() -> None:
    found = {name for name in ROUTERS if make_router(make_config(router=name)).expert_bias is not None}
    assert found == {"sigmoid_topk"}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_float32_for_bfloat16_activations_and_under_autocast(name: str) -> None:
    router = make_router(make_config(**CASES[name]))
    x_TD = torch.randn(T, D)
    wide = router(x_TD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = router(x_TD)
    assert torch.equal(under_autocast.logits, wide.logits)
    assert torch.equal(under_autocast.weights, wide.weights)
    narrow = router(x_TD.bfloat16())
    assert narrow.logits.dtype == narrow.weights.dtype == torch.float32
    assert torch.equal(narrow.logits, router(x_TD.bfloat16().float()).logits)


@pytest.mark.parametrize("name", CASES)
def test_padding_owns_no_row_and_changes_nothing_for_the_others(name: str) -> None:
    moe = make_config(**CASES[name])
    router = make_router(moe)
    x_TD = draw_tokens(router, moe)
    mask_T = torch.rand(T) < 0.6
    with_padding, alone = router(x_TD, mask_T), router(x_TD[mask_T])
    assert with_padding.top_k is None
    assert torch.equal(with_padding.expert_ids, alone.expert_ids)
    torch.testing.assert_close(with_padding.weights, alone.weights)
    assert torch.equal(with_padding.tokens_per_expert(), alone.tokens_per_expert())
    assert bool(mask_T[with_padding.token_ids].all())


@pytest.mark.parametrize("name", CASES)
def test_equal_and_extreme_logits_stay_finite(name: str) -> None:
    moe = make_config(**CASES[name])
    router = make_router(moe)
    for scale in (0.0, 1e4):
        x_TD = (torch.randn(T, D) * scale).requires_grad_()
        routing = router(x_TD)
        routing.weights.sum().backward()
        assert torch.isfinite(routing.weights).all()
        assert x_TD.grad is not None
        assert torch.isfinite(x_TD.grad).all()
        assert all(len(rows_of(routing, token)) == moe.num_experts_per_tok for token in range(T))
