"""What each expert contributes on a text, and which of them that speaks for keeping.

T tokens, N assignments, n of them, E experts, D hidden size, S sampled tokens.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import MoesaicError, UsageError
from moesaic.model.experts import Experts
from moesaic.model.transformer import Transformer
from moesaic.ops import Routing
from moesaic.residency.residency import residency_of

CRITERIA = {
    "reap": "router-weighted expert activation: the mean norm of what an expert adds to the tokens that visit it",
    "frequency": "how many tokens visit an expert",
}
"""What `LayerScores.by` knows."""
SAMPLED_TOKENS = 16
"""S, tokens of a pass on which all experts are compared."""


@dataclass
class LayerScores:
    """The experts of one layer, over all passes so far."""

    tokens: Tensor
    """(E,) int64: tokens that visited each expert."""
    contribution: Tensor
    """(E,) float64: the sum over these tokens of router weight x norm of the expert's output."""
    squared_distance: Tensor
    """(E, E) float64: the sum over the sampled tokens of the squared distance between what two experts make of one;
    zeros where nothing was sampled."""
    sampled: int = 0

    @classmethod
    def of(cls, num_experts: int) -> "LayerScores":
        size, wide = (num_experts,), torch.float64
        return cls(
            torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=wide), torch.zeros(size * 2, dtype=wide)
        )

    def by(self, criterion: str) -> Tensor:
        """(E,) float64, higher for what is worth more; 0 for an expert that no token visited.

        `reap` is S_j = 1 / |X_j| x the sum over x in X_j of g_j(x) |f_j(x)|, X_j the tokens for which the router chose
        expert j, g its weight and f the expert (equation 9 of arXiv 2510.13999).
        """
        if criterion == "frequency":
            return self.tokens.double()
        assert criterion == "reap"
        return self.contribution / self.tokens.clamp_min(1)

    @property
    def distance(self) -> Tensor:
        """(E, E) float64: root mean square, over the sampled tokens, of the distance between two experts' outputs."""
        return (self.squared_distance / max(self.sampled, 1)).sqrt()


def score_experts(model: Transformer, batches: Iterable[Tensor], *, sampled_tokens: int = 0) -> list[LayerScores]:
    """Runs the model over batches of tokens (B, L) and scores the experts of each layer, in order.

    Each expert's rows are computed once more, alone. `sampled_tokens` of each pass, evenly spread, go through all
    experts of a layer, which gives `distance`. Quantised models and experts on disk are scored as they are.

    Raises:
        UsageError: the model has no experts, or does not choose them (soft mixtures).
        MoesaicError: there is no batch.
    """
    moe = model.config.moe
    if moe is None:
        raise UsageError(f"{model.config.model_type or 'this model'} is dense; name a model with experts")
    if moe.router == "soft":
        raise UsageError("the router soft mixes tokens and chooses no experts, so that they cannot be scored")
    scores = [LayerScores.of(moe.num_experts) for _ in model.moe_layers]
    device, residency, seen = model.embed_tokens.weight.device, residency_of(model), 0
    with torch.no_grad(), model.evaluating(), _scoring(model, scores, sampled_tokens):
        for tokens_BL in batches:
            size = tokens_BL.numel()
            with nullcontext() if residency is None else residency.room(pass_tokens=size):
                model(tokens_BL.to(device), logits_to_keep=1)
            seen += size
    if seen == 0:
        raise MoesaicError("there is no text to score the experts on; give more, or a shorter sequence_length")
    return scores


@contextmanager
def _scoring(model: Transformer, scores: Sequence[LayerScores], sampled_tokens: int) -> Iterator[None]:
    def hook_of(layer: LayerScores) -> Any:
        def score(experts: Experts, args: tuple[Tensor, Routing], output: Tensor) -> None:
            x_TD, routing = args
            _add_contribution(layer, experts, x_TD, routing)
            if sampled_tokens:
                _add_distance(layer, experts, x_TD, routing, sampled_tokens)

        return score

    with ExitStack() as hooks:
        for block, layer in zip(model.moe_layers, scores, strict=True):
            hooks.callback(block.experts.register_forward_hook(hook_of(layer)).remove)
        yield


def _add_contribution(layer: LayerScores, experts: Experts, x: Tensor, routing: Routing) -> None:
    """As many rows at a time as there are tokens, expert by expert: an expert on disk is then read once, or twice."""
    order_N = torch.argsort(routing.expert_ids, stable=True)
    for numbers_n in order_N.split(max(1, len(x))):
        ids_n = routing.expert_ids[numbers_n]
        rows_nD = experts.forward(x[routing.token_ids[numbers_n]], _alone(routing, ids_n, routing.weights[numbers_n]))
        norms_n = torch.linalg.vector_norm(rows_nD.double(), dim=1).cpu()
        layer.contribution.index_add_(0, ids_n.cpu(), norms_n)
    layer.tokens += torch.bincount(routing.expert_ids.cpu(), minlength=len(layer.tokens))


def _add_distance(layer: LayerScores, experts: Experts, x: Tensor, routing: Routing, sampled_tokens: int) -> None:
    tokens_T = torch.arange(len(x), device=x.device) if routing.mask is None else routing.mask.nonzero().squeeze(1)
    count, num_experts = min(sampled_tokens, len(tokens_T)), len(layer.tokens)
    if count == 0:
        return
    x_SD = x[tokens_T[torch.arange(count, device=x.device) * len(tokens_T) // count]]
    ids_n = torch.arange(num_experts, device=x.device).repeat_interleave(count)
    y_nD = experts.forward(x_SD.repeat(num_experts, 1), _alone(routing, ids_n, torch.ones(len(ids_n), device=x.device)))
    y_ESD = y_nD.view(num_experts, count, -1).cpu()
    for index, y_SD in enumerate(y_ESD):  # not by products: the distance of equal experts would not be 0
        layer.squared_distance[index] += (y_ESD - y_SD).double().square().sum((1, 2))
    layer.sampled += count


def _alone(routing: Routing, expert_ids: Tensor, weights: Tensor) -> Routing:
    """Assignments (n,) as tokens of their own, so that nothing is summed."""
    count = len(expert_ids)
    return replace(
        routing,
        token_ids=torch.arange(count, device=expert_ids.device),
        expert_ids=expert_ids,
        weights=weights.to(routing.weights.dtype),
        logits=routing.logits.new_zeros(()).expand(count, routing.num_experts),
        top_k=1,
        mask=None,
        choice=None,
    )


def best_experts(scores: Tensor, keep: int, n_group: int = 1) -> list[int]:
    """The `keep` experts of the highest scores (E,), ascending, as many of each of `n_group` neighbouring groups; the
    first of equals. E and `keep` are multiples of `n_group`."""
    size = len(scores) // n_group
    kept: list[int] = []
    for group, of_group in enumerate(scores.split(size)):
        order = torch.argsort(of_group, descending=True, stable=True)[: keep // n_group]
        kept += sorted(int(index) + group * size for index in order)
    return kept


def random_scores(num_experts: int, *, seed: int, layer: int) -> Tensor:
    """(E,) float64 for one layer, to compare with; a function of seed and layer."""
    source = random.Random(f"{seed}-{layer}")
    return torch.tensor([source.random() for _ in range(num_experts)], dtype=torch.float64)


def nearest_leads(distance: Tensor, leads: Sequence[int], n_group: int = 1) -> list[list[int]]:
    """A cluster for each of the `leads`, which comes first in it: every other expert joins the lead that is nearest by
    distance (E, E), the first of equals, among those of its group of `n_group` neighbouring ones.

    M-SMoE (arXiv 2310.01334) so groups experts around those that most tokens visit, by the likeness of their router
    logits; HC-SMoE (arXiv 2410.08589) found that outputs tell more about what experts do, and clusters bottom up by
    these. On models that were trained here that made one cluster of half of the experts and left the others alone.
    """
    size = len(distance) // n_group
    clusters = {lead: [lead] for lead in leads}
    for expert in range(len(distance)):
        if expert not in clusters:
            near = [lead for lead in leads if lead // size == expert // size]
            clusters[near[int(distance[expert, near].argmin())]].append(expert)
    return list(clusters.values())
