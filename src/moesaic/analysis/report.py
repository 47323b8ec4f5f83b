"""The report of a comparison: one self-contained HTML page, and PNG plots beside it.

    Comparison ─► verdict, tables (here) ─┐
               ─► thinned curves (JSON)  ─┼─► page/report.html + .css + .js ─► report.html
                                          └─► plots.py ─► *.png

The page reads nothing from a network: style, script and data are inlined. All text is escaped where it enters.
"""

import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from moesaic.analysis.comparison import LEVEL_MARGIN, Comparison, Point, Row, RunCurve, finite, relative_load
from moesaic.analysis.html_page import fill, read, script_safe
from moesaic.analysis.plots import write_plots

__all__ = ["Comparison", "Point", "RunCurve", "write_report"]

MAX_CURVE_POINTS = 300
"""Training losses are averaged down to this many points; evaluations are all kept."""
MAX_LOAD_COLUMNS = 120
MAX_LOAD_CELLS = 250_000
"""Cells of all load maps together, which bounds the page at about a megabyte."""

SCRIPTS = ("common.js", "loss.js", "experts.js")


def write_report(directory: Path, comparison: Comparison) -> Path:
    """Write report.html and its PNG plots into `directory` and return the path of the page."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "report.html"
    # A tokenizer can produce lone surrogates, which UTF-8 cannot hold.
    path.write_text(render_page(comparison), encoding="utf-8", errors="replace")
    write_plots(directory, comparison)
    return path


def render_page(comparison: Comparison) -> str:
    """The whole page as text."""
    load = load_history(comparison.sparse)
    parts = {
        "css": read("report.css"),
        "js": read(*SCRIPTS),
        "data": script_safe(_payload(comparison, load)),
        "outcome": comparison.outcome,
        "headline": html.escape(headline(comparison)),
        "lede": "".join(f"<p>{html.escape(sentence)}</p>" for sentence in lede(comparison)),
        "sparse_name": html.escape(comparison.sparse.name),
        "dense_name": html.escape(comparison.dense.name),
        "summary_rows": _summary_rows(comparison),
        "tokens_caption": _caption(comparison, "tokens"),
        "flops_caption": _caption(comparison, "flops"),
        "seconds_caption": _caption(comparison, "seconds"),
        "evaluation_table": _evaluation_table(comparison),
        "load_hidden": "" if load else " hidden",
        "load_table": _load_table(comparison.sparse) if load else "",
        "domains_hidden": "" if comparison.domain_load else " hidden",
        "samples_hidden": "" if comparison.samples else " hidden",
        "samples": "\n".join(_sample(prompt, completion) for prompt, completion in comparison.samples),
        "hardware": _definitions(comparison.hardware),
        "config": html.escape(json.dumps(comparison.config, indent=2, ensure_ascii=False, default=str)),
    }
    return fill("report.html", parts)


def headline(comparison: Comparison) -> str:
    """Who is ahead, with both validation losses."""
    sparse, dense = (f"{run.val_loss:.4f}" for run in (comparison.sparse, comparison.dense))
    if comparison.outcome == "level":
        return f"Level: sparse {sparse}, dense {dense} nats per token"
    return f"Sparse {'wins' if comparison.outcome == 'win' else 'loses'}: {sparse} against {dense} nats per token"


def lede(comparison: Comparison) -> list[str]:
    """The verdict in two or three sentences, unfavourable ones included."""
    sparse, dense = comparison.sparse, comparison.dense
    side = "below" if comparison.gain >= 0 else "above"
    first = (
        f"On text that neither model trained on, the sparse model ends {abs(comparison.gain):.4f} nats per token "
        f"{side} its dense twin, with {sparse.flops_per_token / dense.flops_per_token:.2f} × the FLOPs per token and "
        f"{sparse.parameters_total / dense.parameters_total:.1f} × the parameters."
    )
    if comparison.outcome == "level":
        first += f" One run of each cannot tell a difference below {LEVEL_MARGIN} from chance."
    tokens, seconds = comparison.ratio("tokens"), comparison.ratio("seconds")
    if comparison.sparse_reached is None or tokens is None or seconds is None:
        return [first, "It never reaches the dense model's final loss, in any count: tokens, FLOPs or seconds."]
    times = f"{duration(comparison.sparse_reached.seconds)} against {duration(comparison.dense_reached.seconds)}"
    bound = "at most " if comparison.reached_at_first_evaluation else ""
    second = f"It needs {bound}{tokens:.2f} × the tokens to reach the dense model's final loss"
    if seconds < 1:
        return [first, f"{second}, and {seconds:.2f} × the time: {times}."]
    return [first, f"{second}, but {seconds:.2f} × the time: {times}. By the clock the dense model is ahead here."]


def load_history(run: RunCurve) -> dict[str, Any] | None:
    """Expert load over the run: {"steps": one per column, "layers": [layer][expert][column] relative to uniform}.

    Several steps are averaged into a column. None when no row holds a load.
    """
    rows = [row for row in run.training if row.get("load")] or [row for row in run.evaluations if row.get("load")]
    if not rows:
        return None
    shape = [len(shares) for shares in rows[0]["load"]]
    columns = max(2, min(MAX_LOAD_COLUMNS, MAX_LOAD_CELLS // sum(shape)))
    groups = list(_groups(rows, columns))
    layers = [
        [
            [_mean(_clean(row["load"][layer][expert]) for row in group) * num_experts for group in groups]
            for expert in range(num_experts)
        ]
        for layer, num_experts in enumerate(shape)
    ]
    return {"steps": [group[-1]["step"] for group in groups], "layers": _rounded(layers, 2)}


def duration(seconds: float) -> str:
    """Seconds as a person reads them: `8.4 s`, `3:05 min`, `2:07 h`."""
    if seconds < 100:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}\u00a0h" if hours else f"{minutes}:{rest:02}\u00a0min"


def short(value: float) -> str:
    """12400000 as `12.4 M`, always three digits."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:#.3g}".rstrip(".") + f" {unit}"
    return f"{value:.3g}"


def _payload(comparison: Comparison, load: dict[str, Any] | None) -> dict[str, Any]:
    """What the scripts draw. Finite numbers and None only."""
    reached = comparison.sparse_reached
    domains = None
    if comparison.domain_load:
        layers = [relative_load(counts) for counts in comparison.domain_load]
        domains = {"names": list(comparison.domains), "layers": _rounded(layers, 3)}
    return {
        "runs": [
            {
                "role": role,
                "flops_per_token": run.flops_per_token,
                "train": _curve(run.training, "loss"),
                "eval": _series(run.evaluations, "val_loss"),
            }
            for role, run in (("sparse", comparison.sparse), ("dense", comparison.dense))
        ],
        "target": comparison.dense.val_loss,
        "crossing": {"tokens": reached.tokens, "seconds": reached.seconds} if reached else None,
        "ratios": {key: comparison.ratio(key) for key in ("tokens", "flops", "seconds")},
        "load": load,
        "domains": domains,
    }


def _series(rows: Sequence[Row], loss: str) -> dict[str, list[float]]:
    return {
        "step": [row["step"] for row in rows],
        "tokens": [row["tokens"] for row in rows],
        "seconds": [round(row["seconds"], 3) for row in rows],
        "loss": [round(row[loss], 5) for row in rows],
    }


def _curve(rows: Sequence[Row], loss: str) -> dict[str, list[float]]:
    """As `_series`, with neighbouring rows averaged down to MAX_CURVE_POINTS."""
    keys = ("step", "tokens", "seconds", loss)
    groups = _groups(rows, MAX_CURVE_POINTS)
    return _series([{key: _mean(row[key] for row in group) for key in keys} for group in groups], loss)


def _groups(rows: Sequence[Row], limit: int) -> list[Sequence[Row]]:
    """`rows` cut into at most `limit` stretches of nearly equal length."""
    count = min(limit, len(rows))
    edges = [index * len(rows) // count for index in range(count + 1)] if count else []
    return [rows[low:high] for low, high in pairwise(edges)]


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def _clean(value: Any) -> float:
    return finite(value) or 0.0


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, list):
        return [_rounded(item, digits) for item in value]
    return None if value is None else round(value, digits)


def _summary_rows(comparison: Comparison) -> str:
    sparse, dense = comparison.sparse, comparison.dense
    reached = comparison.sparse_reached.seconds if comparison.sparse_reached else None
    table: list[tuple[str, str, float | None, float | None, Callable[[float], str]]] = [
        ("Validation loss", "nats per token", sparse.val_loss, dense.val_loss, "{:.4f}".format),
        ("Bits per byte", "of held-out text", sparse.bits_per_byte, dense.bits_per_byte, "{:.4f}".format),
        ("Time to the dense model's final loss", "", reached, comparison.dense_reached.seconds, duration),
        ("Training time", "evaluation excluded", sparse.seconds, dense.seconds, duration),
        ("Tokens per second", "", sparse.tokens_per_second, dense.tokens_per_second, "{:,.0f}".format),
        ("Tokens", "", sparse.tokens, dense.tokens, short),
        ("Training FLOPs per token", "", sparse.flops_per_token, dense.flops_per_token, short),
        ("Parameters, active", "per token", sparse.parameters_active, dense.parameters_active, short),
        ("Parameters, total", "", sparse.parameters_total, dense.parameters_total, short),
        ("MaxVio", "busiest expert above its fair share", sparse.max_vio, dense.max_vio, "{:.2f}".format),
    ]
    rows = []
    for index, (name, unit, left, right, form) in enumerate(table):
        absent = ("never", "–") if name.startswith("Time to") else ("–", "–")
        cells = [form(value) if value is not None else text for value, text in zip((left, right), absent, strict=True)]
        cells.append(f"{left / right:.3f}\u00a0×" if left is not None and right else "")
        label = f"{html.escape(name)} <small>{html.escape(unit)}</small>" if unit else html.escape(name)
        lead = ' class="lead"' if index == 0 else ""
        rows.append(f'<tr{lead}><th scope="row">{label}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "\n".join(rows)


def _caption(comparison: Comparison, key: str) -> str:
    ratio = comparison.ratio(key)  # type: ignore[arg-type]
    words = {"tokens": "tokens", "flops": "FLOPs", "seconds": "time"}[key]
    if ratio is None:
        return f"Sparse never reaches the dense final loss of {comparison.dense.val_loss:.4f}."
    bound = "at most " if comparison.reached_at_first_evaluation else ""
    target = f"the dense final loss of {comparison.dense.val_loss:.4f}"
    return f"Sparse reaches {target} after {bound}{ratio:.2f} × the {words}."


def _evaluation_table(comparison: Comparison) -> str:
    by_step: dict[int, dict[str, Row]] = {}
    for name, run in (("sparse", comparison.sparse), ("dense", comparison.dense)):
        for row in run.evaluations:
            by_step.setdefault(row["step"], {})[name] = row
    head = ["Step", "Tokens", "Sparse loss", "Sparse seconds", "Dense loss", "Dense seconds"]
    body = []
    for step, sides in sorted(by_step.items()):
        cells = [f"{step:,}", f"{next(iter(sides.values()))['tokens']:,}"]
        for name in ("sparse", "dense"):
            row = sides.get(name)
            cells += [f"{row['val_loss']:.4f}", f"{row['seconds']:,.1f}"] if row else ["–", "–"]
        body.append(cells)
    return _table(head, body)


def _load_table(run: RunCurve) -> str:
    last = next(row["load"] for row in reversed(run.rows) if row.get("load"))
    head = ["Layer", *(f"expert {expert}" for expert in range(max(len(shares) for shares in last)))]
    percent = [[f"{100 * _clean(share):.1f} %" for share in shares] for shares in last]
    body = [[str(layer), *shares] for layer, shares in enumerate(percent, start=1)]
    return _table(head, body)


def _table(head: list[str], body: list[list[str]]) -> str:
    """A table of texts that need no escaping; the first cell of a row names it."""
    columns = "".join(f'<th scope="col">{name}</th>' for name in head)
    rows = (f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in body)
    return f"<table><thead><tr>{columns}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _sample(prompt: str, completion: str) -> str:
    return f'<div class="sample" dir="auto" tabindex="0"><b>{_printable(prompt)}</b>{_printable(completion)}</div>'


def _printable(text: str) -> str:
    """Escaped text; control characters, which HTML does not allow, become the replacement character."""
    return html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "\ufffd", text))


def _definitions(values: Mapping[str, Any]) -> str:
    pairs = (f"<dt>{html.escape(str(key))}</dt><dd>{html.escape(str(value))}</dd>" for key, value in values.items())
    return f"<dl>{''.join(pairs)}</dl>" if values else ""
