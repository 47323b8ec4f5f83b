"""Routers against the modules of transformers: choice, weights and gradients.

T tokens, E experts, K experts per token, D hidden size.
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
from moesaic.model.routers import TopKRouter

from .helpers import D, E, as_matrix, make_config, make_router, route
from .topk_oracle import GROUPS_V2, GROUPS_V3, draw_tokens

T = 29

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
    x_TD = draw_tokens(router, moe, T).requires_grad_()
    actual_TE = as_matrix(route(router, x_TD))
    weights_TK, ids_TK = make_peer(router, moe)(x_TD)
    expected_TE = torch.zeros(T, E).scatter(1, ids_TK, weights_TK)
    assert torch.equal(actual_TE > 0, expected_TE > 0)
    torch.testing.assert_close(actual_TE, expected_TE, rtol=1e-5, atol=1e-6)
    mix_TE = torch.randn(T, E)
    actual, expected = (torch.autograd.grad((mix_TE * one).sum(), x_TD)[0] for one in (actual_TE, expected_TE))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
