"""The ranks of a run, laid out as a mesh (dp, fsdp, ep), and sums over them.

Every rank has tokens of its own. Dense parameters are cut over fsdp and repeated over dp and ep; experts are shared out
over ep, cut over fsdp and repeated over dp.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moesaic.config import ParallelConfig
from moesaic.errors import UsageError

DIMENSIONS = ("dp", "fsdp", "ep")
"""Outermost first: the ranks of an ep group, which talk most, are neighbours, on one host where they fit."""


class Ranks:
    """Where this process stands among those of its run; alone without a mesh, when all sums are their own."""

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        """`mesh` has the dimensions (dp, fsdp, ep)."""
        self.mesh = mesh
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

    def barrier(self) -> None:
        if self.mesh is not None:
            dist.barrier()

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


def make_ranks(config: ParallelConfig, device_type: str = "cpu") -> Ranks:
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
    return Ranks(init_device_mesh(device_type, (count // inner, config.fsdp, config.ep), mesh_dim_names=DIMENSIONS))


@contextmanager
def process_group(device_type: str, timeout: timedelta = timedelta(minutes=30)) -> Iterator[None]:
    """The process group that torchrun's variables describe, until the end; nothing where there are none.

    A rank that waits longer than `timeout` for another one gives up with an error.
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()
