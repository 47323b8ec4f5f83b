"""`moesaic upcycle`: a dense model becomes a sparse one that computes the same."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.console import Console

from moesaic.accounting import count_parameters
from moesaic.cli.options import progress_bars, this_command

if TYPE_CHECKING:
    from moesaic.checkpoint.upcycle import Upcycled

ONE_WEIGHT = "the one weight of every token is 1, so no gradient reaches the routers; with --top-k 2 they can learn\n"


def upcycle(
    dense: str,
    out: Path,
    /,
    *,
    num_experts: int,
    top_k: int,
    method: Literal["copy", "granular"] = "copy",
    granularity: int = 1,
    noise: float = 0.0,
    seed: int = 0,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    offline: Annotated[bool, Parameter(negative="")] = False,
    revision: str | None = None,
) -> None:
    """Make a sparse model of DENSE, with the same logits, as a Hugging Face directory.

    Its experts start as copies, or shards, of the dense MLP and its routers at random; training makes them differ.

    Parameters
    ----------
    dense
        A Hugging Face directory, a hub id, or a run directory, of a dense model.
    out
        The directory to make; it must not hold anything yet.
    num_experts
        Experts in each layer.
    top_k
        Experts that each token visits.
    method
        copy: every expert is the whole MLP. granular: an expert is a shard of it, and a token visits groups of experts
        that make it up.
    granularity
        Shards that the MLP is cut into, for granular; --num-experts and --top-k are multiples of it.
    noise
        Spread of what is added to the experts' weights, relative to theirs; above 0 the logits are no longer the same.
    seed
        Of routers and noise.
    dtype
        Type of the weights; auto keeps what is stored.
    offline
        Take a model of the hub from the local cache, and ask nobody.
    revision
        Branch, tag or commit of a model on the hub.
    """
    # Imported late: a mistyped flag should not wait for torch.
    from moesaic.checkpoint.upcycle import Upcycling
    from moesaic.checkpoint.upcycle import upcycle as write_upcycled

    how = Upcycling(
        num_experts=num_experts, top_k=top_k, method=method, granularity=granularity, noise=noise, seed=seed
    )
    console = Console()
    with progress_bars(console) as progress:
        made = write_upcycled(dense, out, how, dtype=dtype, offline=offline, revision=revision, progress=progress)
    console.print(_report(made, out), markup=False, highlight=False, soft_wrap=True)


def _report(made: "Upcycled", out: Path) -> str:
    assert made.sparse.moe is not None
    experts, top_k = made.sparse.moe.num_experts, made.sparse.moe.num_experts_per_tok
    before, after = count_parameters(made.dense), count_parameters(made.sparse)
    return (
        f"wrote {out} as {made.family}, {experts} experts a layer, {top_k} a token\n"
        f"{ONE_WEIGHT if made.sparse.moe.has_constant_weights else ''}"
        f"  parameters       {before.total:>17,} -> {after.total:,}\n"
        f"  active per token {before.active:>17,} -> {after.active:,}\n"
        f"  {this_command()} generate {shlex.quote(str(out))} --prompt 'def '"
    )
