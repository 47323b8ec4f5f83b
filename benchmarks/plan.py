"""Predictions of `moesaic plan` beside published speeds of training and decoding.

Ratios are predicted to published, so that 1 is best. Every other row was used to fit the constants of
plan/efficiency.py; the others judge them. `--fit` finds the constants anew and prints them; nothing is written.
`--here` also measures this machine, predicts our own kernels from that, and runs them.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from common import Row, note, run_benchmark
from planning.decode_systems import DECODE_SYSTEMS, DecodeSystem
from planning.training_systems import OTHER_MODELS, TRAINING_SYSTEMS, TrainingSystem

from moesaic.config import ModelConfig
from moesaic.config_io import from_mapping
from moesaic.plan.cluster import Cluster, parse_cluster
from moesaic.plan.efficiency import INFERENCE, TRAINING, InferenceLosses, TrainingLosses
from moesaic.plan.hardware import Class
from moesaic.plan.inference import InferenceTask, estimate_inference
from moesaic.plan.layout import Layout, check_layout, parse_layout
from moesaic.plan.search import training_options
from moesaic.plan.subject import Subject, find_subject
from moesaic.plan.training import TrainingTask, estimate_training

MEDIAN_GOAL, WORST_GOAL = 0.15, 0.40
HERE_GOAL = 0.20
"""Error of predictions from this machine's measured limits."""
TRAINING_NAMES = ("gemm", "half_width", "dense_traffic", "expert_traffic", "exposed", "eight_bit", "goodput", "scores",
                  "launch")  # fmt: skip
INFERENCE_NAMES = ("memory", "unpacking", "layer")
FITTED_KINDS: tuple[Class, ...] = ("geforce", "apple", "unified", "server")
PULL = 0.01
"""What a constant that is e times its first value costs, beside the mean error: where rows say little it stays."""


@dataclass(frozen=True)
class TrainingCase:
    system: TrainingSystem
    subject: Subject
    cluster: Cluster
    layout: Layout
    task: TrainingTask

    def ratio(self, losses: TrainingLosses) -> float:
        found = estimate_training(self.subject, self.cluster, self.layout, self.task, losses)
        goodput = losses.goodput if self.system.whole_run else 1.0
        return found.tokens_per_second / self.cluster.count * goodput / self.system.tokens_per_device


@dataclass(frozen=True)
class DecodeCase:
    system: DecodeSystem
    subject: Subject
    cluster: Cluster
    task: InferenceTask

    @property
    def kind(self) -> Class:
        return "server" if self.cluster.host_memory else self.cluster.device.kind

    def ratio(self, losses: Mapping[Class, InferenceLosses]) -> float:
        own = losses[self.cluster.device.kind]
        found = estimate_inference(self.subject, self.cluster, Layout(), self.task, own, losses["server"])
        return found.tokens_per_second / self.system.tokens_per_second


def measure(arguments: argparse.Namespace) -> list[Row]:
    training = [_training_case(system) for system in TRAINING_SYSTEMS]
    decoding = [_decode_case(system) for system in DECODE_SYSTEMS]
    if arguments.fit:
        _fit(training, decoding)
    trained = [case.ratio(TRAINING) for case in training]
    decoded = [case.ratio(INFERENCE) for case in decoding]
    for case, ratio in (*zip(training, trained, strict=True), *zip(decoding, decoded, strict=True)):
        if abs(ratio - 1) > WORST_GOAL:
            note(f"{case.system.name} is {ratio - 1:+.0%} off: {case.system.reason or 'no reason is known'}")
    rows = [
        _row(case.system.name, case.system.source, case.system.tokens_per_device, ratio, index, "tokens/s a device")
        for index, (case, ratio) in enumerate(zip(training, trained, strict=True))
    ]
    rows += [
        _row(case.system.name, case.system.source, case.system.tokens_per_second, ratio, index, "tokens/s")
        for index, (case, ratio) in enumerate(zip(decoding, decoded, strict=True))
    ]
    if arguments.here:
        rows += _here()
    return rows + _summary(trained, decoded)


def _here() -> list[Row]:
    from planning.here import measure_here

    return [
        Row(
            work=one.work, unit="tokens/s", ours=one.predicted, peer=one.measured, peer_name="measured",
            ratio=one.predicted / one.measured, goal=HERE_GOAL, met=abs(one.predicted / one.measured - 1) <= HERE_GOAL,
        )
        for one in measure_here()
    ]  # fmt: skip


def _training_case(system: TrainingSystem) -> TrainingCase:
    other = OTHER_MODELS.get(system.model)
    subject = find_subject(system.model) if other is None else Subject(
        name=system.model, config=from_mapping(ModelConfig, other)
    )  # fmt: skip
    cluster = parse_cluster(system.cluster)
    task = TrainingTask(tokens=1e12, batch_tokens=system.batch_tokens, sequence=system.sequence,
                        precision=system.precision)  # fmt: skip
    if system.layout:
        layout = parse_layout(system.layout, cluster.count)
        check_layout(layout, subject.config, cluster.count)
    else:
        layout = training_options(subject, cluster, task)[0].estimate.layout
    return TrainingCase(system, subject, cluster, layout, task)


def _decode_case(system: DecodeSystem) -> DecodeCase:
    task = InferenceTask(phase="decode", context=system.context, precision=system.precision,
                         dense_precision=system.dense_precision)  # fmt: skip
    return DecodeCase(system, find_subject(system.model), parse_cluster(system.cluster), task)


def _half(index: int) -> str:
    return "judge" if index % 2 else "fit"


def _row(name: str, source: str, published: float, ratio: float, index: int, unit: str) -> Row:
    return Row(
        work=f"{name} ({_half(index)})", unit=unit, ours=published * ratio, peer=published, peer_name=source,
        ratio=ratio,
    )  # fmt: skip


def _summary(trained: Sequence[float], decoded: Sequence[float]) -> list[Row]:
    """Median errors of both halves, and how many judged rows are further off than the second goal."""
    rows = []
    for what, ratios in (("training", trained), ("decoding", decoded), ("all", (*trained, *decoded))):
        parts = (trained, decoded) if what == "all" else (ratios,)
        for half in ("fit", "judge"):
            errors = [abs(ratio - 1) for part in parts for i, ratio in enumerate(part) if _half(i) == half]
            median = statistics.median(errors)
            goal = MEDIAN_GOAL if half == "judge" else None
            rows.append(
                Row(work=f"{what}: median error of {len(errors)} rows ({half})", unit="share", ours=median, goal=goal,
                    met=None if goal is None else median <= goal)
            )  # fmt: skip
    far = [ratio for ratio in (*trained, *decoded) if abs(ratio - 1) > WORST_GOAL]
    rows.append(Row(work=f"rows more than {WORST_GOAL:.0%} off", unit="rows", ours=float(len(far))))
    return rows


def _fit(training: Sequence[TrainingCase], decoding: Sequence[DecodeCase]) -> None:
    """Prints what fits the first half best; plan/efficiency.py is edited by hand."""
    fitted = [case for index, case in enumerate(training) if _half(index) == "fit"]
    best = _descend(
        {name: getattr(TRAINING, name) for name in TRAINING_NAMES},
        lambda values: _mean_error([case.ratio(replace(TRAINING, **values)) for case in fitted]),
    )
    note("training: " + ", ".join(f"{name} = {value:.4g}" for name, value in best.items()))
    for kind in FITTED_KINDS:
        cases = [case for index, case in enumerate(decoding) if _half(index) == "fit" and case.kind == kind]
        names = ("memory",) if kind == "server" else INFERENCE_NAMES

        def error(values: Mapping[str, float], kind: Class = kind, cases: Sequence[DecodeCase] = cases) -> float:
            losses: dict[Class, InferenceLosses] = {**INFERENCE, kind: replace(INFERENCE[kind], **values)}
            return _mean_error([case.ratio(losses) for case in cases])

        best = _descend({name: getattr(INFERENCE[kind], name) for name in names}, error)
        note(f"{kind}: " + ", ".join(f"{name} = {value:.4g}" for name, value in best.items()))


def _mean_error(ratios: Sequence[float]) -> float:
    """Of logarithms; one row that is far off counts as a factor of two."""
    return statistics.mean(min(abs(math.log(ratio)), math.log(2)) for ratio in ratios)


def _descend(first: Mapping[str, float], error: Callable[[Mapping[str, float]], float]) -> dict[str, float]:
    """One constant after another is moved by smaller and smaller factors while that helps."""

    def cost(values: Mapping[str, float]) -> float:
        pull = statistics.mean(math.log(values[name] / first[name]) ** 2 for name in first)
        above = sum(max(0.0, values[name] - 1) for name in ("memory", "unpacking", "gemm") if name in values)
        return error(values) + PULL * pull + 10 * above

    values = dict(first)
    best = cost(values)
    for factor in (1.3, 1.1, 1.03, 1.01):
        moved = True
        while moved:
            moved = False
            for name in values:
                for step in (factor, 1 / factor):
                    tried = {**values, name: values[name] * step}
                    if (found := cost(tried)) < best - 1e-6:
                        values, best, moved = tried, found, True
    return values


if __name__ == "__main__":
    run_benchmark(
        __doc__ or "",
        measure,
        ("--fit", {"action": "store_true", "help": "find the constants anew, and print them"}),
        ("--here", {"action": "store_true", "help": "also measure this machine and run our kernels on it"}),
    )
