"""A plan as one HTML page that reads nothing from a network: options, roofline, where the time goes, a timeline."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from moesaic.plan.inference import InferenceTask
from moesaic.plan.report import Plan, to_json
from moesaic.plan.simulate import Simulation, simulate_decode, simulate_training
from moesaic.plan.table import duration, gib, layout_text, parameters, short, span
from moesaic.plan.training import TrainingTask
from moesaic.plan.work import forward_work, training_work, weights_read
from moesaic.plan.work import parameters as weights_of

WIDTH, HEIGHT = 900, 360
MARGIN = 60
ROW = 26
COLOURS = {"attention": "c1", "dispatch": "c3", "experts": "c2", "waits": "c6", "combine": "c4"}


def render_page(plan: Plan) -> str:
    """The whole page as text."""
    data = to_json(plan)
    css = (resources.files("moesaic.plan") / "page" / "plan.css").read_text(encoding="utf-8")
    title = f"{plan.subject.name} on {plan.cluster.count:,} x {plan.cluster.device.name}"
    played = simulation(plan)
    body = "".join(
        (
            f"<header><p class=soft>moesaic plan</p><h1>{html.escape(title)}: {html.escape(headline(plan, data))}</h1>",
            f"<p>{html.escape(_lede(plan, data))}</p></header>",
            _section("Options", _options(plan, data)),
            _section("Where a step's time goes", _bars(data["options"][0]["step_seconds"])),
            _section("Roofline of a device", _roofline(plan)),
            _section("A simulated step", _timeline(played)),
            _section("Sources and limits", _sources(plan, data)),
        )
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{css}</style></head><body>{body}</body></html>\n"
    )


def simulation(plan: Plan) -> Simulation:
    """Of the first option."""
    layout = plan.options[0].estimate.layout
    if isinstance(plan.task, TrainingTask):
        return simulate_training(plan.subject, plan.cluster, layout, plan.task)
    return simulate_decode(plan.subject, plan.cluster, layout, plan.task)


def headline(plan: Plan, data: Mapping[str, Any]) -> str:
    best = data["options"][0]
    if not best["fits"]:
        return "does not fit"
    if plan.phase == "train":
        return f"{duration(best['days'] * 86400)}, bound by {best['bound']}"
    return f"{short(best['tokens_per_second'])} tokens/s, bound by {best['bound']}"


def _lede(plan: Plan, data: Mapping[str, Any]) -> str:
    best = data["options"][0]
    first = (
        f"{parameters(data['parameters']['total'])} parameters, {parameters(data['parameters']['active'])} of them "
        f"for a token; weights of {gib(data['bytes']['weights'])}."
    )
    likely = f" Likely between {span(best['tokens_per_second_range'])} tokens/s"
    if plan.phase == "train":
        low, high = best["days_range"]
        return f"{first}{likely}: {low:,.3g} to {high:,.3g} days, {span(best['kilowatt_hours_range'])} kWh."
    low, high = best["dollars_per_million_tokens_range"]
    return f"{first}{likely}; a million tokens cost {low:.2g} to {high:.2g} $."


def _section(title: str, inside: str) -> str:
    return f"<section><h2>{title}</h2>{inside}</section>"


def _options(plan: Plan, data: Mapping[str, Any]) -> str:
    train = plan.phase == "train"
    heads = ("layout", "memory a device", "tokens/s", "MFU" if train else "a step", "bound by", "why")
    rows = []
    for option, raw in zip(plan.options, data["options"], strict=True):
        memory = raw["memory"]
        shown = f"{gib(memory['total'])} of {gib(memory['capacity'])}"
        fit = "" if raw["fits"] else " no"
        speed = f"{raw['mfu']:.1%}" if train else duration(raw["seconds_per_step"])
        rows.append(
            f"<tr><td>{html.escape(layout_text(option.estimate.layout, train))}</td>"
            f"<td class='number{fit}'>{shown}</td>"
            f"<td class=number>{short(raw['tokens_per_second'])}</td><td class=number>{speed}</td>"
            f"<td>{html.escape(raw['bound'])}</td><td>{html.escape(raw['reason'])}</td></tr>"
        )
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _bars(seconds: Mapping[str, float]) -> str:
    parts = [item for item in sorted(seconds.items(), key=lambda item: -item[1]) if item[1] > 0]
    total = sum(value for _, value in parts)
    shapes = []
    for row, (name, value) in enumerate(parts):
        top = row * ROW
        width = (WIDTH - 320) * value / parts[0][1]
        shapes.append(
            f"<text x=0 y={top + 17}>{html.escape(name)}</text>"
            f"<rect x=160 y={top + 4} width={width:.1f} height={ROW - 8} rx=3 fill='var(--c{row % 8})'/>"
            f"<text class=ink x={168 + width:.1f} y={top + 17}>{value / total:.1%} · {duration(value)}</text>"
        )
    label = f"Parts of a step of {duration(total)}"
    return f"<p class=soft>{label}, on one device.</p>{_svg(shapes, len(parts) * ROW, label)}"


def _svg(shapes: Iterable[str], height: float, label: str) -> str:
    return f"<svg viewBox='0 0 {WIDTH} {height:.0f}' role=img aria-label='{html.escape(label)}'>{''.join(shapes)}</svg>"


def _points(plan: Plan) -> dict[str, float]:
    """FLOP for each byte of weights, by kind of work."""
    subject, task = plan.subject, plan.task
    part = weights_of(subject)
    if isinstance(task, InferenceTask):
        layout = plan.options[0].estimate.layout
        tokens = max(1.0, task.batch / layout.replicas) * (task.context if task.phase == "prefill" else 1)
        work, weight = forward_work(subject, task.context), task.weight_bytes
    else:
        tokens = float(plan.options[0].estimate.layout.micro * task.sequence)
        work, weight = training_work(subject, task.sequence), (2.0, 2.0)
    points = {"dense weights": tokens * work.dense / (part.always * weight[1])}
    # A device's experts see the tokens of its whole group.
    tokens *= max(1.0, plan.options[0].estimate.layout.ep / plan.options[0].estimate.layout.tp)
    read = weights_read(subject, tokens) - part.always
    if read:
        points["experts"] = tokens * work.experts / (read * weight[0])
    return points


def _roofline(plan: Plan) -> str:
    device = plan.cluster.device
    peak, bandwidth = device.peak("bfloat16"), device.bandwidth
    low, high = -1, 5
    top, bottom = math.log10(peak * 2), math.log10(bandwidth * 10**low)

    def x(intensity: float) -> float:
        place = min(max(math.log10(intensity), low), high)
        return MARGIN + (place - low) / (high - low) * (WIDTH - 2 * MARGIN)

    def y(rate: float) -> float:
        return 20 + (top - math.log10(rate)) / (top - bottom) * (HEIGHT - 60)

    shapes = []
    for power in range(low, high + 1):
        shapes.append(
            f"<line class=grid x1={x(10**power):.1f} x2={x(10**power):.1f} y1=20 y2={HEIGHT - 40} />"
            f"<text x={x(10**power):.1f} y={HEIGHT - 22} text-anchor=middle>{10.0**power:g}</text>"
        )
    knee = peak / bandwidth
    roof = f"{x(10**low):.1f},{y(bandwidth * 10**low):.1f} {x(knee):.1f},{y(peak):.1f} {x(10**high):.1f},{y(peak):.1f}"
    shapes.append(f"<polyline class=roof points='{roof}'/>")
    shapes.append(f"<text x={x(10**high):.0f} y={y(peak) - 8:.0f} text-anchor=end>{short(peak)}FLOP/s</text>")
    shapes.append(f"<text x={x(0.4):.0f} y={y(bandwidth * 0.2):.0f}>{short(bandwidth)}B/s</text>")
    for index, (name, intensity) in enumerate(_points(plan).items()):
        rate = min(peak, bandwidth * intensity)
        shapes.append(
            f"<circle cx={x(intensity):.1f} cy={y(rate):.1f} r=7 fill='var(--c{index + 1})'/>"
            f"<text class=ink x={x(intensity):.1f} y={y(rate) + 24 + 16 * index:.1f} text-anchor=middle>{name}</text>"
        )
    shapes.append(
        f"<text x={WIDTH / 2:.0f} y={HEIGHT - 4} text-anchor=middle>FLOP for each byte of weights read</text>"
    )
    words = f"Left of {knee:,.0f} FLOP a byte a device waits for its memory, right of it for its units."
    return f"<p class=soft>{words}</p>{_svg(shapes, HEIGHT, 'Roofline')}"


def _timeline(played: Simulation) -> str:
    segments = played.segments
    if not segments:
        return "<p class=soft>Nothing to draw.</p>"
    first, last = min(one.start for one in segments), max(one.end for one in segments)
    scale = (WIDTH - 80) / (last - first)
    ranks = sorted({one.rank for one in segments})
    shapes = [f"<text x=0 y={rank * ROW + 17}>rank {rank}</text>" for rank in ranks]
    for one in segments:
        shapes.append(
            f"<rect x={70 + (one.start - first) * scale:.2f} y={one.rank * ROW + 3} "
            f"width={max(0.3, (one.end - one.start) * scale):.2f} height={ROW - 6} fill='var(--{COLOURS[one.name]})'>"
            f"<title>{one.name}, {duration(one.end - one.start)}</title></rect>"
        )
    height = len(ranks) * ROW + 22
    shapes.append(f"<text x=70 y={height - 4}>0</text>")
    shapes.append(f"<text x={WIDTH - 10} y={height - 4} text-anchor=end>{duration(last - first)}</text>")
    keys = "".join(f"<span style='--tile: var(--{colour})'>{name}</span>" for name, colour in COLOURS.items())
    words = (
        f"The first layers of one expert group; {played.ranks:,} ranks were played in all. The step takes "
        f"{duration(played.seconds)}, {duration(played.analytic)} by the analytic model; ranks wait for others "
        f"{played.waiting:.1%} of the time."
    )
    return f"<p class=soft>{words}</p><div class=keys>{keys}</div>{_svg(shapes, height, 'Timeline of ranks')}"


def _sources(plan: Plan, data: Mapping[str, Any]) -> str:
    lines: Sequence[str] = (
        f"Model: {data['model']['source']}.",
        f"Device: {data['cluster']['source']}.",
        f"Published systems lie within about {plan.options[0].estimate.spread:.0%} of such predictions, some further "
        "off; ranges of money and energy also hold what prices, power and buildings differ by.",
    )
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)
