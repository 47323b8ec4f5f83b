"""The page of an inspection: overview first, then a layer, then an expert.

    Inspection ─► headline (here) ─┐
               ─► numbers (JSON)  ─┴─► page/inspect.html + .css + .js ─► one HTML file

Matrices of experts by experts go as one byte a cell. All text is escaped where it enters.

E experts of a layer.
"""

import base64
import html
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.analysis.html_page import fill, read, script_safe
from moesaic.analysis.inspection import Inspection, as_json

SCRIPTS = (
    "common.js", "inspect_state.js", "inspect_overview.js", "inspect_layer.js", "inspect_expert.js", "inspect_text.js",
)  # fmt: skip
MAX_MATRIX_BYTES = 6_000_000
"""Of all matrices of experts by experts; of larger models the later kinds of MATRICES are left out."""
MATRICES = ("lift", "output_similarity", "weight_similarity", "onward")
MAX_TEXT_NUMBERS = 250_000
"""Expert numbers of all tokens that are shown as text, over all layers."""
MAX_TEXT_TOKENS = 400
"""Of each source."""
MANY_EXPERTS = 2000
"""Beyond, fewer tokens and contexts of each are told."""
SURE = 0.05
"""A p above which a specialisation is said to be no more than chance."""


def write_page(path: Path, inspection: Inspection) -> None:
    # Tokens can hold half of a character, which UTF-8 cannot.
    path.write_text(render_page(inspection), encoding="utf-8", errors="replace")


def render_page(inspection: Inspection) -> str:
    """The whole page as text."""
    return fill("inspect.html", {
        "css": read("report.css", "inspect.css"),
        "js": read(*SCRIPTS),
        "data": script_safe(payload(inspection)),
        "title": html.escape(f"{inspection.trace.name}: its experts"),
        "headline": html.escape(headline(inspection)),
        "lede": "".join(f"<p>{html.escape(sentence)}</p>" for sentence in lede(inspection)),
        "against_hidden": "" if inspection.against else " hidden",
        "against": html.escape(inspection.against or ""),
        "model": html.escape(inspection.trace.name),
    })  # fmt: skip


def headline(inspection: Inspection) -> str:
    """What the experts tell most of, above what chance would."""
    most: dict[str, float] = {}
    for above, name, _, _ in _findings(inspection):
        most[name] = max(above, most.get(name, 0.0))
    names = [_short(name) for name, above in sorted(most.items(), key=lambda item: -item[1]) if above > 0]
    if not names:
        return "These experts tell nothing of the text that chance would not"
    return f"These experts sort tokens by {names[0]}" + (f" first, then by {names[1]}" if len(names) > 1 else "")


def lede(inspection: Inspection) -> list[str]:
    """The findings in a few sentences, unfavourable ones included."""
    trace, totals = inspection.trace, inspection.totals()
    sentences = [
        f"{trace.name} sent {len(trace):,} tokens ({', '.join(trace.sources)}) through {trace.num_layers} "
        f"{'layer' if trace.num_layers == 1 else 'layers'} of experts, {totals['num_experts']:,} experts in all."
    ]
    for label in inspection.labels:
        found = [finding for finding in _findings(inspection) if finding[1] == label.name]
        if not found:
            continue
        above, name, layer, information = max(found, key=lambda finding: finding[0])
        if above <= 0:
            sentences.append(f"Of a token's {_short(name)} they tell no more than chance would, in any layer.")
            continue
        share = above / information["label_bits"] if information["label_bits"] else 0.0
        part = f"{share:.0%}" if share >= 0.01 else "less than 1%"
        sentences.append(
            f"An expert of layer {layer} tells {above:.2g} bits of the {_short(name)} of its token above chance, "
            f"{part} of all there is to know."
        )
    dead, alike = totals["dead_experts"], totals["duplicate_experts"]
    unused = f"{dead:,} {'expert was' if dead == 1 else 'experts were'} never used" if dead else "Every expert was used"
    pairs = f", and {alike:,} {'pair is' if alike == 1 else 'pairs are'} nearly the same" if alike else ""
    return [*sentences, f"{unused}{pairs}."]


def _short(label: str) -> str:
    """As a sentence has it that names the token anyway."""
    return label.removeprefix("token ")


def payload(inspection: Inspection) -> dict[str, Any]:
    """What the scripts draw. Finite numbers, texts and None only."""
    trace = inspection.trace
    many = sum(trace.num_experts) > MANY_EXPERTS
    left = MAX_MATRIX_BYTES // max(1, sum(number**2 for number in trace.num_experts))
    matrices = MATRICES[: max(1, left)]
    layers = [_layer(layer, matrices, many) for layer in inspection.layers]
    return as_json({
        "model": trace.name,
        "against": inspection.against,
        "tokens": len(trace),
        "sources": trace.sources,
        "labels": [{"name": label.name, "values": list(label.values)} for label in inspection.labels],
        "left_out": list(MATRICES[len(matrices) :]),
        "layers": layers,
        "texts": list(_texts(inspection)),
    })  # fmt: skip


def _findings(inspection: Inspection) -> Iterator[tuple[float, str, int, Mapping[str, Any]]]:
    """(bits above chance, label, layer, information) of what is told; 0 bits where chance tells as much."""
    for index, layer in enumerate(inspection.layers):
        for name, information in layer["information"].items():
            if information["p"] is None:
                continue
            above = information["sample_bits"] - information["chance_bits"]
            yield (above if information["p"] <= SURE else 0.0), name, index, information


def _layer(layer: Mapping[str, Any], matrices: tuple[str, ...], many: bool) -> dict[str, Any]:
    kept = dict(layer)
    del kept["coactivation"]
    for name in MATRICES:
        values = kept.pop(name, None)
        if values is None or name not in matrices:
            continue
        span = np.log2(np.maximum(values, 2.0**-4)) / 4 if name in ("lift", "onward") else np.asarray(values)
        kept[name] = _bytes_of_cells(span)
    if "movement" in kept:
        movement = dict(kept["movement"])
        movement["flow"] = _largest(movement["flow"], 12)
        kept["movement"] = movement
    if many:
        kept["typical"] = [tokens[:6] for tokens in kept["typical"]]
        kept["contexts"] = [contexts[:2] for contexts in kept["contexts"]]
    return kept


def _bytes_of_cells(span: np.ndarray) -> str:
    """Cells from -1 to 1 as bytes from 1 to 255, 0 for NaN, in base 64."""
    cells = np.where(np.isnan(span), 0, np.rint(np.clip(np.nan_to_num(span), -1, 1) * 127) + 128)
    return base64.b64encode(cells.astype(np.uint8).tobytes()).decode("ascii")


def _largest(flow: np.ndarray, number: int) -> list[tuple[int, int, float]]:
    order = np.argsort(-flow, axis=None, kind="stable")[:number]
    rows, columns = np.unravel_index(order, flow.shape)
    return [(int(i), int(j), float(flow[i, j])) for i, j in zip(rows, columns, strict=True) if flow[i, j] > 0]


def _texts(inspection: Inspection) -> Iterator[dict[str, Any]]:
    """A stretch of each source: its tokens, and by layer each token's experts, that of the greatest weight first."""
    trace = inspection.trace
    tokens, sources = trace.tokens, len(trace.sources)
    width = min(8, max(trace.layer(layer).expert_ids.shape[1] for layer in range(trace.num_layers)))
    room = MAX_TEXT_NUMBERS // (trace.num_layers * width * sources)
    stretches = [
        np.flatnonzero(tokens.source_ids == source)[: max(32, min(MAX_TEXT_TOKENS, room))] for source in range(sources)
    ]
    experts: list[list[list[list[int]]]] = [[] for _ in stretches]
    for layer in range(trace.num_layers):
        rows = trace.layer(layer)
        for stretch, of_source in zip(stretches, experts, strict=True):
            ids_TK, weights_TK = rows.expert_ids[stretch], np.abs(rows.weights[stretch])
            order_TK = np.argsort(-np.where(ids_TK < 0, -1, weights_TK), axis=1, kind="stable")[:, :width]
            of_source.append(np.take_along_axis(ids_TK, order_TK, 1).tolist())
    for source, stretch in enumerate(stretches):
        texts = [trace.vocabulary.get(int(i), b"").decode("utf-8", "replace") for i in tokens.token_ids[stretch]]
        if trace.vocabulary and len(stretch):
            yield {"source": source, "tokens": texts, "experts": experts[source]}
