"""`moesaic export`: a run becomes a Hugging Face directory."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console

from moesaic.cli.options import this_command


def export(
    run: str,
    out: Path,
    /,
    *,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    offline: Annotated[bool, Parameter(negative="")] = False,
    revision: str | None = None,
) -> None:
    """Write RUN as a Hugging Face directory that transformers, vLLM and llama.cpp's converter read.

    Parameters
    ----------
    run
        A run directory (or any other MODEL).
    out
        The directory to make; it must not hold anything yet.
    dtype
        Type of the weights; auto keeps what is stored.
    offline
        Take a model of the hub from the local cache, and ask nobody.
    revision
        Branch, tag or commit of a model on the hub.
    """
    from moesaic.checkpoint.load import load, load_tokenizer
    from moesaic.checkpoint.resolve import resolve_model
    from moesaic.checkpoint.save import export_model, new_directory, require_outside

    directory = new_directory(out)  # before anything is read
    source = resolve_model(run, revision, offline)
    require_outside(directory, source)
    tokenizer = load_tokenizer(source)
    family = export_model(load(source, dtype=dtype, device="cpu", offline=offline), tokenizer, directory)
    reading = f"from transformers import AutoModelForCausalLM as M; print(M.from_pretrained({json.dumps(str(out))}))"
    Console().print(
        f"wrote {out} as {family}\n  {this_command()} generate {shlex.quote(str(out))} --prompt 'def '\n"
        f"  {shlex.quote(sys.executable)} -c {shlex.quote(reading)}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
