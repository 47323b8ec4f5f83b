"""The ranks of a run, laid out as a mesh (dp, fsdp, ep), and sums over them.

Every rank has tokens of its own. Dense parameters are cut over fsdp and repeated over dp and ep; experts are shared out
over ep, cut over fsdp and repeated over dp.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from moesaic.config import ParallelConfig
from moesaic.errors import MoesaicError, UsageError, let_first_rank_speak
from moesaic.parallel.heartbeat import Heartbeat, clone_of, is_broken_exchange

FOR_EVER = timedelta(days=365)
"""Of waits for a rank that works alone; should it be lost, the heartbeat or torchrun ends them."""
_stores = itertools.count()

DIMENSIONS = ("dp", "fsdp", "ep")
"""Outermost first: the ranks of an ep group, which talk most, are neighbours, on one host where they fit."""


class Ranks:
    """Where this process stands among those of its run; alone without a mesh, when all sums are their own."""

    def __init__(self, mesh: DeviceMesh | None = None, heartbeat: Heartbeat | None = None) -> None:
        """`mesh` has the dimensions (dp, fsdp, ep)."""
        self.mesh = mesh
        self._heartbeat = heartbeat
        self.dp, self.fsdp, self.ep = (1, 1, 1) if mesh is None else tuple(mesh.shape)
        self.count = self.dp * self.fsdp * self.ep
        self.index = 0 if mesh is None else dist.get_rank()
        self._dense_replicas = self._group_over(("dp", "ep"))

    @property
    def is_first(self) -> bool:
        """The one that writes files and talks to the user."""
        return self.index == 0

    def group(self, dimension: str) -> dist.ProcessGroup:
        assert self.mesh is not None
        return self.mesh.get_group(dimension)

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """Those of this rank, besides that of all."""
        dimensions = [] if self.mesh is None else self.mesh.get_all_groups()
        return [*dimensions, *([self._dense_replicas] if self._dense_replicas is not None else [])]

    def sum(self, tensor: Tensor) -> Tensor:
        """The same on every rank."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def largest(self, tensor: Tensor) -> Tensor:
        """Element by element, the same on every rank."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Whether it holds on some rank."""
        return bool(self.largest(torch.tensor(int(flag), device=self._device)))

    def sum_replicas(self, tensor: Tensor, *, of_expert: bool) -> None:
        """In place, over the ranks that hold the same part of a dense parameter or of an expert's."""
        if of_expert and self.dp > 1:
            dist.all_reduce(tensor, group=self.group("dp"))
        if not of_expert and self._dense_replicas is not None:
            dist.all_reduce(tensor, group=self._dense_replicas)

    def replicas(self, *, of_expert: bool) -> int:
        """How many ranks hold the same part of a parameter."""
        return self.dp if of_expert else self.dp * self.ep

    def replica(self, *, of_expert: bool) -> int:
        """The number of this rank among them."""
        if self.mesh is None:
            return 0
        dp = self.group("dp").rank()
        return dp if of_expert else dp * self.ep + self.group("ep").rank()

    def share(self, batch_size: int) -> slice:
        """The sequences of a batch that are this rank's.

        Raises UsageError when the ranks would get unequally many.
        """
        if batch_size % self.count:
            more = -(-batch_size // self.count) * self.count
            raise UsageError(
                f"batch_size is {batch_size}, which {self.count} ranks cannot share evenly; set batch_size = {more}"
            )
        size = batch_size // self.count
        return slice(self.index * size, (self.index + 1) * size)

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` returns, JSON, where the first rank alone calls it. The others wait as long as that takes.

        When `make` raises, the others end without a word: it is the first one's to say.
        """
        if self.mesh is None:
            return make()
        store = self.store()
        if not self.is_first:
            store.wait(["made"], FOR_EVER)
            answer = json.loads(store.get("made"))
            if "value" not in answer:
                let_first_rank_speak()
                raise SystemExit(answer["exit_code"])
            return answer["value"]
        answer: dict[str, Any] = {"exit_code": MoesaicError.exit_code}
        try:
            answer = {"value": make()}
        except MoesaicError as error:
            answer = {"exit_code": error.exit_code}
            raise
        finally:
            store.set("made", json.dumps(answer))
        return answer["value"]

    def tell(self, doing: str) -> None:
        """What this rank is doing from now on, which the others say of it should it be lost."""
        if self._heartbeat is not None:
            self._heartbeat.doing = doing

    def store(self) -> Store:
        """One that all ranks see, empty, a new one at each call, which all ranks must make in the same order. It may be
        used in a thread."""
        return PrefixStore(f"moesaic/{next(_stores)}", clone_of(_default_store()))

    @property
    def _device(self) -> str:
        if self.mesh is None or self.mesh.device_type == "cpu":
            return "cpu"
        return f"{self.mesh.device_type}:{torch.accelerator.current_device_index()}"

    def _reduced(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.count == 1:
            return tensor
        reduced = tensor.detach().to(self._device, copy=True).contiguous()
        dist.all_reduce(reduced, operation)
        return reduced.to(tensor.device)

    def _group_over(self, dimensions: tuple[str, ...]) -> dist.ProcessGroup | None:
        """The ranks that differ from this one in these dimensions alone; None where that is nobody."""
        if self.mesh is None:
            return None
        moving = [DIMENSIONS.index(name) for name in dimensions]
        staying = [index for index in range(len(DIMENSIONS)) if index not in moving]
        rows = self.mesh.mesh.permute(*staying, *moving).reshape(-1, self.dp * self.ep)
        if rows.shape[1] == 1:
            return None
        group, _ = dist.new_subgroups_by_enumeration(rows.tolist())
        assert isinstance(group, dist.ProcessGroup)
        return group


def make_ranks(config: ParallelConfig, device_type: str = "cpu", heartbeat: Heartbeat | None = None) -> Ranks:
    """The mesh that `config` asks for, over all processes of the process group, or over this one where there is none.

    Raises UsageError when dp x fsdp x ep is not their number.
    """
    count = dist.get_world_size() if dist.is_initialized() else 1
    inner = config.fsdp * config.ep
    wanted = (config.dp or max(count // inner, 1)) * inner
    if wanted != count:
        dp = f"dp {config.dp} x " if config.dp else ""
        raise UsageError(
            f"parallel asks for {dp}fsdp {config.fsdp} x ep {config.ep} = {wanted if config.dp else inner} ranks"
            f"{'' if config.dp else ' or a multiple of it'}, and there {'is' if count == 1 else 'are'} {count}; "
            f"start it with: torchrun --nproc-per-node {wanted} -m moesaic train CONFIG"
        )
    if not dist.is_initialized():
        return Ranks()
    mesh = init_device_mesh(device_type, (count // inner, config.fsdp, config.ep), mesh_dim_names=DIMENSIONS)
    ranks = Ranks(mesh, heartbeat)
    for group in ranks.groups:  # new groups wait for half an hour, whatever the first one does
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=config.timeout_seconds), group)
    return ranks


@contextmanager
def process_group(device_type: str, timeout_seconds: float) -> Iterator[Heartbeat | None]:
    """The process group that torchrun's variables describe, until the end, with this rank's heartbeat; nothing where
    there are none.

    A rank that waits longer than `timeout_seconds` in an exchange gives it up. Whoever notices that an exchange has
    failed names the rank that is missing, and ends the process.
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield None
        return
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        _init("nccl" if device_type == "cuda" else "gloo", timedelta(seconds=timeout_seconds))
    except RuntimeError as error:
        raise MoesaicError(
            f"the ranks could not connect ({str(error).splitlines()[0]}); check that all hosts reach each other"
        ) from error
    store = PrefixStore("moesaic/heartbeat", clone_of(_default_store()))
    heartbeat = Heartbeat(store, dist.get_rank(), dist.get_world_size(), timeout_seconds)
    heartbeat.start()
    try:
        yield heartbeat
    except RuntimeError as error:
        if is_broken_exchange(error):
            heartbeat.explain_broken_exchange()
        raise
    finally:
        heartbeat.stop()
        dist.destroy_process_group()


def _init(backend: str, timeout: timedelta) -> None:
    """Under other names at each restart: torchrun keeps one store, in which the last ranks' addresses still lie."""
    store, rank, count = next(iter(rendezvous("env://", timeout=timeout)))
    attempt = f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} of {count} ranks"
    dist.init_process_group(
        backend, store=PrefixStore(attempt, store), rank=rank, world_size=count, timeout=timeout
    )  # fmt: skip


def _default_store() -> Store:
    return dist.distributed_c10d._get_default_store()
