"""A plan as data: what `moesaic plan --json` prints, and what the table and the page are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesaic.accounting import flops_per_token
from moesaic.plan.cluster import Cluster
from moesaic.plan.costs import costs, dollars_per_million
from moesaic.plan.inference import InferenceEstimate, InferenceTask
from moesaic.plan.layout import Layout, to_mapping
from moesaic.plan.search import Option, inference_options, training_options
from moesaic.plan.subject import Subject
from moesaic.plan.training import TrainingEstimate, TrainingTask
from moesaic.plan.work import bytes_per_weight, kv_numbers, kv_numbers_per_token, parameters

Task = TrainingTask | InferenceTask
Options = Sequence[Option[TrainingEstimate]] | Sequence[Option[InferenceEstimate]]


@dataclass(frozen=True)
class Plan:
    """What was asked, and the options that were found."""

    subject: Subject
    cluster: Cluster
    task: Task
    options: Options

    @property
    def phase(self) -> str:
        return self.task.phase if isinstance(self.task, InferenceTask) else "train"


def make_plan(subject: Subject, cluster: Cluster, task: Task, layout: Layout | None = None) -> Plan:
    if isinstance(task, InferenceTask):
        return Plan(subject, cluster, task, inference_options(subject, cluster, task, layout))
    return Plan(subject, cluster, task, training_options(subject, cluster, task, layout))


def to_json(plan: Plan) -> dict[str, Any]:
    """Plain values; the keys `parameters.total`, `parameters.active`, `bytes.weights` and `bytes.kv_per_token` stay."""
    subject, cluster, task = plan.subject, plan.cluster, plan.task
    return {
        "model": {"name": subject.name, "source": subject.source},
        "parameters": {"total": subject.total, "active": subject.active},
        "bytes": model_bytes(subject, task),
        "flops": {"forward_per_token": flops_per_token(subject.config, _context(task)).forward},
        "cluster": cluster_json(cluster),
        "task": {"phase": plan.phase} | {name: value for name, value in vars(task).items() if name != "phase"},
        "options": [
            training_json(option, plan) if isinstance(option.estimate, TrainingEstimate)
            else inference_json(option, plan)
            for option in plan.options
        ],
    }  # fmt: skip


def model_bytes(subject: Subject, task: Task) -> dict[str, float]:
    """Of the weights in the precision asked for (as training keeps them: bfloat16), and of a token's keys and values
    where no window ends them."""
    weight, dense_weight = task.weight_bytes if isinstance(task, InferenceTask) else (2.0, 2.0)
    routed = parameters(subject).routed
    cached = bytes_per_weight(task.kv_precision) if isinstance(task, InferenceTask) else 2.0
    layers = subject.config.num_hidden_layers * subject.kv_share
    context = _context(task)
    return {
        "weights": routed * weight + (subject.total - routed) * dense_weight,
        "kv_per_token": round(layers) * kv_numbers_per_token(subject.config) * cached,
        "kv_of_context": kv_numbers(subject, context) * cached,
    }


def _context(task: Task) -> int:
    return task.context if isinstance(task, InferenceTask) else task.sequence


def cluster_json(cluster: Cluster) -> dict[str, Any]:
    device = cluster.device
    return {
        "name": cluster.name, "device": device.name, "count": cluster.count, "node_size": cluster.node_size,
        "memory_bytes": device.memory, "bandwidth": device.bandwidth, "peak_flops": dict(device.flops),
        "link": device.link, "network": device.network, "disk": cluster.disk, "host_memory": cluster.host_memory,
        "source": device.source,
    }  # fmt: skip


def _range(value: float, spread: float) -> list[float]:
    return [value / (1 + spread), value * (1 + spread)]


def training_json(option: Option[Any], plan: Plan) -> dict[str, Any]:
    one: TrainingEstimate = option.estimate
    cost = costs(plan.cluster, one.days * 86400, one.spread)
    return {
        "layout": to_mapping(one.layout), "reason": option.reason, "fits": one.memory.fits, "bound": one.bound,
        "memory": memory_json(one.memory.parts, one.memory.capacity),
        "step_seconds": dict(one.seconds), "micro_batches": one.micro_batches,
        "tokens_per_second": one.tokens_per_second,
        "tokens_per_second_range": _range(one.tokens_per_second, one.spread),
        "flops_per_device": one.flops_per_device, "mfu": one.mfu, "days": one.days,
        "days_range": _range(one.days, one.spread), "device_hours": one.device_hours,
        "kilowatt_hours_range": list(cost.kilowatt_hours),
        "dollars_range": list(cost.dollars) if cost.dollars else None,
    }  # fmt: skip


def inference_json(option: Option[Any], plan: Plan) -> dict[str, Any]:
    one: InferenceEstimate = option.estimate
    cost = costs(plan.cluster, 1e6 / one.tokens_per_second, one.spread)
    return {
        "layout": to_mapping(one.layout), "reason": option.reason, "fits": one.memory.fits, "bound": one.bound,
        "memory": memory_json(one.memory.parts, one.memory.capacity), "experts_in": one.experts_in,
        "step_seconds": dict(one.seconds), "seconds_per_step": one.seconds_per_step, "bytes_read": one.bytes_read,
        "tokens_per_second": one.tokens_per_second,
        "tokens_per_second_range": _range(one.tokens_per_second, one.spread),
        "dollars_per_million_tokens_range": list(dollars_per_million(plan.cluster, one.tokens_per_second, one.spread)),
        "kilowatt_hours_per_million_tokens_range": list(cost.kilowatt_hours),
    }  # fmt: skip


def memory_json(parts: Mapping[str, float], capacity: float) -> dict[str, Any]:
    return {"parts": dict(parts), "total": sum(parts.values()), "capacity": capacity}
