"""Routers: which experts a token visits, and with what weight.

T tokens, E experts, K experts per token, C groups of E / C experts, N = T x K assignments, D hidden size.

Logits, scores and weights are float32 whatever the model computes in: in bfloat16 near ties flip, and other experts are
chosen. Every choice goes through torch.topk, whose results activation checkpointing keeps (`transformer.py`).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from moesaic.config import ModelConfig, MoEConfig
from moesaic.errors import UsageError
from moesaic.ops import Routing


class TopKRouter(nn.Module):
    """Token choice: logits (T, E), K experts for each token, a weight for each of them.

    `expert_bias` (E,), where the config asks for it, selects but never weighs. It is float32 state, moved by
    `balance.update_expert_bias` and never by a gradient. Subclasses say what a score is, and how experts are chosen.
    """

    expert_bias: Tensor | None

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__()
        self.top_k = moe.num_experts_per_tok
        self.num_experts = moe.num_experts
        self.routed_scaling_factor = moe.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(moe.num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(moe.num_experts)) if moe.router_bias else None
        expert_bias = torch.zeros(moe.num_experts, dtype=torch.float32) if moe.has_expert_bias else None
        self.register_buffer("expert_bias", expert_bias)

    def scores(self, logits: Tensor) -> Tensor:
        """(T, E) logits -> (T, E) scores in 0..1, over all experts; balance losses read them too."""
        raise NotImplementedError

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(T, E) logits -> ids (T, K) int64 of the chosen experts, and their weights (T, K) before scaling."""
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """x (T, D), mask (T,) with False for padding -> the routing of the tokens that are not padding.

        Logits and weights are float64 where x is, else float32.
        """
        with torch.autocast(x.device.type, enabled=False):
            wide_TD = x if x.dtype == torch.float64 else x.float()
            bias_E = None if self.bias is None else self.bias.to(wide_TD.dtype)
            logits_TE = functional.linear(wide_TD, self.weight.to(wide_TD.dtype), bias_E)
            topk_ids_TK, topk_weights_TK = self.choose(logits_TE)
        return _token_choice(topk_ids_TK, topk_weights_TK * self.routed_scaling_factor, logits_TE, mask)


class ScoreTopKRouter(TopKRouter):
    """Scores over all experts, the K best of them plus bias, within the best groups; weights are the scores alone.

    With `norm_topk_prob` the weights of a token are divided by their norm: of order 1 nearly everywhere, of any order
    in DBRX, and of at least `norm_topk_min` (ERNIE 4.5).
    """

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__(hidden_size, moe)
        self.norm_topk_prob = moe.norm_topk_prob
        self.norm_topk_order = moe.norm_topk_order
        self.norm_topk_min = moe.norm_topk_min
        self.n_group = moe.n_group
        self.topk_group = moe.topk_group
        self.group_score = moe.group_score

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores_TE = self.scores(logits)
        selection_TE = scores_TE.detach() if self.expert_bias is None else scores_TE.detach() + self.expert_bias
        if self.n_group > 1:
            selection_TE = limit_to_groups(selection_TE, self.n_group, self.topk_group, self.group_score)
        topk_ids_TK = selection_TE.topk(self.top_k, dim=-1).indices
        topk_weights_TK = scores_TE.gather(1, topk_ids_TK)
        return topk_ids_TK, self._normalised(topk_weights_TK) if self.norm_topk_prob else topk_weights_TK

    def _normalised(self, weights: Tensor) -> Tensor:
        if self.norm_topk_order == 1:
            norm_T1 = weights.sum(-1, keepdim=True)  # scores are not negative
        else:
            norm_T1 = torch.linalg.vector_norm(weights, self.norm_topk_order, dim=-1, keepdim=True)
        return weights / norm_T1.clamp_min(self.norm_topk_min)


class SoftmaxTopKRouter(ScoreTopKRouter):
    """Softmax over all experts, then top-k (Switch, arXiv 2101.03961; Mixtral, arXiv 2401.04088; Qwen3-MoE).

    DeepSeek-V2 (arXiv 2405.04434) limits the choice to groups, ERNIE 4.5 adds a selection bias.
    """

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)


class SigmoidTopKRouter(ScoreTopKRouter):
    """An independent sigmoid per expert; a bias that balances the load takes part in the choice only.

    DeepSeek-V3 (arXiv 2412.19437), with the loss-free balancing of arXiv 2408.15664; GLM-4, MiniMax-M2.
    """

    def scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()


class TopKSoftmaxRouter(TopKRouter):
    """The K best logits, then a softmax over these alone (arXiv 1701.06538; Granite, gpt-oss): weights sum to 1."""

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        topk_ids_TK = logits.detach().topk(self.top_k, dim=-1).indices
        return topk_ids_TK, logits.gather(1, topk_ids_TK).softmax(-1)


class TopKSigmoidInputRouter(TopKRouter):
    """The K best logits, each weight the sigmoid of its logit (Llama 4).

    `Experts` multiplies the input of an expert, not its output, by this weight, and so by `routed_scaling_factor`.
    """

    def scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        topk_ids_TK = logits.detach().topk(self.top_k, dim=-1).indices
        return topk_ids_TK, logits.gather(1, topk_ids_TK).sigmoid()


class SparseMixerRouter(TopKRouter):
    """The two experts of SparseMixer-v2 (arXiv 2409.12136, after 2310.00811; Phi-3.5-MoE), as it is evaluated.

    The best expert is weighed by a softmax over the experts whose logit is close to the best one, the second expert by
    the same among the others; so the two weights do not sum to 1. A logit s is close to the best one m when
    m - s <= 2 x router_jitter_noise x max(|s|, m).

    Training uses the same choice and weights with the plain gradient of the two softmaxes. The paper's training mode,
    which samples experts and estimates the gradient of that sampling, is left out.
    """

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__(hidden_size, moe)
        self.router_jitter_noise = moe.router_jitter_noise

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        first_T1, first_weight_T1 = self._best(logits)
        second_T1, second_weight_T1 = self._best(logits.scatter(1, first_T1, -torch.inf))
        return torch.cat((first_T1, second_T1), dim=1), torch.cat((first_weight_T1, second_weight_T1), dim=1)

    def _best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The expert of the best logit (T, 1), and its softmax weight among those close to it; -inf is out of play."""
        fixed_TE = logits.detach()
        best_T1 = fixed_TE.topk(1, dim=-1).indices
        max_T1 = fixed_TE.gather(1, best_T1)
        far_TE = max_T1 - fixed_TE > 2 * self.router_jitter_noise * fixed_TE.abs().maximum(max_T1)
        return best_T1, logits.masked_fill(far_TE, -torch.inf).softmax(-1).gather(1, best_T1)


def limit_to_groups(selection: Tensor, n_group: int, topk_group: int, group_score: str) -> Tensor:
    """Selection scores (T, E), with -inf for every expert outside a token's `topk_group` best of `n_group` groups.

    A group is worth its best expert, "max" (DeepSeek-V2, arXiv 2405.04434), or the sum of its two best, "top2_sum"
    (DeepSeek-V3, arXiv 2412.19437). It must be -inf: a selection bias can make the scores of the best groups negative,
    and 0 would then win.
    """
    grouped_TCe = selection.unflatten(-1, (n_group, -1))
    worth_TC = grouped_TCe.amax(-1) if group_score == "max" else grouped_TCe.topk(2, dim=-1).values.sum(-1)
    outside_TC = torch.ones_like(worth_TC, dtype=torch.bool)
    outside_TC.scatter_(1, worth_TC.topk(topk_group, dim=-1).indices, False)
    return grouped_TCe.masked_fill(outside_TC.unsqueeze(-1), -torch.inf).flatten(-2)


ROUTERS: dict[str, Callable[[int, MoEConfig], TopKRouter]] = {
    "softmax_topk": SoftmaxTopKRouter,
    "topk_softmax": TopKSoftmaxRouter,
    "sigmoid_topk": SigmoidTopKRouter,
    "topk_sigmoid_input": TopKSigmoidInputRouter,
    "sparsemixer": SparseMixerRouter,
}


def make_router(config: ModelConfig) -> TopKRouter:
    assert config.moe is not None
    if config.moe.router not in ROUTERS:
        raise UsageError(f"unknown router '{config.moe.router}'; choose {' or '.join(ROUTERS)}")
    return ROUTERS[config.moe.router](config.hidden_size, config.moe)


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
