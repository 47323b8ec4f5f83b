"""llama.cpp as a server would run it, without the server: slots that share every call of llama_decode.

As in its own server, each call takes the next token of every text that is being written and as much of the waiting
prompts as a batch holds, and the most likely token is drawn. Nothing is sent anywhere.
"""

import ctypes
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from inference.llama import failure, llama_cpp
from inference.load import Job, Outcome, Timing

BATCH = 2048
"""Tokens of a call, llama.cpp's default; it computes them 512 at a time."""


@dataclass
class _Slot:
    job: Job
    timing: Timing
    done: int = 0
    """Tokens with keys and values."""
    written: list[int] = field(default_factory=list)

    @property
    def next_ids(self) -> Sequence[int]:
        return self.job.prompt[self.done :] if self.done < len(self.job.prompt) else self.written[-1:]


class LlamaServer:
    """`sequences` slots of `capacity` tokens each."""

    def __init__(self, path: Path, threads: int, sequences: int, capacity: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), llama_cpp.llama_model_default_params())
        if not self._model:
            raise failure(f"llama.cpp cannot load {path}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_seq_max = capacity * sequences, BATCH, sequences
        options.n_threads = options.n_threads_batch = threads
        options.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise failure(f"llama.cpp cannot make a context of {options.n_ctx} tokens")
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def complete(self, jobs: Sequence[Job], clients: int) -> Outcome:
        """All jobs, with at most so many of them under way."""
        memory = llama_cpp.llama_get_memory(self._context)
        llama_cpp.llama_memory_clear(memory, False)
        waiting, slots, timings = deque(jobs), dict[int, _Slot](), []
        start = time.perf_counter()
        while waiting or slots:
            now = time.perf_counter() - start
            for number in range(clients):
                if number not in slots and waiting and (waiting[0].arrival or 0.0) <= now:
                    job = waiting.popleft()
                    asked = time.perf_counter() if job.arrival is None else start + job.arrival
                    slots[number] = _Slot(job, Timing(asked))
                    timings.append(slots[number].timing)
            if not slots:
                time.sleep(max(0.0, (waiting[0].arrival or 0.0) - now))
                continue
            for number in self._step(slots):
                slot = slots[number]
                slot.timing.came()
                if len(slot.written) == slot.job.new_tokens:
                    llama_cpp.llama_memory_seq_rm(memory, number, -1, -1)
                    del slots[number]
        return Outcome(timings, time.perf_counter() - start)

    def _step(self, slots: dict[int, _Slot]) -> list[int]:
        """One call; the slots that have a new token."""
        batch, count, rows = self._batch, 0, {}
        for number, slot in sorted(slots.items(), key=lambda item: not item[1].written):  # those that write come first
            ids = slot.next_ids[: BATCH - count]
            for index, token in enumerate(ids):
                batch.token[count], batch.pos[count] = token, slot.done + index
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, number
                batch.logits[count] = False
                count += 1
            slot.done += len(ids)
            if ids and slot.done >= len(slot.job.prompt):
                batch.logits[count - 1] = True
                rows[number] = count - 1
        batch.n_tokens = count
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise failure(f"llama_decode returned {status}")
        for number, row in rows.items():
            found = llama_cpp.llama_get_logits_ith(self._context, row)
            logits = np.ctypeslib.as_array(ctypes.cast(found, ctypes.POINTER(ctypes.c_float)), (self._vocab_size,))
            slots[number].written.append(int(logits.argmax()))
        return list(rows)
