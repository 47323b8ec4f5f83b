"""The pictures of an inspection as PNG files, for places where a page cannot go."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moesaic.analysis.inspection import Inspection
from moesaic.analysis.plots import DENSE, SPARSE, STYLE, ratio_bar

MOST_PANELS = 12
"""Layers of which each gets a picture of its own; of more, as many are evenly chosen."""


def write_plots(directory: Path, inspection: Inspection) -> list[Path]:
    """Writes load.png, information.png, domains.png, pairs.png and cache.png, and moved.png of two models."""
    directory.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figures = {
            "load": _load(inspection),
            "information": _information(inspection),
            "pairs": _panels(inspection, "lift", "Experts of one token, against chance", "expert"),
            "cache": _cache(inspection),
        }
        if len(inspection.trace.sources) > 1:
            figures["domains"] = _domains(inspection)
        if inspection.against is not None:
            figures["moved"] = _moved(inspection)
        paths = []
        for name, figure in sorted(figures.items()):
            path = directory / f"{name}.png"
            FigureCanvasAgg(figure).print_png(path)
            paths.append(path)
    return paths


def _load(inspection: Inspection) -> Figure:
    """A row for each layer; experts that a layer does not have stay white."""
    layers = inspection.layers
    relative = np.full((len(layers), max(inspection.trace.num_experts)), np.nan)
    for index, layer in enumerate(layers):
        load_E = layer["load"]
        relative[index, : len(load_E)] = load_E * len(load_E) / max(1, load_E.sum())
    figure, (axes,) = _figure(1, width=9, height=1.6 + 0.22 * len(layers))
    image = _heat(axes, relative)
    axes.set(title="Expert load, relative to a fair share", xlabel="expert", ylabel="layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    ratio_bar(figure, image, [axes])
    return figure


def _information(inspection: Inspection) -> Figure:
    names = [label.name for label in inspection.labels if len(label.values) > 1]
    figure, panels = _figure(max(1, len(names)), width=8, height=2.4 * max(1, len(names)))
    places = np.arange(len(inspection.layers))
    for name, axes in zip(names, panels, strict=False):
        found = [layer["information"][name] for layer in inspection.layers]
        axes.bar(places, [one["bits"] for one in found], color=SPARSE, label="of this routing")
        axes.bar(places, [one["chance_bits"] or 0 for one in found], color="#8a8577", label="by chance")
        axes.set(title=f"What an expert tells of the {name}", ylabel="bits")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].legend()
    panels[-1].set_xlabel("layer")
    return figure


def _domains(inspection: Inspection) -> Figure:
    chosen = _evenly(len(inspection.layers))
    figure, panels = _figure(len(chosen), width=9, height=1 + len(chosen) * (0.5 + 0.3 * len(inspection.trace.sources)))
    image = None
    for index, axes in zip(chosen, panels, strict=True):
        counts_CE = inspection.layers[index]["counts"]["domain"]
        share_CE = counts_CE / np.maximum(1, counts_CE.sum(1, keepdims=True))
        share_E = counts_CE.sum(0) / max(1, counts_CE.sum())
        relative = np.divide(share_CE, share_E, out=np.full(share_CE.shape, np.nan), where=share_E > 0)
        image = _heat(axes, relative)
        axes.set_yticks(range(len(inspection.trace.sources)), inspection.trace.sources)
        axes.set_ylabel(f"layer {index}")
    panels[0].set_title("Use of an expert by a domain, relative to its use by all text")
    panels[-1].set_xlabel("expert")
    ratio_bar(figure, image, panels)
    return figure


def _panels(inspection: Inspection, key: str, title: str, label: str) -> Figure:
    chosen = _evenly(len(inspection.layers))
    columns = min(4, len(chosen))
    figure = Figure(figsize=(2.9 * columns + 1, 2.9 * -(-len(chosen) // columns)), dpi=130, layout="constrained")
    panels = figure.subplots(-(-len(chosen) // columns), columns, squeeze=False).ravel().tolist()
    image = None
    for index, axes in zip(chosen, panels, strict=False):
        values = np.array(inspection.layers[index][key], dtype=float)
        np.fill_diagonal(values, np.nan)
        image = _heat(axes, values)
        axes.set(title=f"layer {index}", xlabel=label, ylabel=label)
    for axes in panels[len(chosen) :]:
        axes.set_visible(False)
    figure.suptitle(title)
    ratio_bar(figure, image, panels[: len(chosen)])
    return figure


def _cache(inspection: Inspection) -> Figure:
    figure, (axes,) = _figure(1, width=8, height=4.8)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(inspection.layers)))
    for index, layer in enumerate(inspection.layers):
        hits = layer["hits"] / max(1, int(layer["load"].sum()))
        name = f"layer {index}" if index in (0, len(inspection.layers) - 1) else None
        axes.plot(np.linspace(0, 1, len(hits)), hits, color=colours[index], label=name)
    axes.plot([0, 1], [0, 1], color="#8a8577", linestyle=":", label="of random routing, about")
    axes.set(title="What a cache would hit", xlabel="part of a layer's experts in the cache", ylabel="hit rate")
    axes.legend()
    return figure


def _moved(inspection: Inspection) -> Figure:
    figure, (axes,) = _figure(1, width=8, height=3.6)
    places = np.arange(len(inspection.layers))
    moved = [layer["movement"] for layer in inspection.layers]
    axes.bar(places - 0.2, [one["changed"] for one in moved], 0.4, color=SPARSE, label="another set of experts")
    axes.bar(places + 0.2, [one["first_changed"] for one in moved], 0.4, color=DENSE, label="another first expert")
    axes.set(title=f"Tokens that {inspection.against} routes otherwise", xlabel="layer", ylabel="share of tokens")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure


def _figure(rows: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    return figure, figure.subplots(rows, 1, sharex=True, squeeze=False).ravel().tolist()


def _heat(axes: Axes, relative: np.ndarray) -> Any:
    axes.grid(False)
    shown = np.log2(np.clip(relative, 0.25, 4))
    return axes.imshow(shown, aspect="auto", cmap="RdBu_r", vmin=-2, vmax=2, interpolation="nearest")


def _evenly(number: int) -> Sequence[int]:
    count = min(number, MOST_PANELS)
    return [index * number // count for index in range(count)]
