"""Bytes that expert parallelism sends per token, counted, beside those of the cost model and of other ways.

Ranks are processes with gloo; what leaves a rank is counted where it is handed to the collective. The layer has random
weights, so that routing is nearly even, which is what the model assumes.
"""

import argparse
import socket
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import Row, note, run_benchmark

from moesaic.config import ModelConfig, MoEConfig, ParallelConfig
from moesaic.model.transformer import Transformer
from moesaic.parallel.all_to_all import AllToAllDispatcher
from moesaic.parallel.cost import ExchangeShape, backward_bytes, forward_bytes
from moesaic.parallel.expert_parallel import apply_expert_parallel
from moesaic.parallel.ranks import make_ranks
from moesaic.parallel.transport import TRANSPORTS

NUM_EXPERTS, TOP_K, HIDDEN, INNER = 64, 8, 256, 128
GOAL = 1.05
"""Counted bytes to those of the model, either way."""
TIMEOUT_S = 240.0


def measure(options: argparse.Namespace) -> Sequence[Row]:
    rows = []
    for num_ranks in (2, 4):
        for transport in TRANSPORTS:
            tokens = options.tokens // 4 if options.quick else options.tokens
            counted = sum(on_ranks(num_ranks, transport, tokens)) / (num_ranks * tokens)
            sizes: dict[str, Any] = {
                "num_experts": NUM_EXPERTS, "top_k": TOP_K, "hidden_size": HIDDEN, "num_ranks": num_ranks,
                "transport": transport, "gradient_transport": transport,
            }  # fmt: skip
            expected = total(ExchangeShape(**sizes))
            without = total(ExchangeShape(**sizes, deduplicated=False))
            if transport == "exact":
                gathered = expert_bytes(num_ranks) / tokens
                work = f"{num_ranks} ranks, {tokens} tokens each: tokens travel"
                rows.append(row(work, counted, gathered, "experts travel (computed)"))
            work = f"{num_ranks} ranks, {transport}"
            rows += [
                row(f"{work}: as predicted", counted, expected, "cost model", goal=GOAL),
                row(f"{work}: a row for each rank", counted, without, "a row for each expert (computed)"),
            ]
    return rows


def row(work: str, ours: float, peer: float, peer_name: str, goal: float | None = None) -> Row:
    """Peer to ours; with a goal, whichever is more to the other, which must not be above it."""
    ratio = peer / ours if goal is None else max(peer / ours, ours / peer)
    met = None if goal is None else ratio <= goal
    return Row(
        work=work, unit="B/token", ours=ours, peer=peer, peer_name=peer_name, ratio=ratio, goal=goal, met=met
    )  # fmt: skip


def total(shape: ExchangeShape) -> float:
    return forward_bytes(shape) + backward_bytes(shape)


def expert_bytes(num_ranks: int) -> float:
    """That a rank sends to gather a layer's experts in both passes and to sum their gradients, in float32."""
    return 3 * 4 * 3 * NUM_EXPERTS * HIDDEN * INNER * (num_ranks - 1) / num_ranks


def on_ranks(num_ranks: int, transport: str, tokens: int) -> list[int]:
    """Bytes that each rank sent."""
    context = mp.get_context("fork")
    results, port = context.Queue(), _free_port()
    processes = [
        context.Process(target=_rank, args=(rank, num_ranks, port, transport, tokens, results), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    try:
        return [results.get(timeout=TIMEOUT_S) for _ in processes]
    finally:
        for process in processes:
            process.join(5.0)
            process.kill()


def _rank(rank: int, num_ranks: int, port: int, transport: str, tokens: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_ranks)
    ranks = make_ranks(ParallelConfig(ep=num_ranks))
    assert ranks.mesh is not None
    config = ModelConfig(
        vocab_size=1024, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        head_dim=64, initializer_range=0.02,
        moe=MoEConfig(num_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, moe_intermediate_size=INNER),
    )  # fmt: skip
    model = Transformer(config)
    model.init_weights(0)
    apply_expert_parallel(model, ranks.mesh, transport=transport, gradient_transport=transport)
    generator = torch.Generator().manual_seed(rank)
    model(torch.randint(0, 1024, (1, tokens), generator=generator)).square().mean().backward()
    dispatcher = model.moe_layers[0].dispatcher
    assert isinstance(dispatcher, AllToAllDispatcher)
    results.put(dispatcher.exchange.bytes_sent)
    dist.barrier()
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    note("bytes of rows, expert ids and weights; the link's own headers are not counted.")
    run_benchmark(
        __doc__ or "", measure, ("--tokens", {"type": int, "default": 2048, "help": "of each rank"})
    )  # fmt: skip
