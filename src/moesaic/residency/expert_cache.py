"""A model's experts on disk, and a cache of fixed size in memory for those that are used.

The cache has slots, each with room for one expert of any layer, so that a layer that needs more gets more. Missing
experts are read by threads while the ones that are there are computed. Where a pass needs more experts than there are
slots, they come in waves.

E experts of a layer, S slots.
"""

import mmap
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from threading import Lock, get_ident
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic.ops import ExpertWeights
from moesaic.ops.quantize import PackedWeight
from moesaic.residency.expert_readers import ExpertReader
from moesaic.residency.foresight import Foresight, Guess
from moesaic.residency.memory_plan import EXPERTS_PER_CHUNK, shown
from moesaic.residency.slots import Expert, SlotTable

READERS = 8
"""Threads that read; they wait for the disk rather than compute."""


@dataclass
class CacheStatistics:
    """Of one layer, since the model was loaded."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    stall_seconds: float = 0.0
    """How long computing waited for reads."""
    read_ahead: int = 0
    """Hits that had been read, or were on their way, because they were expected."""
    read_in_vain: int = 0
    """Experts that were expected, read and then not needed."""

    def __str__(self) -> str:
        return (
            f"{self.hit_rate:.0%} of {self.hits + self.misses:,} were in memory or on their way "
            f"({self.read_ahead:,} read ahead, {self.read_in_vain:,} in vain), {shown(self.bytes_read)} read, "
            f"{self.stall_seconds:.1f} s waited"
        )

    @property
    def hit_rate(self) -> float:
        return self.hits / max(self.hits + self.misses, 1)

    def __add__(self, other: "CacheStatistics") -> "CacheStatistics":
        return CacheStatistics(
            self.hits + other.hits,
            self.misses + other.misses,
            self.bytes_read + other.bytes_read,
            self.stall_seconds + other.stall_seconds,
            self.read_ahead + other.read_ahead,
            self.read_in_vain + other.read_in_vain,
        )


@dataclass(frozen=True)
class LayerOnDisk:
    """One layer's experts: their form, and how they are read."""

    weights: ExpertWeights
    """On the meta device, with the biases of all E experts, where there are any, in memory."""
    reader: ExpertReader

    @property
    def num_experts(self) -> int:
        return self.weights.num_experts

    @property
    def expert_bytes(self) -> int:
        """In memory."""
        return sum(_data_of(stack)[0].nbytes for stack in (self.weights.gate_up, self.weights.down))


@dataclass
class _Reads:
    """Experts on their way, with the slots that wait for them."""

    missing: list[Expert] = field(default_factory=list)
    pending: dict[Future[int], tuple[Expert, int]] = field(default_factory=dict)


class ExpertCache:
    """Experts of several layers, all of one shape and format.

    Raises MoesaicError, in `chunks`, for an expert that cannot be read; those in the cache stay good.
    """

    def __init__(
        self, layers: Sequence[LayerOnDisk], num_slots: int, num_readers: int = READERS, policy: str = "next_use"
    ) -> None:
        self.layers = layers
        self.table = SlotTable(num_slots, len(layers), layers[0].num_experts, policy)
        self.statistics = [CacheStatistics() for _ in layers]
        self.foresight = Foresight()
        self._reads = _Reads()
        """For the layer that is computed."""
        self._ahead = _Reads()
        """For the one after it."""
        self._make_pool = partial(ThreadPoolExecutor, num_readers, thread_name_prefix="moesaic-read")
        self._pool = self._make_pool()
        self._one_pass = Lock()
        self._owner: int | None = None
        """The thread that has it."""
        self._wanted_slots = num_slots
        self.most_slots = num_slots
        self._memory: list[mmap.mmap] = []
        self._slots = {name: self._allocate(getattr(layers[0].weights, name)) for name in ("gate_up", "down")}

    def place(self, uses: NDArray[np.float64]) -> None:
        """Those with the highest of these shares (L, E) are read now, as many as there are slots, and stay as long as
        there are so many."""
        self.table.follow(uses)
        best = np.argsort(-uses, axis=None, kind="stable")[: self.table.number]
        for layer in range(len(self.layers)):
            numbers = sorted((best[best // uses.shape[1] == layer] % uses.shape[1]).tolist())
            with closing(self.chunks(layer, numbers)) as chunks:
                for _ in chunks:
                    pass
        self.statistics = [CacheStatistics() for _ in self.layers]

    def resize(self, num_slots: int) -> None:
        """At most to as many slots as at first; memory that they leave goes back to the system.

        A thread that has a pass gets them after it: a text that was given up is closed whenever the collector finds it.
        """
        self._wanted_slots = num_slots
        if self._owner != get_ident():
            with self._one_pass:
                self._end_pass()
                self._resize()

    def _resize(self) -> None:
        num_slots = self._wanted_slots
        if num_slots == self.table.number:
            return
        self._settle()
        self.table.resize(num_slots)
        for memory in self._memory:
            slot_bytes = len(memory) // self.most_slots
            first = -(-num_slots * slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            if first < len(memory):
                memory.madvise(mmap.MADV_DONTNEED, first, len(memory) - first)

    def chunks(
        self, layer: int, numbers: Sequence[int], ahead: Guess | None = None
    ) -> Generator[ExpertWeights, None, None]:
        """These experts of a layer, as ExpertStore says, and while they are computed reads for another layer's that it
        may need next. To be closed, so that no read of this layer goes on; until then nobody else has the cache."""
        with self._one_pass:
            self._owner = get_ident()
            try:
                self._end_pass()  # of one that was interrupted while it ended
                self._resize()
                yield from self._chunks(self._reads, layer, numbers, ahead)
            except GeneratorExit:
                raise
            except BaseException:
                self._stop_reading()
                raise
            finally:
                try:
                    self._end_pass()
                finally:
                    self._owner = None

    def _end_pass(self) -> None:
        """No read of the pass goes on: they write into their slots."""
        wait(self._reads.pending)
        self._reads = _Reads()
        self.table.end_pass([slot for _, slot in self._ahead.pending.values()])

    def _stop_reading(self) -> None:
        """Also what an interruption kept from being noted."""
        stopping, self._pool = self._pool, self._make_pool()
        self._ahead = _Reads()
        stopping.shutdown(wait=True)

    def _chunks(
        self, reads: _Reads, layer: int, numbers: Sequence[int], ahead: Guess | None
    ) -> Iterator[ExpertWeights]:
        self.table.begin_pass(layer, numbers)
        experts = [(layer, number) for number in numbers]
        self._take_over(reads, layer, set(experts))
        awaited = {expert for expert, _ in reads.pending.values()}
        ready = {expert: self.table.hold(expert) for expert in experts if expert in self.table}
        reads.missing = [expert for expert in experts if expert not in ready and expert not in awaited]
        self.table.expect(())
        statistics = self.statistics[layer]
        statistics.hits += len(experts) - len(reads.missing)
        statistics.misses += len(reads.missing)
        self._start(reads, ahead)
        while ready or reads.pending or reads.missing:
            if not ready:
                if reads.pending:
                    ready |= self._arrived(reads, statistics)
                else:  # other layers' experts are on their way into all slots
                    assert self._ahead.pending, "no slot can be had"
                    start = perf_counter()
                    wait(self._ahead.pending, return_when=FIRST_COMPLETED)
                    statistics.stall_seconds += perf_counter() - start
                    self._dismiss(self._ahead)
                    self._start(reads, ahead)
                continue
            chunk = dict(islice(ready.items(), EXPERTS_PER_CHUNK))
            yield self._weights(layer, chunk)
            self.table.let_go(chunk.values())
            ready = {expert: slot for expert, slot in ready.items() if expert not in chunk}
            self._start(reads, ahead)

    def _start(self, reads: _Reads, ahead: Guess | None) -> None:
        """As many reads as there are slots to be had; when all of the layer have begun, those ahead of it."""
        self._submit(reads)
        if ahead is not None and not reads.missing and not ahead.is_taken_up:
            ahead.is_taken_up = True
            expected = [(ahead.layer, number) for number in ahead.numbers]
            self.table.expect(expected)
            awaited = {expert for expert, _ in self._ahead.pending.values()}
            absent = [expert for expert in expected if expert not in self.table and expert not in awaited]
            self._ahead.missing = self.foresight.worth_reading(ahead, absent)
        if not reads.missing:
            self._submit(self._ahead, most=self.table.number // 2)

    def _submit(self, reads: _Reads, most: int | None = None) -> None:
        """At most so many at a time."""
        while reads.missing and (most is None or len(reads.pending) < most):
            slot = self.table.claim()
            if slot is None:
                return
            expert = reads.missing.pop(0)
            reads.pending[self._pool.submit(self._read, expert, slot)] = expert, slot

    def _take_over(self, reads: _Reads, layer: int, needed: set[Expert]) -> None:
        """What was read ahead, or still is: what is needed is awaited, what is not may leave."""
        self.foresight.learn(layer, needed)
        self._ahead.missing = []
        for future, (expert, slot) in list(self._ahead.pending.items()):
            if expert in needed:
                self.statistics[expert[0]].read_ahead += 1
                reads.pending[future] = expert, slot  # first, so that no interruption loses it
                del self._ahead.pending[future]
        self._dismiss(self._ahead)

    def _dismiss(self, reads: _Reads) -> None:
        """What has come and is not needed now."""
        for future in [future for future in reads.pending if future.done()]:
            self._end_of_no_use(future, *reads.pending.pop(future))

    def _settle(self) -> None:
        """Nothing is read ahead any more."""
        wait(self._ahead.pending)
        self._ahead.missing = []
        self._dismiss(self._ahead)
        self.table.end_pass()

    def _end_of_no_use(self, future: Future[int], expert: Expert, slot: int) -> None:
        if future.exception() is None:
            self.table.put(expert, slot)
            self.table.let_go([slot])
            self.statistics[expert[0]].bytes_read += future.result()
            self.statistics[expert[0]].read_in_vain += 1
        else:  # whoever needs the expert will read it again, and be told
            self.table.give_back(slot)

    def _arrived(self, reads: _Reads, statistics: CacheStatistics) -> dict[Expert, int]:
        """What has come, one expert at least, with its slot. Raises what a read raised."""
        start = perf_counter()
        done = wait(reads.pending, return_when=FIRST_COMPLETED).done
        statistics.stall_seconds += perf_counter() - start
        statistics.bytes_read += sum(future.result() for future in done)
        arrived = dict(reads.pending.pop(future) for future in done)
        for expert, slot in arrived.items():
            self.table.put(expert, slot)
        return arrived

    def _read(self, expert: Expert, slot: int) -> int:
        layer, number = expert
        places = {name: _expert_of(stack, slot) for name, stack in self._slots.items()}
        return self.layers[layer].reader.read(number, places)

    def _weights(self, layer: int, chunk: Mapping[Expert, int]) -> ExpertWeights:
        stored = self.layers[layer]
        slots = np.full(stored.num_experts, -1, dtype=np.int32)
        slots[[number for _, number in chunk]] = list(chunk.values())
        return replace(stored.weights, **self._slots, slots=torch.from_numpy(slots))

    def _allocate(self, like: PackedWeight | Tensor) -> PackedWeight | Tensor:
        """Slots at the start of a page, which take memory when they are first filled."""
        one = _data_of(like)[0]
        memory = mmap.mmap(-1, self.most_slots * one.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.append(memory)
        data = torch.frombuffer(memory, dtype=one.dtype).view(self.most_slots, *one.shape)
        return replace(like, data=data) if isinstance(like, PackedWeight) else data


def _data_of(stack: PackedWeight | Tensor) -> Tensor:
    return stack.data if isinstance(stack, PackedWeight) else stack


def _expert_of(stack: PackedWeight | Tensor, slot: int) -> PackedWeight | Tensor:
    return stack.of_expert(slot) if isinstance(stack, PackedWeight) else stack[slot]
