"""Two models on the same cluster, side by side: the case that papers make for sparse models, or against them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moesaic.accounting import flops_per_token
from moesaic.plan.cluster import Cluster
from moesaic.plan.costs import costs, dollars_per_million
from moesaic.plan.inference import InferenceEstimate, InferenceTask
from moesaic.plan.report import Task, make_plan, model_bytes
from moesaic.plan.subject import Subject
from moesaic.plan.table import duration, gib, parameters, short
from moesaic.plan.training import TrainingEstimate, TrainingTask


@dataclass(frozen=True)
class Line:
    """One figure of both models."""

    name: str
    unit: str
    left: float
    right: float
    spread: float = 0.0
    """Of a prediction; 0 for what is counted."""

    @property
    def ratio(self) -> float:
        return self.left / self.right if self.right else float("inf")


@dataclass(frozen=True)
class Comparison:
    left: Subject
    right: Subject
    cluster: Cluster
    lines: Sequence[Line]
    unfit: Sequence[str]
    """What does not fit, in words."""


def compare(left: Subject, right: Subject, cluster: Cluster, tasks: Sequence[Task]) -> Comparison:
    """Each with the fastest layout of its own; counted figures first, then predictions of each task."""
    first = tasks[0]
    context = first.context if isinstance(first, InferenceTask) else first.sequence
    pair = (left, right)
    sizes = [model_bytes(subject, first) for subject in pair]
    flops = [flops_per_token(subject.config, context).forward for subject in pair]
    lines = [
        Line("parameters, capacity", "parameters", left.total, right.total),
        Line("parameters of a token", "parameters", left.active, right.active),
        Line(f"operations of a token, {context:,} in sight", "FLOP", *flops),
        Line("weights", "bytes", sizes[0]["weights"], sizes[1]["weights"]),
        Line(f"keys and values of {context:,} tokens", "bytes", sizes[0]["kv_of_context"], sizes[1]["kv_of_context"]),
    ]
    unfit: list[str] = []
    for task in tasks:
        found = [make_plan(subject, cluster, task).options[0].estimate for subject in pair]
        unfit += [
            f"{subject.name} does not fit for {_name(task)}: {gib(one.memory.total)} of {gib(one.memory.capacity)}"
            for subject, one in zip(pair, found, strict=True)
            if not one.memory.fits
        ]
        lines += _predicted(task, found, cluster)
    return Comparison(left, right, cluster, lines, unfit)


def _name(task: Task) -> str:
    return "training" if isinstance(task, TrainingTask) else task.phase


def _predicted(task: Task, found: Sequence[Any], cluster: Cluster) -> list[Line]:
    spread = found[0].spread
    if isinstance(task, TrainingTask):
        trained: list[TrainingEstimate] = list(found)
        lines = [
            _line("training speed", "tokens/s", [one.tokens_per_second for one in trained], spread),
            _line(f"days for {short(task.tokens)} tokens", "days", [one.days for one in trained], spread),
        ]
        rents = [costs(cluster, one.days * 86400, 0).dollars for one in trained]
        if rents[0] and rents[1]:
            middles = [(one[0] * one[1]) ** 0.5 for one in rents if one]
            lines.append(_line("rent, middle", "$", middles, spread))
        return lines
    served: list[InferenceEstimate] = list(found)
    what = f"{task.phase}, {task.batch:,} at a time"
    prices = [dollars_per_million(cluster, one.tokens_per_second, 0) for one in served]
    return [
        _line(what, "tokens/s", [one.tokens_per_second for one in served], spread),
        _line(f"{task.phase}: a million tokens, middle", "$", [(low * high) ** 0.5 for low, high in prices], spread),
    ]


def _line(name: str, unit: str, pair: Sequence[float], spread: float) -> Line:
    return Line(name, unit, pair[0], pair[1], spread)


def to_json(comparison: Comparison) -> dict[str, Any]:
    def facts(subject: Subject) -> dict[str, Any]:
        return {
            "name": subject.name,
            "source": subject.source,
            "parameters": {"total": subject.total, "active": subject.active},
        }

    return {
        "model": facts(comparison.left),
        "against": facts(comparison.right),
        "cluster": {"name": comparison.cluster.name, "count": comparison.cluster.count},
        "parameters": facts(comparison.left)["parameters"],
        "lines": [vars(line) | {"ratio": line.ratio} for line in comparison.lines],
        "unfit": list(comparison.unfit),
    }


_SHOWN = {"parameters": parameters, "bytes": gib, "days": lambda value: duration(value * 86400)}


def render(comparison: Comparison) -> RenderableType:
    table = Table(
        "", comparison.left.name, comparison.right.name, "ratio", header_style="bold", box=None, pad_edge=False
    )
    for line in comparison.lines:
        shown = _SHOWN.get(line.unit, lambda value, unit=line.unit: f"{short(value)} {unit}")
        margin = f" ± {line.spread:.0%}" if line.spread else ""
        table.add_row(line.name + margin, shown(line.left), shown(line.right), f"{line.ratio:.3g}")
    cluster = comparison.cluster
    words = [Text(one, style="yellow") for one in comparison.unfit]
    return Group(
        Text(f"on {cluster.count:,} x {cluster.device.name}, each in its fastest layout"), Text(), table, *words
    )
