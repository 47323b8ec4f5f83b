"""Sharing out the experts of a finished model over ranks, from outside.

E experts, P ranks.
"""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moesaic.errors import UsageError
from moesaic.model.transformer import Transformer
from moesaic.parallel.all_to_all import AllToAllDispatcher
from moesaic.parallel.exchange import Exchange
from moesaic.parallel.two_level import TwoLevelDispatcher


def expert_bounds(num_experts: int, num_ranks: int) -> list[int]:
    """(P + 1,): rank p holds the experts bounds[p] to bounds[p + 1]; the first ranks hold one more where P does not
    divide E."""
    size, larger = divmod(num_experts, num_ranks)
    return [rank * size + min(rank, larger) for rank in range(num_ranks + 1)]


def apply_expert_parallel(
    model: Transformer,
    mesh: DeviceMesh,
    *,
    transport: str = "exact",
    gradient_transport: str = "exact",
    overlap: str = "none",
    ranks_per_host: int = 0,
) -> None:
    """Leaves this rank of `mesh`'s dimension ep its share of each layer's experts, and has tokens sent to theirs.

    The keywords are those of `ParallelConfig`. Every rank must then compute the same passes, be it without tokens. The
    parameters of experts are new ones: make optimizers afterwards.

    Raises UsageError when there are more ranks than experts, the experts are packed or on disk, or ep ranks do not fill
    hosts.
    """
    num_ranks = mesh["ep"].size()
    if num_ranks == 1:
        return
    if ranks_per_host and num_ranks % ranks_per_host:
        raise UsageError(
            f"parallel.ep is {num_ranks}, which is not a multiple of parallel.ranks_per_host, {ranks_per_host}; set "
            f"ranks_per_host to 0 for an exchange in one level"
        )
    is_two_level = 1 < ranks_per_host < num_ranks
    groups = _groups_of_hosts(mesh, ranks_per_host) if is_two_level else [mesh.get_group("ep")]
    rank = mesh.get_local_rank("ep")
    for layer in model.moe_layers:
        experts = layer.experts
        if experts.packed or experts.store is not None:
            raise UsageError(f"parallel.ep is {num_ranks}, but the experts are packed or on disk; load plain weights")
        num_experts = experts.num_experts
        if num_ranks > num_experts:
            raise UsageError(
                f"parallel.ep is {num_ranks}, but a layer has {num_experts} experts; set it to {num_experts} or less"
            )
        bounds = expert_bounds(num_experts, num_ranks)
        experts.keep(bounds[rank], bounds[rank + 1])
        outer, *inner = [Exchange(group, transport, gradient_transport) for group in groups]
        if inner:
            layer.dispatcher = TwoLevelDispatcher(outer, inner[0], bounds, overlap)
        else:
            layer.dispatcher = AllToAllDispatcher(outer, bounds, overlap)


def _groups_of_hosts(mesh: DeviceMesh, size: int) -> list[dist.ProcessGroup]:
    """This rank's groups: of its index on all hosts, and of its host."""
    names = mesh.mesh_dim_names
    assert names is not None
    rows = mesh.mesh.movedim(names.index("ep"), -1).reshape(-1, mesh["ep"].size())
    hosts = rows.unflatten(1, (-1, size))
    groups = []
    for ranks in (hosts.mT.flatten(0, 1), hosts.flatten(0, 1)):
        group, _ = dist.new_subgroups_by_enumeration(ranks.tolist())
        assert isinstance(group, dist.ProcessGroup)
        groups.append(group)
    return groups
