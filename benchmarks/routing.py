"""The routing study: which way to route and to balance ends lowest at equal work per token, and how even its load is.

Every contestant has the demo's attention, optimizer, schedule and tokens in the same order, and the dense twin's active
parameters and FLOPs per token within 2 %. All sparse ones hold equally many expert parameters, and the weights of a
token's experts start so that their sum has the scale of the dense twin's output. Contestants take turns within a seed.
A race that is finished is kept in --scratch, and not run again when the study is started anew.
"""

import argparse
import datetime
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import Estimate, Row, commit, hardware, note, positive, run_benchmark
from rich.console import Console

from moesaic.accounting import count_parameters, training_flops_per_token
from moesaic.config import BalanceConfig, CheckpointConfig, MoEConfig, TrainConfig
from moesaic.config_io import to_mapping
from moesaic.recipes import demo_config
from moesaic.train.metrics import read_metrics
from moesaic.train.run import run_training
from moesaic.train.screen import Screen

MARGIN = 0.02
"""Nats per token that count as no difference where a contestant is to be no worse."""
COLLAPSE = 0.5
"""A router has collapsed when one expert of some layer gets this share of all tokens; evenly it would be K / E."""
LAST_PART = 0.1
"""Of the training steps, over which the MaxVio of a batch is averaged."""
EVALUATION_TOKENS = 131_072
MICRO_BATCHES = 4
"""Per optimizer step, wherever the Switch loss balances."""
LOSS_FREE_PAIRS = (("loss-free", "switch-sigmoid"), ("quantile", "switch"), ("loss-free", "switch"))
"""A bias and a loss that balance; the first two pairs score alike, as the published comparison does."""

UNBALANCED = BalanceConfig()


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to route; `moe` None is the dense twin."""

    what: str
    moe: MoEConfig | None = None
    balance: BalanceConfig = UNBALANCED
    micro_batches: int = 1
    looks_ahead: bool = False

    def config(self, *, minutes: float, seed: int, source: str) -> TrainConfig:
        base = demo_config("sparse" if self.moe else "dense", minutes=minutes, seed=seed, source=source)
        return replace(
            base,
            model=replace(base.model, moe=self.moe),
            balance=self.balance,
            micro_batch_size=base.batch_size // self.micro_batches,
            checkpoint=CheckpointConfig(save_every=base.steps, keep=1),
            evaluate_every=0,
            evaluation_tokens=EVALUATION_TOKENS,
        )


def _with_switch_loss(what: str, moe: MoEConfig, *, scope: str = "micro_batch") -> Contestant:
    balance = BalanceConfig(aux_loss_coef=0.01, aux_loss_scope=scope)  # type: ignore[arg-type]
    return Contestant(what=what, moe=moe, balance=balance, micro_batches=MICRO_BATCHES)


def _experts(num_experts: int, top_k: int, width: int, **changes: object) -> MoEConfig:
    fields = {"router": "softmax_topk", "routed_scaling_factor": float(top_k), **changes}
    return MoEConfig(num_experts=num_experts, num_experts_per_tok=top_k, moe_intermediate_size=width, **fields)  # type: ignore[arg-type]


# 256 units work for every token: 4 x 64, 2 x 128, 1 x 256 or 8 x 32. Where the router has fewer experts to score than
# the 32 of the demo, its work goes to the experts as a few more units, and where it has more, the shared expert pays.
CONTESTANTS = {
    "dense": Contestant(what="dense twin"),
    "unbalanced": Contestant(what="4 of 32, softmax, nothing balances", moe=_experts(32, 4, 64)),
    "switch": _with_switch_loss("the same, Switch loss within each of 4 micro-batches", _experts(32, 4, 64)),
    "global": _with_switch_loss("the same, Switch loss over the batch", _experts(32, 4, 64), scope="global_batch"),
    "switch-sigmoid": _with_switch_loss(
        "4 of 32, sigmoid, Switch loss within each of 4 micro-batches",
        _experts(32, 4, 64, router="sigmoid_topk", expert_bias=False),
    ),
    "loss-free": Contestant(
        what="4 of 32, sigmoid, loss-free bias",
        moe=_experts(32, 4, 64, router="sigmoid_topk"),
        balance=BalanceConfig(bias_update_rate=0.01),
    ),
    "quantile": Contestant(
        what="4 of 32, softmax, loss-free bias by the quantile rule",
        moe=_experts(32, 4, 64, expert_bias=True),
        balance=BalanceConfig(bias_update_rate=0.5, bias_update_rule="quantile"),
    ),
    "hash": Contestant(what="4 of 32, by token id", moe=_experts(32, 4, 64, router="hash")),
    "expert-choice": Contestant(
        what="32 experts choose tokens, 4 each on average",
        moe=_experts(32, 4, 64, router="expert_choice", routed_scaling_factor=32.0),
        looks_ahead=True,
    ),
    "fine-shared": _with_switch_loss(
        "6 of 62 of half the width, and a shared expert of twice that, Switch loss",
        _experts(62, 6, 32, shared_expert_intermediate_size=54),
    ),
    "gshard-layer": _with_switch_loss("2 of 16 of twice the width, Switch loss", _experts(16, 2, 132)),
    "switch-layer": _with_switch_loss(
        "1 of 8 of four times the width, Switch loss",
        _experts(8, 1, 264, norm_topk_prob=False, routed_scaling_factor=8.0),
    ),
    "hash-layer": Contestant(
        what="1 of 8 of four times the width, by token id", moe=_experts(8, 1, 268, router="hash")
    ),
}


@dataclass(frozen=True)
class Result:
    """What one race ended with; None where a dense model has no such thing."""

    val_loss: float
    max_vio: float | None
    """Over the validation text."""
    max_vio_batch: float | None
    busiest: float | None
    """Share of the tokens that visit the busiest expert of any layer."""
    dead_experts: int | None
    """In the validation text, over all layers."""
    seconds: float


Races = dict[str, list[Result]]
"""Results by contestant, in the order of the seeds."""


@dataclass(frozen=True)
class Direction:
    """Something published, and whether it shows here."""

    claim: str
    value: float
    found: str
    verdict: str
    """yes, no or unclear."""


def measure(arguments: argparse.Namespace) -> list[Row]:
    seeds = range(1 if arguments.quick else arguments.seeds)
    if arguments.quick:
        arguments.minutes = 0.06
    names = _chosen(arguments.only)
    corpora = {"standard library": "stdlib", **({"text": arguments.text} if arguments.text else {})}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(arguments.scratch or temporary)
        races = {
            corpus: _all_races(scratch, corpus, source, names, seeds, arguments.minutes)
            for corpus, source in corpora.items()
        }
    directions = {corpus: judge(results) for corpus, results in races.items()}
    if arguments.record:
        Path(arguments.record).write_text(_record(races, directions, arguments), encoding="utf-8")
    return [row for corpus in races for row in _rows(corpus, races[corpus], directions[corpus])]


def _chosen(only: str) -> list[str]:
    names = only.split(",") if only else list(CONTESTANTS)
    for name in names:
        if name not in CONTESTANTS:
            raise SystemExit(f"unknown contestant '{name}'; there are {', '.join(CONTESTANTS)}")
    return names


def _all_races(
    scratch: Path, corpus: str, source: str, names: Sequence[str], seeds: Sequence[int], minutes: float
) -> Races:
    """Each seed starts with another contestant, so that a machine whose speed drifts favours none."""
    races: Races = {name: [] for name in names}
    for seed in seeds:
        start = seed % len(names)
        for name in (*names[start:], *names[:start]):
            config = CONTESTANTS[name].config(minutes=minutes, seed=seed, source=source)
            result = _race(scratch, corpus, f"{name}-{seed}", config)
            races[name].append(result)
            vio = "" if result.max_vio is None else f", MaxVio {result.max_vio:.2f}, busiest {result.busiest:.3f}"
            note(f"{corpus}, {name}, seed {seed}: {result.val_loss:.4f}{vio} ({result.seconds:.0f} s)")
    return races


def _race(scratch: Path, corpus: str, name: str, config: TrainConfig) -> Result:
    """Train, or take what an earlier start of the study found with this very config."""
    fingerprint = hashlib.sha256(json.dumps(to_mapping(config), sort_keys=True).encode()).hexdigest()[:16]
    folder = scratch / corpus.replace(" ", "-")
    kept = folder / "results" / f"{name}-{fingerprint}.json"
    if kept.exists():
        return Result(**json.loads(kept.read_text()))
    run = folder / "running" / name
    shutil.rmtree(run, ignore_errors=True)  # what a start that was stopped left behind
    screen = Screen(Console(quiet=True), live=False)
    if run_training(config, run, screen, data_directory=folder / "data").stop_requested:
        raise SystemExit("stopped; the finished races are kept in --scratch, and this one starts anew")
    result = _result(config, read_metrics(run / "metrics.jsonl"))
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(result)))
    os.replace(partial, kept)
    shutil.rmtree(run)
    return result


def _result(config: TrainConfig, rows: Sequence[dict[str, Any]]) -> Result:
    training = [row for row in rows if row["kind"] == "train"]
    last = next(row for row in reversed(rows) if row["kind"] == "eval")
    if last["val_loss"] is None:
        raise SystemExit("a race ended with a loss that is not finite, so there is nothing to compare")
    moe = config.model.moe
    if moe is None:
        return Result(last["val_loss"], None, None, None, None, last["seconds"])
    final = training[-max(1, round(LAST_PART * len(training))) :]
    return Result(
        val_loss=last["val_loss"],
        max_vio=last["max_vio"],
        max_vio_batch=statistics.mean(row["max_vio"] for row in final),
        busiest=moe.num_experts_per_tok * max(max(shares) for shares in last["load"]),
        dead_experts=last["dead_experts"],
        seconds=last["seconds"],
    )


def judge(races: Races) -> list[Direction]:
    """The published directions that the contestants at hand can show."""
    directions = []
    for free, with_loss in LOSS_FREE_PAIRS:
        if {free, with_loss} <= races.keys():
            directions.append(_much_evener(races, free, with_loss))
            directions.append(_compared(races, free, with_loss, "is no worse than", MARGIN))
    if "unbalanced" in races:
        directions.append(_collapse(races["unbalanced"]))
    balanced = [name for name in races if name not in ("dense", "unbalanced") and not CONTESTANTS[name].looks_ahead]
    if "dense" in races:
        directions += [_compared(races, name, "dense", "is below") for name in balanced]
    if {"global", "switch"} <= races.keys():
        directions.append(_compared(races, "global", "switch", "is no worse than", MARGIN))
    for lower, higher in (
        ("switch", "hash"),
        ("switch-layer", "hash-layer"),
        ("fine-shared", "switch-layer"),
        ("fine-shared", "gshard-layer"),
    ):
        if {lower, higher} <= races.keys():
            directions.append(_compared(races, lower, higher, "is below"))
    return directions


def paired(races: Races, name: str, other: str) -> Estimate:
    """Validation loss of `name` minus that of `other`, seed by seed."""
    return Estimate.of([a.val_loss - b.val_loss for a, b in zip(races[name], races[other], strict=True)])


def _compared(races: Races, name: str, other: str, relation: str, margin: float = 0.0) -> Direction:
    """Whether the loss of `name` is surely at most `margin` above that of `other`."""
    difference = paired(races, name, other)
    verdict = "unclear"
    if difference.mean + difference.half < margin:
        verdict = "yes"
    elif difference.mean - difference.half > 0:
        verdict = "no"
    return Direction(f"{name} {relation} {other}", difference.mean, f"{difference} nats per token", verdict)


def _much_evener(races: Races, name: str, other: str) -> Direction:
    pairs = [(a.max_vio or 0.0, b.max_vio or 0.0) for a, b in zip(races[name], races[other], strict=True)]
    found = ", ".join(f"{ours:.2f} against {theirs:.2f}" for ours, theirs in pairs)
    ratio = sum(ours for ours, _ in pairs) / max(1e-9, sum(theirs for _, theirs in pairs))
    verdict = _unanimous([3 * ours <= theirs for ours, theirs in pairs])
    return Direction(f"global MaxVio of {name} is at most a third of {other}'s", ratio, found, verdict)


def _collapse(results: Sequence[Result]) -> Direction:
    shares = [result.busiest or 0.0 for result in results]
    found = f"the busiest expert gets {', '.join(f'{share:.3f}' for share in shares)} of the tokens"
    verdict = _unanimous([share >= COLLAPSE for share in shares])
    return Direction("without balancing the router collapses", statistics.mean(shares), found, verdict)


def _unanimous(answers: Sequence[bool]) -> str:
    return "yes" if all(answers) else "unclear" if any(answers) else "no"


def _rows(corpus: str, races: Races, directions: Sequence[Direction]) -> list[Row]:
    rows = []
    dense = statistics.mean(result.val_loss for result in races["dense"]) if "dense" in races else None
    for name, results in races.items():
        loss = Estimate.of([result.val_loss for result in results])
        rows.append(
            Row(
                work=f"{corpus}, {name}{_mark(name)}: validation loss {loss}",
                unit="nats per token",
                ours=loss.mean,
                peer=dense,
                peer_name="dense twin",
                ratio=dense / loss.mean if dense else None,
            )
        )
        if name != "dense":
            vio = statistics.mean(result.max_vio or 0.0 for result in results)
            rows.append(Row(work=f"{corpus}, {name}: global MaxVio (less is better)", unit="mean loads", ours=vio))
    for direction in directions:
        met = {"yes": True, "no": False}.get(direction.verdict)
        work = f"{corpus}: {direction.claim}? {direction.found}: {direction.verdict}"
        rows.append(Row(work=work, unit="see work", ours=direction.value, met=met))
    return rows


def _mark(name: str) -> str:
    return " (looks ahead: not comparable)" if CONTESTANTS[name].looks_ahead else ""


def _record(races: dict[str, Races], directions: dict[str, list[Direction]], arguments: argparse.Namespace) -> str:
    """The study as a page of benchmarks/results, to which a person adds what it says."""
    names = list(next(iter(races.values())))
    configs = [CONTESTANTS[name].config(minutes=arguments.minutes, seed=0, source="stdlib") for name in names]
    seeds = len(next(iter(next(iter(races.values())).values())))
    lines = [
        "# routing: which way to route and to balance, at equal work per token?",
        "",
        f"`python {' '.join(sys.argv)}`",
        "",
        f"- Hardware: {hardware()}",
        f"- Date: {datetime.date.today()}; commit {commit()}",
        f"- Work: the demo's recipe, {configs[0].steps} steps of {configs[0].tokens_per_step:,} tokens; seeds 0 to "
        f"{seeds - 1};",
        f"  loss and MaxVio over {EVALUATION_TOKENS:,} tokens of validation text, or all there are.",
        "- Numbers are means ± half of the 95 % confidence interval over the seeds (Student's t); differences are",
        "  paired by seed. MaxVio of a batch is the mean of the last tenth of the training steps. Busiest: share of",
        "  the tokens that visit the busiest expert of any layer. Dead: experts, of all layers, that no token of the",
        "  validation text visits.",
        "",
        "| Contestant | What | Parameters, M | Training MFLOP per token |",
        "|---|---|---|---|",
    ]
    for name, config in zip(names, configs, strict=True):
        parameters = count_parameters(config.model).total / 1e6
        flops = training_flops_per_token(config.model, config.sequence_length) / 1e6
        lines.append(f"| {name} | {CONTESTANTS[name].what} | {parameters:.3f} | {flops:.3f} |")
    for corpus, results in races.items():
        lines += ["", f"## {corpus}", "", *_result_table(results), ""]
        lines += ["| Published direction | Here | Reproduced |", "|---|---|---|"]
        lines += [f"| {each.claim} | {each.found} | {each.verdict} |" for each in directions[corpus]]
    return "\n".join(lines) + "\n"


def _result_table(races: Races) -> list[str]:
    columns = (
        "Contestant", "Validation loss", "Minus dense", "Minus switch", "MaxVio global", "MaxVio batch", "Busiest",
        "Dead",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, results in races.items():
        cells = [name + _mark(name), str(Estimate.of([result.val_loss for result in results]))]
        for other in ("dense", "switch"):
            cells.append(str(paired(races, name, other)) if other in races and other != name else "-")
        for key, form in (("max_vio", ".2f"), ("max_vio_batch", ".2f"), ("busiest", ".3f"), ("dead_experts", ".1f")):
            values = [getattr(result, key) for result in results]
            cells.append("-" if None in values else format(statistics.mean(values), form))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    run_benchmark(
        __doc__ or "",
        measure,
        ("--seeds", {"type": positive, "default": 3, "help": "seeds 0 to N-1"}),
        ("--minutes", {"type": float, "default": 2.0, "help": "length of a race, as in moesaic demo (both twins)"}),
        ("--text", {"help": "a file or folder of text as a second corpus"}),
        ("--only", {"default": "", "help": "contestants, separated by commas: " + ", ".join(CONTESTANTS)}),
        ("--scratch", {"help": "a folder that keeps data and finished races, so that a second start goes on"}),
        ("--record", {"help": "write the study as a page of Markdown here"}),
    )
