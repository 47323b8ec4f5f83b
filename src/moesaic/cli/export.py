"""`moesaic export`: a run becomes a Hugging Face directory."""

from pathlib import Path

from rich.console import Console


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
        f"wrote {out} as {family}\n  moesaic generate {out} --prompt 'def '\n"
        f"  python -c \"from transformers import AutoModelForCausalLM as M; print(M.from_pretrained('{out}'))\"",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
