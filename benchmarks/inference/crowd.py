"""Clients by the hundred, in a process of their own, who take down when each was told what.

Run as a program it reads a Load from its standard input and writes a list of what was told to its standard output, both
as JSON. It needs nothing but the standard library: it starts at once, and leaves the server its processor time.
"""

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

PATIENCE = 60.0
"""Seconds after which a client who still waits takes the answer for lost."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Who asks how often for streams of /v1/completions, of random prompts."""

    port: int
    seconds: float
    """In which requests are sent; all answers are waited for."""
    clients: int = 0
    """Each asks again as soon as it has its answer (a closed load). They begin one after the other."""
    per_second: float = 0.0
    """Or requests come at random times at this rate, whatever is going on (an open load)."""
    prompt_tokens: int = 32
    new_tokens: int = 32
    """Half to one and a half times as many are asked for, so that texts do not end together."""
    vocab_size: int = 256
    seed: int = 0


@dataclass
class Told:
    """One request. Times are of time.monotonic, which all processes of a machine share."""

    sent: float
    asked: int = 0
    """How many tokens."""
    status: int = 0
    """0: no connection, or one that ended without a word."""
    answered: float = 0.0
    """When the status was there."""
    first: float = 0.0
    last: float = 0.0
    """When the first and the last text came."""
    largest_gap: float = 0.0
    """Seconds between two texts."""
    tokens: int = 0
    retry_after: bool = False
    finish_reason: str | None = None
    done: bool = False
    """Whether the stream came to its proper end."""
    problem: str = ""

    @property
    def complete(self) -> bool:
        """Whether all came that was asked for, to its proper end."""
        return self.tokens == self.asked and self.finish_reason == "length" and self.done and not self.problem

    @property
    def to_status(self) -> float:
        return self.answered - self.sent

    @property
    def to_first_token(self) -> float:
        return self.first - self.sent

    @property
    def to_end(self) -> float:
        return self.last - self.sent

    @property
    def per_token(self) -> float:
        """After the first."""
        return (self.last - self.first) / max(self.tokens - 1, 1)


class Crowd:
    """The process of a load, which begins with this object."""

    def __init__(self, load: Load) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(load)))
        self._process.stdin.close()
        self._process.stdin = None

    def told(self) -> list[Told]:
        """What each request was told, in the order in which they were sent, once all have been answered."""
        answer, _ = self._process.communicate()
        if self._process.returncode:
            raise RuntimeError(f"the clients ended with status {self._process.returncode}")
        return sorted((Told(**one) for one in json.loads(answer)), key=lambda one: one.sent)


def quantile(told: Sequence[Told], q: float, of: Callable[[Told], float]) -> float:
    """The smallest value that a share `q` of them does not exceed."""
    values = sorted(map(of, told))
    return values[min(len(values) - 1, int(q * len(values)))]


async def _run(load: Load) -> list[Told]:
    rng, told = random.Random(load.seed), []
    end = time.monotonic() + load.seconds

    async def client(delay: float) -> None:
        await asyncio.sleep(delay)
        while time.monotonic() < end:
            told.append(await _ask(load, rng))
            if told[-1].status != 200:
                await asyncio.sleep(0.1)

    if load.clients:
        await asyncio.gather(*(client(0.03 * number) for number in range(load.clients)))
        return told
    requests, at = set(), time.monotonic()
    while (at := at + rng.expovariate(load.per_second)) < end:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        requests.add(asyncio.create_task(_ask(load, rng)))
    return list(await asyncio.gather(*requests))


async def _ask(load: Load, rng: random.Random) -> Told:
    prompt = [rng.randrange(load.vocab_size) for _ in range(load.prompt_tokens)]
    asked = rng.randint((load.new_tokens + 1) // 2, load.new_tokens + load.new_tokens // 2)
    body = {"prompt": prompt, "max_tokens": asked, "temperature": 0, "ignore_eos": True, "stream": True}
    payload = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {len(payload)}\r\n"
    )
    told = Told(time.monotonic(), asked)
    try:
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_connection("127.0.0.1", load.port)
            try:
                writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + payload)
                await _read(reader, told)
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        told.problem = f"{type(error).__name__}: {error}"
    return told


async def _read(reader: asyncio.StreamReader, told: Told) -> None:
    line = await reader.readline()
    if not line:
        return
    told.answered, told.status = time.monotonic(), int(line.split()[1])
    async for line in reader:
        if line.lower().startswith(b"retry-after:"):
            told.retry_after = True
        elif line == b"data: [DONE]\n":
            told.done = True
        elif line.startswith(b'data: {"error"'):
            told.problem = line.decode(errors="replace")
        elif line.startswith(b"data: {"):
            _take(json.loads(line[6:]), told)


def _take(chunk: dict, told: Told) -> None:
    if not chunk["choices"]:
        told.tokens = chunk["usage"]["completion_tokens"]
        return
    now = time.monotonic()
    if told.first:
        told.largest_gap = max(told.largest_gap, now - told.last)
    else:
        told.first = now
    told.last = now
    told.finish_reason = chunk["choices"][0]["finish_reason"]


if __name__ == "__main__":
    print(json.dumps([asdict(one) for one in asyncio.run(_run(Load(**json.load(sys.stdin))))]))
