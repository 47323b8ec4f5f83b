"""Loss of a model on held-out text, and how its experts were used there.

B sequences, L positions, V vocabulary, E experts, M mixture-of-experts layers, C domains.
"""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moesaic.errors import MoesaicError
from moesaic.model.balance import max_vio
from moesaic.model.transformer import Transformer
from moesaic.ops import Routing
from moesaic.parallel.ranks import Ranks
from moesaic.residency.residency import residency_of
from moesaic.train.routing_statistics import RoutingStatistics


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured."""

    loss: float
    """Mean negative log-likelihood, nats per token."""
    bits_per_byte: float
    """Bits per byte of text, which compares across tokenizers."""
    tokens: int
    load: Tensor
    """(C, M, E) int64: rows per domain, layer and expert; C is 1 without domains, M is 0 for a dense model."""
    routing: RoutingStatistics
    """How the experts were used over all evaluated tokens."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def max_vio(self) -> float | None:
        """MaxVio over all evaluated tokens (global), averaged over layers; None for a dense model."""
        return max_vio(self.routing.load) if self.routing.num_layers else None


@torch.no_grad()
def evaluate(
    model: Transformer,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    token_bytes: Tensor,
    *,
    num_domains: int = 1,
    dtype: torch.dtype = torch.float32,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Score batches of (tokens (B, L), targets (B, L), domain ids (B,)). A model with a budget keeps to it.

    Args:
        token_bytes: (V,) bytes of text that each token id stands for.
        num_domains: C; with 1 the domain ids do not matter.
        dtype: bfloat16 evaluates under autocast.
        ranks: which take the sequences of each batch in turn; all get the result.

    Raises:
        MoesaicError: there is no batch.
        UsageError: the budget has no room for such batches.
    """
    ranks = ranks or Ranks()
    device = model.embed_tokens.weight.device
    moe = model.config.moe
    load = torch.zeros(num_domains, len(model.moe_layers), moe.num_routed if moe else 0, dtype=torch.int64)
    statistics = RoutingStatistics(len(model.moe_layers))
    residency = residency_of(model)
    nats, tokens, text_bytes = 0.0, 0, 0
    for batch in batches:
        tokens_BL, targets_BL, domains_B = (part[ranks.index :: ranks.count] for part in batch)
        if num_domains == 1:
            domains_B = torch.zeros_like(domains_B)
        routings: list[Routing] = []
        tokens_BL, targets_BL = tokens_BL.to(device), targets_BL.to(device)
        size = targets_BL.numel()  # the loss makes the logits once more
        with nullcontext() if residency is None else residency.room(pass_tokens=size, logits=2 * size):
            with (
                model.evaluating(),
                torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16),
            ):
                logits_TV = model(tokens_BL, routings=routings).flatten(0, 1)
            nats += float(functional.cross_entropy(logits_TV.float(), targets_BL.flatten(), reduction="sum"))
            del logits_TV
        tokens += targets_BL.numel()
        text_bytes += int(token_bytes[targets_BL.flatten().cpu()].sum())
        statistics.add(routings, model)
        for layer, routing in enumerate(routings):
            _count_by_domain(load[:, layer], routing, domains_B, tokens_BL.shape[1])
    nats, tokens, text_bytes = ranks.sum(torch.tensor((nats, tokens, text_bytes), dtype=torch.float64)).tolist()
    load = ranks.sum(load)
    statistics.sum_over(ranks)
    if tokens == 0:
        raise MoesaicError("there is no text to evaluate on; give more, or a shorter sequence_length")
    return Evaluation(
        loss=nats / tokens,
        bits_per_byte=nats / math.log(2) / max(text_bytes, 1),
        tokens=int(tokens),
        load=load,
        routing=statistics,
    )


def _count_by_domain(load: Tensor, routing: Routing, domains: Tensor, length: int) -> None:
    """Add a routing's rows to load (C, E); sequence b of `length` tokens belongs to domain `domains[b]`."""
    domain_N = domains[routing.token_ids.cpu() // length]
    num_domains, num_experts = load.shape
    flat = torch.bincount(domain_N * num_experts + routing.expert_ids.cpu(), minlength=num_domains * num_experts)
    load += flat.view(num_domains, num_experts)
