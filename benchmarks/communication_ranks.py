"""What one rank of `communication.py` does: exchanges of a layer of experts, and those of other ways, over its link.

T tokens, D hidden size, P ranks, E experts, K experts per token, F intermediate size of an expert.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from hosts import sent
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moesaic.config import ModelConfig, MoEConfig, ParallelConfig
from moesaic.model.moe import ExpertLayer
from moesaic.model.routing_context import RoutingContext
from moesaic.model.transformer import Transformer
from moesaic.parallel.expert_parallel import apply_expert_parallel
from moesaic.parallel.ranks import make_ranks


@dataclass(frozen=True)
class Sizes:
    """Of a layer, and of the batch of each rank."""

    tokens: int
    num_experts: int = 64
    top_k: int = 8
    hidden_size: int = 256
    inner_size: int = 128
    n_group: int = 1
    topk_group: int = 1
    shared_size: int = 0


@dataclass(frozen=True)
class Passed:
    """Of one rank: what its interface sent, in bytes without headers, and median seconds."""

    forward_bytes: int = 0
    both_bytes: int = 0
    """In the forward and the backward pass."""
    exchange_seconds: float = 0.0
    """There and back in the forward pass, nothing computed."""
    forward_seconds: float = 0.0
    seconds: float = 0.0
    """Both passes of the layer."""


def make_layer(sizes: Sizes, **settings: Any) -> ExpertLayer:
    """Of this rank, with random weights; experts over all ranks where there are settings of `apply_expert_parallel`."""
    config = ModelConfig(
        vocab_size=16, hidden_size=sizes.hidden_size, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, head_dim=64, initializer_range=0.02,
        moe=MoEConfig(
            num_experts=sizes.num_experts, num_experts_per_tok=sizes.top_k, moe_intermediate_size=sizes.inner_size,
            router="sigmoid_topk", n_group=sizes.n_group, topk_group=sizes.topk_group,
            n_shared_experts=1 if sizes.shared_size else 0,
            shared_expert_intermediate_size=sizes.shared_size,
        ),
    )  # fmt: skip
    model = Transformer(config)
    model.init_weights(0)
    if settings:
        ranks = make_ranks(ParallelConfig(ep=dist.get_world_size()))
        assert ranks.mesh is not None
        apply_expert_parallel(model, ranks.mesh, **settings)
    return model.moe_layers[0]


def draw(sizes: Sizes) -> Tensor:
    """x (1, T, D) of this rank."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randn(1, sizes.tokens, sizes.hidden_size, generator=generator)


def context_of(sizes: Sizes) -> RoutingContext:
    return RoutingContext(tokens=torch.zeros(1, sizes.tokens, dtype=torch.int64))


def timed(work: Callable[[], object]) -> float:
    """Seconds that the slowest rank took, of a common start."""
    dist.barrier()
    start = time.perf_counter()
    work()
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def counted(work: Callable[[], object]) -> int:
    """Bytes that this host sent meanwhile, without headers; a barrier's are in it, some 200."""
    dist.barrier()
    before = sent()
    work()
    dist.barrier()
    traffic = sent().since(before)
    return traffic.payload


def learn(layer: nn.Module, x: Tensor, *arguments: Any) -> None:
    y = layer(x.detach().requires_grad_(), *arguments)
    (y[0] if isinstance(y, tuple) else y).square().mean().backward()


@torch.no_grad()
def look(layer: nn.Module, x: Tensor, *arguments: Any) -> None:
    layer(x, *arguments)


@torch.no_grad()
def only_exchange(layer: ExpertLayer, sizes: Sizes) -> Callable[[], None]:
    """The layer's exchanges there and back, for a routing that is made once; what arrives goes home at once."""
    x_TD, context = draw(sizes)[0], context_of(sizes)
    routing = layer.router(x_TD, context)

    @torch.no_grad()
    def exchange() -> None:
        trips = layer.dispatcher.dispatch(x_TD, routing)
        for trip in trips:
            rows_RD, _ = trip.arrive()
            trip.send_back(rows_RD)
        layer.dispatcher.combine(trips)

    return exchange


def exchanges(sizes: Sizes, cases: Mapping[str, Mapping[str, Any]], rounds: int) -> dict[str, Passed]:
    """By name of a case, the settings of `apply_expert_parallel`, with those of `Sizes` among them; in turns."""
    layers, works = {}, {}
    names = Sizes.__dataclass_fields__.keys()
    for name, case in cases.items():
        own = replace(sizes, **{key: value for key, value in case.items() if key in names})
        layers[name] = make_layer(own, **{key: value for key, value in case.items() if key not in names})
        works[name] = only_exchange(layers[name], own)
        works[name]()  # connects
    seconds = {name: [] for name in cases}
    for _ in range(rounds):
        for name, work in works.items():
            seconds[name].append(timed(work))
    x_1TD, context, passed = draw(sizes), context_of(sizes), {}
    for name, layer in layers.items():
        learn(layer, x_1TD, context)
        forward = counted(lambda layer=layer: look(layer, x_1TD, context))
        both = counted(lambda layer=layer: learn(layer, x_1TD, context))
        passed[name] = Passed(forward, both, exchange_seconds=statistics.median(seconds[name]))
    return passed


def inside_rate(num_bytes: int = 1 << 23) -> float:
    """Bytes/s that two ranks of this host exchange together, both ways."""
    size = 2
    groups = [list(range(first, first + size)) for first in range(0, dist.get_world_size(), size)]
    group, _ = dist.new_subgroups_by_enumeration(groups)
    message, answer = torch.zeros(num_bytes, dtype=torch.uint8), torch.empty(num_bytes, dtype=torch.uint8)
    work = lambda: dist.all_to_all_single(answer, message, group=group)  # noqa: E731
    work()
    return num_bytes / statistics.median(timed(work) for _ in range(3))


def peers(sizes: Sizes, rounds: int) -> dict[str, Passed]:
    """A layer whose tokens travel, one whose experts travel (FSDP2), and transformers' expert parallelism."""
    context, x_1TD = context_of(sizes), draw(sizes)
    gathered = make_layer(sizes)
    fully_shard(gathered.experts, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    layers: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {
        "ours": (make_layer(sizes, transport="exact"), (context,)),
        "experts travel (FSDP2)": (gathered, (context,)),
        "transformers": (_of_transformers(sizes), ()),
    }
    for layer, arguments in layers.values():
        learn(layer, x_1TD, *arguments)
    seconds = {name: [] for name in layers}
    for _ in range(rounds):
        for name, (layer, arguments) in layers.items():
            seconds[name].append(timed(lambda layer=layer, rest=arguments: learn(layer, x_1TD, *rest)))
    passed = {}
    for name, (layer, rest) in layers.items():
        both = counted(lambda layer=layer, rest=rest: learn(layer, x_1TD, *rest))
        passed[name] = Passed(both_bytes=both, seconds=statistics.median(seconds[name]))
    return passed


def _of_transformers(sizes: Sizes) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.distributed.expert_parallel import apply_expert_parallelism
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=sizes.hidden_size, moe_intermediate_size=sizes.inner_size, num_experts=sizes.num_experts,
        num_experts_per_tok=sizes.top_k, norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    block = Qwen3MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("ep", "tp"))
    plan = {
        "experts.gate_up_proj": "grouped_gemm",
        "experts.down_proj": "grouped_gemm",
        "experts": "ep_dispatch_experts",
    }
    return apply_expert_parallelism(block, mesh["ep"], mesh["tp"], plan, "all_to_all")


def overlaps(sizes: Sizes, rounds: int) -> tuple[dict[str, Passed], dict[str, float]]:
    """Of each overlap, with shared experts that take about as long as the exchange; and the seconds of the exchange and
    of the shared experts, by pass."""
    exchange = only_exchange(make_layer(sizes, overlap="none"), sizes)
    exchange()
    exchange_seconds = statistics.median(timed(exchange) for _ in range(rounds))
    x_1TD, context, shared_size = draw(sizes), context_of(sizes), 512
    for _ in range(2):
        seconds = _shared_seconds(replace(sizes, shared_size=shared_size), rounds)
        shared_size = max(64, round(shared_size * exchange_seconds / seconds / 64) * 64)
    layers = {
        name: make_layer(replace(sizes, shared_size=shared_size), overlap=name) for name in ("none", "shared", "halves")
    }
    shared = layers["none"].shared_experts
    assert shared is not None
    works: dict[str, Callable[[], object]] = {
        "exchange": exchange,
        "shared": lambda: look(shared, x_1TD),
        "shared both": lambda: learn(shared, x_1TD),
    }
    for name, layer in layers.items():
        works[f"{name} forward"] = lambda layer=layer: look(layer, x_1TD, context)
        works[f"{name} both"] = lambda layer=layer: learn(layer, x_1TD, context)
    samples: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            samples[name].append(timed(work))
    medians = {name: statistics.median(values[1:]) for name, values in samples.items()}
    passed = {
        name: Passed(forward_seconds=medians[f"{name} forward"], seconds=medians[f"{name} both"]) for name in layers
    }
    return passed, {name: medians[name] for name in ("exchange", "shared", "shared both")} | {"size": shared_size}


def _shared_seconds(sizes: Sizes, rounds: int) -> float:
    shared, x_1TD = make_layer(sizes).shared_experts, draw(sizes)
    assert shared is not None
    look(shared, x_1TD)
    work = partial(look, shared, x_1TD)
    return statistics.median(timed(work) for _ in range(rounds))
