"""What expert parallelism sends between hosts, counted and timed, beside its cost model and other ways.

Hosts are network namespaces, each with an interface of limited rate; what an interface sent is read from its counters,
without the headers of Ethernet, IP and TCP. Weights are random, so that routing is nearly even, as the model assumes.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
from common import Row, note, positive, run_benchmark
from communication_ranks import Passed, Sizes, exchanges, inside_rate, overlaps, peers
from hosts import Hosts, why_not
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moesaic.analysis.plots import DENSE, SPARSE, STYLE
from moesaic.errors import UsageError
from moesaic.parallel.cost import (
    ExchangeShape,
    backward_bytes,
    exchange_seconds,
    forward_bytes,
    host_bytes,
    host_seconds,
)
from moesaic.parallel.transport import TRANSPORTS

GOAL = 1.05
"""Counted bytes to those of the model, either way."""
HIDDEN_GOAL = 0.6
"""Of the exchange, when the shared experts take as long."""
SLOWER = 5
"""How many times as slow the links of two hosts of two ranks are, and of the overlap: then the exchange is what takes
the time on a machine whose two cores also drive the links."""


def measure(options: argparse.Namespace) -> Sequence[Row]:
    reason = why_not()
    if reason:
        raise UsageError(f"no hosts to measure between: {reason}")
    sizes = Sizes(tokens=options.tokens // 2 if options.quick else options.tokens)
    rounds = 3 if options.quick else options.rounds
    rows: list[Row] = []
    for num_ranks in (2, 4):
        with Hosts(num_ranks, options.rate, options.delay) as hosts:
            delay = options.delay * 1e-3 if hosts.is_delayed else 0.0
            note(f"{num_ranks} hosts, {options.rate} Mbit/s each way, {delay * 1e3:g} ms of delay by the link")
            cases = {name: {"transport": name, "gradient_transport": name} for name in TRANSPORTS}
            passed = _mean(hosts.run(exchanges, sizes, cases, rounds))
            rows += transport_rows(passed, sizes, num_ranks, options.rate * 125e3, delay)
            rows += peer_rows(_mean(hosts.run(peers, sizes, rounds)), num_ranks, sizes.tokens)
    slow = max(options.rate // SLOWER, 1)
    with Hosts(2, slow, options.delay) as hosts:
        note(f"2 hosts of 2 ranks, {slow} Mbit/s")
        rows += two_level_rows(hosts, sizes, rounds, slow * 125e3)
    with Hosts(2, slow, options.delay) as hosts:
        note(f"overlap, 2 hosts, {slow} Mbit/s")
        wide = replace(sizes, inner_size=16, hidden_size=512)
        answers = hosts.run(overlaps, wide, rounds)
        rows += overlap_rows(*answers[0])
    if options.plot:
        _plot(rows, Path(options.plot))
    return rows


def transport_rows(
    passed: Mapping[str, Passed], sizes: Sizes, num_ranks: int, rate: float, delay: float
) -> Sequence[Row]:
    rows = []
    exact = passed["exact"].both_bytes / sizes.tokens
    for name, seen in passed.items():
        shape = shape_of(sizes, num_ranks, transport=name, gradient_transport=name)
        forward, both = seen.forward_bytes / sizes.tokens, seen.both_bytes / sizes.tokens
        expected_forward, expected = forward_bytes(shape), forward_bytes(shape) + backward_bytes(shape)
        work = f"{num_ranks} hosts, {name}"
        rows += [
            near(f"{work}: forward", "B/token", forward, expected_forward),
            near(f"{work}: forward and backward", "B/token", both, expected),
        ]
        if name == "exact":
            single = replace(shape, deduplicated=False)
            every = forward_bytes(single) + backward_bytes(single)
            rows.append(less(f"{work}: a token once to each rank", both, every, "once to each expert (computed)"))
        else:
            plain = shape_of(sizes, num_ranks)
            saved = (forward_bytes(plain) + backward_bytes(plain)) / expected
            rows.append(near(f"{work}: times fewer than exact", "x", exact / both, saved))
        model = 2 * exchange_seconds(shape, sizes.tokens, rate, delay)
        rows.append(
            Row(
                work=f"{work}: exchange of a forward pass; less is better", unit="ms",
                ours=seen.exchange_seconds * 1e3, peer=model * 1e3, peer_name="cost model",
                ratio=seen.exchange_seconds / model,
            )
        )  # fmt: skip
    return rows


def peer_rows(passed: Mapping[str, Passed], num_ranks: int, tokens: int) -> Sequence[Row]:
    ours, rows = passed["ours"], []
    for name, seen in passed.items():
        if name == "ours":
            continue
        work = f"{num_ranks} hosts, {tokens} tokens each, forward and backward"
        rows += [
            less(work, ours.both_bytes / tokens, seen.both_bytes / tokens, name, goal=1.0),
            less(work, ours.seconds * 1e3, seen.seconds * 1e3, name, unit="ms", goal=1.0),
        ]
    return rows


def two_level_rows(hosts: Hosts, sizes: Sizes, rounds: int, rate: float) -> Sequence[Row]:
    cases: dict[str, dict[str, Any]] = {
        "one level": {"transport": "exact"},
        "two levels": {"ranks_per_host": 2},
        "one level, 1 of 2 groups": {"transport": "exact", "n_group": 2, "topk_group": 1},
        "two levels, 1 of 2 groups": {"ranks_per_host": 2, "n_group": 2, "topk_group": 1},
    }
    answers = hosts.run(exchanges, sizes, cases, rounds, ranks_per_host=2)
    inside = min(hosts.run(inside_rate, ranks_per_host=2))
    passed = _mean(answers[::2])  # the two ranks of a host have one interface
    rows, per_host = [], 2 * sizes.tokens
    seconds = {}
    for name, case in cases.items():
        groups = {key: case[key] for key in ("n_group", "topk_group") if key in case}
        shape = shape_of(sizes, 4, ranks_per_host=2, **groups)
        hierarchical = "ranks_per_host" in case
        work = f"2 hosts of 2 ranks, {name}"
        expected = host_bytes(shape, hierarchical=hierarchical)
        rows.append(near(f"{work}: forward, between hosts", "B/token", passed[name].forward_bytes / per_host, expected))
        model = 2 * host_seconds(shape, sizes.tokens, rate, 0.0, hierarchical=hierarchical, inside_rate=inside)
        seconds[name] = model
        rows.append(
            Row(
                work=f"{work}: exchange of a forward pass; less is better", unit="ms",
                ours=passed[name].exchange_seconds * 1e3, peer=model * 1e3, peer_name="cost model",
                ratio=passed[name].exchange_seconds / model,
            )
        )  # fmt: skip
    for flat, levels in (tuple(cases)[:2], tuple(cases)[2:]):
        predicted = seconds[flat] / seconds[levels]
        ours, peer = passed[levels].exchange_seconds * 1e3, passed[flat].exchange_seconds * 1e3
        work = f"2 hosts of 2 ranks, {levels} (cost model: {predicted:.2f} times as fast)"
        rows.append(less(work, ours, peer, flat, unit="ms", goal=1.0))
    bytes_flat, bytes_levels = passed["one level"].forward_bytes, passed["two levels, 1 of 2 groups"].forward_bytes
    work = "2 hosts of 2 ranks, two levels, 1 of 2 groups: between hosts"
    rows.append(less(work, bytes_levels / per_host, bytes_flat / per_host, "one level, no groups"))
    return rows


def overlap_rows(passed: Mapping[str, Passed], parts: Mapping[str, float]) -> Sequence[Row]:
    rows, none = [], passed["none"]
    note(f"shared experts of width {parts['size']:.0f}: {parts['shared'] * 1e3:.0f} ms forward, exchange "
         f"{parts['exchange'] * 1e3:.0f} ms")  # fmt: skip
    for name in ("shared", "halves"):
        seen = passed[name]
        for work, without, with_it, exchange in (
            ("forward", none.forward_seconds, seen.forward_seconds, parts["exchange"]),
            ("forward and backward", none.seconds, seen.seconds, 2 * parts["exchange"]),
        ):
            hidden = (without - with_it) / exchange
            longest = min(1.0, parts["shared" if work == "forward" else "shared both"] / exchange)
            rows += [
                Row(
                    work=f'overlap = "{name}", {work}: share of the exchange hidden', unit="of 1", ours=hidden,
                    limit=longest, goal=HIDDEN_GOAL, met=hidden >= HIDDEN_GOAL,
                ),
                less(f'overlap = "{name}", {work}', with_it * 1e3, without * 1e3, 'overlap = "none"', unit="ms"),
            ]  # fmt: skip
    return rows


def shape_of(sizes: Sizes, num_ranks: int, **settings: Any) -> ExchangeShape:
    return ExchangeShape(
        num_experts=sizes.num_experts, top_k=sizes.top_k, hidden_size=sizes.hidden_size, num_ranks=num_ranks,
        **settings,
    )  # fmt: skip


def near(work: str, unit: str, ours: float, expected: float) -> Row:
    """Whichever is more to the other."""
    ratio = max(expected / ours, ours / expected)
    return Row(
        work=work, unit=unit, ours=ours, peer=expected, peer_name="cost model", ratio=ratio, goal=GOAL,
        met=ratio <= GOAL,
    )  # fmt: skip


def less(work: str, ours: float, peer: float, name: str, unit: str = "B/token", goal: float | None = None) -> Row:
    ratio = peer / ours
    met = None if goal is None else ratio >= goal
    return Row(work=work, unit=unit, ours=ours, peer=peer, peer_name=name, ratio=ratio, goal=goal, met=met)


def _mean(answers: Sequence[Mapping[str, Passed]]) -> dict[str, Passed]:
    """Over hosts; seconds are the same on all."""
    return {
        name: replace(
            seen,
            forward_bytes=round(sum(answer[name].forward_bytes for answer in answers) / len(answers)),
            both_bytes=round(sum(answer[name].both_bytes for answer in answers) / len(answers)),
        )
        for name, seen in answers[0].items()
    }


def _plot(rows: Sequence[Row], path: Path) -> None:
    """Bytes per token of a forward and a backward pass, and the share of the exchange that is hidden."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(2, 1))
        ours = {row.work.split(":")[0]: row for row in rows if row.work.endswith(": forward and backward")}
        left.bar(range(len(ours)), [row.ours for row in ours.values()], color=SPARSE, label="on the interface")
        left.plot(range(len(ours)), [row.peer for row in ours.values()], "_", color=DENSE, markersize=22,
                  markeredgewidth=3, label="cost model")  # fmt: skip
        left.set_xticks(range(len(ours)), [name.replace(", ", "\n") for name in ours], fontsize=7)
        left.set_title("bytes per token, forward and backward")
        left.legend()
        hidden = [row for row in rows if row.work.endswith("hidden")]
        right.bar(range(len(hidden)), [row.ours for row in hidden], color=SPARSE)
        right.axhline(HIDDEN_GOAL, color=DENSE, linestyle="--", label="goal")
        names = [
            row.work.split('"')[1] + "\n" + row.work.split(", ")[1].split(":")[0].replace(" and ", "\nand ")
            for row in hidden
        ]
        right.set_xticks(range(len(hidden)), names, fontsize=7)
        right.set_ylim(0, 1.1)
        right.set_title("exchange hidden")
        right.legend()
        FigureCanvasAgg(figure).print_png(path)


if __name__ == "__main__":
    run_benchmark(
        __doc__ or "",
        measure,
        ("--tokens", {"type": positive, "default": 2048, "help": "of each rank"}),
        ("--rounds", {"type": positive, "default": 5, "help": "of which seconds are medians"}),
        ("--rate", {"type": positive, "default": 1000, "help": "of a link, Mbit/s each way"}),
        ("--delay", {"type": float, "default": 2.0, "help": "of a link, ms, where the kernel can"}),
        ("--plot", {"default": "", "help": "write a picture to this .png"}),
    )
