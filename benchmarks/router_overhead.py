"""What routing costs: the router, sorting by expert, and moving rows there and back, as a share of the layer's time.

Forward and backward of one mixture-of-experts layer against the same parts of it alone, in one process, taking turns;
medians. Counted are the router's forward and backward, one sort, and every permute and unpermute that the grouped
backend makes: x, then the gradient of y, then x once more; the experts' outputs, then the gradients of their inputs.

T tokens, D hidden size, F inner width of an expert, E experts, K experts per token, N = T x K rows.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import cast

import torch
from common import Row, note, positive, run_benchmark
from torch import Tensor

from moesaic.config import ModelConfig, MoEConfig
from moesaic.model.moe import MoE
from moesaic.model.routing_context import RoutingContext
from moesaic.moe_config import RouterName
from moesaic.ops import DTYPES
from moesaic.ops.device import cpu_set_up_for_training
from moesaic.ops.permute import permute, sort_by_expert, unpermute

GOAL = 0.10
SEQUENCE_LENGTH = 512
PERMUTES, UNPERMUTES = 3, 2
"""In one forward and backward of the grouped backend."""

Timed = dict[str, Callable[[], object]]


def measure(arguments: argparse.Namespace) -> list[Row]:
    tokens = 1024 if arguments.quick else arguments.tokens
    rounds = 3 if arguments.quick else arguments.rounds
    rows = []
    with cpu_set_up_for_training():
        for dtype in arguments.dtypes.split(","):
            for router in arguments.routers.split(","):
                work = _work(cast(RouterName, router), tokens, DTYPES[dtype], arguments)
                name = f"{router}, {dtype}"
                rows += _rows(name, _medians(name, work, rounds))
    return rows


def _work(router: RouterName, num_tokens: int, dtype: torch.dtype, arguments: argparse.Namespace) -> Timed:
    """The layer and its parts, each a call without arguments."""
    config = ModelConfig(
        vocab_size=64,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        moe=MoEConfig(
            num_experts=arguments.experts,
            num_experts_per_tok=arguments.top_k,
            moe_intermediate_size=arguments.intermediate_size,
            router=router,
        ),
    )
    layer = MoE(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    layer = layer.to(dtype)
    tokens_BL = torch.randint(0, config.vocab_size, (num_tokens // SEQUENCE_LENGTH, SEQUENCE_LENGTH))
    context = RoutingContext(tokens=tokens_BL)
    x_BLD = torch.randn(*tokens_BL.shape, config.hidden_size).to(dtype).requires_grad_()
    x_TD = x_BLD.detach().flatten(0, 1).requires_grad_()
    grad_y_BLD = torch.randn_like(x_BLD)
    routing = layer.router(x_TD, context).detach()
    grad_weights_N = torch.randn_like(routing.weights)
    permutation = sort_by_expert(routing)
    rows_ND = permute(x_TD.detach(), permutation)
    inputs_TD = x_TD.detach()

    def whole() -> None:
        layer(x_BLD, context)[0].backward(grad_y_BLD)
        _forget(layer, x_BLD)

    def route() -> None:
        layer.router(x_TD, context).weights.backward(grad_weights_N)
        _forget(layer, x_TD)

    return {
        "layer": whole,
        "router": route,
        "sort": lambda: sort_by_expert(routing),
        "permute": lambda: permute(inputs_TD, permutation),
        "unpermute": lambda: unpermute(rows_ND, permutation),
    }


def _forget(layer: MoE, x: Tensor) -> None:
    """Drop the gradients, as an optimizer step does."""
    x.grad = None
    layer.zero_grad(set_to_none=True)


def _medians(name: str, work: Timed, rounds: int) -> dict[str, float]:
    """Seconds of each; the first round warms up and does not count."""
    seconds: dict[str, list[float]] = {part: [] for part in work}
    for _ in range(rounds + 1):
        for part, call in work.items():
            start = time.perf_counter()
            call()
            seconds[part].append(time.perf_counter() - start)
    medians = {part: statistics.median(values[1:]) for part, values in seconds.items()}
    note(f"{name}: " + ", ".join(f"{part} {1e3 * value:.2f} ms" for part, value in medians.items()))
    return medians


def _rows(name: str, seconds: dict[str, float]) -> list[Row]:
    parts = {
        "router, forward and backward": seconds["router"],
        "sort by expert": seconds["sort"],
        f"{PERMUTES} permutes": PERMUTES * seconds["permute"],
        f"{UNPERMUTES} unpermutes": UNPERMUTES * seconds["unpermute"],
    }
    layer = seconds["layer"]
    share = sum(parts.values()) / layer
    return [
        *(
            Row(work=f"{name}: {part}", unit="ms", ours=1e3 * value, peer=1e3 * layer, peer_name="whole layer",
                ratio=value / layer)
            for part, value in parts.items()
        ),
        Row(work=f"{name}: all of it, share of the layer (less is better)", unit="share", ours=share, goal=GOAL,
            met=share <= GOAL),
    ]  # fmt: skip


if __name__ == "__main__":
    run_benchmark(
        __doc__ or "",
        measure,
        ("--routers", {"default": "softmax_topk,sigmoid_topk", "help": "separated by commas"}),
        ("--dtypes", {"default": "float32", "help": "float32, bfloat16 or both, separated by a comma"}),
        ("--rounds", {"type": positive, "default": 15, "help": "timed rounds"}),
        ("--tokens", {"type": positive, "default": 4096, "help": "T, a multiple of 512"}),
        ("--hidden-size", {"type": positive, "default": 512, "help": "D"}),
        ("--intermediate-size", {"type": positive, "default": 256, "help": "F"}),
        ("--experts", {"type": positive, "default": 64, "help": "E"}),
        ("--top-k", {"type": positive, "default": 8, "help": "K"}),
    )
