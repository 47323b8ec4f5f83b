"""`moesaic prune`: leave out the experts that matter least."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from moesaic.checks import require, require_seed
from moesaic.cli.fewer_experts import Subject, TextOptions, experts_before, report_of, show
from moesaic.cli.options import JsonFlag, ModelOptions, existing_file, progress_bars
from moesaic.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

Criterion = Literal["reap", "frequency", "random", "list"]
ON_TEXT: tuple[Criterion, ...] = ("reap", "frequency")
"""Criteria that score the experts on a text."""
_MODEL, _TEXT = ModelOptions(), TextOptions()


def prune(
    model: str,
    out: Path,
    /,
    *,
    keep: int | None = None,
    by: Criterion = "reap",
    experts: Path | None = None,
    seed: int = 0,
    text: TextOptions = _TEXT,
    loading: ModelOptions = _MODEL,
    json_output: JsonFlag = False,
) -> None:
    """Write MODEL with the KEEP best experts of each layer, as a Hugging Face directory.

    Nothing else changes; what was left out cannot be chosen any more.

    Parameters
    ----------
    model
        A run directory, a Hugging Face directory, or a hub id.
    out
        The directory to make; it must not hold anything yet.
    keep
        Experts that stay in each layer.
    by
        reap: mean norm of what an expert adds to the tokens that visit it. frequency: tokens that visit it. random: a
        draw, to compare with. list: those that --experts names.
    experts
        For list, a JSON file {"layer": [experts to keep]}, or what --json printed before.
    seed
        Of random.
    json_output
        One JSON object with perplexity, bytes, and the experts that stayed and went, with their scores.
    """
    from moesaic.analysis.expert_scores import best_experts
    from moesaic.checkpoint.prune import prune as write_pruned
    from moesaic.checkpoint.reduce_experts import require_kept

    named = _named(by, experts)
    keep = _keep(keep, named)
    require_seed(seed)
    text.check(f"--by {by} scores the experts" if by in ON_TEXT else None)
    source, moe, layers = experts_before(model, out, keep, loading)
    if named:
        require_kept(moe, layers, named)
    console = Console(stderr=json_output)
    with progress_bars(console) as progress:
        subject = Subject(source, text, loading, progress)
        scores = _scores(subject, by, seed, moe.num_experts, layers)
        kept = named or {layer: best_experts(each, keep, moe.n_group) for layer, each in scores.items()}
        made = write_pruned(source, out, kept, dtype=loading.dtype, offline=loading.offline, progress=progress)
        subject.after(out)
    dropped = {layer: sorted(set(range(moe.num_experts)) - set(kept[layer])) for layer in layers}
    numbers = {layer: each.tolist() for layer, each in scores.items()}
    report = report_of(made, subject, by=by, kept=kept, dropped=dropped, scores=numbers)
    how = f"by {by} on {subject.tokens['scored']:,} tokens" if by in ON_TEXT else f"by {by}"
    lines = [f"  layer {layer} without {', '.join(map(str, each))}" for layer, each in dropped.items()]
    show(console, report, out, how, lines, as_json=json_output)


def _scores(subject: Subject, by: Criterion, seed: int, num_experts: int, layers: Sequence[int]) -> "dict[int, Tensor]":
    """(E,) for each layer, higher for experts that should stay; none for a list. Perplexity is measured on the way."""
    from moesaic.analysis.expert_scores import random_scores

    measured = subject.before(scored=by in ON_TEXT)
    if by == "random":
        return {layer: random_scores(num_experts, seed=seed, layer=layer) for layer in layers}
    return {layer: each.by(by) for layer, each in zip(layers, measured, strict=by in ON_TEXT)}


def _named(by: Criterion, experts: Path | None) -> dict[int, list[int]]:
    """What the file of --experts says; empty where there is none.

    Raises UsageError for a file that is not {"layer": [experts]}.
    """
    from moesaic.weights_io import read_json

    if (by == "list") != (experts is not None):
        raise UsageError("--by list and --experts FILE belong together; give both or none")
    if experts is None:
        return {}
    values: Any = read_json(existing_file(experts, "--experts"), unique=True)
    values = values.get("kept", values)
    form = f'{experts} is not of the form {{"0": [1, 5, 6], "1": [0, 2, 3]}}: layers, and the experts that each keeps'
    require(isinstance(values, dict) and bool(values), form)
    for layer, numbers in values.items():
        require(layer.isdecimal() and len(layer) < 10 and layer == str(int(layer)) and isinstance(numbers, list), form)
        require(all(type(number) is int for number in numbers), form)
    return {layer: sorted(values[str(layer)]) for layer in sorted(map(int, values))}


def _keep(keep: int | None, named: Mapping[int, Sequence[int]]) -> int:
    if named:
        found = len(next(iter(named.values())))
        require(
            keep in (None, found), f"--keep is {keep}, but --experts keeps {found} in its first layer; leave --keep out"
        )
        return found
    if keep is None:
        raise UsageError("nothing says how many experts stay in each layer; add --keep N")
    return keep
