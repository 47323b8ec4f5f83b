"""`moesaic eval`: perplexity, bits per byte and balance on a text file."""

import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moesaic.cli.options import JsonFlag, ModelOptions, existing_file
from moesaic.errors import UsageError

_MODEL = ModelOptions()
LABELS = {"max_vio": "MaxVio", "loss": "loss (nats per token)"}


def evaluate(
    model: str,
    /,
    *,
    data: Path,
    sequence_length: int = 256,
    batch_size: int = 8,
    trace: Path | None = None,
    loading: ModelOptions = _MODEL,
    json_output: JsonFlag = False,
) -> None:
    """Score MODEL on the text of a file.

    Parameters
    ----------
    model
        A run directory, a Hugging Face directory, or a hub id.
    data
        A UTF-8 text file. A last window shorter than --sequence-length is left out.
    sequence_length
        Tokens per window; windows do not overlap and see nothing before them.
    batch_size
        Windows per forward pass.
    trace
        Keep the routing of the text in this folder, for `moesaic inspect FOLDER`.
    json_output
        One JSON object with perplexity, bits_per_byte and max_vio.
    """
    import torch

    from moesaic.cli.tracing import recorded_passes
    from moesaic.train.data import tokenize_for_evaluation, validation_batches
    from moesaic.train.evaluate import evaluate as evaluate_model

    for flag, value in (("--sequence-length", sequence_length), ("--batch-size", batch_size)):
        if value < 1:
            raise UsageError(f"{flag} is {value}; it must be 1 or more")
    path = existing_file(data, "--data")
    transformer, tokenizer = loading.load_over_ranks(model, trace)
    token_file, _ = tokenize_for_evaluation(tokenizer, str(path), max_bytes=path.stat().st_size)
    if not len(token_file):
        raise UsageError(f"--data {data} holds no text to score; name another file")
    positions = transformer.config.max_position_embeddings
    if sequence_length > positions:
        raise UsageError(f"--sequence-length is {sequence_length} but the model has {positions} positions; lower it")
    batches = validation_batches(token_file, sequence_length, batch_size, len(token_file))
    with recorded_passes(trace, model, transformer, tokenizer, [path.stem]):
        result = evaluate_model(transformer, batches, torch.tensor(tokenizer.token_bytes()))
    report = {
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "loss": result.loss,
        "tokens": result.tokens,
        "max_vio": result.max_vio,
    }
    if json_output:
        print(json.dumps(report))
    else:
        _show(report, f"{model} on {data}")


def _show(report: Mapping[str, float | None], title: str) -> None:
    console = Console()
    console.print(title, highlight=False, soft_wrap=True)
    table = Table(show_header=False, box=None)
    for name, value in report.items():
        shown = "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"
        table.add_row(LABELS.get(name, name.replace("_", " ")), shown)
    console.print(table)
