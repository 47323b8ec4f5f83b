"""The report's pictures as PNG files, for places where a page cannot go."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from moesaic.analysis.comparison import Comparison, Point, Row, RunCurve, relative_load

SPARSE, DENSE, INK = "#4338ca", "#b45309", "#1d1f24"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b8b3a8",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 13,
    "axes.titlepad": 10,
    "axes.grid": True,
    "grid.color": "#ece8e0",
    "axes.axisbelow": True,
    "legend.frameon": False,
    # Names of domains are text, even when they hold a dollar sign.
    "text.parse_math": False,
}
MAX_HEAT_COLUMNS = 240


def write_plots(directory: Path, comparison: Comparison) -> list[Path]:
    """Write loss_{tokens,flops,seconds}.png, and expert_load.png and domain_experts.png where there is data."""
    with matplotlib.rc_context(STYLE):
        figures = {f"loss_{axis}": _loss_figure(comparison, axis) for axis in LOSS_AXES}
        rows = [row for row in comparison.sparse.rows if row.get("load") and row.get("kind") == "train"]
        if rows:
            figures["expert_load"] = _load_figure(rows)
        if comparison.domain_load:
            figures["domain_experts"] = _domain_figure(comparison)
        paths = []
        for name, figure in figures.items():
            path = directory / f"{name}.png"
            FigureCanvasAgg(figure).print_png(path)
            paths.append(path)
    return paths


LOSS_AXES: dict[str, tuple[str, EngFormatter, Callable[[RunCurve, Row], float]]] = {
    "tokens": ("tokens", EngFormatter(), lambda run, row: row["tokens"]),
    "flops": ("training FLOPs", EngFormatter(), lambda run, row: row["tokens"] * run.flops_per_token),
    "seconds": ("wall clock, evaluation excluded", EngFormatter(unit="s"), lambda run, row: row["seconds"]),
}


def _loss_figure(comparison: Comparison, axis: str) -> Figure:
    label, formatter, value = LOSS_AXES[axis]
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for run, colour, form in ((comparison.dense, DENSE, "s--"), (comparison.sparse, SPARSE, "o-")):
        x = [value(run, row) for row in run.evaluations]
        y = [row["val_loss"] for row in run.evaluations]
        marker_size = 5 if len(x) <= 40 else 0
        axes.plot(x, y, form, color=colour, linewidth=2, markersize=marker_size, label=f"{run.name}: {y[-1]:.4f}")
    target = comparison.dense.val_loss
    axes.axhline(target, color=INK, linewidth=1, linestyle=":", alpha=0.6)
    title = "Sparse never reaches the dense model's final loss"
    if comparison.sparse_reached is not None:
        title = _mark_crossing(axes, comparison.sparse_reached, axis, comparison.ratio(axis))  # type: ignore[arg-type]
    axes.set(title=title, xlabel=label, ylabel="validation loss (nats per token)", ylim=_loss_limits(comparison))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(formatter)
    axes.legend()
    return figure


def _mark_crossing(axes: Axes, point: Point, axis: str, ratio: float | None) -> str:
    """Ring the place where sparse reaches the dense final loss; returns the title that says so."""
    axes.scatter(
        [getattr(point, axis)], [point.loss], s=170, facecolors="none", edgecolors=INK, linewidths=1.8, zorder=3
    )
    words = {"tokens": "tokens", "flops": "FLOPs", "seconds": "time"}[axis]
    return f"Dense final loss after {ratio:.2f} × the {words}" if ratio is not None else "Loss"


def _loss_limits(comparison: Comparison) -> tuple[float, float]:
    """From the lowest loss to the highest of the evaluations after the first 6 % of the run, plus a margin."""
    runs = (comparison.sparse, comparison.dense)
    rows = [(run, row) for run in runs for row in run.evaluations]
    late = [row["val_loss"] for run, row in rows if row["step"] >= 0.06 * run.evaluations[-1]["step"]]
    low, high = min(row["val_loss"] for _, row in rows), max(late)
    pad = max(0.02, 0.06 * (high - low))
    return low - pad, high + pad


def _load_figure(rows: Sequence[Row]) -> Figure:
    """One heat map per layer: x = step, y = expert, colour = share relative to uniform."""
    num_layers = len(rows[0]["load"])
    columns = max(1, -(-num_layers // 8))
    lines = -(-num_layers // columns)
    figure = Figure(figsize=(9 if columns == 1 else 4.5 * columns, 1.0 + 1.5 * lines), dpi=130, layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, squeeze=False).ravel().tolist()
    edges = np.linspace(0, len(rows), min(MAX_HEAT_COLUMNS, len(rows)) + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, len(rows)))
    image = None
    for layer, axes in enumerate(panels[:num_layers]):
        share_SE = np.nan_to_num(np.array([row["load"][layer] for row in rows], dtype=float))
        relative_ES = (np.add.reduceat(share_SE, edges) / counts[:, None] * share_SE.shape[1]).T
        image = axes.imshow(
            np.log2(np.clip(relative_ES, 0.25, 4)), aspect="auto", cmap="RdBu_r", vmin=-2, vmax=2,
            interpolation="nearest", extent=(rows[0]["step"], rows[-1]["step"] + 1, share_SE.shape[1] - 0.5, -0.5),
        )  # fmt: skip
        axes.grid(False)
        axes.set_ylabel(f"layer {layer}")
        axes.yaxis.get_major_locator().set_params(integer=True)
    for axes in panels[num_layers:]:
        axes.set_visible(False)
    panels[0].set_title("Expert load, relative to a fair share")
    for axes in panels[max(0, num_layers - columns) : num_layers]:
        axes.set_xlabel("step")
    ratio_bar(figure, image, panels)
    return figure


def _domain_figure(comparison: Comparison) -> Figure:
    """One matrix per layer: rows = domains, columns = experts, colour = use relative to all text."""
    layers = [relative_load(counts) for counts in comparison.domain_load]
    num_layers, num_domains, num_experts = len(layers), len(layers[0]), len(layers[0][0])
    height = 1.2 + num_layers * (0.5 + 0.32 * num_domains)
    figure = Figure(figsize=(max(8.0, min(16.0, 2.5 + 0.4 * num_experts)), height), dpi=130, layout="constrained")
    panels = figure.subplots(num_layers, 1, sharex=True, squeeze=False).ravel().tolist()
    image = None
    for layer, (relative, axes) in enumerate(zip(layers, panels, strict=True)):
        relative_DE = np.array(relative, dtype=float)
        image = axes.imshow(np.log2(np.clip(relative_DE, 0.25, 4)), aspect="auto", cmap="RdBu_r", vmin=-2, vmax=2)
        axes.set_yticks(range(num_domains), list(comparison.domains))
        axes.set_ylabel(f"layer {layer}")
        axes.grid(False)
        if num_experts <= 24:
            for (domain, expert), value in np.ndenumerate(relative_DE):
                colour = "white" if abs(np.log2(max(value, 0.25))) > 1.2 else INK
                text = f"{value:.1f}" if np.isfinite(value) else "–"
                axes.text(expert, domain, text, ha="center", va="center", fontsize=8, color=colour)
    if num_experts <= 24:
        panels[-1].set_xticks(range(num_experts))
    panels[-1].set_xlabel("expert")
    panels[0].set_title("Use of an expert by a domain, relative to its use by all text")
    ratio_bar(figure, image, panels)
    return figure


def ratio_bar(figure: Figure, image: object, panels: Sequence[Axes]) -> None:
    """The key to colours from a quarter to four times."""
    bar = figure.colorbar(image, ax=list(panels), ticks=[-2, -1, 0, 1, 2], shrink=min(1.0, 3 / len(panels) + 0.25))  # type: ignore[arg-type]
    bar.ax.set_yticklabels(["¼", "½", "1 ×", "2 ×", "4 ×"])
    bar.outline.set_visible(False)  # type: ignore[operator]
