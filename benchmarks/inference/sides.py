"""Sides of a contest of speed: one process per side with a model in it, asked for one piece of work at a time.

Processes keep memory and thread pools apart; only the side whose turn it is has work. All sides get the same tokens.

B sequences, L positions, S steps, V vocabulary.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
PAUSE = 0.02
"""Seconds between two turns, in which the threads of the last one stop spinning."""
START_SECONDS = 900.0
"""In which a side must have loaded its model, or done a turn."""


class Runner(Protocol):
    """A model that can be asked for work. Every method rewinds what it cached."""

    def logits(self, tokens: Tokens) -> NDArray[np.float32]:
        """(L,) -> (L, V)."""
        ...

    def prefill(self, tokens: Tokens) -> float:
        """Seconds from tokens (L,) to the logits of the last."""
        ...

    def decode(self, prompt: Tokens, tokens: Tokens) -> float:
        """Seconds for S steps, each of one token per sequence: tokens (B, S) after the prompt (B, P)."""
        ...


@dataclass(frozen=True)
class Side:
    """Who takes part: a name, and how to make it, which must pickle."""

    name: str
    make: Callable[[], object]


class Contest:
    """The processes of some sides, alive within a `with` block."""

    def __init__(self, sides: Sequence[Side], threads: int) -> None:
        self.names = [side.name for side in sides]
        self._sides = sides
        self._threads = threads
        self._workers: dict[str, _Worker] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for side in self._sides:
                worker = _Worker(side, self._threads)
                stack.callback(worker.close)
                self._workers[side.name] = worker
                worker.receive()  # one after the other, so that they do not load against each other
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def ask(self, name: str, method: str, *arguments: object) -> Any:
        """What a side's method returns. Raises RuntimeError with the side's own words when it failed."""
        worker = self._workers[name]
        worker.send(method, arguments)
        return worker.receive()

    def take_turns(self, method: str, arguments: Sequence[Sequence[object]], *, warm_up: int = 1) -> dict[str, list]:
        """Each side does the work of each round; there and back, so that nobody always follows the same one.

        Returns, by side, what `method` returned in each round after the first `warm_up`.
        """
        found: dict[str, list] = {name: [] for name in self.names}
        for number, each in enumerate(arguments):
            for name in self.names if number % 2 == 0 else reversed(self.names):
                found[name].append(self.ask(name, method, *each))
                time.sleep(PAUSE)
        return {name: values[warm_up:] for name, values in found.items()}


class _Worker:
    def __init__(self, side: Side, threads: int) -> None:
        self.name = side.name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read when the process first imports torch
        try:
            self._process = context.Process(target=_serve, args=(theirs, side.make), daemon=True)
            self._process.start()
        finally:
            os.environ.pop("OMP_NUM_THREADS")
            if before is not None:
                os.environ["OMP_NUM_THREADS"] = before
        theirs.close()

    def send(self, method: str, arguments: Sequence[object]) -> None:
        self._connection.send((method, arguments))

    def receive(self) -> Any:
        if not self._connection.poll(START_SECONDS):
            raise RuntimeError(f"{self.name} has not answered for {START_SECONDS:.0f} s")
        try:
            worked, value = self._connection.recv()
        except EOFError:
            self._process.join(10)
            raise RuntimeError(f"the process of {self.name} died with exit code {self._process.exitcode}") from None
        if not worked:
            raise RuntimeError(f"{self.name}: {value}")
        return value

    def close(self) -> None:
        if self._process.is_alive():
            self._process.kill()  # it holds nothing but memory
        self._process.join()
        self._connection.close()


def _serve(connection: Connection, make: Callable[[], Runner]) -> None:
    """The other process: make the model, then answer until the parent is gone."""
    try:
        runner = make()
        connection.send((True, None))
        while True:
            method, arguments = connection.recv()
            connection.send((True, getattr(runner, method)(*arguments)))
    except EOFError:
        return
    except Exception as error:
        connection.send((False, f"{type(error).__name__}: {error}"))
