"""`moesaic merge`: make one expert of several that are alike."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from moesaic.cli.fewer_experts import Subject, TextOptions, experts_before, report_of, show
from moesaic.cli.options import JsonFlag, ModelOptions, progress_bars

if TYPE_CHECKING:
    from moesaic.checkpoint.merge import Cluster

_MODEL, _TEXT = ModelOptions(), TextOptions()


def merge(
    model: str,
    out: Path,
    /,
    *,
    keep: int,
    text: TextOptions = _TEXT,
    loading: ModelOptions = _MODEL,
    json_output: JsonFlag = False,
) -> None:
    """Write MODEL with KEEP experts in each layer, the means of those that are alike, as a Hugging Face directory.

    The best experts by REAP lead, and each of the others joins the one whose outputs on --data are nearest to its own.
    In the mean an expert weighs as much as tokens visit it.

    Parameters
    ----------
    model
        A run directory, a Hugging Face directory, or a hub id.
    out
        The directory to make; it must not hold anything yet.
    keep
        Experts that each layer has then.
    json_output
        One JSON object with perplexity, bytes and clusters.
    """
    from moesaic.analysis.expert_scores import SAMPLED_TOKENS, best_experts, nearest_leads
    from moesaic.checkpoint.merge import Cluster
    from moesaic.checkpoint.merge import merge as write_merged

    text.check("experts are compared")
    source, moe, layers = experts_before(model, out, keep, loading)
    console = Console(stderr=json_output)
    with progress_bars(console) as progress:
        subject = Subject(source, text, loading, progress)
        scores = subject.before(scored=True, sampled_tokens=SAMPLED_TOKENS)
        clusters: dict[int, list[Cluster]] = {}
        for layer, each in zip(layers, scores, strict=True):
            leads = best_experts(each.by("reap"), keep, moe.n_group)
            joined = nearest_leads(each.distance, leads, moe.n_group)
            clusters[layer] = [Cluster.of(members, each.tokens) for members in joined]
        made = write_merged(source, out, clusters, dtype=loading.dtype, offline=loading.offline, progress=progress)
        subject.after(out)
    report = report_of(
        made,
        subject,
        clusters={layer: [list(cluster.experts) for cluster in each] for layer, each in clusters.items()},
        weights={layer: [list(cluster.weights) for cluster in each] for layer, each in clusters.items()},
    )
    how = f"merged by their outputs on {subject.tokens['scored']:,} tokens"
    show(console, report, out, how, [_line(layer, each) for layer, each in clusters.items()], as_json=json_output)


def _line(layer: int, clusters: "list[Cluster]") -> str:
    joined = ["+".join(map(str, cluster.experts)) for cluster in clusters if len(cluster.experts) > 1]
    return f"  layer {layer} joins {', '.join(joined)}"
