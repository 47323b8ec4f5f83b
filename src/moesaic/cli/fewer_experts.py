"""What `moesaic prune` and `moesaic merge` share: texts, the model before and after, and the report."""

import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cyclopts import Parameter
from rich.console import Console

from moesaic.checks import require
from moesaic.cli.options import ModelOptions, existing_file, this_command

if TYPE_CHECKING:
    from torch import Tensor

    from moesaic.analysis.expert_scores import LayerScores
    from moesaic.checkpoint.reduce_experts import Reduced
    from moesaic.checkpoint.resolve import ModelSource
    from moesaic.config import MoEConfig
    from moesaic.tokenizer import Tokenizer
    from moesaic.train.token_file import TokenFile

Progress = Callable[[str, int, int | None], None]
Item = TypeVar("Item")
BYTES_PER_TOKEN = 32
"""So much of a text is read for each token that is asked for: enough for both parts."""
HELD_OUT = 10
"""One in so many tokens of --data measures perplexity."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """What experts are scored on, and the model before and after."""

    data: Path | None = None
    "A UTF-8 text file. Experts are scored on its first nine tenths, and perplexity is measured on the last."
    eval_data: Path | None = None
    "A text file to measure perplexity on instead; experts are then scored on all of --data."
    tokens: int = 65_536
    "Tokens that experts are scored on, at most, spread evenly over the text; and that perplexity is measured on."
    sequence_length: int = 256
    "Tokens per window."
    batch_size: int = 8
    "Windows per forward pass."

    def check(self, needed_for: str | None = None) -> None:
        """Raises UsageError for numbers that make no sense and files that are not there, and where there is no text but
        something needs one, which is said."""
        require(needed_for is None or self.data is not None, f"{needed_for} on a text; add --data FILE")
        for flag, value in (("tokens", self.tokens), ("sequence-length", self.sequence_length)):
            require(value > 0, f"--{flag} is {value}; it must be 1 or more")
        require(self.batch_size > 0, f"--batch-size is {self.batch_size}; it must be 1 or more")
        require(
            self.tokens >= self.sequence_length,
            f"--tokens is {self.tokens}, less than one window of {self.sequence_length}; raise it, or lower "
            "--sequence-length",
        )
        for flag, path in (("--data", self.data), ("--eval-data", self.eval_data)):
            if path is not None:
                existing_file(path, flag)

    def split(self, tokenizer: "Tokenizer") -> "Texts":
        """Raises UsageError for a text that has no window for each purpose."""
        from moesaic.train.token_file import TokenFile

        assert self.data is not None
        tokens = self._tokens_of(tokenizer, self.data)
        windows = (len(tokens) - 1) // self.sequence_length
        if self.eval_data is not None:
            self._require_windows(self.data, len(tokens), 1)
            scored = self._tokens_of(tokenizer, self.eval_data)
            self._require_windows(self.eval_data, len(scored), 1)
            return Texts(self, tokens, scored)
        self._require_windows(self.data, len(tokens), 2)
        cut = (windows - max(1, windows // HELD_OUT)) * self.sequence_length + 1
        parts = (tokens.tokens[:cut], tokens.tokens[cut - 1 :])
        return Texts(self, *(TokenFile(part, 0, ((0, 0),)) for part in parts))

    def _tokens_of(self, tokenizer: "Tokenizer", path: Path) -> "TokenFile":
        from moesaic.train.data import tokenize_for_evaluation

        return tokenize_for_evaluation(tokenizer, str(path), max_bytes=BYTES_PER_TOKEN * self.tokens)[0]

    def _require_windows(self, path: Path, tokens: int, windows: int) -> None:
        needed = windows * self.sequence_length + 1
        require(
            tokens >= needed,
            f"{path} holds {tokens} tokens, and {windows} window{'s' * (windows > 1)} of --sequence-length "
            f"{self.sequence_length} take{'s' * (windows == 1)} {needed}; lower it, or name a longer text",
        )


@dataclass(frozen=True)
class Texts:
    """The tokens that experts are scored on, and those that perplexity is measured on."""

    options: TextOptions
    scored: "TokenFile"
    measured: "TokenFile"

    def batches(self, of: "TokenFile") -> "list[tuple[Tensor, Tensor, Tensor]]":
        from moesaic.train.data import validation_batches

        options = self.options
        return list(validation_batches(of, options.sequence_length, options.batch_size, options.tokens))


def experts_before(
    model: str, out: Path, keep: int, loading: ModelOptions
) -> "tuple[ModelSource, MoEConfig, list[int]]":
    """Where MODEL is, what its experts are, and the numbers of the layers that have some.

    Raises what writing `out` with `keep` experts would raise, before anything is computed.
    """
    from moesaic.checkpoint.reduce_experts import open_reducible
    from moesaic.checkpoint.resolve import resolve_model

    source = resolve_model(model, loading.revision, loading.offline)
    with open_reducible(source, out, keep, dtype=loading.dtype, offline=loading.offline) as reducible:
        return source, reducible.moe, reducible.layers


class Subject:
    """The model before and after: loaded where a text is to be read, and let go while files are written."""

    def __init__(self, source: "ModelSource", text: TextOptions, loading: ModelOptions, progress: Progress) -> None:
        self._source, self._progress = source, progress
        self._text, self._loading = text, replace(loading, revision=None)
        self.perplexity: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        """How many experts were scored on, and how many perplexity was measured on."""

    def before(self, *, scored: bool, sampled_tokens: int = 0) -> "list[LayerScores]":
        """Measures perplexity, and scores the experts where that is asked for. Without a text nothing is done."""
        from moesaic.analysis.expert_scores import score_experts

        if self._text.data is None:
            return []
        model, texts = self._load(self._source.directory)
        scores: list[LayerScores] = []
        if scored:
            batches = [tokens for tokens, _, _ in texts.batches(texts.scored)]
            self.tokens["scored"] = sum(tokens.numel() for tokens in batches)
            scores = score_experts(model, self._counted("scoring", batches), sampled_tokens=sampled_tokens)
        self._measure("before", model, texts)
        return scores

    def after(self, out: Path) -> None:
        if self._text.data is not None:
            self._measure("after", *self._load(out))

    def _load(self, directory: Path) -> tuple[Any, Texts]:
        model, tokenizer = self._loading.load(str(directory))
        length, positions = self._text.sequence_length, model.config.max_position_embeddings
        require(
            length <= positions,
            f"--sequence-length is {length} but the model has {positions} positions; lower it",
        )
        self._token_bytes = tokenizer.token_bytes()
        return model, self._text.split(tokenizer)

    def _measure(self, when: str, model: Any, texts: Texts) -> None:
        import torch

        from moesaic.train.evaluate import evaluate

        batches = self._counted(f"perplexity {when}", texts.batches(texts.measured))
        result = evaluate(model, batches, torch.tensor(self._token_bytes))
        self.perplexity[when], self.tokens["measured"] = result.perplexity, result.tokens

    def _counted(self, label: str, items: Sequence[Item]) -> Iterator[Item]:
        for number, item in enumerate(items, start=1):
            yield item
            self._progress(label, number, len(items))


def report_of(made: "Reduced", subject: Subject, **more: Any) -> dict[str, Any]:
    """What --json prints."""
    assert made.before.moe is not None
    assert made.after.moe is not None
    return {
        "family": made.family,
        "experts": {"before": made.before.moe.num_experts, "after": made.after.moe.num_experts},
        "bytes": {
            "before": made.nbytes_before,
            "after": made.nbytes,
            "saved": made.nbytes_before - made.nbytes,
        },
        "perplexity": subject.perplexity or None,
        "tokens": subject.tokens,
        **more,
    }


def show(
    console: Console, report: Mapping[str, Any], out: Path, how: str, layers: Iterable[str], *, as_json: bool
) -> None:
    """The report for people, in which `layers` has a line for each, or as one JSON object."""
    if as_json:
        print(json.dumps(report))
        return
    experts, sizes, perplexity = report["experts"], report["bytes"], report["perplexity"]
    lines = [
        f"wrote {out} as {report['family']}, {experts['after']} of {experts['before']} experts a layer, {how}",
        f"  bytes       {sizes['before']:,} -> {sizes['after']:,}, {sizes['saved']:,} saved "
        f"({sizes['saved'] / sizes['before']:.1%})",
    ]
    if perplexity:
        lines.append(
            f"  perplexity  {perplexity['before']:,.4f} -> {perplexity['after']:,.4f} "
            f"on {report['tokens']['measured']:,} tokens"
        )
    lines += [*layers, f"  {this_command()} generate {shlex.quote(str(out))} --prompt 'def '"]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
