"""Writing the states of a run: by one process or by all ranks, at once or while training goes on."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoint.run_state import Crew, save_pieces, save_run_state
from moesaic.config import CheckpointConfig
from moesaic.parallel.ranks import Ranks
from moesaic.parallel.shard import Part


class StateWriter:
    """Of a run whose `ranks` all call it in the same order.

    In the background a state is copied first, so it takes the memory of this rank's part once more, and at most one is
    being written. It has its name only once it is whole on the disk, so a kill before that loses this state alone.
    """

    def __init__(self, run_directory: Path, ranks: Ranks, config: CheckpointConfig) -> None:
        self.run_directory = run_directory
        self.ranks = ranks
        self.config = config
        self._copies: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "save") if config.background else None
        self._step = 0
        self._pending: Future[object] | None = None

    def save(
        self, step: int, parts: Mapping[str, Part], extra: Mapping[str, Any], report: Callable[[int], None]
    ) -> None:
        """Writes the state of `step`, which has these `parts` on this rank, or begins to, after the one before.

        `report` gets the number of the steps whose states are now on the disk. Raises MoesaicError when a state could
        not be written.
        """
        self.finish(report)
        self._step = step
        if self._thread is None:
            self._work(step, parts, extra)()
            report(step)
            return
        copies = {name: replace(part, tensor=self._copied(name, part.tensor)) for name, part in parts.items()}
        self._pending = self._thread.submit(self._work(step, copies, extra))

    def finish(self, report: Callable[[int], None]) -> None:
        """Waits for what is being written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()
            report(self._step)

    @property
    def failed(self) -> bool:
        """Whether `finish` would raise, as far as this rank knows now."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def _work(self, step: int, parts: Mapping[str, Part], extra: Mapping[str, Any]) -> Callable[[], object]:
        if self.ranks.count == 1:
            tensors = {name: part.tensor for name, part in parts.items()}
            return partial(save_run_state, self.run_directory, step, tensors, extra, keep=self.config.keep)
        crew = Crew(self.ranks.store(), self.ranks.index, self.ranks.count)
        return partial(save_pieces, self.run_directory, step, parts, extra, crew, keep=self.config.keep)

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        """In memory that the next state has again."""
        copy = self._copies.get(name)
        if copy is None:
            copy = self._copies[name] = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
        return copy.copy_(tensor)
