"""What leaving out experts costs: REAP against frequency, random draws and merging, on models trained here.

Each seed trains the demo's sparse model on the standard library. Its experts are scored on training text, layers are
cut to three quarters and to half of them in every way, each directory is loaded again and measured on held-out text.
What a model lost is its loss minus that of the whole model, in nats per token; random is the mean of several draws.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Estimate, Row, note, positive, run_benchmark
from rich.console import Console

from moesaic.analysis.expert_scores import (
    SAMPLED_TOKENS,
    LayerScores,
    best_experts,
    nearest_leads,
    random_scores,
    score_experts,
)
from moesaic.checkpoint.load import load
from moesaic.checkpoint.merge import Cluster, merge
from moesaic.checkpoint.prune import prune
from moesaic.recipes import demo_config
from moesaic.train.data import PreparedData, prepare_data, validation_batches
from moesaic.train.evaluate import evaluate
from moesaic.train.run import run_training
from moesaic.train.screen import Screen
from moesaic.train.token_file import TokenFile

SHARES = (0.75, 0.5)
BATCH, LENGTH = 16, 128
PEERS = ("frequency", "random", "merge")
Write = Callable[[Path], object]


@dataclass(frozen=True)
class Effort:
    """What one seed costs."""

    minutes: float
    """Of training, as in moesaic demo."""
    draws: int
    scored_tokens: int = 65_536
    measured_tokens: int = 131_072


QUICK = Effort(minutes=0.5, draws=2, scored_tokens=16_384, measured_tokens=32_768)
Losses = dict[str, list[float]]
"""By way of cutting, the loss of the model that is left, for each seed; `all` is the whole model."""


def measure(arguments: argparse.Namespace) -> list[Row]:
    seeds = [0] if arguments.quick else list(range(arguments.seeds))
    effort = QUICK if arguments.quick else Effort(arguments.minutes, arguments.draws)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    found: Losses = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in seeds:
            for name, loss in _cut(Path(scratch), seed, effort).items():
                found.setdefault(name, []).append(loss)
            note(f"seed {seed}: " + ", ".join(f"{name} {losses[-1]:.4f}" for name, losses in found.items()))
    return [_whole(found), *(row for share in SHARES for row in _rows(found, share))]


def _cut(folder: Path, seed: int, effort: Effort) -> dict[str, float]:
    """Trains one model; the losses of it and of what is left of it."""
    config = demo_config("sparse", minutes=effort.minutes, seed=seed)
    run = folder / f"run-{seed}"
    screen = Screen(Console(quiet=True), live=False)
    if run_training(config, run, screen, data_directory=folder / "data").stop_requested:
        raise SystemExit("stopped; a model that was cut short has no result")
    tokens_needed = config.steps * config.tokens_per_step + 1
    data = prepare_data(config.data, folder / "data", tokens_needed=tokens_needed, sequence_length=LENGTH)
    text = TokenFile(data.train.tokens, 0, ((0, 0),))
    batches = [tokens for tokens, _, _ in validation_batches(text, LENGTH, BATCH, effort.scored_tokens)]
    scores = score_experts(load(run), batches, sampled_tokens=SAMPLED_TOKENS)
    losses = {"all": _loss(run, data, effort)}
    for share in SHARES:
        for way, writes in _ways(run, scores, share, effort.draws):
            made = []
            for number, write in enumerate(writes):
                out = folder / f"{seed} {share} {way} {number}"
                write(out)
                made.append(_loss(out, data, effort))
            losses[f"{share:.0%} {way}"] = statistics.mean(made)
    return losses


def _ways(run: Path, scores: list[LayerScores], share: float, draws: int) -> Iterator[tuple[str, list[Write]]]:
    """How to write what is left: name, and one function for each model."""
    keep = round(share * len(scores[0].tokens))

    def pruned(by_layer: list[torch.Tensor]) -> Write:
        kept = {layer: best_experts(each, keep) for layer, each in enumerate(by_layer)}
        return lambda out: prune(run, out, kept)

    for criterion in ("reap", "frequency"):
        yield criterion, [pruned([each.by(criterion) for each in scores])]
    experts = len(scores[0].tokens)
    yield (
        "random",
        [
            pruned([random_scores(experts, seed=draw, layer=layer) for layer in range(len(scores))])
            for draw in range(draws)
        ],
    )
    clusters = {
        layer: [
            Cluster.of(members, each.tokens)
            for members in nearest_leads(each.distance, best_experts(each.by("reap"), keep))
        ]
        for layer, each in enumerate(scores)
    }
    yield "merge", [lambda out: merge(run, out, clusters)]


def _loss(directory: Path, data: PreparedData, effort: Effort) -> float:
    batches = validation_batches(data.validation, LENGTH, BATCH, effort.measured_tokens)
    return evaluate(load(directory), batches, torch.tensor(data.tokenizer.token_bytes())).loss


def _perplexity(losses: list[float]) -> float:
    return statistics.mean(float(torch.tensor(loss).exp()) for loss in losses)


def _whole(found: Losses) -> Row:
    losses = found["all"]
    return Row(work=f"all experts, mean of {len(losses)} seeds", unit="perplexity", ours=_perplexity(losses))


def _rows(found: Losses, share: float) -> Iterator[Row]:
    """REAP beside the others at one size: perplexities, and what was lost."""
    losses = {way: found[f"{share:.0%} {way}"] for way in ("reap", *PEERS)}
    ours = _perplexity(losses["reap"])
    for peer in PEERS:
        theirs = _perplexity(losses[peer])
        yield Row(
            work=f"{share:.0%} of the experts, by REAP",
            unit="perplexity",
            ours=ours,
            peer=theirs,
            peer_name=peer,
            ratio=theirs / ours,
        )
    added = {way: [a - b for a, b in zip(each, found["all"], strict=True)] for way, each in losses.items()}
    note(f"{share:.0%}: added " + ", ".join(f"by {way} {Estimate.of(each)}" for way, each in added.items()))
    for peer in PEERS:
        less = sum(mine < other for mine, other in zip(added["reap"], added[peer], strict=True))
        mine, other = statistics.mean(added["reap"]), statistics.mean(added[peer])
        yield Row(
            work=f"{share:.0%} of the experts, loss added by REAP; less on {less} of {len(added[peer])} seeds",
            unit="nats per token",
            ours=mine,
            peer=other,
            peer_name=peer,
            ratio=other / mine,
            goal=None if peer == "merge" else 1.0,
            met=None if peer == "merge" else less == len(added[peer]),
        )


if __name__ == "__main__":
    run_benchmark(
        __doc__ or "",
        measure,
        ("--seeds", {"type": positive, "default": 3, "help": "seeds 0 to N-1"}),
        ("--minutes", {"type": float, "default": 5.0, "help": "training of one model, as in moesaic demo"}),
        ("--draws", {"type": positive, "default": 5, "help": "random choices for each model and size"}),
        ("--threads", {"type": positive, "help": "of torch; default: its own"}),
    )
