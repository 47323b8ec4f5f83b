"""Seconds of one training step, part by part, and from there tokens per second, days, energy and money.

A step is micro-batches through stages of layers. On a device a layer's time is that of its products, of the memory
traffic beside them and of what it sends; stages idle while the pipeline fills and drains; at the end gradients are
summed over the copies. Imbalance of experts makes everybody wait for the fullest device.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from moesaic.checks import require
from moesaic.plan.cluster import Cluster
from moesaic.plan.communication import all_reduce_seconds, all_to_all_seconds, gather_seconds, network_rate
from moesaic.plan.efficiency import SPREAD, TRAINING, TrainingLosses
from moesaic.plan.layout import Layout, device_max_vio
from moesaic.plan.memory import Memory, training_memory
from moesaic.plan.subject import Subject
from moesaic.plan.work import bytes_per_weight, parameters, training_work

RECOMPUTED = {"none": 0.0, "selective": 0.03, "full": 1.0}
"""Share of the forward pass that is computed again."""


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """What is trained, apart from the model."""

    tokens: float
    """Of the whole run."""
    batch_tokens: float
    """Of one optimizer step."""
    sequence: int
    precision: str = "bfloat16"
    """Of the products: bfloat16 or float8 (with bfloat16 attention scores)."""
    max_vio: float = 0.0
    """(largest - mean) / mean load of an expert."""
    downtime: float = 0.0
    """Share of the time that a cluster restarts, waits or evaluates."""


@dataclass(frozen=True, kw_only=True)
class TrainingEstimate:
    """One layout of one task on one cluster."""

    layout: Layout
    memory: Memory
    seconds: Mapping[str, float]
    """Of one step, by what the device does."""
    tokens_per_second: float
    """Of the whole cluster."""
    model_flops: float
    """Of one token, forward and backward, nothing counted twice."""
    flops_per_device: float
    """Achieved, of these."""
    mfu: float
    """The same as a share of the bfloat16 peak."""
    days: float
    device_hours: float
    bound: str
    micro_batches: int
    spread: float

    @property
    def step(self) -> float:
        return sum(self.seconds.values())


def estimate_training(
    subject: Subject, cluster: Cluster, layout: Layout, task: TrainingTask, losses: TrainingLosses = TRAINING
) -> TrainingEstimate:
    """Does not refuse what does not fit: `memory.fits` says so."""
    micro_batches = _micro_batches(layout, task)
    layer = layer_seconds(subject, cluster, layout, task, losses)
    per_stage = subject.config.num_hidden_layers / layout.pp
    seconds = {name: micro_batches * per_stage * value for name, value in layer.items()}
    seconds["head"] = micro_batches * _head_seconds(subject, cluster, layout, task, losses)
    busy = sum(seconds.values())
    seconds["pipeline bubble"] = busy * (layout.pp - 1) / (micro_batches * layout.vp)
    seconds["pipeline transfers"] = _transfer_seconds(subject, cluster, layout, task, losses, micro_batches)
    seconds |= _gradient_seconds(subject, cluster, layout, losses, micro_batches, busy)
    seconds["optimizer"] = _optimizer_seconds(subject, cluster, layout, losses)
    step = sum(seconds.values())
    rate = task.batch_tokens / step * (1 - task.downtime)
    flops = 3 * training_work(subject, task.sequence).total
    per_device = flops * rate / cluster.count
    days = task.tokens / rate / 86400
    memory = training_memory(subject, layout, task.sequence, cluster.device.memory, task.precision)
    return TrainingEstimate(
        layout=layout, memory=memory, seconds=seconds, tokens_per_second=rate, model_flops=flops,
        flops_per_device=per_device, mfu=per_device / cluster.device.peak("bfloat16"), days=days,
        device_hours=days * 24 * cluster.count, bound=_bound(seconds, memory), micro_batches=micro_batches,
        spread=SPREAD["train"],
    )  # fmt: skip


def layer_seconds(
    subject: Subject, cluster: Cluster, layout: Layout, task: TrainingTask, losses: TrainingLosses
) -> dict[str, float]:
    """Forward and backward of one micro-batch through the mean layer of one stage, on one device."""
    config, device = subject.config, cluster.device
    work = training_work(subject, task.sequence)
    part = parameters(subject)
    tokens = layout.micro * task.sequence / layout.tp
    passes = 3 + RECOMPUTED[layout.recompute]
    eight_bit = task.precision == "float8" and "float8" in device.flops
    gemm = device.peak(task.precision) * losses.gemm * (losses.eight_bit if eight_bit else 1.0)
    expert_gemm = gemm * _shape_factor(config.moe.moe_intermediate_size, losses) if config.moe else gemm
    gemm *= _shape_factor(config.hidden_size / layout.tp, losses)
    layers = config.num_hidden_layers
    dense = (work.dense - 2 * part.head) / layers
    rows = _rows(subject)
    bandwidth = device.bandwidth * losses.memory
    seconds = {
        "dense products": passes * tokens * dense / gemm,
        "expert products": passes * tokens * work.experts / layers / expert_gemm,
        "attention scores": passes * tokens * work.scores / layers / (device.peak("bfloat16") * losses.scores),
        "memory traffic": passes / 3 * tokens * 2 * config.hidden_size
        * (losses.dense_traffic + losses.expert_traffic * rows) / bandwidth,
        "launches": losses.launch * passes / 3,
    }  # fmt: skip
    seconds["expert imbalance"] = seconds["expert products"] * device_max_vio(layout, config, task.max_vio)
    exchanges = 4 + (2 if layout.recompute == "full" else 0)
    if config.moe is not None:
        # Dispatch sends the type of the products, combine bfloat16.
        sent = tokens * config.hidden_size * (bytes_per_weight(task.precision) + 2) / 2
        nodes = config.moe.topk_group if config.moe.n_group > 1 else config.moe.num_experts_per_tok
        one = all_to_all_seconds(sent, config.moe.num_experts_per_tok, nodes, cluster, layout.ep, losses)
        seconds["all-to-all"] = losses.exposed * exchanges * one * config.num_moe_layers / layers
    activations = layout.micro * task.sequence * config.hidden_size * 2
    # Sequence parallel: a gather and a scatter around attention and around the feed-forward part, each way.
    both = 2 if config.moe is None or layout.ep == 1 else 1
    seconds["tensor parallel"] = (
        passes / 3 * 4 * both * gather_seconds(activations, cluster, layout.tp, 1, losses) * losses.exposed
    )
    return seconds


def _shape_factor(width: float, losses: TrainingLosses) -> float:
    """Narrow matrices keep fewer units busy: half of the efficiency at `half_width`."""
    return width / (width + losses.half_width)


@lru_cache(maxsize=256)
def _rows(subject: Subject) -> float:
    """Rows that a token becomes, the mean over layers."""
    config = subject.config
    if config.moe is None:
        return 0.0
    return config.moe.num_experts_per_tok * config.num_moe_layers / config.num_hidden_layers


def _micro_batches(layout: Layout, task: TrainingTask) -> int:
    sequences = task.batch_tokens / task.sequence
    count = round(sequences / (layout.replicas * layout.micro))
    require(
        count >= 1,
        f"a batch of {task.batch_tokens:,.0f} tokens is {sequences:,.0f} sequences of {task.sequence:,}, too few for "
        f"{layout.replicas} replicas; raise --batch-tokens to {layout.replicas * layout.micro * task.sequence:,}",
    )
    return count


def _head_seconds(
    subject: Subject, cluster: Cluster, layout: Layout, task: TrainingTask, losses: TrainingLosses
) -> float:
    """Of the last stage, which the others wait for."""
    config = subject.config
    tokens = layout.micro * task.sequence / layout.tp
    products = 6 * config.vocab_size * config.hidden_size / (cluster.device.peak("bfloat16") * losses.gemm)
    logits = 12 * config.vocab_size / (cluster.device.bandwidth * losses.memory)
    # Stages are cut so that the last one has fewer layers, as far as there are layers to cut.
    spread = 1.0 if layout.pp == 1 else 1.0 / min(layout.pp, config.num_hidden_layers / layout.pp)
    return tokens * (products + logits) * spread


def _transfer_seconds(
    subject: Subject, cluster: Cluster, layout: Layout, task: TrainingTask, losses: TrainingLosses, micro_batches: int
) -> float:
    """Activations to the next stage and gradients back; of many micro-batches most is hidden."""
    if layout.pp == 1:
        return 0.0
    size = layout.micro * task.sequence * subject.config.hidden_size * 2 / layout.tp
    one = size / network_rate(cluster, losses) + cluster.delay(cluster.count)
    return 2 * one * layout.vp * micro_batches * 0.2


def _gradient_seconds(
    subject: Subject, cluster: Cluster, layout: Layout, losses: TrainingLosses, micro_batches: int, busy: float
) -> dict[str, float]:
    """Summing over copies and sharing the updated weights, hidden behind the last micro-batch's backward pass; with
    FSDP weights are also gathered for every micro-batch."""
    part, config = parameters(subject), subject.config
    dense = part.not_routed / (layout.pp * layout.tp)
    routed = part.routed / (layout.pp * layout.ep) if config.moe else 0.0
    group, copies = layout.replicas, layout.expert_copies if config.moe else 1
    stride, expert_stride = layout.tp, layout.ep
    summed = 1.5 * all_reduce_seconds(2 * dense, cluster, group, stride, losses)
    summed += 1.5 * all_reduce_seconds(2 * routed, cluster, copies, expert_stride, losses)
    hidden = busy / micro_batches * 0.6
    seconds = {"gradient sums": max(0.0, summed - hidden)}
    if layout.fsdp > 1:
        gathered = gather_seconds(2 * dense, cluster, layout.fsdp, stride, losses)
        gathered += gather_seconds(2 * routed, cluster, min(layout.fsdp, copies), expert_stride, losses)
        seconds["weight gathers"] = max(0.0, 2 * micro_batches * gathered - 0.8 * busy)
    return seconds


def _optimizer_seconds(subject: Subject, cluster: Cluster, layout: Layout, losses: TrainingLosses) -> float:
    """Reading and writing the state that a device updates."""
    part = parameters(subject)
    own = part.not_routed / (layout.pp * layout.tp * layout.replicas)
    if part.routed:
        own += part.routed / (layout.pp * layout.ep * max(1, layout.expert_copies))
    return 34 * own / (cluster.device.bandwidth * losses.memory)


def _bound(seconds: Mapping[str, float], memory: Memory) -> str:
    """What to change first."""
    if not memory.fits:
        return f"memory: {memory.largest}"
    groups = {
        "compute": ("dense products", "expert products", "attention scores", "head"),
        "memory traffic": ("memory traffic", "optimizer"),
        "launches": ("launches",),
        "all-to-all": ("all-to-all",),
        "tensor parallel": ("tensor parallel",),
        "pipeline": ("pipeline bubble", "pipeline transfers"),
        "gradient sums": ("gradient sums", "weight gathers"),
        "expert imbalance": ("expert imbalance",),
    }
    sums = {name: sum(seconds.get(kind, 0.0) for kind in kinds) for name, kinds in groups.items()}
    return max(sums, key=lambda name: sums[name])
