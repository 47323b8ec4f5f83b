"""A plan as tables for the terminal."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moesaic.plan.report import Plan, to_json

UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(value: float, digits: int = 3) -> str:
    """1.23 T, 45.6 M, 0.0123."""
    for size, letter in UNITS:
        if abs(value) >= size:
            scaled = value / size
            rounded = float(f"{scaled:.{digits}g}") if abs(scaled) < 1000 else scaled
            return f"{rounded:,.0f} {letter}" if abs(rounded) >= 100 else f"{rounded:g} {letter}"
    return f"{value:.{digits}g}"


def parameters(value: float) -> str:
    size, letter = next((pair for pair in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if value >= pair[0]), (1e3, "k"))
    return f"{value / size:.3g} {letter}"


def gib(value: float) -> str:
    size, unit = next((pair for pair in ((2**30, "GiB"), (2**20, "MiB")) if value >= pair[0]), (2**10, "KiB"))
    return f"{value / size:,.1f} {unit}"


def duration(seconds: float) -> str:
    """In the unit that reads best."""
    for size, unit in ((365.25 * 86400, "years"), (86400, "days"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def span(values: Sequence[float], unit: str = "") -> str:
    return f"{short(values[0], 2)} to {short(values[1], 2)}{unit}"


def render(plan: Plan) -> RenderableType:
    data = to_json(plan)
    return Group(_facts(plan, data), Text(), options_table(plan, data), *_remarks(plan, data))


def _facts(plan: Plan, data: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    total, active = data["parameters"]["total"], data["parameters"]["active"]
    table.add_row("model", f"{data['model']['name']}: {parameters(total)} parameters, {parameters(active)} active")
    size = data["bytes"]
    table.add_row("bytes", f"weights {gib(size['weights'])}, keys and values {gib(size['kv_per_token'])} a token")
    cluster = data["cluster"]
    table.add_row(
        "cluster",
        f"{cluster['count']:,} x {cluster['device']} with {gib(cluster['memory_bytes'])}, "
        f"{short(cluster['peak_flops']['bfloat16'])}FLOP/s and {short(cluster['bandwidth'])}B/s each",
    )
    table.add_row("task", _task(plan))
    return table


def _task(plan: Plan) -> str:
    task: Any = plan.task
    if plan.phase == "train":
        return (
            f"train on {short(task.tokens)} tokens, {short(task.batch_tokens)} a step, sequences of "
            f"{task.sequence:,}, {task.precision}"
        )
    what = "prefill of" if plan.phase == "prefill" else "decoding after"
    return f"{what} {task.context:,} tokens, {task.batch:,} at a time, weights in {task.precision}"


def options_table(plan: Plan, data: dict[str, Any]) -> Table:
    """Narrow enough for 80 columns; reasons stand below, by number."""
    train = plan.phase == "train"
    last = ("MFU", "time") if train else ("a step", "$ / M tokens")
    table = Table(
        "", "layout", "GiB a device", "tokens/s", *last, "bound by", header_style="bold", box=None, pad_edge=False
    )
    for number, (option, raw) in enumerate(zip(plan.options, data["options"], strict=True), 1):
        memory = raw["memory"]
        figures = (
            (f"{raw['mfu']:.1%}", duration(raw["days"] * 86400))
            if train
            else (duration(raw["seconds_per_step"]), _cents(raw["dollars_per_million_tokens_range"]))
        )
        table.add_row(
            str(number), layout_text(option.estimate.layout, train),
            Text(f"{memory['total'] / 2**30:,.1f} of {memory['capacity'] / 2**30:,.1f}", "" if raw["fits"] else "red"),
            short(raw["tokens_per_second"]), *figures, raw["bound"] + _where(raw),
        )  # fmt: skip
    return table


def layout_text(layout: Any, train: bool) -> str:
    more = [f"micro {layout.micro}"] if train else []
    more += [f"{layout.recompute} recompute"] if layout.recompute != "none" else []
    return ", ".join((str(layout), *more))


def _where(raw: dict[str, Any]) -> str:
    places = {"device": "", "host": " (experts on the host)", "disk": " (experts on disk)"}
    return places[raw.get("experts_in", "device")]


def _cents(values: Sequence[float]) -> str:
    return f"{values[0]:.2g} to {values[1]:.2g}"


def _remarks(plan: Plan, data: dict[str, Any]) -> Iterable[Text]:
    for number, raw in enumerate(data["options"], 1):
        yield Text(f"{number}: {raw['reason']}" + ("" if raw["fits"] else "; does not fit"), style="dim")
    best = data["options"][0]
    spread = plan.options[0].estimate.spread
    parts = sorted(best["step_seconds"].items(), key=lambda item: -item[1])
    total = sum(best["step_seconds"].values())
    shares = ", ".join(f"{name} {value / total:.0%}" for name, value in parts if value / total >= 0.01)
    yield Text(f"A step of the first option takes {duration(total)}: {shares}.")
    if plan.phase == "train":
        hours = best["device_hours"]
        money = best["dollars_range"]
        rent = f", {span(money)} $ of rent" if money else ""
        yield Text(
            f"The run takes {short(hours)} device hours, {span(best['kilowatt_hours_range'])} kWh{rent}; "
            f"{best['days_range'][0]:,.3g} to {best['days_range'][1]:,.3g} days without interruptions."
        )
    if not best["fits"]:
        memory = best["memory"]
        yield Text(
            f"It does not fit: {gib(memory['total'])} are needed on a device, most of them "
            f"{max(memory['parts'], key=memory['parts'].get)}, and {gib(memory['capacity'])} are there; "
            "take more devices, or fewer bits.",
            style="yellow",
        )
    yield Text(f"Uncertainty: published systems lie within about {spread:.0%} of such predictions (docs/planning.md).")
