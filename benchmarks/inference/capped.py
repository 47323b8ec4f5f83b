"""Sides that run in less memory than their weights, each in a memory cgroup of its own, and the tokens they get."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import note
from numpy.random import Generator

import moesaic
from inference.runners import Ours, Texts
from inference.sides import Runner, Tokens
from moesaic.residency.expert_cache import CacheStatistics
from moesaic.residency.file_reader import FileReader
from moesaic.residency.residency import residency_of
from moesaic.safetensors_file import Extent

CGROUPS = Path("/sys/fs/cgroup/memory")
DISK_SAMPLE = 4 * 2**20
REPEATED = (0.67, 0.14)
"""Of a correlated text: the chance that a token is the last one again, and that it is the one before. So a cache of an
eighth of the experts hits 67 %, and one of a quarter 81 %, as measured on real models."""


def random_tokens(generator: Generator, vocabulary: int, count: int, *, correlated: bool) -> Tokens:
    """(1, count)."""
    recent = generator.integers(vocabulary, size=2).tolist()
    tokens = []
    for draw in generator.random(count):
        if correlated and draw < REPEATED[0]:
            token = recent[-1]
        elif correlated and draw < sum(REPEATED):
            token = recent[-2]
        else:
            token = int(generator.integers(vocabulary))
        recent = [*[one for one in recent if one != token][-1:], token]
        recent = recent if len(recent) == 2 else [token, token]
        tokens.append(token)
    return np.array([tokens])


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
        self._texts = {}
        residency = residency_of(self.model)
        assert residency is not None
        self._residency = residency
        self._bytes_read = self._steps = 0
        note(str(residency.plan))

    @torch.inference_mode()
    def decode(self, prompt: Tokens, tokens: Tokens) -> float:
        """Notes what the steps read from disk; the prompt is not one of them."""
        capacity = prompt.shape[1] + tokens.shape[1]
        with self._residency.room(cached_tokens=capacity, pass_tokens=prompt.shape[1]) as room:
            texts = self._empty_texts(1, capacity)
            texts.read(torch.from_numpy(prompt))
            room.resize(1)
            before, start = self._bytes_needed(), time.perf_counter()
            for step_11 in torch.from_numpy(tokens).T.unsqueeze(2):
                texts.read(step_11)
            seconds = time.perf_counter() - start
        self._bytes_read += self._bytes_needed() - before
        self._steps += tokens.shape[1]
        return seconds

    def _bytes_needed(self) -> int:
        """Of what was read so far."""
        statistics = self._residency.statistics
        return statistics.bytes_read - statistics.read_in_vain * self._residency.plan.slot_bytes

    def prefill(self, tokens: Tokens) -> float:
        with self._residency.room(cached_tokens=len(tokens), pass_tokens=len(tokens)):
            return super().prefill(tokens)

    def logits(self, tokens: Tokens) -> Any:
        """Of every position but the first, decoded one by one."""
        return _decoded_logits(self.model, tokens)

    @property
    def statistics(self) -> CacheStatistics:
        return self._residency.statistics

    def least_seconds(self, disk: float, memory: float) -> float:
        """Of a step since this was last asked, at these rates: reading what missed, and what is used."""
        moe = self.model.config.moe
        assert moe is not None
        plain = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        experts = len(self.model.moe_layers) * moe.num_experts_per_tok * self._residency.plan.slot_bytes
        read, self._bytes_read = self._bytes_read / self._steps, 0
        self._steps = 0
        return read / disk + (plain + experts) / memory


class InMemory(Ours):
    """The same without a budget."""

    def logits(self, tokens: Tokens) -> Any:
        return _decoded_logits(self.model, tokens)


@torch.inference_mode()
def _decoded_logits(model: Any, tokens: Tokens) -> Any:
    texts = Texts(model, 1, tokens.shape[1])
    steps = torch.from_numpy(tokens).T.unsqueeze(2)
    return torch.cat([texts.read(step_11)[0] for step_11 in steps]).numpy()


def disk_rate(directory: Path) -> float:
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


def seconds_to_read(directory: Path) -> float:
    """All its weights, one after another through the page cache, which is empty at first."""
    drop_page_cache()
    start, buffer = time.perf_counter(), bytearray(8 * 2**20)
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def drop_page_cache() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
