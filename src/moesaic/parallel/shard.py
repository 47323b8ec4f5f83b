"""A finished model over the ranks of a mesh: experts over ep, then every parameter over fsdp by FSDP2; and its tensors,
or those of its optimizer, between the parts of the ranks and the whole ones that a single process has.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from moesaic.config import ParallelConfig
from moesaic.model.transformer import Transformer
from moesaic.parallel.expert_parallel import apply_expert_parallel, expert_bounds
from moesaic.parallel.gradients import is_expert, local
from moesaic.parallel.ranks import Ranks


def spread(model: Transformer, ranks: Ranks, config: ParallelConfig) -> None:
    """Leaves this rank its part of the model; make optimizers afterwards.

    Raises UsageError when there are more ranks in an ep group than experts.
    """
    if ranks.mesh is None:
        return
    apply_expert_parallel(
        model,
        ranks.mesh,
        transport=config.transport,
        gradient_transport=config.gradient_transport,
        overlap=config.overlap,
        ranks_per_host=config.ranks_per_host,
    )
    if ranks.fsdp > 1:
        _cut(model, ranks)


def _cut(model: Transformer, ranks: Ranks) -> None:
    assert ranks.mesh is not None
    mesh = ranks.mesh["fsdp"]
    for layer in model.moe_layers:
        fully_shard(layer.experts, mesh=mesh)  # alone, so that the largest part is not gathered before its turn
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Sums: the wrapper would divide by its ranks, and the loss has divided by the tokens of all ranks already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@dataclass(frozen=True)
class Part:
    """Rows `first` to `first + len(tensor)` of the `rows` that a tensor has in one process; a scalar has one row."""

    tensor: Tensor
    first: int
    rows: int


def own_parts(model: Transformer, tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Part]:
    """What this rank is to write of `tensors`, by name of a parameter or buffer, or NAME/MOMENT.

    The parts of all ranks are the whole tensors, each row once: of ranks that hold the same, the one with the fewest
    bytes so far writes the next.
    """
    layout = _Layout(model, ranks)
    written = {expert: [0] * ranks.replicas(of_expert=expert) for expert in (False, True)}
    parts = {}
    for key, value in sorted(tensors.items()):  # a resumed run has its moments in another order, and the same files
        expert = value.ndim > 0 and layout.of_expert(key)
        part, loads = local(value).detach(), written[expert]
        writer = loads.index(min(loads))
        loads[writer] += part.nbytes
        held_elsewhere = ranks.fsdp > 1 and not isinstance(value, DTensor) and ranks.group("fsdp").rank() > 0
        if writer == ranks.replica(of_expert=expert) and not held_elsewhere and part.numel():
            rows = layout.rows(key, value)
            parts[key] = Part(part, layout.bounds(key, rows)[0] if part.ndim else 0, rows)
    return parts


def read_parts(
    model: Transformer, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str, int, int], Tensor], ranks: Ranks
) -> dict[str, Tensor]:
    """The way back: of whole tensors of such shapes what this rank holds; `read(name, first, last)` gives some rows."""
    layout = _Layout(model, ranks)
    tensors = {}
    for key, shape in shapes.items():
        value = read(key, *(layout.bounds(key, shape[0]) if shape else (0, 1)))
        like = layout.parameter(key)
        if isinstance(like, DTensor) and shape:
            value = DTensor.from_local(
                value.to(like.device), like.device_mesh, like.placements, run_check=False,
                shape=like.shape, stride=like.stride(),
            )  # fmt: skip
        tensors[key] = value
    return tensors


class _Layout:
    """Which rows of a tensor are on this rank. Keys are names, or NAME/MOMENT."""

    def __init__(self, model: Transformer, ranks: Ranks) -> None:
        self._ranks = ranks
        self._parameters = dict(model.named_parameters())
        self._of_expert = is_expert(model)
        self._num_experts = model.config.moe.num_experts if model.config.moe else 0

    def parameter(self, key: str) -> Tensor | None:
        return self._parameters.get(key.split("/")[0])

    def of_expert(self, key: str) -> bool:
        return self._of_expert.get(key.split("/")[0], False)

    def rows(self, key: str, value: Tensor) -> int:
        """Of a tensor here, those of the whole one. A DTensor counts the rows of all that it is cut among."""
        if value.ndim == 0:
            return 1
        return self._num_experts if self.of_expert(key) else len(value)

    def bounds(self, key: str, rows: int) -> tuple[int, int]:
        """The first row here and the one after the last: this rank's experts, and of them or of all rows its cut."""
        first, last = 0, rows
        if self._ranks.ep > 1 and self.of_expert(key):
            bounds, rank = expert_bounds(rows, self._ranks.ep), self._ranks.group("ep").rank()
            first, last = bounds[rank], bounds[rank + 1]
        if isinstance(self.parameter(key), DTensor):
            size = -(-(last - first) // self._ranks.fsdp)  # as torch cuts: the last ranks may have less, or nothing
            first = min(first + self._ranks.group("fsdp").rank() * size, last)
            last = min(first + size, last)
        return first, last
