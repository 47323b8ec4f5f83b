"""Load balance: the losses and the bias update that keep every expert in use, and how uneven the load is.

T tokens, E experts, K experts per token, N assignments. All statistics leave padding out.
"""

import torch
from torch import Tensor

from moesaic.model.router import TopKRouter
from moesaic.ops import Routing


def switch_loss(routing: Routing, scores: Tensor) -> Tensor:
    """Load-balance loss of Switch Transformer (arXiv 2101.03961): E x sum_e f_e P_e, which is 1 at balance.

    f_e is the share of the N assignments that went to expert e (so K does not enter), P_e the mean over tokens of the
    full score distribution `scores` (T, E), normalised over the experts. One layer, one micro-batch.
    """
    share_E = routing.tokens_per_expert() / max(routing.expert_ids.numel(), 1)
    probability_TE = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    if routing.mask is not None:
        probability_TE = probability_TE[routing.mask]
    return routing.num_experts * (share_E * probability_TE.mean(0)).sum()


def z_loss(routing: Routing) -> Tensor:
    """Router z-loss of ST-MoE (arXiv 2202.08906): mean over tokens of logsumexp(logits) squared."""
    logits_TE = routing.logits if routing.mask is None else routing.logits[routing.mask]
    return logits_TE.logsumexp(-1).square().mean()


@torch.no_grad()
def update_expert_bias(router: TopKRouter, tokens_per_expert: Tensor, rate: float) -> None:
    """Loss-free balancing (arXiv 2408.15664): raise the bias of experts below the mean load, lower it above.

    Call once per optimizer step with the load (E,) summed over the whole batch. The bias stays centred on 0. For any
    router that was made with an `expert_bias`.
    """
    bias_E = router.expert_bias
    assert bias_E is not None, "this router has no selection bias"
    load_E = tokens_per_expert.to(torch.float32)
    bias_E += rate * torch.sign(load_E.mean() - load_E)
    bias_E -= bias_E.mean()


def max_vio(tokens_per_expert: Tensor) -> float:
    """MaxVio (arXiv 2408.15664): (max load - mean load) / mean load of (..., E) loads, averaged over leading axes."""
    load = tokens_per_expert.to(torch.float64)
    mean = load.mean(-1).clamp_min(1e-12)
    return float(((load.max(-1).values - mean) / mean).mean())
