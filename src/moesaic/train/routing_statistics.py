"""How the experts were used: one object sums over the micro-batches of a step, or over a whole validation set.

T tokens, E experts, M mixture-of-experts layers.

Only sums are kept, counts as int64 and the rest as float64, so that neither the cutting of a batch nor the order of its
parts nor padding changes a number. They stay on the model's device until somebody reads them.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.model.balance import max_vio
from moesaic.model.routers import Router
from moesaic.model.transformer import Transformer
from moesaic.moe_config import UNLEARNED_ROUTERS
from moesaic.ops import Routing
from moesaic.parallel.ranks import Ranks

_LEAST_SCORE = torch.finfo(torch.float32).tiny
"""Stands for smaller scores under the logarithm: 0 x log(this) is 0."""


class RoutingStatistics:
    """Sums over everything that was added. A dense model has `num_layers` 0, adds nothing and knows nothing."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self._counts: dict[str, Tensor] = {}
        """`load` (M, E), `dropped` (M,) and `tokens` (M,), all int64."""
        self._logits: dict[str, Tensor] = {}
        """`entropy`, `squares` and `largest`, each () float64."""

    @torch.no_grad()
    def add(self, routings: Sequence[Routing], model: Transformer) -> None:
        """Take the routings (M) of one forward pass of `model`."""
        if not routings:
            return
        assert model.config.moe is not None
        assert len(routings) == self.num_layers, "one routing for each layer"
        _accumulate(
            self._counts,
            load=torch.stack([routing.load() for routing in routings]),
            dropped=torch.stack([_num_dropped(routing) for routing in routings]),
            tokens=torch.stack([_num_tokens(routing) for routing in routings]),
        )
        if model.config.moe.router not in UNLEARNED_ROUTERS:
            for layer, routing in zip(model.moe_layers, routings, strict=True):
                self._add_logits(routing, layer.router)

    def _add_logits(self, routing: Routing, router: Router) -> None:
        logits_TE = routing.logits if routing.mask is None else routing.logits[routing.mask]
        if not len(logits_TE):
            return
        entropy_T = _relative_entropy(router.scores(logits_TE))
        mean_square_T = torch.linalg.vector_norm(logits_TE, dim=-1).square() / logits_TE.shape[1]
        largest = torch.stack(torch.aminmax(logits_TE)).abs().amax().double()
        if "largest" in self._logits:
            largest = torch.maximum(largest, self._logits.pop("largest"))
        self._logits["largest"] = largest
        _accumulate(
            self._logits,
            entropy=entropy_T.sum(dtype=torch.float64),
            squares=mean_square_T.sum(dtype=torch.float64),
        )

    def sum_over(self, ranks: Ranks) -> None:
        """From here on the sums are those of all ranks, each of which added something, be it without tokens."""
        if ranks.count == 1 or not self._counts:
            return
        self._counts = {name: ranks.sum(value) for name, value in self._counts.items()}
        if ranks.any(bool(self._logits)):  # a rank whose tokens are all padding has none
            nothing = torch.zeros((), dtype=torch.float64, device=self._counts["load"].device)
            self._logits = {
                "largest": ranks.largest(self._logits.get("largest", nothing)),
                "entropy": ranks.sum(self._logits.get("entropy", nothing)),
                "squares": ranks.sum(self._logits.get("squares", nothing)),
            }

    @property
    def load(self) -> Tensor:
        """(M, E) int64: rows that tokens sent to each expert, also those that found no room; on the CPU."""
        return self._counts["load"].cpu() if self._counts else torch.zeros(self.num_layers, 0, dtype=torch.int64)

    def row(self) -> dict[str, Any]:
        """What a line of metrics.jsonl says; None where there is nothing to say.

        The keys of `load_statistics`, and `dropped`, share of the rows asked for that no expert had room for;
        `experts_per_token`, mean rows computed per token; `router_entropy`, mean over tokens and layers of the entropy
        of a token's scores, 1 when all experts score alike and 0 when one takes all; `router_logit_rms` and
        `router_logit_max` (largest magnitude), whose growth makes a router unstable (arXiv 2202.08906).
        """
        row = load_statistics(self.load)
        row |= dict.fromkeys(("dropped", "experts_per_token", "router_entropy", "router_logit_rms", "router_logit_max"))
        if not self._counts:
            return row
        asked, dropped, tokens = (int(self._counts[name].sum()) for name in ("load", "dropped", "tokens"))
        row["dropped"] = round(dropped / max(1, asked), 6)
        row["experts_per_token"] = round((asked - dropped) / max(1, tokens), 4)
        if self._logits:
            sums = {name: float(value) for name, value in self._logits.items()}
            row["router_entropy"] = _rounded(sums["entropy"] / tokens)
            row["router_logit_rms"] = _rounded(math.sqrt(sums["squares"] / tokens))
            row["router_logit_max"] = _rounded(sums["largest"])
        return row


def load_statistics(load: Tensor) -> dict[str, Any]:
    """Balance of loads (M, E), None without layers or experts.

    `max_vio`, the mean of `max_vio_layers`; `dead_experts`, which no token asked for, over all layers; `load`, each
    expert's share of its layer's rows.
    """
    if load.numel() == 0:
        return dict.fromkeys(("max_vio", "max_vio_layers", "dead_experts", "load"))
    share_ME = load / load.sum(1, keepdim=True).clamp_min(1)
    return {
        "max_vio": round(max_vio(load), 4),
        "max_vio_layers": [round(max_vio(load_E), 4) for load_E in load],
        "dead_experts": int((load == 0).sum()),
        "load": [[round(share, 4) for share in layer] for layer in share_ME.tolist()],
    }


def _accumulate(sums: dict[str, Tensor], **values: Tensor) -> None:
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value


def _num_tokens(routing: Routing) -> Tensor:
    """() int64, without padding."""
    if routing.mask is not None:
        return routing.mask.sum()
    return torch.tensor(routing.num_tokens, device=routing.expert_ids.device)


def _num_dropped(routing: Routing) -> Tensor:
    """() int64. Without a choice of its own a routing dropped nothing, and counting that again would take time."""
    return routing.expert_ids.new_zeros(()) if routing.choice is None else routing.num_dropped()


def _relative_entropy(scores: Tensor) -> Tensor:
    """Scores (T, E), not negative -> (T,): entropy of each token's share for each expert, 1 when they are even."""
    # Shares s / S have the entropy log S - sum(s log s) / S, which takes fewer passes over (T, E) than the shares.
    total_T = scores.sum(-1)
    logs_T = scores.clamp_min(_LEAST_SCORE).log_().mul_(scores).sum(-1)
    entropy_T = torch.where(total_T == 0, 0.0, total_T.log() - logs_T / total_T)
    return entropy_T.div_(math.log(scores.shape[1]) or 1.0).clamp_(0.0, 1.0)


def _rounded(value: float) -> float | None:
    """Six digits; JSON has no NaN."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
