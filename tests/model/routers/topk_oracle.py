"""Token choice of exactly K experts as it is defined, written for one token in float64.

T tokens, E experts, D hidden size.
"""

import math

import torch
from torch import Tensor

from moesaic.config import MoEConfig
from moesaic.model.routers import TopKRouter

from .helpers import MARGIN, MAX_DRAWS, D, exact_logits

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
    "noisy, as it is evaluated": {"router": "noisy_topk"},
    "softmax, multiplied bias": {"router": "softmax_topk", "expert_bias": True, "expert_bias_form": "multiply"},
    "sparse mixer": {"router": "sparsemixer"},
    "sparse mixer, wide, router bias": {"router": "sparsemixer", "router_jitter_noise": 0.4, "router_bias": True},
    "sparse mixer, without jitter": {"router": "sparsemixer", "router_jitter_noise": 0.0},
}  # fmt: skip


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
        elif moe.router in ("topk_softmax", "noisy_topk", "topk_sigmoid_input"):
            chosen = self._best(range(moe.num_experts), logits.tolist(), moe.num_experts_per_tok)
            over_chosen = logits[chosen].sigmoid() if moe.router == "topk_sigmoid_input" else logits[chosen].softmax(0)
            weights = dict(zip(chosen, over_chosen, strict=True))
        else:
            scores = logits.softmax(0) if moe.router == "softmax_topk" else logits.sigmoid()
            pairs = zip(scores.tolist(), self.expert_bias, strict=True)
            if moe.expert_bias_form == "add":
                selection = [score + bias for score, bias in pairs]
            else:
                selection = [score * math.exp(bias) for score, bias in pairs]
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


def draw_tokens(router: TopKRouter, moe: MoEConfig, num_tokens: int) -> Tensor:
    """(T, D) float32 whose routing hangs on no gap below MARGIN."""
    kept: list[Tensor] = []
    for _ in range(MAX_DRAWS * num_tokens):
        x_D = torch.randn(D)
        oracle = Oracle(moe, router.expert_bias)
        oracle.route(exact_logits(router, x_D))
        if oracle.margin > MARGIN:
            kept.append(x_D)
        if len(kept) == num_tokens:
            return torch.stack(kept)
    raise AssertionError(f"only {len(kept)} of {MAX_DRAWS * num_tokens} draws have wide gaps")
