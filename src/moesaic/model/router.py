"""Routers: which experts a token visits, and with what weight.

T tokens, E experts, K experts per token, N = T x K assignments, D hidden size.

Logits and scores are float32 whatever the model computes in: in bfloat16 near ties flip, and other experts are chosen.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from moesaic.config import ModelConfig, MoEConfig
from moesaic.errors import UsageError
from moesaic.ops import Routing


class TopKRouter(nn.Module):
    """Token choice: scores (T, E) from logits, the K best experts, weights from their scores.

    Subclasses say what a score is, and may add a bias that selects but never weighs.
    """

    expert_bias: Tensor | None

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__()
        self.top_k = moe.num_experts_per_tok
        self.num_experts = moe.num_experts
        self.norm_topk_prob = moe.norm_topk_prob
        self.routed_scaling_factor = moe.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(moe.num_experts, hidden_size))
        self.register_buffer("expert_bias", None)

    def scores(self, logits: Tensor) -> Tensor:
        """(T, E) logits -> (T, E) scores in 0..1."""
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """x (T, D), mask (T,) with False for padding -> the routing of the tokens that are not padding."""
        with torch.autocast(x.device.type, enabled=False):
            logits_TE = functional.linear(_wide(x), _wide(self.weight))
            scores_TE = self.scores(logits_TE)
        selection_TE = scores_TE.detach() if self.expert_bias is None else scores_TE.detach() + self.expert_bias
        topk_ids_TK = selection_TE.topk(self.top_k, dim=-1).indices
        topk_weights_TK = scores_TE.gather(1, topk_ids_TK)
        if self.norm_topk_prob:
            topk_weights_TK = topk_weights_TK / (topk_weights_TK.sum(-1, keepdim=True) + 1e-20)
        topk_weights_TK = topk_weights_TK * self.routed_scaling_factor
        return _token_choice(topk_ids_TK, topk_weights_TK, logits_TE, mask)


class SoftmaxTopKRouter(TopKRouter):
    """Softmax over all experts, then top-k (Switch, arXiv 2101.03961; Mixtral, arXiv 2401.04088; Qwen3-MoE)."""

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)


class SigmoidTopKRouter(TopKRouter):
    """An independent sigmoid per expert; a bias that balances the load takes part in the choice only.

    DeepSeek-V3 (arXiv 2412.19437), with the loss-free balancing of arXiv 2408.15664. The bias is float32 state, moved
    by `balance.update_expert_bias` and never by a gradient.
    """

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__(hidden_size, moe)
        self.register_buffer("expert_bias", torch.zeros(moe.num_experts, dtype=torch.float32))

    def scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()


ROUTERS: dict[str, Callable[[int, MoEConfig], TopKRouter]] = {
    "softmax_topk": SoftmaxTopKRouter,
    "sigmoid_topk": SigmoidTopKRouter,
}


def make_router(config: ModelConfig) -> TopKRouter:
    assert config.moe is not None
    if config.moe.router not in ROUTERS:
        raise UsageError(f"unknown router '{config.moe.router}'; choose {' or '.join(ROUTERS)}")
    return ROUTERS[config.moe.router](config.hidden_size, config.moe)


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


def _token_choice(topk_ids: Tensor, topk_weights: Tensor, logits: Tensor, mask: Tensor | None) -> Routing:
    """Flatten (T, K) choices into assignments in token order, without the rows of padding."""
    num_tokens, top_k = topk_ids.shape
    token_ids_TK = torch.arange(num_tokens, device=topk_ids.device).unsqueeze(1).expand(-1, top_k)
    keep = slice(None) if mask is None else mask
    return Routing(
        token_ids=token_ids_TK[keep].reshape(-1),
        expert_ids=topk_ids[keep].reshape(-1),
        weights=topk_weights[keep].reshape(-1),
        logits=logits,
        num_experts=logits.shape[1],
        top_k=top_k if mask is None else None,
        mask=mask,
    )
