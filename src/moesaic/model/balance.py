"""Load balance: the losses and the bias updates that keep every expert in use, and how uneven the load is.

B sequences, L positions, T = B x L tokens, E experts, K experts per token, G devices or experts.

All terms are of one layer and leave padding out. A term of a micro-batch is its share of the whole batch's term: means
divide by what the whole batch holds, so the terms of all micro-batches add up to that of the uncut batch.
"""

import math

import torch
from torch import Tensor

from moesaic.model.routers import Router
from moesaic.ops import Routing

HISTOGRAM_BINS = 1001
"""An odd number, so that 0 lies within a bin: it is what the expert at the cut-off needs, give or take rounding."""
NARROWEST_BIN = 1e-6
"""Distance from the present bias below which bins are equally wide, 3 % of this."""


def switch_loss(
    routing: Routing, scores: Tensor, *, load: Tensor | None = None, num_tokens: int | None = None, num_devices: int = 0
) -> Tensor:
    """Load-balance loss of Switch Transformer (arXiv 2101.03961): E x sum_e f_e P_e, which is 1 at balance.

    f_e is the share of all assignments that asked for expert e, before any is dropped (so K does not enter); P_e the
    mean over tokens of the full score distribution `scores` (T, E), normalised over the experts.

    Args:
        load: (E,) that f is taken from: the whole batch's (arXiv 2501.11873), or by default this routing's own.
        num_tokens: of the whole batch, without padding; default: of this routing.
        num_devices: pool the experts into so many equal groups first (DeepSeek-V2, arXiv 2405.04434); 0 or 1: do not.
    """
    probability_TG = _pooled(_probabilities(scores), num_devices)
    if routing.mask is not None:
        probability_TG = probability_TG[routing.mask]
    mean_G = probability_TG.sum(0) / max(len(probability_TG) if num_tokens is None else num_tokens, 1)
    share_G = _shares(_pooled(routing.load() if load is None else load, num_devices), mean_G.dtype)
    return len(share_G) * (share_G * mean_G).sum()


def sequence_switch_loss(
    routing: Routing, scores: Tensor, batch_size: int, *, num_sequences: int | None = None, num_devices: int = 0
) -> Tensor:
    """The Switch loss of each sequence alone, mean over sequences (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    Args:
        batch_size: B, sequences that the T tokens are.
        num_sequences: of the whole batch, without those that are nothing but padding; default: of this routing.
    """
    probability_TG = _pooled(_probabilities(scores), num_devices)
    sequence_T = torch.arange(batch_size, device=scores.device).repeat_interleave(len(scores) // max(batch_size, 1))
    if routing.mask is not None:
        probability_TG, sequence_T = probability_TG[routing.mask], sequence_T[routing.mask]
    length_B = torch.bincount(sequence_T, minlength=batch_size)
    summed_BG = probability_TG.new_zeros(batch_size, probability_TG.shape[1]).index_add(0, sequence_T, probability_TG)
    mean_BG = summed_BG / length_B.clamp_min(1).unsqueeze(1)
    share_BG = _shares(_pooled(load_of_sequences(routing, batch_size), num_devices), mean_BG.dtype)
    count = int((length_B > 0).sum()) if num_sequences is None else num_sequences
    return share_BG.shape[1] * (share_BG * mean_BG).sum() / max(count, 1)


def z_loss(routing: Routing, num_tokens: int | None = None) -> Tensor:
    """Router z-loss of ST-MoE (arXiv 2202.08906): mean over tokens of logsumexp(logits) squared.

    `num_tokens` is that of the whole batch, without padding; default: of this routing.
    """
    logits_TE = routing.logits if routing.mask is None else routing.logits[routing.mask]
    return logits_TE.logsumexp(-1).square().sum() / max(len(logits_TE) if num_tokens is None else num_tokens, 1)


def relu_l1_loss(routing: Routing, top_k: int, *, load: Tensor | None = None, num_tokens: int | None = None) -> Tensor:
    """What keeps ReLU routers sparse and even (ReMoE, arXiv 2412.14711): sum_e f_e x mean_t relu(logit)_te.

    f_e = E / (K T) x the tokens that expert e is active for, so the L1 norm weighs more where the load is high.
    """
    logits_TE = routing.logits if routing.mask is None else routing.logits[routing.mask]
    num_tokens = max(len(logits_TE) if num_tokens is None else num_tokens, 1)
    load_E = (routing.load() if load is None else load).to(logits_TE.dtype)
    factor_E = routing.num_experts / (top_k * num_tokens) * load_E
    return (factor_E * logits_TE.relu().sum(0)).sum() / num_tokens


def load_of_sequences(routing: Routing, batch_size: int) -> Tensor:
    """(B, E) int64: rows that the tokens of each sequence asked for, whether or not there was room."""
    decision = routing.decision
    token_ids_N, expert_ids_N = decision.token_ids, decision.wishes
    if routing.mask is not None:
        is_token_N = routing.mask[token_ids_N]
        token_ids_N, expert_ids_N = token_ids_N[is_token_N], expert_ids_N[is_token_N]
    sequence_N = token_ids_N // max(routing.num_tokens // max(batch_size, 1), 1)
    place_N = sequence_N * routing.num_experts + expert_ids_N
    flat = torch.bincount(place_N, minlength=batch_size * routing.num_experts)
    return flat.view(batch_size, routing.num_experts)


def _probabilities(scores: Tensor) -> Tensor:
    return scores / (scores.sum(-1, keepdim=True) + 1e-20)


def _pooled(values: Tensor, num_devices: int) -> Tensor:
    """(..., E) -> (..., G) sums of neighbouring experts."""
    return values if num_devices <= 1 else values.unflatten(-1, (num_devices, -1)).sum(-1)


def _shares(load: Tensor, dtype: torch.dtype) -> Tensor:
    return load.to(dtype) / load.sum(-1, keepdim=True).clamp_min(1)


@torch.no_grad()
def update_expert_bias(router: Router, load: Tensor, rate: float, *, proportional: bool = False) -> None:
    """Loss-free balancing (arXiv 2408.15664): raise the bias of experts below the mean load, lower it above.

    By `rate` x the sign of what is missing, or x what is missing, as a share of the mean load. Call once per optimizer
    step with the load (E,) of the whole batch. The bias stays centred on 0. For any router that was made with an
    `expert_bias`, whether it is added or, as its exponential, multiplies.
    """
    bias_E = _bias(router)
    load_E = load.to(bias_E)
    missing_E = load_E.mean() - load_E
    bias_E += rate * (missing_E / load_E.mean().clamp_min(1e-12) if proportional else missing_E.sign())
    bias_E -= bias_E.mean()


class BiasHistogram:
    """Quantile balancing (J. Su, 2026; Kimi K3): the bias with which each expert gets its K / E of these tokens.

    Expert e wins token t when its bias exceeds the token's cut-off, the (K + 1)-th highest biased score, minus its own
    score. The K / E quantile of that over the tokens of the whole batch is its new bias. A histogram finds it, linearly
    within a bin: it is summed over micro-batches, and its size does not depend on the tokens. Bins lie around the
    expert's present bias and grow with the distance from it, by 3 %: so a step is right to 3 % of its length, whether
    scores are of order 1 or 1 / E.
    """

    def __init__(self, router: Router) -> None:
        self.bias = _bias(router).double()
        # Scores lie in 0..1, so no bias that is needed lies further from a present one.
        farthest = float(self.bias.max() - self.bias.min()) + 1.0 if len(self.bias) else 1.0
        self.scale = math.log1p(farthest / NARROWEST_BIN)
        self.counts = torch.zeros(len(self.bias), HISTOGRAM_BINS, dtype=torch.int64, device=self.bias.device)

    @torch.no_grad()
    def add(self, router: Router, routing: Routing) -> None:
        scores_TE = router.scores(routing.logits if routing.mask is None else routing.logits[routing.mask])
        cutoff_T1 = (scores_TE + _bias(router)).topk(router.top_k + 1, dim=-1).values[:, -1:]
        move_TE = (cutoff_T1 - scores_TE).double() - self.bias
        place_TE = move_TE.sign() * torch.log1p(move_TE.abs() / NARROWEST_BIN) / self.scale  # -1..1
        bin_TE = (HISTOGRAM_BINS / 2 * (place_TE + 1)).long().clamp(0, HISTOGRAM_BINS - 1)
        bin_TE = bin_TE + HISTOGRAM_BINS * torch.arange(bin_TE.shape[1], device=bin_TE.device)
        self.counts += torch.bincount(bin_TE.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def quantile(self, share: float) -> Tensor:
        """(E,) float64: below this lie `share` of the biases that were needed."""
        reached_EB = self.counts.cumsum(1).double()
        target_E1 = share * reached_EB[:, -1:]
        bin_E1 = torch.searchsorted(reached_EB, target_E1).clamp_max(HISTOGRAM_BINS - 1)
        count_E1 = self.counts.gather(1, bin_E1)
        before_E1 = reached_EB.gather(1, bin_E1) - count_E1
        low_E1, high_E1 = self._edge(bin_E1), self._edge(bin_E1 + 1)
        return self.bias + (low_E1 + (high_E1 - low_E1) * (target_E1 - before_E1) / count_E1.clamp_min(1)).squeeze(1)

    def _edge(self, bins: Tensor) -> Tensor:
        """How far from the present bias each bin begins."""
        place = bins.double() / (HISTOGRAM_BINS / 2) - 1
        return place.sign() * NARROWEST_BIN * torch.expm1(place.abs() * self.scale)


@torch.no_grad()
def move_expert_bias(router: Router, histogram: BiasHistogram, rate: float) -> None:
    """Go the part `rate` of the way from the router's bias to the one that would have balanced the batch, centred."""
    if int(histogram.counts.sum()) == 0:
        return
    bias_E = _bias(router)
    target_E = histogram.quantile(router.top_k / router.num_experts)
    bias_E += rate * ((target_E - target_E.mean()).to(bias_E.dtype) - bias_E)


def _bias(router: Router) -> Tensor:
    assert router.expert_bias is not None, "this router has no selection bias"
    return router.expert_bias


def max_vio(tokens_per_expert: Tensor) -> float:
    """MaxVio (arXiv 2408.15664): (max load - mean load) / mean load of (..., E) loads, averaged over leading axes."""
    load = tokens_per_expert.to(torch.float64)
    mean = load.mean(-1).clamp_min(1e-12)
    return float(((load.max(-1).values - mean) / mean).mean())
