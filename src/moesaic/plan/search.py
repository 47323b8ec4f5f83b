"""All sensible layouts of a model on a cluster, and the few of them that are worth a look.

An option is kept when no other that fits is better in speed and in memory left (training: tokens/s and bytes; decoding:
tokens/s, time between tokens and bytes). Each comes with the reason why it is there.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from moesaic.errors import UsageError
from moesaic.plan.cluster import Cluster
from moesaic.plan.inference import InferenceEstimate, InferenceTask, estimate_inference
from moesaic.plan.layout import Layout, Recompute, check_layout
from moesaic.plan.subject import Subject
from moesaic.plan.training import TrainingEstimate, TrainingTask, estimate_training

MAX_OPTIONS = 6
MAX_EXPERT_GROUP = 512
MAX_STAGES = 64

Estimate = TypeVar("Estimate", TrainingEstimate, InferenceEstimate)


@dataclass(frozen=True)
class Option(Generic[Estimate]):
    """One way to run it, and why it is shown."""

    estimate: Estimate
    reason: str


def training_options(
    subject: Subject, cluster: Cluster, task: TrainingTask, layout: Layout | None = None
) -> list[Option[TrainingEstimate]]:
    """The given layout, or the best found. Where nothing fits, the option that comes nearest to fitting."""
    if layout is not None:
        check_layout(layout, subject.config, cluster.count)
        return [Option(estimate_training(subject, cluster, layout, task), "as asked for")]
    found: list[TrainingEstimate] = []
    for one in _training_layouts(subject, cluster, task):
        try:
            found.append(estimate_training(subject, cluster, one, task))
        except UsageError:  # a batch too small for so many replicas
            continue
    if not found:
        raise UsageError(
            f"a batch of {task.batch_tokens:,.0f} tokens cannot be dealt to {cluster.count:,} devices in any layout; "
            "raise --batch-tokens, or take fewer devices"
        )
    return _chosen(found, lambda one: (one.tokens_per_second, -one.memory.total))


def inference_options(
    subject: Subject, cluster: Cluster, task: InferenceTask, layout: Layout | None = None
) -> list[Option[InferenceEstimate]]:
    if layout is not None:
        check_layout(layout, subject.config, cluster.count)
        return [Option(estimate_inference(subject, cluster, layout, task), "as asked for")]
    found = [estimate_inference(subject, cluster, one, task) for one in _inference_layouts(subject, cluster)]
    return _chosen(found, lambda one: (one.tokens_per_second, -one.seconds_per_step, -one.memory.total))


def _chosen(found: list[Estimate], merits: Callable[[Estimate], tuple[float, ...]]) -> list[Option[Estimate]]:
    """The fastest first, then others that nobody beats in everything."""
    fitting = [one for one in found if one.memory.fits]
    if not fitting:
        nearest = min(found, key=lambda one: one.memory.total / one.memory.capacity)
        return [Option(nearest, "nothing fits; this comes nearest")]
    fastest = max(fitting, key=lambda one: merits(one)[:2])
    front = _pareto(fitting, merits)
    options = [Option(fastest, "the fastest that fits")]
    taken = {fastest.layout}
    for reason, key in (
        ("the least memory", lambda one: merits(one)[-1]),
        ("the shortest time between tokens", lambda one: merits(one)[1]),
    ):
        best = max(front, key=key)
        if best.layout not in taken and len(merits(best)) > (2 if "tokens" in reason else 1):
            taken.add(best.layout)
            options.append(Option(best, reason))
    for one in sorted(front, key=merits, reverse=True):
        if len(options) >= MAX_OPTIONS:
            break
        if one.layout not in taken and _differs(one, options):
            taken.add(one.layout)
            options.append(Option(one, _trade(one, fastest)))
    return options


def _pareto(found: Sequence[Estimate], merits: Callable[[Estimate], tuple[float, ...]]) -> list[Estimate]:
    ranked = sorted(found, key=merits, reverse=True)
    front: list[Estimate] = []
    for one in ranked:
        mine = merits(one)
        if not any(all(a >= b for a, b in zip(merits(other), mine, strict=True)) for other in front):
            front.append(one)
    return front


def _differs(one: Estimate, options: Sequence[Option[Estimate]]) -> bool:
    """Neighbours on the front that nobody could tell apart are left out."""
    return all(
        abs(one.memory.total / option.estimate.memory.total - 1) > 0.1
        or abs(one.tokens_per_second / option.estimate.tokens_per_second - 1) > 0.05
        for option in options
    )


def _trade(one: Estimate, fastest: Estimate) -> str:
    slower = 1 - one.tokens_per_second / fastest.tokens_per_second
    smaller = 1 - one.memory.total / fastest.memory.total
    return f"{smaller:.0%} less memory for {slower:.0%} less speed"


def _powers(limit: int) -> list[int]:
    return [2**power for power in range(limit.bit_length()) if 2**power <= limit]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _training_layouts(subject: Subject, cluster: Cluster, task: TrainingTask) -> Iterator[Layout]:
    config = subject.config
    for tp, pp in _grid(subject, cluster):
        replicas = cluster.count // (tp * pp)
        if replicas * task.sequence > task.batch_tokens:
            continue
        for ep in _expert_groups(subject, cluster, replicas * tp):
            for fsdp in {1, min(replicas, cluster.node_size), replicas}:
                if replicas % fsdp or (fsdp > 1 and pp > 1):
                    continue  # gathering weights again for every micro-batch of a pipeline is never worth it
                for vp in (1, 2, 4) if pp > 1 else (1,):
                    if pp * vp > config.num_hidden_layers:
                        continue
                    yield from _micro_layouts(Layout(dp=replicas // fsdp, fsdp=fsdp, ep=ep, pp=pp, tp=tp, vp=vp), task)


def _micro_layouts(layout: Layout, task: TrainingTask) -> Iterator[Layout]:
    choices: tuple[Recompute, ...] = ("none", "selective", "full")
    for micro in (1, 2, 4, 8):
        if layout.replicas * micro * task.sequence <= task.batch_tokens:
            for recompute in choices:
                yield replace(layout, micro=micro, recompute=recompute)


def _inference_layouts(subject: Subject, cluster: Cluster) -> Iterator[Layout]:
    for tp, pp in _grid(subject, cluster):
        replicas = cluster.count // (tp * pp)
        for ep in _expert_groups(subject, cluster, replicas * tp):
            yield Layout(dp=replicas, ep=ep, pp=pp, tp=tp)


def _grid(subject: Subject, cluster: Cluster) -> Iterator[tuple[int, int]]:
    """Tensor parallel inside a node only, by a divisor of the heads, times stages."""
    config = subject.config
    for tp in _powers(cluster.node_size):
        if config.num_attention_heads % tp or cluster.count % tp:
            continue
        for pp in range(1, min(MAX_STAGES, config.num_hidden_layers, cluster.count // tp) + 1):
            if cluster.count % (tp * pp) == 0:
                yield tp, pp


def _expert_groups(subject: Subject, cluster: Cluster, devices: int) -> list[int]:
    moe = subject.config.moe
    if moe is None:
        return [1]
    groups = [ep for ep in _divisors(moe.num_experts) if devices % ep == 0 and ep <= MAX_EXPERT_GROUP]
    return [ep for ep in groups if ep & (ep - 1) == 0] or groups
