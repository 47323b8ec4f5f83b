"""`moesaic plan`: does it fit, how fast, how much, and in which layout."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.console import Console

from moesaic.cli.options import JsonFlag
from moesaic.errors import UsageError

if TYPE_CHECKING:
    from moesaic.plan.cluster import Cluster
    from moesaic.plan.report import Plan, Task
    from moesaic.plan.subject import Subject

_MOST_TOKENS = 1e18
_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
Phase = Literal["train", "prefill", "decode"]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What the model is to do."""

    phase: Phase | None = None
    "train, prefill or decode; without it train where --train-tokens is given, else decode."
    train_tokens: str | None = None
    "Tokens of a training run, such as 15T or 300B."
    batch_tokens: str = "4M"
    "Tokens of an optimizer step."
    sequence: int = 4096
    "Tokens of a training sequence."
    batch: int = 1
    "Texts at the same time, in prefill and decode."
    context: int = 1024
    "Tokens of the prompt, or before the token that is decoded."
    precision: str | None = None
    "Of weights (bfloat16, float8, int8, int4, mxfp4, q4_k_m, …), or of training's products (bfloat16, float8)."
    dense_precision: str = ""
    "Of weights outside of routed experts, where it is another; beside mxfp4 it is bfloat16."
    kv_precision: str = "bfloat16"
    "Of keys and values."
    max_vio: str = "0"
    "Imbalance of experts: (largest - mean) / mean load; or the trace of the model by moesaic inspect --trace."
    hit_rate: float | None = None
    "Of the expert cache where experts are on disk; without it the cached share."

    def one(self, subject: "Subject") -> "Task":
        phase: Phase = self.phase or ("train" if self.train_tokens else "decode")
        self._check(phase)
        return self._task(phase, subject.stored_as, self._max_vio(subject))

    def compared(self) -> "list[Task]":
        """What a comparison looks at: the phase asked for, or prefill, decode, and training with --train-tokens. Both
        models in one precision."""
        phases: list[Phase] = ["prefill", "decode", *(["train"] if self.train_tokens else [])]
        phases = phases if self.phase is None else [self.phase]
        self._check("train" if self.phase is None and self.train_tokens else phases[0])
        max_vio = self._max_vio(None)
        return [self._task(phase, "bfloat16", max_vio) for phase in phases]

    def _task(self, phase: Phase, stored_as: str, max_vio: float) -> "Task":
        return self._training(max_vio) if phase == "train" else self._inference(phase, stored_as, max_vio)

    def _max_vio(self, subject: "Subject | None") -> float:
        """Given as a number, or the mean over layers of a trace of `subject`."""
        try:
            max_vio = float(self.max_vio)
        except ValueError:
            return self._recorded_max_vio(subject)
        if not 0 <= max_vio <= 1e4:
            raise UsageError(f"--max-vio is {self.max_vio}; it must be 0 (even loads) or more, and at most 10,000")
        return max_vio

    def _recorded_max_vio(self, subject: "Subject | None") -> float:
        if subject is None:
            raise UsageError(f"--max-vio {self.max_vio}: a trace is of one model; with --against give a number")
        moe = subject.config.moe
        if moe is None:
            raise UsageError(f"--max-vio {self.max_vio}: {subject.name} has no experts; leave --max-vio out")
        if not Path(self.max_vio).exists():
            raise UsageError(
                f"--max-vio {self.max_vio} is neither a number nor a trace; write one like 0.5, or record a trace: "
                "moesaic inspect MODEL --data FILE --trace DIR"
            )
        from moesaic.residency.placement import read_uses

        uses_LE = read_uses(self.max_vio, subject.config.num_moe_layers, moe.num_experts)
        return float((uses_LE.max(1) * moe.num_experts - 1).mean())

    def _training(self, max_vio: float) -> "Task":
        from moesaic.plan.training import TrainingTask

        precision = self.precision or "bfloat16"
        if precision not in ("bfloat16", "float8"):
            raise UsageError(f"--precision is {precision}; training computes in bfloat16 or float8")
        return TrainingTask(
            tokens=parse_count(self.train_tokens or "1T", "--train-tokens"),
            batch_tokens=parse_count(self.batch_tokens, "--batch-tokens"),
            sequence=self.sequence,
            precision=precision,
            max_vio=max_vio,
        )

    def _inference(self, phase: Literal["prefill", "decode"], stored_as: str, max_vio: float) -> "Task":
        from moesaic.plan.inference import InferenceTask
        from moesaic.plan.work import bytes_per_weight

        task = InferenceTask(
            phase=phase,
            batch=self.batch,
            context=self.context,
            precision=self.precision or stored_as,
            dense_precision=self.dense_precision,
            kv_precision=self.kv_precision,
            hit_rate=self.hit_rate,
            max_vio=max_vio,
        )
        for precision in (task.precision, task.dense_type, task.kv_precision):
            bytes_per_weight(precision)
        return task

    def _check(self, phase: Phase) -> None:
        for flag in ("sequence", "batch", "context"):
            value = getattr(self, flag)
            if not 0 < value <= 100_000_000:
                raise UsageError(f"--{flag} is {value}; it must lie between 1 and 100,000,000")
        if self.hit_rate is not None and not 0 <= self.hit_rate <= 1:
            raise UsageError(f"--hit-rate is {self.hit_rate}; it must lie between 0 and 1")
        if self.train_tokens and phase != "train":
            raise UsageError(f"--train-tokens does not go with --phase {phase}; leave one of them out")


_TASK = TaskOptions()


def plan(
    model: str = "",
    /,
    *,
    cluster: str = "8xH100",
    task: TaskOptions = _TASK,
    parallel: str | None = None,
    against: str | None = None,
    calibrate: Annotated[bool, Parameter(negative="")] = False,
    html: Path | None = None,
    json_output: JsonFlag = False,
) -> None:
    """Predict what MODEL costs on a cluster, from its config alone.

    Parameters
    ----------
    model
        A preset such as mixtral-8x7b, a config.json, a Hugging Face or run directory, or a run's TOML file.
    cluster
        Such as 8xH100, 256xH800:ib400, laptop:32GiB:ddr5, 1xRTX-4090:host256GiB:ddr5x8, or a TOML file.
    parallel
        Such as ep=8,tp=2,pp=4; without it layouts are searched.
    against
        A second model, for a comparison on the same cluster.
    calibrate
        Measure this machine and plan for it; without MODEL print the measurement as a cluster file.
    html
        Write a page with the roofline and the timeline of a simulated step.
    json_output
        One JSON object with parameters, bytes and options.
    """
    from moesaic.plan.cluster import parse_cluster
    from moesaic.plan.layout import parse_layout
    from moesaic.plan.report import make_plan, to_json
    from moesaic.plan.subject import find_subject
    from moesaic.plan.table import render

    if calibrate and not model:
        _print_calibration(json_output)
        return
    if not model:
        raise UsageError("name a model: a preset such as mixtral-8x7b, a directory, or a config.json")
    subject = find_subject(model)
    machines = _this_machine() if calibrate else parse_cluster(cluster)
    if against is not None:
        _compare(model, against, machines, task, (parallel, html), json_output)
        return
    layout = None if parallel is None else parse_layout(parallel, machines.count)
    found = make_plan(subject, machines, task.one(subject), layout)
    if not _is_first_rank():
        return
    if html is not None:
        _write_page(html, found)
    if json_output:
        print(json.dumps(to_json(found)))
        return
    Console().print(render(found))


def _is_first_rank() -> bool:
    """Under torchrun all measure, and one speaks."""
    return os.environ.get("RANK", "0") == "0"


def _compare(
    model: str,
    against: str,
    machines: "Cluster",
    task: TaskOptions,
    refused: tuple[str | None, Path | None],
    json_output: bool,
) -> None:
    from moesaic.plan.comparison import compare, render, to_json
    from moesaic.plan.subject import find_subject

    if any(one is not None for one in refused):
        raise UsageError("--against takes each model's fastest layout and writes no page; leave out --parallel, --html")
    found = compare(find_subject(model), find_subject(against), machines, task.compared())
    if not _is_first_rank():
        return
    if json_output:
        print(json.dumps(to_json(found)))
        return
    Console().print(render(found))


def _this_machine() -> "Cluster":
    from moesaic.plan.calibrate import calibrate, calibrated_cluster

    return calibrated_cluster(calibrate())


def _print_calibration(json_output: bool) -> None:
    from moesaic.plan.calibrate import calibrate, to_toml

    found = calibrate()
    if not _is_first_rank():
        return
    print(json.dumps(vars(found)) if json_output else to_toml(found))


def _write_page(path: Path, found: "Plan") -> None:
    from moesaic.plan.html_page import render_page

    try:
        path.write_text(render_page(found), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write the page {path}: {error.strerror}") from error
    Console(stderr=True).print(f"wrote {path}", highlight=False, soft_wrap=True)


def parse_count(text: str, flag: str) -> float:
    """15T, 300B, 1.5e12. Raises UsageError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?(?:e\d{1,2})?)\s*([kmbgt]?)\s*", text.lower())
    if match is None or not float(match[1]):
        raise UsageError(f"{flag} {text!r} is not a number of tokens; write it like 15T, 300B or 4M")
    count = float(match[1]) * _COUNTS[match[2]]
    if not 1 <= count <= _MOST_TOKENS:
        raise UsageError(f"{flag} {text!r} is not between 1 and {_MOST_TOKENS:.0e} tokens; write 15T, 300B or 4M")
    return count
