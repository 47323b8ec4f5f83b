"""What a batch teaches: its loss and gradients, the same however the batch is cut into micro-batches.

B sequences, L positions, V vocabulary, M mixture-of-experts layers, E experts.

Every mean is a sum divided by a count of the whole batch, so what micro-batches add up is what the uncut batch gives,
also where padding leaves them unequally many tokens. One term needs more than counts: the load of the whole batch, of
the Switch loss in the scope `global_batch` and of the L1 loss of ReLU routers. When there are several micro-batches, a
pass without gradient over all of them finds it first; the second pass takes the experts that the first one chose. The
same pass counts the tokens of each layer where tokens may pass layers by.

Micro-batches may also lie on several ranks. Counts, loads and losses are then those of all ranks, and the gradients of
a rank its share, to be summed over ranks and never averaged.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from moesaic.config import BalanceConfig
from moesaic.model.balance import (
    BiasHistogram,
    move_expert_bias,
    relu_l1_loss,
    sequence_switch_loss,
    switch_loss,
    update_expert_bias,
    z_loss,
)
from moesaic.model.depth import depth_loss
from moesaic.model.routers import ReLURouter, Router
from moesaic.model.transformer import Transformer
from moesaic.ops import Routing
from moesaic.parallel.ranks import Ranks
from moesaic.train.routing_statistics import RoutingStatistics

IGNORED = -100
"""A target that is not predicted."""


@dataclass(frozen=True)
class Batch:
    """Sequences and what follows each of their tokens."""

    tokens: Tensor
    """(B, L) int64."""
    targets: Tensor
    """(B, L) int64; `IGNORED` where nothing is to be predicted."""
    positions: Tensor | None = None
    """(B, L) int64, negative for padding, whose targets do not count. None: consecutive, without padding."""
    noise_keys: Tensor | None = None
    """(B,) int64, from which routers draw noise. None: torch's generator, which knows nothing of micro-batches."""

    def split(self, size: int) -> list["Batch"]:
        """Micro-batches of `size` sequences."""
        return [
            Batch(*(None if part is None else part[start : start + size] for part in self._parts()))  # type: ignore[arg-type]
            for start in range(0, len(self.tokens), size)
        ]

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(None if part is None else part.to(device) for part in self._parts()))  # type: ignore[arg-type]

    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.tokens, self.targets, self.positions, self.noise_keys

    @property
    def real_targets(self) -> Tensor:
        """The targets, `IGNORED` at padding."""
        return self.targets if self.positions is None else self.targets.masked_fill(self.positions < 0, IGNORED)

    def counts(self) -> Tensor:
        """(3,) int64: targets, tokens and sequences, without padding."""
        is_token_BL = torch.ones_like(self.tokens, dtype=torch.bool) if self.positions is None else self.positions >= 0
        is_target_BL = self.real_targets != IGNORED
        return torch.stack((is_target_BL.sum(), is_token_BL.sum(), is_token_BL.any(1).sum()))


@dataclass(frozen=True)
class Terms:
    """The parts of the loss, before their coefficients."""

    cross_entropy: Tensor
    aux: Tensor
    z: Tensor
    l1: Tensor
    """Of ReLU routers; times its own weight, which they steer."""
    depth: Tensor

    def total(self, balance: BalanceConfig) -> Tensor:
        auxiliary = balance.aux_loss_coef * self.aux + balance.z_loss_coef * self.z
        return self.cross_entropy + auxiliary + self.l1 + balance.depth_loss_coef * self.depth

    def detached(self) -> Tensor:
        """(5,) float64."""
        values = (self.cross_entropy, self.aux, self.z, self.l1, self.depth)
        device = self.cross_entropy.device
        return torch.stack([value.detach().to(device, torch.float64) for value in values])


@dataclass(frozen=True)
class BatchResult:
    """What a batch said, its gradients aside."""

    loss: float
    """Mean cross-entropy over the targets, in nats."""
    aux_loss: float
    z_loss: float
    l1_loss: float
    depth_loss: float
    layer_tokens: list[int]
    """Of each of the M layers, without padding and without tokens that pass it by."""
    statistics: RoutingStatistics
    histograms: list[BiasHistogram]
    """One per layer where the selection bias follows the quantile rule; else none."""


@dataclass(frozen=True)
class _Whole:
    """What the terms of a micro-batch must know of the whole batch."""

    num_targets: int
    num_tokens: int
    num_sequences: int
    layer_tokens: Sequence[int | None]
    """Of each of the M layers. None, here and below: the batch is in one piece, which knows its own."""
    recorded: Sequence[list[Routing] | None]
    """Per micro-batch, what to replay."""
    load: Tensor | None = None
    """(M, E)."""


def accumulate_gradients(
    model: Transformer,
    micro_batches: Sequence[Batch],
    balance: BalanceConfig,
    *,
    dtype: torch.dtype = torch.float32,
    ranks: Ranks | None = None,
) -> BatchResult:
    """Add the gradients of a whole batch, given as micro-batches, to those of the model's parameters.

    `dtype` bfloat16 computes under autocast. Call it in training mode: the routers' noise and capacities belong to it.
    Each of several `ranks` gives equally many micro-batches of its own; the result is that of all of them.
    """
    ranks = ranks or Ranks()
    whole = _look_at_whole(model, micro_batches, balance, dtype, ranks)
    routers = [layer.router for layer in model.moe_layers]
    follows_quantile = balance.bias_update_rate > 0 and balance.bias_update_rule == "quantile"
    histograms = [BiasHistogram(router) for router in routers] if follows_quantile else []
    statistics = RoutingStatistics(len(routers))
    terms: list[Tensor] = []
    tokens_M = [0] * len(routers)
    for batch, replay in zip(micro_batches, whole.recorded, strict=True):
        logits_BLV, routings, depth_routings = _forward(model, batch, dtype, replay)
        parts = Terms(
            cross_entropy=_cross_entropy(logits_BLV, batch) / max(whole.num_targets, 1),
            **_router_terms(routers, routings, len(batch.tokens), whole, balance),
            depth=_mean([depth_loss(routing) / max(whole.num_tokens, 1) for routing in depth_routings]),
        )
        parts.total(balance).backward()
        terms.append(parts.detached())
        statistics.add(routings, model)
        tokens_M = [count + more for count, more in zip(tokens_M, _layer_tokens(routings), strict=True)]
        for router, routing, histogram in zip(routers, routings, histograms, strict=False):
            histogram.add(router, routing)
    loss, aux, z, l1, depth = ranks.sum(torch.stack(terms).sum(0)).tolist()
    for histogram in histograms:
        histogram.counts = ranks.sum(histogram.counts)
    statistics.sum_over(ranks)
    tokens_M = ranks.sum(torch.tensor(tokens_M)).tolist()
    return BatchResult(loss, aux, z, l1, depth, tokens_M, statistics, histograms)


@torch.no_grad()
def update_after_step(model: Transformer, result: BatchResult, balance: BalanceConfig, factor: float = 1.0) -> None:
    """Move what the load moves and no gradient: selection biases, and the L1 weights of ReLU routers.

    Once per optimizer step; `factor` is the learning rate's share of its peak.
    """
    rate = factor * balance.bias_update_rate
    load_ME = result.statistics.load
    for index, layer in enumerate(model.moe_layers):
        if rate and balance.bias_update_rule == "quantile":
            move_expert_bias(layer.router, result.histograms[index], rate)
        elif rate:
            proportional = balance.bias_update_rule == "proportional"
            update_expert_bias(layer.router, load_ME[index], rate, proportional=proportional)
        if isinstance(layer.router, ReLURouter):
            layer.router.steer(load_ME[index].sum() / max(result.layer_tokens[index], 1), balance.relu_l1_growth)


def _look_at_whole(
    model: Transformer, micro_batches: Sequence[Batch], balance: BalanceConfig, dtype: torch.dtype, ranks: Ranks
) -> _Whole:
    counts = ranks.sum(torch.stack([batch.counts() for batch in micro_batches]).sum(0)).tolist()
    num_layers, in_one_piece = len(model.moe_layers), len(micro_batches) * ranks.count == 1
    layer_tokens = [None if in_one_piece else counts[1]] * num_layers
    whole = _Whole(*counts, layer_tokens=layer_tokens, recorded=[None] * len(micro_batches))
    if in_one_piece or not num_layers or not _needs_load(model, balance):
        return whole
    recorded: list[list[Routing] | None] = []
    loads, tokens = [], [0] * num_layers
    with torch.no_grad():
        for batch in micro_batches:
            _, routings, _ = _forward(model, batch, dtype, None, logits_to_keep=1)
            loads.append(torch.stack([routing.load() for routing in routings]))
            tokens = [count + more for count, more in zip(tokens, _layer_tokens(routings), strict=True)]
            # Which tokens a layer computes cannot be replayed; it is decided again, in the same way.
            replayable = not model.config.depth_layers
            recorded.append([_choices_only(routing) for routing in routings] if replayable else None)
    tokens, load_ME = ranks.sum(torch.tensor(tokens)).tolist(), ranks.sum(torch.stack(loads).sum(0))
    return replace(whole, layer_tokens=tokens, recorded=recorded, load=load_ME)


def _needs_load(model: Transformer, balance: BalanceConfig) -> bool:
    """Whether a term needs to know the whole batch's load, or what no config tells of its tokens."""
    global_loss = balance.aux_loss_coef > 0 and balance.aux_loss_scope == "global_batch"
    per_layer = bool(model.config.depth_layers) and (balance.aux_loss_coef > 0 or balance.z_loss_coef > 0)
    return global_loss or per_layer or any(isinstance(layer.router, ReLURouter) for layer in model.moe_layers)


def _forward(
    model: Transformer,
    batch: Batch,
    dtype: torch.dtype,
    replay: Sequence[Routing] | None,
    logits_to_keep: int | None = None,
) -> tuple[Tensor, list[Routing], list[Routing]]:
    """Logits (B, L, V), the routings of the layers of experts, and those of blocks that tokens may pass by."""
    routings: list[Routing] = []
    depth_routings: list[Routing] = []
    with torch.autocast(batch.tokens.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits_BLV = model(
            batch.tokens,
            batch.positions,
            routings=routings,
            depth_routings=depth_routings,
            replay=replay,
            noise_keys=batch.noise_keys,
            logits_to_keep=logits_to_keep,
        )
    return logits_BLV, routings, depth_routings


def _cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Sum over the targets of a micro-batch; logits (B, L, V)."""
    wide_TV = logits.flatten(0, 1)
    wide_TV = wide_TV if wide_TV.dtype == torch.float64 else wide_TV.float()
    return functional.cross_entropy(wide_TV, batch.real_targets.flatten(), ignore_index=IGNORED, reduction="sum")


def _router_terms(
    routers: Sequence[Router], routings: Sequence[Routing], batch_size: int, whole: _Whole, balance: BalanceConfig
) -> dict[str, Tensor]:
    """The share of a micro-batch in the routers' terms, each the mean over layers."""
    aux, z, l1 = [], [], []
    for index, (router, routing) in enumerate(zip(routers, routings, strict=True)):
        load_E, num_tokens = None if whole.load is None else whole.load[index], whole.layer_tokens[index]
        if balance.aux_loss_coef:
            aux.append(_aux_loss(router, routing, batch_size, load_E, num_tokens, whole.num_sequences, balance))
        if balance.z_loss_coef:
            z.append(z_loss(routing, num_tokens))
        if isinstance(router, ReLURouter):
            loss = relu_l1_loss(routing, router.top_k, load=load_E, num_tokens=num_tokens)
            l1.append(router.l1_weight * loss)
    return {"aux": _mean(aux), "z": _mean(z), "l1": _mean(l1)}


def _aux_loss(
    router: Router,
    routing: Routing,
    batch_size: int,
    load: Tensor | None,
    num_tokens: int | None,
    num_sequences: int,
    balance: BalanceConfig,
) -> Tensor:
    scores_TE, num_devices = router.scores(routing.logits), balance.aux_loss_devices
    if balance.aux_loss_scope == "sequence":
        return sequence_switch_loss(
            routing, scores_TE, batch_size, num_sequences=num_sequences, num_devices=num_devices
        )  # fmt: skip
    load_E = load if balance.aux_loss_scope == "global_batch" else None
    return switch_loss(routing, scores_TE, load=load_E, num_tokens=num_tokens, num_devices=num_devices)


def _layer_tokens(routings: Sequence[Routing]) -> list[int]:
    """(M,)."""
    return [routing.num_tokens if routing.mask is None else int(routing.mask.sum()) for routing in routings]


def _choices_only(routing: Routing) -> Routing:
    """What a replay reads, without the memory of the rest."""
    return replace(
        routing,
        weights=routing.weights[:0],
        logits=routing.logits.new_zeros(()).expand(routing.logits.shape),
    )


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean() if values else torch.zeros(())
