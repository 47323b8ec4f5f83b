"""Prefill and decode in less memory than the weights, 4-bit, beside llama.cpp; and the first token of a cold start.

Two models with random weights. The bench model has OLMoE-1B-7B's layer shape and 4 layers. The large one has all 16,
and an embedding so large that its routing follows the tokens alone: random tokens route at random, the worst case for a
cache, and tokens that repeat as texts do route so that a cache hits as often as it does on real models.

Each side is a process in a memory cgroup of its own, whose limit is a share of our quantised directory's size, page
cache included: what a side reads from disk counts as its memory while it is kept. We are told the limit (`--memory`);
llama.cpp maps its file, and beside the bench model a copy of it in its lazy mode, so that none has the other's pages.
The page cache is emptied before the sides of a limit start; the first round is the cold one. Sides take turns with the
same tokens. The limit of decode is the time to read what missed at the rate of the disk, and after that what was used
at the rate of memory, both measured in the same run. Needs root, for the cgroup.
"""

import argparse
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from common import Row, note, positive, run_benchmark
from cpu_inference import DECODE_STEPS, LAYERS, PROMPT_TOKENS, bench_config, folder_name, prepare
from inference.capped import (
    CGROUPS,
    Capped,
    InMemory,
    WithinMemory,
    disk_rate,
    drop_page_cache,
    random_tokens,
    seconds_to_read,
)
from inference.limits import measure_limits
from inference.runners import Llama
from inference.sides import Contest, Runner, Side

from moesaic.checkpoint.quantize import quantize
from moesaic.residency.memory_plan import shown

SHARES = (0.33, 0.5, 0.67, 0.9)
LARGE_LAYERS, LARGE_EMBEDDING = 16, 4.0
GOALS = {("decode", 0.67): 8.0, ("prefill", 0.67): 5.0}
START_GOAL = 3.0
"""Times as fast as reading the whole file the first token of a cold start is to be."""
DECODED = DECODE_STEPS[1]
COMPARED_TOKENS = 12
OURS, MAPPED, LAZY = "moesaic", "llama.cpp", "llama.cpp, lazy"


@dataclass(frozen=True)
class Model:
    name: str
    layers: int
    embedding: float | None
    traces: tuple[str, ...]
    """Of its tokens: random, correlated."""
    peers: tuple[str, ...]


MODELS = (
    Model("4 layers", LAYERS, None, ("random",), (MAPPED, LAZY)),
    Model("16 layers", LARGE_LAYERS, LARGE_EMBEDDING, ("random", "correlated"), (MAPPED,)),
)


def measure(arguments: argparse.Namespace) -> list[Row]:
    if os.geteuid() != 0 or not CGROUPS.is_dir():
        raise SystemExit("this benchmark needs root and the memory cgroup (version 1) at /sys/fs/cgroup/memory")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(arguments.scratch or temporary)
        for model in MODELS[:1] if arguments.quick or arguments.small else MODELS:
            rows += _measure_model(model, scratch, arguments)
    if arguments.plot:
        _plot(rows, Path(arguments.plot))
    return rows


def _measure_model(model: Model, scratch: Path, arguments: argparse.Namespace) -> list[Row]:
    arguments.layers = model.layers
    config = bench_config(arguments)
    folder = scratch / folder_name(config)
    files = prepare(config, folder, ["Q4_0"], arguments.threads, embedding=model.embedding)
    directory = folder / "int4"
    if not directory.exists():
        note("quantising to int4")
        quantize(files["hf"], directory, "int4")
    copy = folder / "Q4_0-copy.gguf"
    if LAZY in model.peers and not copy.exists():
        shutil.copyfile(files["Q4_0"], copy)
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    rates = disk_rate(directory), measure_limits(arguments.threads).read
    note(f"{model.name}: {shown(size)}; {rates[0] / 1e9:.2f} GB/s from disk, {rates[1] / 1e9:.1f} from memory")
    rows: list[Row] = []
    for share in (0.67,) if arguments.quick else SHARES:
        limit = int(share * size)
        sides = [Side(OURS, partial(Capped, partial(WithinMemory, directory, arguments.threads, limit), limit))]
        for name in model.peers:
            file = copy if name == LAZY else files["Q4_0"]
            sides.append(Side(name, partial(Capped, _llama(file, arguments, lazy=name == LAZY), limit)))
        rows += _measure_share(model, share, limit, sides, rates, arguments)
        if share == 0.67:
            _require_same_logits(sides[0], directory, arguments)
    if not arguments.quick:
        rows += _cold_starts(model, files["hf"], directory, arguments)
    return rows


def _llama(path: Path, arguments: argparse.Namespace, *, lazy: bool) -> Callable[[], Runner]:
    capacity = max(arguments.prefill, PROMPT_TOKENS + DECODED)
    return partial(Llama, path, arguments.threads, capacity=capacity, repack=False, lazy=lazy)


def _measure_share(
    model: Model, share: float, limit: int, sides: list[Side], rates: tuple[float, float], arguments: argparse.Namespace
) -> list[Row]:
    generator = np.random.default_rng(arguments.seed)
    rounds = arguments.rounds or (2 if arguments.quick else 5)
    drop_page_cache()
    rows: list[Row] = []
    try:
        contest = Contest(sides, arguments.threads).__enter__()
    except RuntimeError as error:
        note(f"{model.name} in {share:.0%}: {error}")
        _remove_groups()
        return []
    try:
        for trace in model.traces:
            draw = partial(random_tokens, generator, arguments.vocabulary, correlated=trace == "correlated")
            where = f"{model.name} in {share:.0%}, {trace}"
            turns = [(draw(PROMPT_TOKENS), draw(DECODED)) for _ in range(rounds + 1)]
            cold = contest.take_turns("decode", turns[:1], warm_up=0)
            contest.ask(OURS, "least_seconds", *rates)  # from here on it counts
            warm = contest.take_turns("decode", turns[1:], warm_up=0)
            fastest = 1 / contest.ask(OURS, "least_seconds", *rates)
            rows.append(_row("decode", where, DECODED, warm, fastest, share))
            if trace == "random":
                rows.append(_row("cold decode", where, DECODED, cold, None, share))
                turns = [(draw(arguments.prefill)[0],) for _ in range(rounds + 1)]
                prefill = contest.take_turns("prefill", turns)
                rows.append(_row("prefill", where, arguments.prefill, prefill, None, share))
        note(f"{model.name} in {share:.0%}, {shown(limit)}: {contest.ask(OURS, 'statistics')}")
        resident = shown(contest.ask(OURS, "resident"))
        peaks = ", ".join(f"{name} {shown(contest.ask(name, 'peak'))}" for name in contest.names)
        note(f"peak with page cache: {peaks}; ours without it {resident}")
    except RuntimeError as error:  # a side died; what the others did counts
        note(f"{model.name} in {share:.0%}: {error}")
    finally:
        contest.__exit__()
        _remove_groups()
    return rows


def _row(work: str, where: str, tokens: int, seconds: dict[str, list], limit: float | None, share: float) -> Row:
    """The ratio to the faster peer, as the median over rounds: all sides of a round met the same disturbance."""
    peer = min((name for name in seconds if name != OURS), key=lambda name: median(seconds[name]))
    ours, theirs = seconds[OURS], seconds[peer]
    speed, goal = tokens / median(ours), GOALS.get((work, share))
    ratio = median(b / a for a, b in zip(ours, theirs, strict=True))
    of_limit = "" if limit is None else f" ({speed / limit:.2f} of the limit)"
    return Row(
        work=f"{work} {tokens}, {where}{of_limit}",
        unit="tokens/s",
        ours=speed,
        peer=tokens / median(theirs),
        peer_name=peer,
        limit=limit,
        ratio=ratio,
        goal=goal,
        met=None if goal is None else ratio >= goal,
    )


def _require_same_logits(side: Side, directory: Path, arguments: argparse.Namespace) -> None:
    """What a budget computes is what the model in memory does, bit for bit."""
    generator = np.random.default_rng(arguments.seed)
    tokens = random_tokens(generator, arguments.vocabulary, COMPARED_TOKENS, correlated=False)
    found = []
    for each in (side, Side(OURS, partial(InMemory, directory, arguments.threads))):
        with Contest([each], arguments.threads) as contest:
            found.append(contest.ask(OURS, "logits", tokens))
    _remove_groups()
    if not np.array_equal(*found):
        raise SystemExit("the logits within a budget differ from those of the model in memory")
    note(f"logits of {COMPARED_TOKENS} steps within the budget equal those in memory, bit for bit")


def _cold_starts(model: Model, plain: Path, packed: Path, arguments: argparse.Namespace) -> list[Row]:
    """From the start of the process, with an empty page cache, to the logits after a prompt of one token."""
    rows = []
    for name, directory in (("bfloat16", plain), ("int4", packed)):
        budget = sum(file.stat().st_size for file in directory.glob("*.safetensors")) // 2
        whole = seconds_to_read(directory)
        drop_page_cache()
        start = time.perf_counter()
        side = Side(OURS, partial(Capped, partial(WithinMemory, directory, arguments.threads, budget), budget))
        try:
            with Contest([side], arguments.threads) as contest:
                contest.ask(OURS, "prefill", np.array([arguments.seed]))
                seconds = time.perf_counter() - start
        except RuntimeError as error:
            note(f"{model.name}, {name}: {error}")
            continue
        finally:
            _remove_groups()
        ratio = whole / seconds
        rows.append(
            Row(
                work=f"first token of a cold start, {model.name}, {name}, in 50%",
                unit="s",
                ours=seconds,
                peer=whole,
                peer_name="reading the file",
                limit=None,
                ratio=ratio,
                goal=START_GOAL,
                met=ratio >= START_GOAL,
            )
        )
    return rows


def _remove_groups() -> None:
    """Of our processes, which have ended, or do so in a moment."""
    for group in CGROUPS.glob(f"moesaic-{os.getpid()}-*"):
        for _ in range(50):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def _plot(rows: list[Row], path: Path) -> None:
    """Speed of decoding against the budget, a panel for each model and trace."""
    import matplotlib  # here, because the sides import this file, and count what it takes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from moesaic.analysis.plots import DENSE, SPARSE, STYLE

    panels: dict[str, list[tuple[float, Row]]] = {}
    for row in rows:
        if row.work.startswith(f"decode {DECODED}, "):
            model, _, rest = row.work.removeprefix(f"decode {DECODED}, ").partition(" in ")
            share, _, trace = rest.partition("%, ")
            panels.setdefault(f"{model}, {trace.split(' (')[0]} routing", []).append((float(share), row))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
        FigureCanvasAgg(figure)
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, points) in zip(all_axes, panels.items(), strict=True):
            shares = [share for share, _ in points]
            axes.plot(shares, [row.ours for _, row in points], marker="o", color=SPARSE, label=OURS)
            axes.plot(shares, [row.peer for _, row in points], marker="s", color=DENSE, label="llama.cpp, the faster")
            axes.plot(shares, [row.limit for _, row in points], linestyle=":", color="gray", label="limit")
            axes.set(title=title, xlabel="memory, % of the 4-bit weights", ylim=(0, None))
        figure.axes[0].set_ylabel("tokens/s")
        figure.axes[0].legend()
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run_benchmark(
        __doc__ or "",
        measure,
        ("--rounds", {"type": positive, "help": "timed turns of each side and work (default 5, quick 2)"}),
        ("--threads", {"type": positive, "default": 2, "help": "of every side"}),
        ("--prefill", {"type": positive, "default": 512, "help": "tokens of a prompt"}),
        ("--small", {"action": "store_true", "help": "the model of 4 layers alone"}),
        ("--width", {"type": positive, "default": 2048, "help": "of the residual stream"}),
        ("--expert-width", {"type": positive, "default": 1024, "help": "inner width of an expert"}),
        ("--experts", {"type": positive, "default": 64}),
        ("--top-k", {"type": positive, "default": 8, "help": "experts per token"}),
        ("--heads", {"type": positive, "default": 16}),
        ("--vocabulary", {"type": positive, "default": 50304}),
        ("--seed", {"type": int, "default": 0, "help": "of the tokens"}),
        ("--scratch", {"help": "a folder that keeps the models (45 GB, half of it for a while), for a second run"}),
        ("--plot", {"help": "a PNG file of speed against budget"}),
    )
