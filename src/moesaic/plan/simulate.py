"""One step played over all ranks: who computes, sends and waits. It checks the analytic model and draws a timeline.

Ranks of an expert group meet at every layer: rows leave when the last of them is ready (dispatch), and go home when the
last expert is done (combine). Loads are drawn from routing with a given MaxVio, and every rank is a little faster or
slower each time. Stages follow 1F1B. Durations of undisturbed parts are those of the analytic model; what the
simulation adds is waiting.

P stages, G expert groups of a stage, R ranks of a group, M micro-batches.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesaic.plan.cluster import Cluster
from moesaic.plan.efficiency import TRAINING
from moesaic.plan.inference import InferenceTask, estimate_inference
from moesaic.plan.layout import Layout
from moesaic.plan.subject import Subject
from moesaic.plan.training import TrainingTask, estimate_training, layer_seconds

Array = NDArray[np.float64]
JITTER = 0.02
"""Standard deviation of how long the same work takes, as a share."""
VARIANTS = 3
"""Micro-batches that are drawn; the others repeat them."""
SHOWN_RANKS, SHOWN_LAYERS = 8, 6
EXPOSED_IN_LAYER = ("dense products", "attention scores", "memory traffic", "launches", "tensor parallel")


@dataclass(frozen=True)
class Segment:
    """What a rank does from `start` to `end`, in seconds."""

    rank: int
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """One step, played."""

    ranks: int
    seconds: float
    analytic: float
    """What the analytic model says of the same step."""
    waiting: float
    """Share of the time that the mean rank waits for others of its expert group."""
    segments: tuple[Segment, ...]
    """Of the first layers of one expert group's first ranks."""


def simulate_training(
    subject: Subject, cluster: Cluster, layout: Layout, task: TrainingTask, jitter: float = JITTER, seed: int = 0
) -> Simulation:
    """One optimizer step of all ranks."""
    estimate = estimate_training(subject, cluster, layout, task)
    layer = layer_seconds(subject, cluster, layout, task, TRAINING)
    rng = np.random.default_rng(seed)
    groups = layout.replicas * layout.tp // layout.ep
    layers = max(1, round(subject.config.num_hidden_layers / layout.pp))
    scale = subject.config.num_hidden_layers / layout.pp / layers
    durations = _durations(layer)
    play = _Play(rng, jitter, _popularity(rng, subject, task.max_vio), layout.ep)
    head = estimate.seconds["head"] / estimate.micro_batches / 3
    forward, backward = [], []
    for _ in range(VARIANTS):
        forward.append([scale * play.stage(durations, 1 / 3, layers, groups) + head for _ in range(layout.pp)])
        backward.append([scale * play.stage(durations, 2 / 3, layers, groups) + 2 * head for _ in range(layout.pp)])
    # With interleaved stages the pipeline fills and drains in shorter parts.
    played = float(_pipeline(np.array(forward), np.array(backward), estimate.micro_batches).max())
    busy = estimate.micro_batches * float(np.mean(np.array(forward) + np.array(backward)))
    seconds = busy + max(0.0, played - busy) / layout.vp
    rest = ("pipeline transfers", "gradient sums", "weight gathers", "optimizer")
    seconds += sum(estimate.seconds.get(name, 0.0) for name in rest)
    return Simulation(cluster.count, seconds, estimate.step, play.waited / max(play.total, 1e-12), tuple(play.segments))


def simulate_decode(
    subject: Subject, cluster: Cluster, layout: Layout, task: InferenceTask, jitter: float = JITTER, seed: int = 0
) -> Simulation:
    """One token of every text."""
    estimate = estimate_inference(subject, cluster, layout, task)
    rng = np.random.default_rng(seed)
    layers = subject.config.num_hidden_layers
    names = ("expert products", "reading experts", "experts on the host", "disk")
    experts = sum(estimate.seconds.get(name, 0.0) for name in names)
    exchange = estimate.seconds.get("all-to-all", 0.0)
    rest = sum(estimate.seconds.values()) - experts - exchange
    durations = {"attention": rest / layers, "exchange": exchange / layers, "experts": experts / layers}
    play = _Play(rng, jitter, _popularity(rng, subject, task.max_vio), layout.ep)
    groups = max(1, layout.replicas * layout.tp // layout.ep)
    played = play.stage(durations, 1.0, layers, groups)
    return Simulation(cluster.count, float(played.max()), sum(estimate.seconds.values()),
                      play.waited / max(play.total, 1e-12), tuple(play.segments))  # fmt: skip


def _durations(layer: Mapping[str, float]) -> dict[str, float]:
    """Forward and backward of the mean layer, by phase; imbalance is left to the loads that are drawn."""
    return {
        "attention": sum(layer[name] for name in EXPOSED_IN_LAYER),
        "exchange": layer.get("all-to-all", 0.0),
        "experts": layer["expert products"],
    }


def _popularity(rng: np.random.Generator, subject: Subject, max_vio: float) -> Array:
    """Loads of the experts, of mean 1, whose largest is 1 + max_vio (E,)."""
    experts = subject.config.moe.num_experts if subject.config.moe else 1
    if max_vio <= 0 or experts == 1:
        return np.ones(experts)
    z_E = rng.standard_normal(experts)
    low, high = 0.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        load_E = np.exp(middle * z_E)
        low, high = (middle, high) if load_E.max() / load_E.mean() < 1 + max_vio else (low, middle)
    load_E = np.exp(low * z_E)
    return load_E / load_E.mean()


class _Play:
    """Layers of one stage for all of its ranks; keeps what was waited, and the segments of the first group."""

    def __init__(self, rng: np.random.Generator, jitter: float, popularity: Array, group: int):
        self.rng, self.jitter, self.group = rng, jitter, group
        experts = len(popularity)
        self.popularity = popularity
        self.per_rank = max(1, experts // group)
        self.waited, self.total = 0.0, 0.0
        self.segments: list[Segment] = []

    def stage(self, durations: Mapping[str, float], share: float, layers: int, groups: int) -> Array:
        """Seconds that the stage's layers take each expert group (G,)."""
        now_G = np.zeros(groups)
        for index in range(layers):
            now_G = self._layer(durations, share, now_G, index)
        self.total += float(now_G.mean())
        return now_G

    def _layer(self, durations: Mapping[str, float], share: float, now_G: Array, index: int) -> Array:
        shape = (len(now_G), self.group)
        exchange = share * durations["exchange"] / 2
        ready_GR = now_G[:, None] + share * durations["attention"] * self._noise(shape)
        sent_G = ready_GR.max(axis=1)
        got_G = sent_G + exchange
        # Which experts are popular differs from layer to layer.
        load_R = (
            self.rng.permutation(self.popularity)[: self.per_rank * self.group].reshape(self.group, -1).mean(axis=1)
        )
        done_GR = got_G[:, None] + share * durations["experts"] * load_R * self._noise(shape)
        last_G = done_GR.max(axis=1)
        waited = (sent_G[:, None] - ready_GR).mean() + (last_G[:, None] - done_GR).mean()
        self.waited += float(waited)
        home_G = last_G + exchange
        if index < SHOWN_LAYERS and not self.total:
            self._show(now_G[0], ready_GR[0], sent_G[0], got_G[0], done_GR[0], last_G[0], home_G[0])
        return home_G

    def _noise(self, shape: tuple[int, int]) -> Array:
        return np.exp(self.jitter * self.rng.standard_normal(shape))

    def _show(
        self, now: float, ready_R: Array, sent: float, got: float, done_R: Array, last: float, home: float
    ) -> None:
        for rank in range(min(self.group, SHOWN_RANKS)):
            times = (
                ("attention", now, ready_R[rank]), ("waits", ready_R[rank], sent), ("dispatch", sent, got),
                ("experts", got, done_R[rank]), ("waits", done_R[rank], last), ("combine", last, home),
            )  # fmt: skip
            self.segments += [
                Segment(rank, name, float(start), float(end)) for name, start, end in times if end > start
            ]


def _pipeline(forward: Array, backward: Array, micro_batches: int) -> Array:
    """When the last backward pass of each group ends, in 1F1B order; durations are (variants, P, G)."""
    variants, stages, groups = forward.shape
    orders = [_order(stage, stages, micro_batches) for stage in range(stages)]
    ends: dict[tuple[str, int, int], Array] = {}
    clocks = [np.zeros(groups) for _ in range(stages)]
    positions = [0] * stages
    left = sum(map(len, orders))
    while left:
        for stage, order in enumerate(orders):
            while positions[stage] < len(order):
                kind, micro = order[positions[stage]]
                before = (kind, stage - 1, micro) if kind == "F" else (kind, stage + 1, micro)
                inner = 0 <= before[1] < stages
                if inner and before not in ends:
                    break
                start = np.maximum(clocks[stage], ends.pop(before)) if inner else clocks[stage]
                duration = forward if kind == "F" else backward
                clocks[stage] = start + duration[micro % variants, stage]
                ends[kind, stage, micro] = clocks[stage]
                positions[stage] += 1
                left -= 1
    return np.maximum.reduce(clocks)


def _order(stage: int, stages: int, micro_batches: int) -> list[tuple[str, int]]:
    """Forward passes that fill the pipeline, then one backward and one forward, then what is left."""
    warm = min(stages - stage - 1, micro_batches)
    order = [("F", micro) for micro in range(warm)]
    for micro in range(micro_batches - warm):
        order += [("F", warm + micro), ("B", micro)]
    return order + [("B", micro) for micro in range(micro_batches - warm, micro_batches)]
