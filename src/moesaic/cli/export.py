"""`moesaic export`: a run becomes a Hugging Face directory."""

import shlex
import sys
from pathlib import Path

from rich.console import Console

from moesaic.cli.options import this_command


def export(run: str, out: Path, /) -> None:
    """Write RUN as a Hugging Face directory that transformers, vLLM and llama.cpp's converter read.

    Parameters
    ----------
    run
        A run directory (or any other MODEL).
    out
        The directory to make; it must not hold anything yet.
    """
    from moesaic.checkpoint.load import load, load_tokenizer
    from moesaic.checkpoint.save import export_model

    family = export_model(load(run), load_tokenizer(run), out)
    Console().print(
        f"wrote {out} as {family}\n  {this_command()} generate {out} --prompt 'def '\n"
        f"  {shlex.quote(sys.executable)} -c "
        f"\"from transformers import AutoModelForCausalLM as M; print(M.from_pretrained('{out}'))\"",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
