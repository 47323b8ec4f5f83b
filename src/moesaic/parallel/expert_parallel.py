"""Sharing out the experts of a finished model over ranks, from outside.

E experts, P ranks.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from moesaic.errors import UsageError
from moesaic.model.experts import Experts
from moesaic.model.transformer import Transformer
from moesaic.parallel.all_to_all import AllToAllDispatcher, Exchange


def expert_bounds(num_experts: int, num_ranks: int) -> list[int]:
    """(P + 1,): rank p holds the experts bounds[p] to bounds[p + 1]; the first ranks hold one more where P does not
    divide E."""
    size, larger = divmod(num_experts, num_ranks)
    return [rank * size + min(rank, larger) for rank in range(num_ranks + 1)]


def apply_expert_parallel(
    model: Transformer, mesh: DeviceMesh, *, transport: str = "exact", gradient_transport: str = "exact"
) -> None:
    """Leaves this rank of `mesh`'s dimension ep its share of each layer's experts, and has tokens sent to theirs.

    Every rank must then compute the same passes, be it without tokens. The parameters of experts are new ones: make
    optimizers afterwards.

    Raises UsageError when there are more ranks than experts, or the experts are packed or on disk.
    """
    num_ranks = mesh["ep"].size()
    if num_ranks == 1:
        return
    for layer in model.moe_layers:
        experts = layer.experts
        if experts.packed or experts.store is not None:
            raise UsageError(f"parallel.ep is {num_ranks}, but the experts are packed or on disk; load plain weights")
        num_experts = len(experts.gate_up)
        if num_ranks > num_experts:
            raise UsageError(
                f"parallel.ep is {num_ranks}, but a layer has {num_experts} experts; set it to {num_experts} or less"
            )
        exchange = Exchange(mesh.get_group("ep"), transport, gradient_transport)
        bounds = expert_bounds(num_experts, num_ranks)
        _keep(experts, bounds[exchange.rank], bounds[exchange.rank + 1])
        layer.dispatcher = AllToAllDispatcher(exchange, bounds)


def _keep(experts: Experts, first: int, last: int) -> None:
    for name, parameter in list(experts.named_parameters(recurse=False)):
        kept = parameter.detach()[first:last].clone()
        setattr(experts, name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
