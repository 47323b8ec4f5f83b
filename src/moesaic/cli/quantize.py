"""`moesaic quantize`: a model's weights in 8 or 4 bits."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from moesaic.cli.options import progress_bars, this_command
from moesaic.errors import UsageError

if TYPE_CHECKING:
    from moesaic.checkpoint.quantize import Quantized

NAMES = {"lm_head": "head", "mlp": "feed-forwards", "shared_experts": "shared experts", "hot_experts": "hot experts"}


def quantize(
    model: str,
    out: Path,
    /,
    *,
    scheme: Literal["int8", "int4", "mxfp4"],
    group_size: Literal[32, 64] = 32,
    hot: Path | None = None,
    hot_share: float | None = None,
    bits: float | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    offline: Annotated[bool, Parameter(negative="")] = False,
    revision: str | None = None,
) -> None:
    """Write MODEL with packed weights, for inference: a directory for generate, chat and eval.

    Embeddings, norms and routers stay as they are.

    Parameters
    ----------
    model
        A run directory, a Hugging Face directory, or a hub id.
    out
        The directory to make; it must not hold anything yet.
    scheme
        int8: 8 bits for all matrices. int4: 4 bits for the experts (in a dense model, for the feed-forwards) and for
        the head, 8 for the rest. mxfp4: experts that were published so, without loss.
    group_size
        Weights that share a factor; with 64 the model is a little smaller and less exact.
    hot
        With int4, a trace of `moesaic inspect --trace`: the experts that it used most get 8 bits.
    hot_share
        With --hot, the share of all experts that get 8 bits, such as 0.25.
    bits
        With --hot and in place of --hot-share, how many bits an expert's weight may take on average, such as 5.2.
    dtype
        Type of what stays as it is; auto keeps what is stored.
    offline
        Take a model of the hub from the local cache, and ask nobody.
    revision
        Branch, tag or commit of a model on the hub.
    """
    if hot is None and not (hot_share is None and bits is None):
        flag = "--bits" if hot_share is None else "--hot-share"
        raise UsageError(
            f"{flag} gives 8 bits to the experts that were used most, and no record says which; add --hot TRACE, which "
            "`moesaic inspect MODEL --data FILE --trace TRACE` writes"
        )
    # Imported late: a mistyped flag should not wait for torch.
    from moesaic.checkpoint.quantize import quantize as write_quantized
    from moesaic.model.mixed_precision import HotBudget

    budget = None if hot is None else HotBudget(hot, hot_share, bits)
    console = Console()
    with progress_bars(console) as progress:
        made = write_quantized(
            model, out, scheme, group_size=group_size, hot=budget, dtype=dtype, offline=offline, revision=revision,
            progress=progress,
        )  # fmt: skip
    _print(console, made, out)


def _print(console: Console, made: "Quantized", out: Path) -> None:
    dtype = str(made.dtype).removeprefix("torch.")
    console.print(
        f"wrote {out} as {made.quantization.scheme}: {_size(made.plain_nbytes)} in {dtype} -> {_size(made.nbytes)}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    table = Table("", "format", "weights", "bits per weight", "relative error", box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for name, kind in made.kinds.items():
        bits = f"{8 * kind.nbytes / kind.weights:.2f}"
        table.add_row(NAMES.get(name, name), kind.format, f"{kind.weights:,}", bits, f"{kind.relative_error:.2%}")
    table.add_row("the rest", dtype, f"{made.plain_weights:,}", str(8 * made.dtype.itemsize), "0.00%")
    console.print(table)
    if made.quantization.hot:
        _print_plan(console, made)
    console.print(
        f"{made.packed_share:.1%} of the bytes were packed; {8 * made.nbytes / made.weights:.2f} bits per weight\n"
        f"  {this_command()} generate {shlex.quote(str(out))} --prompt 'def '",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _print_plan(console: Console, made: "Quantized") -> None:
    counts = [len(numbers) for numbers in made.quantization.hot]
    total = made.num_experts * len(counts)
    console.print(
        f"{sum(counts)} of {total} experts are hot and took {made.hot_uses:.0%} of the assignments of the record; "
        f"{made.expert_bits:.2f} bits per expert weight\n"
        f"hot ones of {made.num_experts}, by layer: {' '.join(map(str, counts))}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _size(nbytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes / 1000:.1f} kB"
