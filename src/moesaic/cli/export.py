"""`moesaic export`: a run becomes a Hugging Face directory."""

import shlex
import sys
from pathlib import Path

from rich.console import Console

from moesaic.cli.options import ModelOptions, this_command

_MODEL = ModelOptions()


def export(run: str, out: Path, /, *, loading: ModelOptions = _MODEL) -> None:
    """Write RUN as a Hugging Face directory that transformers, vLLM and llama.cpp's converter read.

    Parameters
    ----------
    run
        A run directory (or any other MODEL).
    out
        The directory to make; it must not hold anything yet.
    """
    from moesaic.checkpoint.save import export_model

    transformer, tokenizer = loading.load(run)
    family = export_model(transformer, tokenizer, out)
    Console().print(
        f"wrote {out} as {family}\n  {this_command()} generate {out} --prompt 'def '\n"
        f"  {shlex.quote(sys.executable)} -c "
        f"\"from transformers import AutoModelForCausalLM as M; print(M.from_pretrained('{out}'))\"",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
