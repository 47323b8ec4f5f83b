"""A server under load against llama.cpp: tokens per second and the wait for the first one.

Ours is `moesaic serve` in a process of its own, asked over HTTP by streaming clients; llama.cpp is its batched
interface as its server uses it, in this process tree too, and nothing is sent anywhere. Both read prompts of 64 to 192
random tokens and write 64 tokens to each, in 4 bits, on the model with OLMoE-1B-7B's layers of `cpu_inference.py`.

A closed load has so many clients, each of which asks again when it has its answer; the open one comes at random times,
at a rate that both can bear. Sides take turns, and what is printed are medians over the rounds. Our own overhead is
what a step of the engine takes beside the model, and what clients over HTTP get less than from the engine directly.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from common import Row, note, positive, run_benchmark
from cpu_inference import MODEL_FLAGS, bench_config, folder_name, prepare
from inference.llama_batched import LlamaServer
from inference.load import Job, Outcome, closed_load, open_load, through_http
from inference.serving import serving
from inference.sides import Contest, Side

from moesaic.checkpoint.quantize import quantize
from moesaic.tokenizer import train_bpe
from moesaic.train.sources import documents

CLIENTS = (1, 4, 16)
PROMPT_TOKENS, NEW_TOKENS = 128, 64
CAPACITY = 512
JOBS_OF_A_CLIENT = {1: 6, 4: 4, 16: 3}
OPEN_CLIENTS = 16
LOADED = 0.7
"""Of what the slower side bears, for the open load."""


class DirectEngine:
    """Our engine without a server: what HTTP adds is the difference."""

    def __init__(self, directory: Path, threads: int) -> None:
        import torch

        import moesaic
        from moesaic.config import EngineConfig
        from moesaic.engine.engine import Engine
        from moesaic.tokenizer import byte_tokenizer

        torch.set_num_threads(threads)
        model = moesaic.load(directory, device="cpu")
        self._engine = Engine(model, byte_tokenizer(), EngineConfig(max_model_tokens=CAPACITY, prefix_cache=False))

    def complete(self, jobs: Sequence[Job], clients: int) -> Outcome:
        from inference.load import Timing

        from moesaic.config import SamplingConfig
        from moesaic.engine.request import Request

        waiting, timings, running = list(reversed(jobs)), [], {}
        start = time.perf_counter()
        while waiting or running:
            while waiting and len(running) < clients:
                job = waiting.pop()
                sampling = SamplingConfig(max_tokens=job.new_tokens, temperature=0, ignore_eos=True)
                handle = self._engine.submit(Request(prompt_ids=job.prompt, sampling=sampling))
                running[handle] = Timing(time.perf_counter())
                timings.append(running[handle])
            for handle, delta in self._engine.step():
                running[handle].came(len(delta.tokens))
                if delta.finish_reason is not None:
                    del running[handle]
        return Outcome(timings, time.perf_counter() - start)

    def overhead(self) -> float:
        """Of all its steps, the share that was not spent in the model."""
        statistics = self._engine.statistics()
        return 1 - statistics.model_seconds / statistics.step_seconds


def measure(arguments: argparse.Namespace) -> Sequence[Row]:
    rows: list[Row] = []
    config = bench_config(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.scratch or Path(temporary)) / folder_name(config)
        files = prepare(config, folder, ["Q4_0"], arguments.threads)
        packed = folder / "int4"
        if not packed.exists():
            quantize(files["hf"], packed, "int4")
        if not (packed / "tokenizer.json").exists():
            note("making a tokenizer")
            train_bpe((document.text for document in documents("stdlib")), config.vocab_size).save(packed)
        sides = [
            Side("llama.cpp", partial(LlamaServer, files["Q4_0"], arguments.threads, max(CLIENTS), CAPACITY)),
            Side("engine", partial(DirectEngine, packed, arguments.threads)),
        ]
        with (
            serving(packed, "--max-model-tokens", str(CAPACITY), threads=arguments.threads) as port,
            Contest(sides, arguments.threads) as contest,
        ):
            rows += _closed(port, contest, config.vocab_size, arguments)
            rows += _open(port, contest, config.vocab_size, arguments)
            overhead = contest.ask("engine", "overhead")
            work = "scheduler: share of a step outside the model"
            rows.append(Row(work=work, unit="", ours=overhead, goal=0.05, met=overhead <= 0.05))
    return rows


def _closed(port: int, contest: Contest, vocab_size: int, arguments: argparse.Namespace) -> Iterator[Row]:
    for clients in CLIENTS:
        ours, peers, direct = [], [], []
        for round in range(arguments.rounds + 1):
            rng = np.random.default_rng([clients, round])
            count = clients * (1 if arguments.quick else JOBS_OF_A_CLIENT[clients])
            jobs = closed_load(rng, count, PROMPT_TOKENS, NEW_TOKENS, vocab_size)
            note(f"{clients} clients, round {round} of {arguments.rounds}{' (not counted)' * (round == 0)}")
            outcomes = (
                through_http(port, jobs, clients),
                contest.ask("llama.cpp", "complete", jobs, clients),
                contest.ask("engine", "complete", jobs, clients),
            )
            if round:
                for kept, outcome in zip((ours, peers, direct), outcomes, strict=True):
                    kept.append(outcome)
        yield from _rows(f"{clients} clients", ours, peers, goal=1.5)
        in_process, over_http = _median_speed(direct), _median_speed(ours)
        lost = 1 - over_http / in_process
        work = f"{clients} clients: share of speed lost to HTTP"
        yield Row(work=work, unit="", ours=lost, goal=0.05, met=lost <= 0.05)


def _open(port: int, contest: Contest, vocab_size: int, arguments: argparse.Namespace) -> Iterator[Row]:
    """At a rate from what the slower side did with as many clients as there may be texts side by side."""
    rng = np.random.default_rng(0)
    count = 12 if arguments.quick else 48
    jobs = closed_load(rng, count, PROMPT_TOKENS, NEW_TOKENS, vocab_size)
    slowest = contest.ask("llama.cpp", "complete", jobs[:OPEN_CLIENTS], OPEN_CLIENTS).tokens_per_second
    arriving = open_load(jobs, rng, LOADED * slowest / NEW_TOKENS)
    ours, peers = [], []
    for round in range(arguments.rounds):
        note(f"open load, round {round + 1} of {arguments.rounds}")
        ours.append(through_http(port, arriving, OPEN_CLIENTS))
        peers.append(contest.ask("llama.cpp", "complete", arriving, OPEN_CLIENTS))
    yield from _rows(f"Poisson arrivals, {LOADED:.0%} of llama.cpp's capacity", ours, peers, goal=None)


def _rows(work: str, ours: Sequence[Outcome], peers: Sequence[Outcome], goal: float | None) -> Iterator[Row]:
    speed, peer_speed = _median_speed(ours), _median_speed(peers)
    ratio = speed / peer_speed
    name = "llama.cpp Q4_0"
    if goal is not None:
        yield Row(
            work=f"{work}: throughput", unit="tokens/s", ours=speed, peer=peer_speed, peer_name=name, ratio=ratio,
            goal=goal, met=ratio >= goal,
        )  # fmt: skip
    for label, of in (
        ("median wait for the first token", lambda outcome: outcome.median_to_first_token),
        ("99th percentile of it", lambda outcome: outcome.worst_to_first_token),
        ("median time per token", lambda outcome: median(timing.per_token for timing in outcome.timings)),
    ):
        mine, other = median(map(of, ours)), median(map(of, peers))
        wanted = 1.0 if label.startswith("median wait") else None
        yield Row(
            work=f"{work}: {label}", unit="ms", ours=1e3 * mine, peer=1e3 * other, peer_name=name, ratio=other / mine,
            goal=wanted, met=None if wanted is None else other >= mine,
        )  # fmt: skip


def _median_speed(outcomes: Sequence[Outcome]) -> float:
    return median(outcome.tokens_per_second for outcome in outcomes)


if __name__ == "__main__":
    run_benchmark(
        __doc__ or "",
        measure,
        (
            "--rounds",
            {"type": positive, "default": 3, "help": "timed turns of each side and load"},
        ),
        ("--threads", {"type": positive, "default": 2, "help": "of every side"}),
        *MODEL_FLAGS,
        ("--scratch", {"type": Path, "help": "a folder that keeps the models (6 GB), so that a second run starts"}),
    )
