"""Prefill and decode in less memory than the weights, 4-bit, beside llama.cpp.

The model has OLMoE-1B-7B's layer shape and random weights, so that its routing is random too: the worst case for a
cache. Each side is a process in a memory cgroup of its own, whose limit is a share of our quantised directory's size,
page cache included: what a side reads from disk counts as its memory while it is kept. We are told the limit
(`--memory`), llama.cpp maps its file. The page cache is emptied before the sides of a limit start. Sides take turns
with the same random tokens. The limit of decode is the time to read what missed at the rate of the disk and what was
used at the rate of memory, both measured in the same run. Needs root, for the cgroup.
"""

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import Row, note, positive, run_benchmark
from cpu_inference import DECODE_STEPS, LAYERS, PROMPT_TOKENS, bench_config, folder_name, prepare
from inference.limits import measure_limits
from inference.runners import Llama, Ours
from inference.sides import Contest, Runner, Side, Tokens

import moesaic
from moesaic.checkpoint.quantize import quantize
from moesaic.residency.expert_cache import CacheStatistics
from moesaic.residency.file_reader import FileReader
from moesaic.residency.memory_plan import shown
from moesaic.residency.residency import residency_of
from moesaic.safetensors_file import Extent

CGROUPS = Path("/sys/fs/cgroup/memory")
SHARES = (0.33, 0.5, 0.67, 0.9)
GOALS = {("decode", 0.67): 8.0, ("prefill", 0.67): 5.0}
GOAL_OF_LIMIT = 0.7
DECODED = DECODE_STEPS[1]
DISK_SAMPLE = 4 * 2**20


class Capped:
    """A runner in a memory cgroup: `make` runs inside it."""

    def __init__(self, make: Callable[[], Runner], limit: int) -> None:
        self._group = CGROUPS / f"moesaic-{os.getppid()}-{os.getpid()}"
        self._group.mkdir()
        (self._group / "memory.limit_in_bytes").write_text(str(limit))
        (self._group / "cgroup.procs").write_text(str(os.getpid()))
        self._runner: Any = make()

    def prefill(self, tokens: Tokens) -> float:
        return self._runner.prefill(tokens)

    def decode(self, prompt: Tokens, tokens: Tokens) -> float:
        return self._runner.decode(prompt, tokens)

    def logits(self, tokens: Tokens) -> Any:
        return self._runner.logits(tokens)

    def peak(self) -> int:
        """Bytes that the cgroup had in use at most, page cache included."""
        return int((self._group / "memory.max_usage_in_bytes").read_text())

    def resident(self) -> int:
        """Bytes of it that are not page cache, now."""
        lines = (self._group / "memory.stat").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("rss ")))

    def statistics(self) -> str:
        return str(self._runner.statistics)

    def least_seconds(self, disk: float, memory: float) -> float:
        return self._runner.least_seconds(disk, memory)


class WithinMemory(Ours):
    """`moesaic.load` with a budget."""

    def __init__(self, directory: Path, threads: int, budget: int) -> None:
        torch.set_num_threads(threads)
        self.model = moesaic.load(directory, device="cpu", memory=str(budget))
        self._caches = {}
        residency = residency_of(self.model)
        assert residency is not None
        self._residency = residency
        self._experts_read = self._steps = 0
        note(str(residency.plan))

    @torch.inference_mode()
    def decode(self, prompt: Tokens, tokens: Tokens) -> float:
        """Notes what the steps read from disk; the prompt is not one of them."""
        capacity = prompt.shape[1] + tokens.shape[1]
        with self._residency.room(cached_tokens=capacity) as room:
            cache = self._cache(1, capacity)
            self.model(torch.from_numpy(prompt), kv=cache, logits_to_keep=1)
            room.only_decodes()
            before, start = self._residency.statistics.bytes_read, time.perf_counter()
            for step_11 in torch.from_numpy(tokens).T.unsqueeze(2):
                self.model(step_11, kv=cache, logits_to_keep=1)
            seconds = time.perf_counter() - start
        self._experts_read += self._residency.statistics.bytes_read - before
        self._steps += tokens.shape[1]
        return seconds

    def prefill(self, tokens: Tokens) -> float:
        with self._residency.room(cached_tokens=len(tokens), pass_tokens=len(tokens)):
            return super().prefill(tokens)

    @property
    def statistics(self) -> CacheStatistics:
        return self._residency.statistics

    def least_seconds(self, disk: float, memory: float) -> float:
        """Of a step, at these rates: reading what missed, and what is used."""
        moe = self.model.config.moe
        assert moe is not None
        plain = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        experts = len(self.model.moe_layers) * moe.num_experts_per_tok * self._residency.plan.slot_bytes
        return self._experts_read / self._steps / disk + (plain + experts) / memory


def measure(arguments: argparse.Namespace) -> list[Row]:
    if os.geteuid() != 0 or not CGROUPS.is_dir():
        raise SystemExit("this benchmark needs root and the memory cgroup (version 1) at /sys/fs/cgroup/memory")
    config = bench_config(arguments)
    rounds = arguments.rounds or (2 if arguments.quick else 5)
    shares = (0.67,) if arguments.quick else SHARES
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.scratch or temporary) / folder_name(config)
        files = prepare(config, folder, ["Q4_0"], arguments.threads)
        directory = folder / "int4"
        if not directory.exists():
            note("quantising to int4")
            quantize(files["hf"], directory, "int4")
        size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        rates = _disk_rate(directory), measure_limits(arguments.threads).read
        note(f"{shown(size)} on disk; reading {rates[0] / 1e9:.2f} GB/s from disk, {rates[1] / 1e9:.1f} from memory")
        for share in shares:
            limit = int(share * size)
            sides = [
                Side("moesaic", partial(Capped, partial(WithinMemory, directory, arguments.threads, limit), limit)),
                Side("llama.cpp Q4_0", partial(Capped, _llama(files["Q4_0"], arguments), limit)),
            ]
            rows += _measure_share(share, limit, sides, rates, rounds, arguments)
    return rows


def _llama(path: Path, arguments: argparse.Namespace) -> Callable[[], Runner]:
    capacity = max(arguments.prefill, PROMPT_TOKENS + DECODED)
    return partial(Llama, path, arguments.threads, capacity=capacity, repack=False)


def _measure_share(
    share: float, limit: int, sides: list[Side], rates: tuple[float, float], rounds: int, arguments: argparse.Namespace
) -> list[Row]:
    generator = np.random.default_rng(arguments.seed)

    def random_tokens(*shape: int) -> Tokens:
        return generator.integers(arguments.vocabulary, size=shape)

    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    rows = []
    try:
        contest = Contest(sides, arguments.threads).__enter__()
    except RuntimeError as error:
        note(f"{share:.0%}: {error}")
        _remove_groups()
        return []
    try:
        turns = [(random_tokens(arguments.prefill),) for _ in range(rounds + 1)]
        prefill = contest.take_turns("prefill", turns)
        turns = [(random_tokens(1, PROMPT_TOKENS), random_tokens(1, DECODED)) for _ in range(rounds + 1)]
        decode = contest.take_turns("decode", turns)
        peaks = ", ".join(f"{name} {shown(contest.ask(name, 'peak'))}" for name in contest.names)
        resident = shown(contest.ask("moesaic", "resident"))
        note(f"{share:.0%}, {shown(limit)}: {contest.ask('moesaic', 'statistics')}; ours without page cache {resident}")
        note(f"{share:.0%}: peak with page cache {peaks}")
        fastest = 1 / contest.ask("moesaic", "least_seconds", *rates)
        rows.append(_row("prefill", share, arguments.prefill, prefill, None))
        rows.append(_row("decode", share, DECODED, decode, fastest))
    finally:
        contest.__exit__()
        _remove_groups()
    return rows


def _row(work: str, share: float, tokens: int, seconds: dict[str, list], limit: float | None) -> Row:
    """The ratio is the median over rounds: both sides of a round met the same disturbance."""
    ours, theirs = seconds["moesaic"], seconds["llama.cpp Q4_0"]
    speed, goal = tokens / median(ours), GOALS.get((work, share))
    ratio = median(b / a for a, b in zip(ours, theirs, strict=True))
    of_limit = "" if limit is None else f" ({speed / limit:.2f} of the limit)"
    return Row(
        work=f"{work} {tokens} in {share:.0%} of the weights{of_limit}",
        unit="tokens/s",
        ours=speed,
        peer=tokens / median(theirs),
        peer_name="llama.cpp Q4_0",
        limit=limit,
        ratio=ratio,
        goal=goal,
        met=None if goal is None else ratio >= goal,
    )


def _remove_groups() -> None:
    """Of our processes, which have ended, or do so in a moment."""
    for group in CGROUPS.glob(f"moesaic-{os.getpid()}-*"):
        for _ in range(50):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def _disk_rate(directory: Path) -> float:
    """Bytes per second that several threads read past the page cache."""
    path = max(directory.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    whole = path.stat().st_size // DISK_SAMPLE
    extents = [Extent(path, number * DISK_SAMPLE, DISK_SAMPLE) for number in range(min(whole, 128))]
    reader = FileReader(direct=True)
    targets = [torch.empty(DISK_SAMPLE, dtype=torch.uint8) for _ in range(8)]
    start = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda each: reader.read_into(each[1], targets[each[0] % 8]), enumerate(extents)))
    return len(extents) * DISK_SAMPLE / (time.perf_counter() - start)


if __name__ == "__main__":
    run_benchmark(
        __doc__ or "",
        measure,
        ("--rounds", {"type": positive, "help": "timed turns of each side and work (default 5, quick 2)"}),
        ("--threads", {"type": positive, "default": 2, "help": "of every side"}),
        ("--prefill", {"type": positive, "default": 512, "help": "tokens of a prompt"}),
        ("--layers", {"type": positive, "default": LAYERS}),
        ("--width", {"type": positive, "default": 2048, "help": "of the residual stream"}),
        ("--expert-width", {"type": positive, "default": 1024, "help": "inner width of an expert"}),
        ("--experts", {"type": positive, "default": 64}),
        ("--top-k", {"type": positive, "default": 8, "help": "experts per token"}),
        ("--heads", {"type": positive, "default": 16}),
        ("--vocabulary", {"type": positive, "default": 50304}),
        ("--seed", {"type": int, "default": 0, "help": "of the tokens"}),
        ("--scratch", {"help": "a folder that keeps the models (10 GB), so that a second run starts"}),
    )
