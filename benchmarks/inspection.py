"""What reading a trace costs: all that `moesaic inspect` tells of a large one, and the curve of its caches alone.

The trace is drawn: a token keeps the experts of the one before it half of the time, and else gets new ones that depend
on what it is. It is analysed in a process of its own, whose peak of memory is that of the analysis. The curve of all
cache sizes, which one pass over a layer gives, is compared with simulating each cache; both must count the same hits.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections import OrderedDict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import Row, note, positive, run_benchmark

from moesaic.analysis.inspection import inspect_trace
from moesaic.analysis.inspection_page import write_page
from moesaic.analysis.locality import hit_curve
from moesaic.analysis.trace import read_trace
from moesaic.analysis.trace_writer import TokenRows, TraceWriter
from moesaic.ops.device import peak_bytes

LAYERS, EXPERTS, TOP_K = 16, 64, 8
VOCABULARY, SOURCES = 30_000, 4
DOCUMENT, SEQUENCE = 3_000, 250
PIECE = 50_000
"""Tokens that are drawn at a time."""
MOST_SECONDS, MOST_BYTES = 60.0, 2e9


@dataclass(frozen=True)
class Analysis:
    """What it cost; `curve_seconds` is the part of the caches' curves."""

    seconds: float
    cpu_seconds: float
    curve_seconds: float
    peak: int
    page_bytes: int


def measure(arguments: argparse.Namespace) -> list[Row]:
    tokens = 100_000 if arguments.quick else arguments.tokens
    simulated = 2_000 if arguments.quick else arguments.simulated
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        _draw(Path(scratch) / "trace", tokens)
        note(f"drawn and written in {time.perf_counter() - start:.1f} s")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            found = process.submit(_analyse, Path(scratch), arguments.threads).result()
        note(
            f"analysed in {found.seconds:.1f} s, {found.cpu_seconds:.1f} s of CPUs; the curves alone take "
            f"{found.curve_seconds:.1f} s; page of {found.page_bytes / 1e6:.1f} MB"
        )
        of_layer = read_trace(Path(scratch) / "trace").layer(0).expert_ids[:simulated]
    work = f"{tokens:,} tokens x {LAYERS} layers, {EXPERTS} experts, top {TOP_K}"
    return [
        Row(
            work=f"{work}: read, analysed, page written; less is better", unit="seconds", ours=found.seconds,
            goal=MOST_SECONDS, met=found.seconds < MOST_SECONDS,
        ),
        Row(
            work=f"{work}: peak of memory; less is better", unit="GB", ours=found.peak / 1e9,
            goal=MOST_BYTES / 1e9, met=found.peak < MOST_BYTES,
        ),
        *_against_simulation(of_layer),
    ]  # fmt: skip


def _analyse(folder: Path, threads: int | None) -> Analysis:
    """In a process that does nothing else."""
    if threads:
        torch.set_num_threads(threads)
    start, cpu = time.perf_counter(), time.process_time()
    trace = read_trace(folder / "trace")
    write_page(folder / "page.html", inspect_trace(trace))
    seconds, cpu_seconds, peak = time.perf_counter() - start, time.process_time() - cpu, peak_bytes()
    curve_seconds = 0.0
    for layer in range(LAYERS):
        rows = trace.layer(layer)
        start = time.perf_counter()
        hit_curve(rows.expert_ids, EXPERTS)
        curve_seconds += time.perf_counter() - start
    return Analysis(seconds, cpu_seconds, curve_seconds, peak, (folder / "page.html").stat().st_size)


def _against_simulation(expert_ids: np.ndarray) -> list[Row]:
    """The curve of one layer (T, K), and as many caches as it has points."""
    start = time.perf_counter()
    curve = hit_curve(expert_ids, EXPERTS)
    between = time.perf_counter()
    simulated = [_simulated_hits(expert_ids, size) for size in range(EXPERTS + 1)]
    ours, peer = between - start, time.perf_counter() - between
    equal = sum(mine == other for mine, other in zip(curve.tolist(), simulated, strict=True))
    work, name = f"curve of one layer, {len(expert_ids):,} tokens", f"{EXPERTS + 1} caches simulated"
    return [
        Row(
            work=f"{work}: sizes with the same hits", unit="sizes", ours=equal, peer=len(simulated), peer_name=name,
            ratio=equal / len(simulated), goal=1.0, met=equal == len(simulated),
        ),
        Row(
            work=work, unit="tokens/s", ours=len(expert_ids) / ours, peer=len(expert_ids) / peer, peer_name=name,
            ratio=peer / ours,
        ),
    ]  # fmt: skip


def _simulated_hits(expert_ids: np.ndarray, size: int) -> int:
    """Of one LRU cache, whose tokens visit all their experts at once."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for row in expert_ids.tolist():
        hits += sum(expert in cache for expert in row)
        for expert in row:
            cache[expert] = None
            cache.move_to_end(expert)
        while len(cache) > size:
            cache.popitem(last=False)
    return hits


def _draw(directory: Path, tokens: int) -> None:
    drawn = np.random.default_rng(0)
    writer = TraceWriter(
        directory,
        num_experts=[EXPERTS] * LAYERS,
        sources=[f"text {number}" for number in range(SOURCES)],
        token_bytes=lambda token_id: f" w{token_id}".encode(),
    )
    with writer:
        for first in range(0, tokens, PIECE):
            places_T = np.arange(first, min(first + PIECE, tokens))
            ids_T = drawn.zipf(1.3, len(places_T)) % VOCABULARY
            rows = TokenRows(
                token_ids=ids_T,
                source_ids=places_T * SOURCES // tokens,
                document_ids=places_T // DOCUMENT,
                sequence_ids=places_T // SEQUENCE,
                positions=places_T % SEQUENCE,
                text_offsets=places_T * 4,
            )
            writer.add_chosen(rows, [_layer(drawn, ids_T, layer) for layer in range(LAYERS)])


def _layer(drawn: np.random.Generator, token_ids: np.ndarray, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert ids and weights (T, K) of some tokens."""
    count = len(token_ids)
    first_T = (token_ids * (2 * layer + 3) + drawn.integers(0, EXPERTS // 4, count)) % EXPERTS
    step_T = 2 * drawn.integers(0, EXPERTS // 2, count) + 1  # odd, so that the experts of a token differ
    own_T = np.maximum.accumulate(np.where(drawn.random(count) < 0.5, np.arange(count), 0))
    ids_TK = (first_T[own_T, None] + step_T[own_T, None] * np.arange(TOP_K)) % EXPERTS
    weights_TK = -np.sort(-drawn.random((count, TOP_K), np.float32))
    return torch.from_numpy(ids_TK.astype(np.int16)), torch.from_numpy(weights_TK)


if __name__ == "__main__":
    run_benchmark(
        __doc__ or "",
        measure,
        ("--tokens", {"type": positive, "default": 1_000_000, "help": "of the trace"}),
        ("--simulated", {"type": positive, "default": 20_000, "help": "tokens that caches are simulated on"}),
        ("--threads", {"type": positive, "help": "of torch; default: its own"}),
    )
