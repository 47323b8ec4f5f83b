"""Token choice: every token takes the K experts that suit it best.

T tokens, E experts, K experts per token, C groups of E / C experts, N = T x K assignments.

These routers are causal: what a token gets depends on it alone, but for a capacity, which serves earlier tokens first.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from moesaic.config import ModelConfig
from moesaic.errors import UsageError
from moesaic.model.noise import combine, normal
from moesaic.model.routers.base import LinearRouter
from moesaic.model.routers.capacity import choose_within_capacity, sequence_capacity
from moesaic.model.routing_context import RoutingContext
from moesaic.ops import Choice, Routing, native_step


class TopKRouter(LinearRouter):
    """The K experts of the highest selection value, each token for itself.

    `expert_bias` (E,), where the config asks for it, takes part in the selection but never in the weight. With a
    `capacity_factor` an expert takes only so many tokens of a sequence, in training: GShard (arXiv 2006.16668), Switch
    (arXiv 2101.03961, which is K = 1 with `softmax_topk`, not normalised). Evaluation and generation drop nothing, so
    that decoding equals the whole pass, as in DeepSeek-V2 (arXiv 2405.04434).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        assert config.moe is not None
        self.capacity_factor = config.moe.capacity_factor
        self.drop_policy = config.moe.drop_policy

    def selection(self, logits: Tensor, context: RoutingContext) -> Tensor:
        """(T, E) logits -> (T, E) values, of which the K highest of a token are chosen; -inf is out of play."""
        return logits

    def weights(self, logits: Tensor, topk_ids: Tensor) -> Tensor:
        """(T, E) logits, (T, K) chosen experts -> their weights (T, K)."""
        raise NotImplementedError

    def select(self, logits: Tensor, context: RoutingContext) -> Choice:
        selection_TE = self.selection(logits, context)
        if self.capacity_factor is None or not self.training:
            return Choice.of_topk(self._highest(selection_TE))
        capacity_B = sequence_capacity(context, self.capacity_factor * self.top_k / self.num_experts)
        another_if_full = self.drop_policy == "next_choice"
        return choose_within_capacity(selection_TE, self.top_k, capacity_B, context, another_if_full=another_if_full)

    def _highest(self, selection: Tensor) -> Tensor:
        """(T, E) -> (T, K)."""
        if native_step.ranks(selection):
            return native_step.top_k(selection, self.top_k)
        return selection.topk(self.top_k, dim=-1).indices

    def weigh(self, logits: Tensor, choice: Choice) -> Tensor:
        if choice.top_k != self.top_k:
            recorded = "a varying number of" if choice.top_k is None else choice.top_k
            raise UsageError(
                f"the recorded routing sends each token to {recorded} experts, and this router to {self.top_k}; replay "
                "it on a model that takes as many"
            )
        return self.weights(logits, choice.expert_ids.view(len(logits), self.top_k)).flatten()

    def _assemble(self, choice: Choice, weights: Tensor, logits: Tensor, context: RoutingContext) -> Routing:
        routing = super()._assemble(choice, weights, logits, context)
        if self.capacity_factor is None or self.drop_policy != "pad" or not self.training:
            return routing
        capacity_B = sequence_capacity(context, self.capacity_factor * self.top_k / self.num_experts)
        return filled_up(routing, choice, int(capacity_B.sum()))


class ScoreTopKRouter(TopKRouter):
    """Scores over all experts, the K best of them plus bias, within the best groups; weights are the scores alone.

    With `norm_topk_prob` the weights of a token are divided by their norm: of order 1 nearly everywhere, of any order
    in DBRX, and of at least `norm_topk_min` (ERNIE 4.5).
    """

    score_name: ClassVar[str]
    """What `native_step.route` calls the scores."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        moe = config.moe
        assert moe is not None
        self.multiplies_bias = moe.expert_bias_form == "multiply"
        self.norm_topk_prob = moe.norm_topk_prob
        self.norm_topk_order = moe.norm_topk_order
        self.norm_topk_min = moe.norm_topk_min
        self.n_group = moe.n_group
        self.topk_group = moe.topk_group
        self.group_score = moe.group_score

    def forward(self, x: Tensor, context: RoutingContext) -> Routing:
        if self.native_serves(x, context):
            return self.routing_of(*native_step.route(self.step(), x))
        return super().forward(x, context)

    def native_serves(self, x: Tensor, context: RoutingContext) -> bool:
        """Whether one operator may route: there is nothing unusual."""
        return (
            native_step.serves(x)
            and not self.training
            and context.mask is None
            and context.replay is None
            and self.n_group == 1
            and self.norm_topk_order == 1
            and not (self.multiplies_bias and self.expert_bias is not None)
            and self.weight.dtype == torch.float32
        )

    def step(self) -> native_step.RouterStep:
        """What that operator reads besides the tokens."""
        return native_step.RouterStep(
            self.weight,
            self.top_k,
            self.score_name,
            normalise=self.norm_topk_prob,
            least_sum=self.norm_topk_min,
            scaling=self.routed_scaling_factor,
            bias=self.bias,
            selection_bias=self.expert_bias,
        )

    def routing_of(self, logits: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Routing:
        """What that operator gave: (T, E), (T, K) and (T, K)."""
        choice = Choice.of_topk(topk_ids)
        return Routing(
            token_ids=choice.token_ids,
            expert_ids=choice.expert_ids,
            weights=topk_weights.flatten(),
            logits=logits,
            num_experts=self.num_experts,
            top_k=self.top_k,
        )

    def selection(self, logits: Tensor, context: RoutingContext) -> Tensor:
        selection_TE = self.scores(logits)
        if self.expert_bias is not None:
            bias_E = self.expert_bias
            selection_TE = selection_TE * bias_E.exp() if self.multiplies_bias else selection_TE + bias_E
        if self.n_group > 1:
            selection_TE = limit_to_groups(selection_TE, self.n_group, self.topk_group, self.group_score)
        return selection_TE

    def weights(self, logits: Tensor, topk_ids: Tensor) -> Tensor:
        topk_weights_TK = self.scores_of(logits, topk_ids)
        return self._normalised(topk_weights_TK) if self.norm_topk_prob else topk_weights_TK

    def scores_of(self, logits: Tensor, topk_ids: Tensor) -> Tensor:
        """(T, E) logits, (T, K) experts -> their scores (T, K)."""
        return self.scores(logits).gather(1, topk_ids)

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

    score_name = "softmax"

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)


class SigmoidTopKRouter(ScoreTopKRouter):
    """An independent sigmoid per expert; a bias that balances the load takes part in the choice only.

    DeepSeek-V3 (arXiv 2412.19437), with the loss-free balancing of arXiv 2408.15664; GLM-4, MiniMax-M2.
    """

    score_name = "sigmoid"

    def scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def scores_of(self, logits: Tensor, topk_ids: Tensor) -> Tensor:
        return logits.gather(1, topk_ids).sigmoid()


class TopKSoftmaxRouter(TopKRouter):
    """The K best logits, then a softmax over these alone (arXiv 1701.06538; Granite, gpt-oss): weights sum to 1."""

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def weights(self, logits: Tensor, topk_ids: Tensor) -> Tensor:
        return logits.gather(1, topk_ids).softmax(-1)


class NoisyTopKRouter(TopKSoftmaxRouter):
    """Top-k, then softmax, over logits with learned normal noise in training (arXiv 1701.06538).

    The noise of an expert has the standard deviation softplus(x noise_weight^T). It starts at ln 2 with zero weights,
    and is absent from evaluation.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.noise_weight = nn.Parameter(torch.empty_like(self.weight))

    def logits(self, x: Tensor, context: RoutingContext) -> Tensor:
        logits_TE = super().logits(x, context)
        if not self.training:
            return logits_TE
        deviation_TE = functional.softplus(functional.linear(x, self.noise_weight.to(x.dtype)))
        return logits_TE + self._normal_noise(logits_TE, context) * deviation_TE

    def _normal_noise(self, like: Tensor, context: RoutingContext) -> Tensor:
        if context.noise_keys is None:
            return torch.randn_like(like)
        return normal(combine(context.noise_keys.flatten(), 2), like.shape[1]).to(like.dtype)


class TopKSigmoidInputRouter(TopKRouter):
    """The K best logits, each weight the sigmoid of its logit (Llama 4).

    `Experts` multiplies the input of an expert, not its output, by this weight, and so by `routed_scaling_factor`.
    """

    def scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def weights(self, logits: Tensor, topk_ids: Tensor) -> Tensor:
        return logits.gather(1, topk_ids).sigmoid()


class SparseMixerRouter(TopKRouter):
    """The two experts of SparseMixer-v2 (arXiv 2409.12136, after 2310.00811; Phi-3.5-MoE), as it is evaluated.

    The best expert is weighed by a softmax over the experts whose logit is close to the best one, the second expert by
    the same among the others; so the two weights do not sum to 1. A logit s is close to the best one m when
    m - s <= 2 x router_jitter_noise x max(|s|, m).

    Training uses the same choice and weights with the plain gradient of the two softmaxes. The paper's training mode,
    which samples experts and estimates the gradient of that sampling, is left out.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        assert config.moe is not None
        self.router_jitter_noise = config.moe.router_jitter_noise

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def weights(self, logits: Tensor, topk_ids: Tensor) -> Tensor:
        first_T1, second_T1 = topk_ids.split(1, dim=1)
        others_TE = logits.scatter(1, first_T1, -torch.inf)
        return torch.cat((self._share(logits, first_T1), self._share(others_TE, second_T1)), dim=1)

    def _share(self, logits: Tensor, best_ids: Tensor) -> Tensor:
        """Softmax weight (T, 1) of the best experts (T, 1) among those close to them; -inf is out of play."""
        fixed_TE = logits.detach()
        max_T1 = fixed_TE.gather(1, best_ids)
        far_TE = max_T1 - fixed_TE > 2 * self.router_jitter_noise * fixed_TE.abs().maximum(max_T1)
        return logits.masked_fill(far_TE, -torch.inf).softmax(-1).gather(1, best_ids)


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


def filled_up(routing: Routing, choice: Choice, capacity: int) -> Routing:
    """The routing with rows of weight 0 added, so that every expert computes `capacity` rows.

    They compute some token that is not padding (a NaN there must not spread), and take no gradient to the router.
    """
    missing_E = (capacity - routing.tokens_per_expert()).clamp_min(0)
    added_N = torch.repeat_interleave(torch.arange(len(missing_E), device=missing_E.device), missing_E)
    if routing.token_ids.numel() == 0:
        return routing
    return replace(
        routing,
        token_ids=torch.cat((routing.token_ids, routing.token_ids[:1].expand(len(added_N)))),
        expert_ids=torch.cat((routing.expert_ids, added_N)),
        weights=torch.cat((routing.weights, routing.weights.new_zeros(len(added_N)))),
        top_k=None,
        choice=choice,
    )
