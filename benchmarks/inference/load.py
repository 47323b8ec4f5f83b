"""Load on something that completes prompts: requests, when they come, and what each had to wait for.

A closed load keeps a number of clients busy, each of which asks again as soon as it has its answer; an open one comes
at random times, whatever is going on.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from inference.serving import MODEL_NAME


@dataclass(frozen=True)
class Job:
    """A prompt of token ids, and how many tokens are to follow."""

    prompt: tuple[int, ...]
    new_tokens: int
    arrival: float | None = None
    """Seconds after the start; None: as soon as its client is free."""


@dataclass
class Timing:
    """Seconds on one clock."""

    asked: float
    arrivals: list[float] = field(default_factory=list)
    """When something came; usually one token."""
    num_tokens: int = 0

    def came(self, count: int = 1) -> None:
        self.arrivals.append(time.perf_counter())
        self.num_tokens += count

    @property
    def to_first_token(self) -> float:
        return self.arrivals[0] - self.asked

    @property
    def per_token(self) -> float:
        """After the first."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(self.num_tokens - 1, 1)


@dataclass(frozen=True)
class Outcome:
    """Of one load on one side."""

    timings: Sequence[Timing]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return sum(timing.num_tokens for timing in self.timings) / self.seconds

    @property
    def median_to_first_token(self) -> float:
        return median(timing.to_first_token for timing in self.timings)

    @property
    def worst_to_first_token(self) -> float:
        """The 99th percentile."""
        return float(np.quantile([timing.to_first_token for timing in self.timings], 0.99))


def closed_load(
    rng: np.random.Generator, count: int, prompt_tokens: int, new_tokens: int, vocab_size: int
) -> list[Job]:
    """Prompts of half to one and a half times the length."""
    lengths = rng.integers(prompt_tokens // 2, prompt_tokens + prompt_tokens // 2 + 1, count)
    return [Job(tuple(rng.integers(0, vocab_size, length).tolist()), new_tokens) for length in lengths]


def open_load(jobs: Sequence[Job], rng: np.random.Generator, per_second: float) -> list[Job]:
    """The same at the times of a Poisson process."""
    arrivals = np.cumsum(rng.exponential(1 / per_second, len(jobs)))
    return [Job(job.prompt, job.new_tokens, float(at)) for job, at in zip(jobs, arrivals, strict=True)]


def through_http(port: int, jobs: Sequence[Job], clients: int) -> Outcome:
    """Send the jobs to a server on this machine, as streams of /v1/completions."""
    return asyncio.run(_send_all(port, jobs, clients))


async def _send_all(port: int, jobs: Sequence[Job], clients: int) -> Outcome:
    start = time.perf_counter()
    if all(job.arrival is not None for job in jobs):
        timings = await asyncio.gather(*(_send_at(port, job, start) for job in jobs))
        return Outcome(timings, time.perf_counter() - start)
    waiting = list(reversed(jobs))

    async def client() -> list[Timing]:
        done = []
        while waiting:
            done.append(await _send(port, waiting.pop()))
        return done

    results = await asyncio.gather(*(client() for _ in range(clients)))
    return Outcome([timing for done in results for timing in done], time.perf_counter() - start)


async def _send_at(port: int, job: Job, start: float) -> Timing:
    assert job.arrival is not None
    await asyncio.sleep(max(0.0, start + job.arrival - time.perf_counter()))
    return await _send(port, job)


async def _send(port: int, job: Job) -> Timing:
    """By hand, since a client library would take a core away from the server."""
    body = {"model": MODEL_NAME, "prompt": list(job.prompt), "max_tokens": job.new_tokens, "temperature": 0}
    payload = json.dumps(
        body | {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    ).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    timing = Timing(time.perf_counter())
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"the server answered {(status + await reader.read()).decode(errors='replace')}")
        async for line in reader:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[len(b"data: ") :])
            if "error" in chunk:
                raise RuntimeError(f"the server failed: {chunk['error']}")
            if chunk["choices"]:
                timing.came(0)
            else:
                timing.num_tokens = chunk["usage"]["completion_tokens"]
    finally:
        writer.close()
    if timing.num_tokens != job.new_tokens:
        raise RuntimeError(f"{timing.num_tokens} tokens came of {job.new_tokens}")
    return timing
