"""Tokens per second of prefill and of decoding, with experts in the device's memory, in the host's, or on disk.

A step of decoding reads the weights that its tokens use and their keys and values; what a layer takes beside that no
size makes shorter. Prefill is bound by products, or by reading all weights where the prompt is short. Where weights do
not fit into the device's memory, experts stay in the host's memory, whose processor computes them, or on disk, from
which those that are not in memory are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moesaic.plan.cluster import Cluster
from moesaic.plan.communication import all_reduce_seconds, all_to_all_seconds, network_rate
from moesaic.plan.efficiency import INFERENCE, SPREAD, TRAINING, InferenceLosses
from moesaic.plan.layout import Layout, device_max_vio
from moesaic.plan.memory import Memory, inference_memory
from moesaic.plan.subject import Subject
from moesaic.plan.work import (
    absorbed_score_flops,
    bytes_per_weight,
    experts_visited,
    forward_work,
    kv_numbers,
    last_feed_forward,
    parameters,
)

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, kw_only=True)
class InferenceTask:
    """What is generated, apart from the model."""

    phase: Phase
    batch: int = 1
    """Texts at the same time, on the whole cluster."""
    context: int = 1024
    """Tokens of each: of the prompt in prefill, before the new token in decoding."""
    precision: str = "bfloat16"
    """Of the weights."""
    dense_precision: str = ""
    """Of those that are not routed experts; empty: the same, but bfloat16 beside mxfp4, as models are published."""
    kv_precision: str = "bfloat16"
    hit_rate: float | None = None
    """Of the expert cache, where experts are on disk; None: the cached share of them, as with random routing. Text that
    repeats its experts does better: LRU caches of 1/8 and 1/4 of them were seen to hit 0.67 and 0.81."""
    max_vio: float = 0.0

    @property
    def weight_bytes(self) -> tuple[float, float]:
        """Of a routed weight and of any other."""
        return bytes_per_weight(self.precision), bytes_per_weight(self.dense_type)

    @property
    def dense_type(self) -> str:
        return self.dense_precision or ("bfloat16" if self.precision == "mxfp4" else self.precision)


@dataclass(frozen=True, kw_only=True)
class InferenceEstimate:
    layout: Layout
    memory: Memory
    seconds: Mapping[str, float]
    """Of one step of decoding, or of the prefill of the batch."""
    tokens_per_second: float
    """Of the whole cluster."""
    seconds_per_step: float
    """Between two tokens of a text, or until the first."""
    bound: str
    experts_in: Literal["device", "host", "disk"]
    spread: float
    bytes_read: float
    """Of weights, keys and values, by one device in one step."""


def estimate_inference(
    subject: Subject, cluster: Cluster, layout: Layout, task: InferenceTask, losses: InferenceLosses | None = None,
    host_losses: InferenceLosses = INFERENCE["server"],
) -> InferenceEstimate:  # fmt: skip
    """Does not refuse what does not fit: `memory.fits` says so."""
    losses = losses or INFERENCE[cluster.device.kind]
    texts = max(1.0, task.batch / layout.replicas)
    tokens = texts * (task.context if task.phase == "prefill" else 1)
    chunk = min(tokens, 8192.0)
    memory = inference_memory(subject, layout, task.batch, task.context, chunk, cluster.device.memory,
                              *task.weight_bytes, task.kv_precision)  # fmt: skip
    place, memory, missing = _place_experts(subject, cluster, layout, memory)
    read = _bytes_read(subject, layout, task, texts, tokens)
    seconds = _compute_seconds(subject, cluster, layout, task, (losses, host_losses), texts, tokens, read, place)
    if place == "disk":
        hits = task.hit_rate if task.hit_rate is not None else 1 - missing
        seconds["disk"] = read["experts"] * (1 - hits) / cluster.disk
    seconds |= _exchange_seconds(subject, cluster, layout, tokens)
    step = sum(seconds.values())
    produced = task.batch * (task.context if task.phase == "prefill" else 1)
    return InferenceEstimate(
        layout=layout, memory=memory, seconds=seconds, tokens_per_second=produced / step, seconds_per_step=step,
        bound=_bound(seconds, memory), experts_in=place, spread=SPREAD[task.phase], bytes_read=sum(read.values()),
    )  # fmt: skip


def _place_experts(
    subject: Subject, cluster: Cluster, layout: Layout, memory: Memory
) -> tuple[Literal["device", "host", "disk"], Memory, float]:
    """Where the experts go, what the device then holds, and the share of the experts that is in no memory."""
    if memory.fits or not memory.parts["experts"]:
        return "device", memory, 0.0
    others = memory.total - memory.parts["experts"]
    room = memory.capacity - others
    if cluster.host_memory and cluster.host_memory >= memory.parts["experts"]:
        return "host", Memory({**memory.parts, "experts": 0.0}, memory.capacity), 0.0
    slot = memory.parts["experts"] / max(1, _experts(subject) / (layout.ep * layout.pp))
    if room < 2 * slot:
        return "device", memory, 0.0
    cached = room + cluster.host_memory
    return (
        "disk",
        Memory({**memory.parts, "experts": room}, memory.capacity),
        max(0.0, 1 - cached / memory.parts["experts"]),
    )


def _experts(subject: Subject) -> int:
    config = subject.config
    return config.num_moe_layers * config.moe.num_experts if config.moe else 0


def _bytes_read(subject: Subject, layout: Layout, task: InferenceTask, texts: float, tokens: float) -> dict[str, float]:
    """By one device in one step. Experts that several devices hold are visited by the tokens of all of them."""
    part, config = parameters(subject), subject.config
    weight, dense_weight = task.weight_bytes
    shared_tokens = tokens * max(1.0, layout.ep / layout.tp)
    visited = config.num_moe_layers * experts_visited(config, shared_tokens)
    if task.phase == "prefill" and config.is_moe_layer(config.num_hidden_layers - 1):
        visited -= experts_visited(config, shared_tokens) - experts_visited(config, shared_tokens / task.context)
    cut = 1 if config.mla else min(layout.tp, config.num_key_value_heads)
    cache = 0.0
    if task.phase == "decode":
        cache = texts * kv_numbers(subject, task.context) * bytes_per_weight(task.kv_precision) / cut
    return {
        "dense": dense_weight * part.always / layout.tp,
        "experts": weight * visited / max(layout.ep, 1) * part.expert,
        "keys and values": cache,
    }


def _compute_seconds(
    subject: Subject, cluster: Cluster, layout: Layout, task: InferenceTask,
    both_losses: tuple[InferenceLosses, InferenceLosses], texts: float, tokens: float, read: Mapping[str, float],
    place: str,
) -> dict[str, float]:  # fmt: skip
    """A replica's stages work one after another on the same tokens, so stages do not make a step shorter."""
    device, config = cluster.device, subject.config
    losses, host = both_losses
    part = parameters(subject)
    prefill = task.phase == "prefill"
    work = forward_work(subject, task.context / 2 if prefill else task.context)
    scores = work.scores if prefill else absorbed_score_flops(subject, task.context)
    last, skipped = last_feed_forward(subject), tokens - texts if prefill else 0.0
    dense = tokens * (work.dense + scores) - skipped * (2 * part.head + last.dense)
    experts = tokens * work.experts - skipped * last.experts
    peak = device.peak(_compute_type(task.precision, device.kind)) * losses.gemm
    seconds: dict[str, float] = {}
    reading = read["dense"] / (device.bandwidth * losses.reading(task.dense_type))
    reading += read["keys and values"] / (device.bandwidth * losses.memory)
    _add(seconds, "dense products", "reading weights", dense / (peak * layout.tp), reading)
    if place == "host":
        # A processor of our own time adds about 100 operations for each byte that it reads.
        products = experts / (cluster.host_bandwidth * 100 * host.gemm)
        _add(seconds, "experts on the host", "experts on the host", products,
             read["experts"] / (cluster.host_bandwidth * host.memory))  # fmt: skip
    else:
        imbalance = 1 + device_max_vio(layout, config, task.max_vio)
        products = experts * imbalance / (peak * layout.tp)
        reading = read["experts"] / (device.bandwidth * losses.reading(task.precision))
        _add(seconds, "expert products", "reading experts", products, reading)
    seconds["layers"] = config.num_hidden_layers * losses.layer
    return seconds


def _add(seconds: dict[str, float], busy: str, reading: str, products: float, bytes_: float) -> None:
    """Products and reading overlap; the longer one counts, under its own name."""
    name = busy if products > bytes_ else reading
    seconds[name] = seconds.get(name, 0.0) + max(products, bytes_)


def _compute_type(precision: str, kind: str) -> str:
    """What the products are made of: our CPU kernels multiply packed weights as 8-bit integers, others unpack them."""
    if precision in ("int4", "int8") and kind in ("cpu", "calibrated"):
        return "int8"
    return precision if precision in ("float32", "bfloat16", "float8") else "bfloat16"


def _exchange_seconds(subject: Subject, cluster: Cluster, layout: Layout, tokens: float) -> dict[str, float]:
    """Sums over tensor-parallel devices twice a layer, rows to experts and back, stages to the next."""
    config = subject.config
    size = 2.0 * tokens * config.hidden_size
    seconds: dict[str, float] = {}
    if layout.tp > 1:
        one = all_reduce_seconds(size, cluster, layout.tp, 1, TRAINING)
        seconds["tensor parallel"] = 2 * config.num_hidden_layers * one
    if layout.ep > layout.tp and config.moe is not None:
        top_k = config.moe.num_experts_per_tok
        one = all_to_all_seconds(size / layout.tp, top_k, top_k, cluster, layout.ep, TRAINING)
        seconds["all-to-all"] = 2 * config.num_moe_layers * one
    if layout.pp > 1:
        one = size / layout.tp / network_rate(cluster, TRAINING) + cluster.delay(cluster.count)
        seconds["pipeline transfers"] = (layout.pp - 1) * one
    return seconds


def _bound(seconds: Mapping[str, float], memory: Memory) -> str:
    if not memory.fits:
        return f"memory: {memory.largest}"
    return max(seconds, key=lambda name: seconds[name])
