"""Recording what the routers decide, and having them decide it again, from outside the model.

T tokens of all recorded passes, E experts, K experts per token, N assignments.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.errors import UsageError
from moesaic.model.transformer import Transformer
from moesaic.ops import Routing


class LayerTrace:
    """The decisions of one layer's router over all recorded forward passes, in order."""

    def __init__(self) -> None:
        self.routings: list[Routing] = []
        """One per forward pass."""

    @property
    def expert_ids(self) -> Tensor:
        """(T, K) int64, or (N,) when tokens do not all have K experts."""
        return self._joined("expert_ids")

    @property
    def weights(self) -> Tensor:
        """Like `expert_ids`, float32."""
        return self._joined("weights")

    @property
    def logits(self) -> Tensor:
        """(T, E) float32."""
        return torch.cat([routing.logits for routing in self._recorded()])

    def tokens_per_expert(self) -> Tensor:
        """(E,) int64."""
        return torch.stack([routing.tokens_per_expert() for routing in self._recorded()]).sum(0)

    def _recorded(self) -> list[Routing]:
        if not self.routings:
            raise UsageError("nothing is recorded yet; run the model inside `with record_routing(model) as trace`")
        return self.routings

    def _joined(self, field: str) -> Tensor:
        flat_N = torch.cat([getattr(routing, field) for routing in self._recorded()])
        widths = {routing.top_k for routing in self.routings}
        top_k = widths.pop() if len(widths) == 1 else None
        return flat_N if top_k is None else flat_N.view(-1, top_k)


class RoutingTrace:
    """One `LayerTrace` per mixture-of-experts layer: `trace[0].expert_ids`."""

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerTrace() for _ in range(num_layers)]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerTrace]:
        return iter(self.layers)

    def __getitem__(self, layer: int) -> LayerTrace:
        return self.layers[layer]

    @property
    def num_passes(self) -> int:
        """Forward passes recorded."""
        return len(self.layers[0].routings) if self.layers else 0


@contextmanager
def watch_routing(model: Transformer, tell: Callable[[Tensor, list[Routing]], None]) -> Iterator[None]:
    """Within it each forward pass calls `tell(tokens (B, L), routings)` when it is done, with a `Routing` per layer of
    experts, detached. Passes that other threads run on the same model meanwhile are told, too."""
    num_layers = len(model.moe_layers)

    def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        asked_for = kwargs.get("routings")
        return args, {**kwargs, "routings": [] if asked_for is None else asked_for}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        newest = kwargs["routings"][len(kwargs["routings"]) - num_layers :]
        tell(args[0] if args else kwargs["tokens"], [routing.detach() for routing in newest])

    handles = [
        model.register_forward_pre_hook(ask, with_kwargs=True),
        model.register_forward_hook(keep, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record_routing(model: Transformer) -> Iterator[RoutingTrace]:
    """`with record_routing(model) as trace: model(tokens)` collects expert ids, weights and logits of every layer.

    What is recorded is detached. Forward passes that other threads run on the same model meanwhile are recorded too.
    """
    trace = RoutingTrace(len(model.moe_layers))

    def keep(tokens: Tensor, routings: list[Routing]) -> None:
        for layer, routing in zip(trace, routings, strict=True):
            layer.routings.append(routing)

    with watch_routing(model, keep):
        yield trace


@contextmanager
def replay_routing(model: Transformer, trace: RoutingTrace) -> Iterator[None]:
    """`with replay_routing(model, trace): model(tokens)` sends the tokens to the experts of the trace.

    The first forward pass takes the choices of the first recorded pass, the second those of the second, and so on; each
    must have as many tokens. Weights are computed anew with gradients, so that one can train with a trace, too: of
    another model, of another precision, or of an earlier policy (arXiv 2510.11370 replays the routing of rollouts
    in reinforcement learning).

    Raises:
        UsageError: by a pass that the trace has nothing for.
    """
    done = 0

    def hand_in(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal done
        if done == trace.num_passes:
            raise UsageError(f"the trace holds {done} forward passes, and this is one more; record as many")
        replay = [layer.routings[done] for layer in trace]
        done += 1
        return args, {**kwargs, "replay": replay}

    handle = model.register_forward_pre_hook(hand_in, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
