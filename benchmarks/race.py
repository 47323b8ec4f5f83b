"""How much wall clock a sparse model needs to reach the final loss of its dense twin.

Twins have the same attention and equal active FLOPs per token within 2 %, the same tokens in the same order, and the
same rates. The dense twin trains until it has seen 40 tokens per active parameter, or as many as asked for. The sparse
one follows a schedule of its own, which is as long as --share says: a rate that falls to zero at the end is part of
reaching a loss soon, so each must be allowed its own end. Seconds are those of each twin's own training steps, read
between two evaluations along a straight line; evaluation and saving do not count. The twins take turns of some steps
each, so that both meet the same machine. A race goes on where it stopped when it is started anew with the same flags
and --scratch.
"""

import argparse
import datetime
import hashlib
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import Row, commit, hardware, note, positive, run_benchmark
from rich.console import Console

from moesaic.accounting import count_parameters, training_flops_per_token
from moesaic.analysis.comparison import Comparison, RunCurve
from moesaic.analysis.plots import write_plots
from moesaic.checkpoint.run_state import list_steps, newest_run_state
from moesaic.config import BalanceConfig, CheckpointConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig
from moesaic.config_io import to_mapping
from moesaic.model.transformer import Transformer
from moesaic.ops.device import cpu_set_up_for_training
from moesaic.recipes import demo_config
from moesaic.train.data import prepare_data
from moesaic.train.metrics import read_metrics
from moesaic.train.screen import Screen
from moesaic.train.trainer import Trainer

GOAL = 0.6
EVALUATIONS = 40
"""Of each twin, evenly spread over its run."""
EVALUATION_TOKENS = 65_536
CURVE_POINTS = 8
LARGEST_DIFFERENCE = 0.02
"""Of FLOPs per token between the twins."""
ROUTERS: Mapping[str, tuple[dict[str, Any], BalanceConfig]] = {
    "sigmoid": ({"router": "sigmoid_topk"}, BalanceConfig(bias_update_rate=0.01)),
    "softmax": ({"router": "softmax_topk"}, BalanceConfig(aux_loss_coef=0.01)),
}
"""As the routing study has them: scores, and what balances their load."""

Twins = dict[str, TrainConfig]
"""`dense` and `sparse`."""


class Turn(Screen):
    """Shows nothing, and ends a run after some steps."""

    def __init__(self, trainer: Trainer, steps: int) -> None:
        super().__init__(Console(quiet=True), live=False)
        self._trainer = trainer
        self._left = steps
        trainer.stop_requested = False

    def step(self, row: Mapping[str, Any]) -> None:
        self._left -= 1
        self._trainer.stop_requested = self._left <= 0


def measure(arguments: argparse.Namespace) -> list[Row]:
    seeds = range(1 if arguments.quick else arguments.seeds)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary, cpu_set_up_for_training():
        scratch = Path(arguments.scratch or temporary)
        folder = scratch / _fingerprint(twins(arguments, seed=0))
        races = [race(twins(arguments, seed), seed, folder, arguments.slice) for seed in seeds]
        by_experts = {arguments.experts: races[0]}
        for experts in arguments.other_experts:
            configs = twins(argparse.Namespace(**{**vars(arguments), "experts": experts}), seed=0)
            note(f"{experts} experts")
            by_experts[experts] = race(configs, 0, scratch / _fingerprint(configs), arguments.slice)
        if arguments.record:
            _write_record(Path(arguments.record), races, by_experts, twins(arguments, seed=0), folder)
    return [*(_seed_row(seed, each) for seed, each in zip(seeds, races, strict=True)), _summary_row(races)]


def twins(arguments: argparse.Namespace, seed: int) -> Twins:
    """Both configs; --quick trains a hundredth of the tokens."""
    extra, balance = ROUTERS[arguments.router]
    top_k, experts = arguments.top_k, arguments.experts
    moe = MoEConfig(
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=arguments.inner // top_k,
        routed_scaling_factor=float(top_k),
        **extra,
    )
    # A router's E x D multiply-adds, given to the dense twin as rows of its three matrices, 8 at a time.
    dense = _model(arguments, intermediate_size=arguments.inner + 8 * round(experts / 24))
    sparse = _model(arguments, moe=moe)
    tokens = arguments.tokens_per_parameter * (0.01 if arguments.quick else 1.0) * count_parameters(dense).active
    return {
        "dense": _run(arguments, seed, dense, tokens),
        "sparse": replace(_run(arguments, seed, sparse, arguments.share * tokens), balance=balance),
    }


def _model(arguments: argparse.Namespace, **feed_forward: Any) -> ModelConfig:
    head_dim = arguments.head_dim
    heads = arguments.width // head_dim
    return ModelConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=head_dim,
        max_position_embeddings=1024,
        initializer_range=0.0,
        **feed_forward,
    )


def _run(arguments: argparse.Namespace, seed: int, model: ModelConfig, tokens: float) -> TrainConfig:
    """The demo's recipe with this model, for so many tokens."""
    recipe = demo_config("dense", seed=seed)
    muon, rate = recipe.optimizer, arguments.rate
    steps = max(2, math.ceil(tokens / (arguments.batch * arguments.length)))
    optimizer = (
        replace(
            muon,
            lr=muon.lr * rate,
            embedding_lr=muon.embedding_lr * rate,
            matrix_lr=muon.matrix_lr * rate,
            feed_forward_lr=muon.feed_forward_lr * rate,
            expert_every=arguments.expert_every,
        )
        if arguments.optimizer == "muon"
        else OptimizerConfig(name="adamw", lr=3e-3 * rate)
    )
    return replace(
        recipe,
        model=model,
        data=replace(recipe.data, tokenizer=f"bpe:{arguments.vocabulary}", source=arguments.data),
        optimizer=optimizer,
        schedule=replace(recipe.schedule, decay_fraction=arguments.decay),
        steps=steps,
        batch_size=arguments.batch,
        sequence_length=arguments.length,
        checkpoint=CheckpointConfig(save_every=steps, keep=1),  # each turn saves at its end anyway
        evaluate_every=max(1, steps // EVALUATIONS),
        evaluation_tokens=EVALUATION_TOKENS,
    )


def race(configs: Twins, seed: int, folder: Path, slice_steps: int) -> Comparison:
    """Train both twins in turns to their ends, or go on with what `folder` holds, and compare their curves."""
    _require_equal_work(configs)
    tokens = configs["dense"].steps * configs["dense"].tokens_per_step + 1
    racers = {
        name: _Racer(name, config, folder / f"{name}-{seed}", folder / "data", tokens)
        for name, config in configs.items()
    }
    turns = math.ceil(configs["dense"].steps / slice_steps)
    number = 0
    while any(racer.unfinished for racer in racers.values()):
        for name in ("dense", "sparse") if (number + seed) % 2 == 0 else ("sparse", "dense"):
            racers[name].take_turn(math.ceil(configs[name].steps / turns))
        number += 1
        if number % 5 == 0:
            note(f"seed {seed}: " + "; ".join(racer.standing for racer in racers.values()))
    curves = {name: racer.curve() for name, racer in racers.items()}
    comparison = Comparison(sparse=curves["sparse"], dense=curves["dense"])
    note(
        f"seed {seed}: dense {comparison.dense.val_loss:.4f} in {comparison.dense.seconds:.0f} s, sparse "
        f"{comparison.sparse.val_loss:.4f} in {comparison.sparse.seconds:.0f} s; ratio of the times to the dense loss "
        f"{_shown(comparison.ratio('seconds'))}"
    )
    for tokens, ratio in ratio_curve(comparison):
        note(f"  to the dense twin's loss after {tokens / 1e6:.2f} M tokens, ratio of the times: {_shown(ratio)}")
    return comparison


class _Racer:
    """One twin: its trainer, and where it stands."""

    def __init__(self, name: str, config: TrainConfig, run: Path, data_folder: Path, tokens_needed: int) -> None:
        run.mkdir(parents=True, exist_ok=True)
        data = prepare_data(
            config.data,
            data_folder,
            tokens_needed=tokens_needed,
            sequence_length=config.sequence_length,
        )
        model = Transformer(config.model, backend=config.backend)
        model.init_weights(config.seed)
        self._name, self._config, self._run = name, config, run
        self._trainer = Trainer(config, model, data, run)
        self._saved = newest_run_state(run) if list_steps(run) else None

    @property
    def step(self) -> int:
        return self._saved.step if self._saved else self._trainer.step

    @property
    def unfinished(self) -> bool:
        return self.step < self._config.steps

    @property
    def standing(self) -> str:
        losses = [row["val_loss"] for row in self._rows() if row["kind"] == "eval"]
        loss = f", loss {losses[-1]:.4f}" if losses else ""
        return f"{self._name} {self.step}/{self._config.steps} in {self._trainer.training_seconds:.0f} s{loss}"

    def take_turn(self, steps: int) -> None:
        if self.unfinished:
            self._trainer.run(Turn(self._trainer, steps), resume_from=self._saved)
            self._saved = None

    def curve(self) -> RunCurve:
        return RunCurve.of_run(self._name, self._config, self._rows())

    def _rows(self) -> list[dict[str, Any]]:
        return read_metrics(self._run / "metrics.jsonl")


def ratio_curve(comparison: Comparison, points: int = CURVE_POINTS) -> list[tuple[int, float | None]]:
    """Of so many moments of the dense run: tokens it had seen, and the sparse twin's time to that loss over its own."""
    evaluations = comparison.dense.evaluations
    chosen = sorted({math.ceil(len(evaluations) * (i + 1) / points) - 1 for i in range(points)})
    curve = []
    for row in (evaluations[index] for index in chosen):
        dense, sparse = (run.reached(row["val_loss"]) for run in (comparison.dense, comparison.sparse))
        curve.append((row["tokens"], sparse.seconds / dense.seconds if sparse and dense and dense.seconds else None))
    return curve


def _require_equal_work(configs: Twins) -> None:
    flops = [training_flops_per_token(config.model, config.sequence_length) for config in configs.values()]
    if abs(flops[0] / flops[1] - 1) > LARGEST_DIFFERENCE:
        work = ", ".join(f"{name} {each / 1e6:.3f}" for name, each in zip(configs, flops, strict=True))
        raise SystemExit(f"the twins differ in training MFLOP per token: {work}; let --top-k divide --inner")


def _fingerprint(configs: Twins) -> str:
    """Of everything but the seed."""
    mapping = {name: to_mapping(config) for name, config in configs.items()}
    return "race-" + hashlib.sha256(json.dumps(mapping, sort_keys=True).encode()).hexdigest()[:12]


def _seed_row(seed: int, comparison: Comparison) -> Row:
    ratio = comparison.ratio("seconds")
    reached = comparison.sparse_reached
    at = (
        "never, all its time is shown"
        if reached is None
        else f"{reached.tokens / 1e6:.2f} M of {comparison.dense.tokens / 1e6:.2f} M tokens"
    )
    return Row(
        work=f"seed {seed}: time to the dense twin's final loss {comparison.dense.val_loss:.4f} ({at}; at its own end "
        f"sparse has {comparison.sparse.val_loss:.4f}); less is better",
        unit="s",
        ours=reached.seconds if reached else comparison.sparse.seconds,
        peer=comparison.dense_reached.seconds,
        peer_name="dense twin",
        ratio=ratio,
        goal=GOAL,
        met=ratio is not None and ratio <= GOAL,
    )


def _summary_row(races: Sequence[Comparison]) -> Row:
    ratios = [ratio for each in races if (ratio := each.ratio("seconds")) is not None]
    met = len(ratios) == len(races) and max(ratios) <= GOAL
    return Row(
        work=f"time to the dense twin's final loss over its own, the worst of the {len(ratios)} of {len(races)} seeds "
        "that reached it; less is better",
        unit="ratio",
        ours=max(ratios, default=0.0),
        peer=1.0,
        peer_name="dense twin",
        ratio=max(ratios, default=None),
        goal=GOAL,
        met=met,
    )


def _write_record(
    path: Path, races: Sequence[Comparison], by_experts: Mapping[int, Comparison], configs: Twins, folder: Path
) -> None:
    """A page of benchmarks/results, to which a person adds what it says, and the first seed's losses over the clock."""
    dense, sparse = configs["dense"], configs["sparse"]
    counts = {name: count_parameters(config.model) for name, config in configs.items()}
    flops = training_flops_per_token(dense.model, dense.sequence_length)
    seen = dense.steps * dense.tokens_per_step / counts["dense"].active
    lines = [
        "# race: how much wall clock does sparse need to reach its dense twin's final loss?",
        "",
        f"`python {' '.join(sys.argv)}`",
        "",
        f"- Hardware: {hardware()}",
        f"- Date: {datetime.date.today()}; commit {commit()}",
        f"- Work: dense {dense.steps} steps, sparse at most {sparse.steps}, of {dense.tokens_per_step:,} tokens; "
        f"{seen:.1f} tokens per active parameter;",
        f"  dense {counts['dense'].total / 1e6:.2f} M parameters, sparse {counts['sparse'].total / 1e6:.2f} M with "
        f"{counts['sparse'].active / 1e6:.2f} M active; {flops / 1e6:.2f} training MFLOP per token.",
        "- Seconds are those of the twins' own steps, taken in turns; the ratio is sparse to dense, less is better.",
        "",
        "| Seed | Dense loss | Sparse loss | Dense, s | Sparse to the dense loss, s | Ratio | Tokens, ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for seed, each in enumerate(races):
        reached = each.sparse_reached
        seconds = "never" if reached is None else f"{reached.seconds:.0f}"
        cells = (seed, f"{each.dense.val_loss:.4f}", f"{each.sparse.val_loss:.4f}", f"{each.dense_reached.seconds:.0f}")
        ratios = (_shown(each.ratio("seconds")), _shown(each.ratio("tokens")))
        lines.append(f"| {' | '.join(map(str, (*cells, seconds, *ratios)))} |")
    lines += ["", "Ratio of the times to the loss that the dense twin had after so many tokens:", ""]
    curves = [ratio_curve(each) for each in races]
    names = " | ".join(f"seed {seed}" for seed in range(len(races)))
    lines += [f"| Tokens, M | {names} |", "|---" * (len(races) + 1) + "|"]
    for points in zip(*curves, strict=True):
        lines.append(f"| {points[0][0] / 1e6:.2f} | {' | '.join(_shown(ratio) for _, ratio in points)} |")
    lines += _table_by_experts(by_experts)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    write_plots(plots, races[0])
    shutil.copyfile(plots / "loss_seconds.png", path.with_suffix(".png"))


def _table_by_experts(races: Mapping[int, Comparison]) -> list[str]:
    """Nothing where there is only one number of experts."""
    if len(races) == 1:
        return []
    lines = ["", "The number of experts, seed 0:", "", "| Experts | Dense loss | Sparse loss | Ratio | Tokens, ratio |"]
    lines.append("|---|---|---|---|---|")
    for experts, each in sorted(races.items()):
        losses = f"{each.dense.val_loss:.4f} | {each.sparse.val_loss:.4f}"
        lines.append(f"| {experts} | {losses} | {_shown(each.ratio('seconds'))} | {_shown(each.ratio('tokens'))} |")
    return lines


def _shown(ratio: float | None) -> str:
    return "never" if ratio is None else f"{ratio:.3f}"


FLAGS: tuple[tuple[str, dict[str, object]], ...] = (
    ("--seeds", {"type": positive, "default": 3, "help": "seeds 0 to N-1"}),
    ("--share", {"type": float, "default": 0.5, "help": "length of the sparse run, as a share of the dense one's"}),
    ("--tokens-per-parameter", {"type": float, "default": 40.0, "help": "of the dense twin, active ones"}),
    ("--width", {"type": positive, "default": 64, "help": "of the residual stream"}),
    ("--layers", {"type": positive, "default": 3}),
    ("--inner", {"type": positive, "default": 256, "help": "feed-forward units that work for a token"}),
    ("--head-dim", {"type": positive, "default": 16}),
    ("--vocabulary", {"type": positive, "default": 2048}),
    ("--experts", {"type": positive, "default": 128}),
    ("--other-experts", {"type": positive, "nargs": "*", "default": (), "help": "numbers to race seed 0 with as well"}),
    ("--top-k", {"type": positive, "default": 4, "help": "experts per token"}),
    ("--router", {"choices": tuple(ROUTERS), "default": "sigmoid", "help": "scores, and what balances them"}),
    ("--optimizer", {"choices": ("muon", "adamw"), "default": "muon"}),
    ("--rate", {"type": float, "default": 1.0, "help": "factor on all learning rates of the recipe"}),
    ("--expert-every", {"type": positive, "default": 4, "help": "steps between two of the sparse twin's experts"}),
    ("--decay", {"type": float, "default": 0.8, "help": "share of a run over which the rates fall"}),
    ("--batch", {"type": positive, "default": 32, "help": "sequences per step"}),
    ("--length", {"type": positive, "default": 128, "help": "tokens of a sequence"}),
    ("--data", {"default": "stdlib", "help": "text to train on, as in moesaic train"}),
    ("--slice", {"type": positive, "default": 50, "help": "steps of a turn of the dense twin"}),
    ("--threads", {"type": positive, "help": "default: torch's"}),
    ("--scratch", {"help": "a folder that keeps data and races, so that a second start goes on"}),
    ("--record", {"help": "write the race as a page of Markdown here, and a plot beside it"}),
)

if __name__ == "__main__":
    run_benchmark(__doc__ or "", measure, *FLAGS)
