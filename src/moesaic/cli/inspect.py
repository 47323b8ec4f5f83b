"""`moesaic inspect`: what the experts of a model do on text, as a page."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from moesaic.cli.options import JsonFlag, ModelOptions, progress_bars
from moesaic.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from moesaic.analysis.inspection import Inspection
    from moesaic.analysis.similarity import Similarity
    from moesaic.analysis.trace import Trace
    from moesaic.analysis.trace_writer import TokenRows
    from moesaic.model.transformer import Transformer
    from moesaic.tokenizer import Tokenizer

_MODEL = ModelOptions()
FEWEST_TOKENS = 16


def inspect(
    model: str,
    /,
    *,
    data: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    out: Path = Path("inspect.html"),
    against: str | None = None,
    tokens: int = 32768,
    sequence_length: int = 256,
    batch_size: int = 8,
    trace: Path | None = None,
    logits: Annotated[bool, Parameter(negative="")] = False,
    png: Path | None = None,
    loading: ModelOptions = _MODEL,
    json_output: JsonFlag = False,
) -> None:
    """Run MODEL on texts and show what its experts do: load, specialisation, favourites, company, likeness.

    Parameters
    ----------
    model
        A run directory, a Hugging Face directory, a hub id, or a trace that was recorded before.
    data
        NAME=FILE for each kind of text, such as code=src/main.py; a folder is one kind, too.
    out
        The page: one HTML file that needs nothing else.
    against
        A second model, or a trace of the same text: how routing moved.
    tokens
        To read, of all texts together; each gives an equal share while it lasts.
    sequence_length
        Tokens per sequence; sequences see nothing before them.
    batch_size
        Sequences per forward pass.
    trace
        Keep the recorded routing in this folder, for `moesaic inspect FOLDER` and for programs.
    logits
        Record the routers' logits, too.
    png
        Also write the pictures into this folder.
    json_output
        Print all numbers as one JSON object.
    """
    _require_sensible(out, png, tokens=tokens, sequence_length=sequence_length, batch_size=batch_size)
    console = Console(stderr=json_output)
    with progress_bars(console) as progress, tempfile.TemporaryDirectory(prefix="moesaic-trace-") as folder:
        recording = _Recording(loading, batch_size, logits, progress, Path(folder))
        text = _Text(data, sequence_length, tokens)
        inspection = _inspected(model, text, recording, kept=trace, against=against)
        _write(inspection, out, png)
    if json_output:
        print(json.dumps(inspection.plain(), allow_nan=False))
        return
    _show(inspection, console)
    places = {"page": out, "trace": trace, "pictures": png}
    told = "\n".join(f"{what}: {place}" for what, place in places.items() if place is not None)
    console.print(told, markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class _Text:
    """What is to be read."""

    data: list[str] | None
    sequence_length: int
    tokens: int


def _inspected(
    model: str, text: _Text, recording: "_Recording", *, kept: Path | None, against: str | None
) -> "Inspection":
    """Of a model on a text, whose trace is `kept` or else forgotten, or of a trace."""
    from moesaic.analysis.inspection import inspect_trace
    from moesaic.analysis.trace import is_trace, read_trace
    from moesaic.analysis.trace_writer import require_place

    similarities: list[Similarity] = []
    if is_trace(model):
        for flag, given in (("--data", text.data), ("--trace", kept)):
            if given:
                raise UsageError(f"{model} is a trace, which has its own text; leave {flag} out")
        recorded = read_trace(model)
    else:
        kinds = _named_sources(text.data)
        if kept is not None:
            require_place(kept)
        transformer, tokenizer = recording.loading.load(model)
        rows = _read_text(kinds, tokenizer, transformer, text.sequence_length, text.tokens)
        place = recording.folder / "one" if kept is None else kept
        recorded, similarities = recording.record(model, transformer, tokenizer, rows, list(kinds), place)
        del transformer
    other = None
    if against is not None:
        other = read_trace(against) if is_trace(against) else recording.of_other(against, recorded)
    return inspect_trace(
        recorded,
        similarities=similarities,
        against=other,
        progress=lambda done: recording.progress("analysing layers", done, recorded.num_layers),
    )


def _write(inspection: "Inspection", out: Path, png: Path | None) -> None:
    from moesaic.analysis.inspection_page import write_page

    write_page(out, inspection)
    if png is not None:
        from moesaic.analysis.inspection_plots import write_plots

        write_plots(png, inspection)


@dataclass(frozen=True)
class _Recording:
    """How models are loaded and run."""

    loading: ModelOptions
    batch_size: int
    with_logits: bool
    progress: Any
    folder: Path
    """For traces that nobody keeps."""

    def record(
        self,
        name: str,
        transformer: "Transformer",
        tokenizer: "Tokenizer",
        text: "TokenRows",
        sources: list[str],
        directory: Path,
        *,
        compare_experts: bool = True,
    ) -> "tuple[Trace, list[Similarity]]":
        """The trace of a text, and how alike the experts are."""
        from moesaic.analysis.similarity import InputSample, similarity
        from moesaic.analysis.text_rows import record_text
        from moesaic.analysis.trace import read_trace
        from moesaic.cli.tracing import writer_for

        writer = writer_for(directory, name, transformer, tokenizer, sources, with_logits=self.with_logits)
        with InputSample(transformer) as sample, writer:
            record_text(
                transformer,
                text,
                writer,
                batch_size=self.batch_size,
                progress=lambda done: self.progress(f"running {name}", done, len(text)),
            )
        found = []
        num_layers = len(transformer.moe_layers) if compare_experts else 0
        for layer in range(num_layers):
            found.append(similarity(transformer, layer, sample.of_layer(layer)))
            self.progress("comparing experts", layer + 1, num_layers)
        return read_trace(directory), found

    def of_other(self, model: str, recorded: "Trace") -> "Trace":
        """A second model on the text of a trace."""
        transformer, tokenizer = self.loading.load(model)
        known = recorded.head.get("tokenizer")
        if known is not None and known != tokenizer.fingerprint:
            raise UsageError(
                f"{model} has another tokenizer than {recorded.name}, so that their tokens differ; compare models that "
                "share one"
            )
        trace, _ = self.record(
            model, transformer, tokenizer, recorded.tokens, recorded.sources, self.folder / "two", compare_experts=False
        )
        return trace


def _require_sensible(out: Path, png: Path | None, **numbers: int) -> None:
    for flag, value in numbers.items():
        if value < 1:
            raise UsageError(f"--{flag.replace('_', '-')} is {value}; it must be 1 or more")
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; name a file, such as {out / 'inspect.html'}")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out} is in no folder that exists; make it with: mkdir -p {out.absolute().parent}")
    if png is not None and png.exists() and not png.is_dir():
        raise UsageError(f"--png {png} is a file; name a folder")


def _named_sources(data: list[str] | None) -> dict[str, str]:
    """Name and place of each kind of text."""
    if not data:
        raise UsageError("inspect needs text to run the model on; add --data NAME=FILE, such as --data code=main.py")
    kinds: dict[str, str] = {}
    for given in data:
        name, equals, place = given.partition("=")
        if not equals:
            name, place = Path(given).stem, given
        if not name or not place:
            raise UsageError(f"--data {given!r} is no NAME=FILE; write for example --data code=main.py")
        if name in kinds:
            raise UsageError(f"--data has {name} twice; give each kind of text a name of its own")
        kinds[name] = place
    return kinds


def _read_text(
    kinds: dict[str, str], tokenizer: "Tokenizer", transformer: "Transformer", sequence_length: int, tokens: int
) -> "TokenRows":
    from moesaic.analysis.text_rows import text_rows

    positions = transformer.config.max_position_embeddings
    if sequence_length > positions:
        raise UsageError(f"--sequence-length is {sequence_length} but the model has {positions} positions; lower it")
    text = text_rows(
        [_documents(place, tokenizer) for place in kinds.values()],
        tokenizer.token_bytes(),
        sequence_length=sequence_length,
        limit=max(1, tokens // len(kinds)),
    )
    for source, (name, place) in enumerate(kinds.items()):
        count = int((text.source_ids == source).sum())
        if count < FEWEST_TOKENS:
            raise UsageError(f"--data {name}={place} gives {count} tokens, too few to say anything; name more text")
    return text


def _documents(source: str, tokenizer: "Tokenizer") -> "Iterator[np.ndarray]":
    from moesaic.train.sources import documents
    from moesaic.train.token_file import batches_of_text, encode_documents

    for batch in batches_of_text(documents(source)):
        yield from encode_documents(tokenizer, batch)


def _show(inspection: "Inspection", console: Console) -> None:
    trace, totals = inspection.trace, inspection.totals()
    console.print(
        f"{trace.name}: {trace.num_layers} layers of experts, {len(trace):,} tokens of {', '.join(trace.sources)}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    names = [labels.name for labels in inspection.labels]
    table = Table(
        "layer", "MaxVio", "dead", "alike", *(name.removeprefix("token ") for name in names), "cache", box=None
    )
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    if inspection.against is not None:
        table.add_column("moved", justify="right")
    for index, layer in enumerate(inspection.layers):
        hits, num_experts = layer["hits"], trace.num_experts[index]
        cells = [f"{layer['max_vio']:.2f}", str(len(layer["dead"])), str(len(layer["duplicates"]))]
        cells += [_told(layer["information"][name]) for name in names]
        cells.append(f"{hits[num_experts // 2] / max(1, int(layer['load'].sum())):.0%}")
        if inspection.against is not None:
            cells.append(f"{layer['movement']['changed']:.1%}")
        table.add_row(str(index), *cells)
    console.print(table)
    console.print(
        f"{totals['dead_experts']} of {totals['num_experts']} experts unused, {totals['duplicate_experts']} pairs "
        "alike. Domain, type, position: bits that an expert tells of its token, and standard deviations above chance. "
        "Cache: hits with room for half of a layer's experts.",
        highlight=False, style="dim",
    )  # fmt: skip


def _told(information: dict[str, Any]) -> str:
    """Bits above chance, and how sure that is."""
    if information["z"] is None:
        return f"{information['bits']:.3f}"
    return f"{information['bits']:.3f} {information['z']:+.0f}"
