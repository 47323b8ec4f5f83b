"""Runs a function on several ranks, each a process of its own with gloo; a hang fails after a while."""

import io
import queue
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._C._distributed_c10d import FileStore

TIMEOUT = 40.0
"""Seconds in which all ranks have to be done, starting up included."""
MODEL = """[model]
hidden_size = 16
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 8
initializer_range = 0.1
[model.moe]
num_experts = 5
num_experts_per_tok = 2
moe_intermediate_size = 8
"""
"""The part of a run's config that makes it tiny; 5 experts, which few numbers of ranks divide."""


def on_ranks(count: int, function: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT) -> list[Any]:
    """What `function(*arguments)` returns on each of `count` ranks, forks that have it and its arguments."""
    context = mp.get_context("fork")
    results = context.Queue()
    with TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_run, args=(rank, count, folder, results, timeout, function, arguments), daemon=True)
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        try:
            answers = dict(_next(results, timeout) for _ in processes)
        finally:
            for process in processes:
                process.join(2.0)
                process.kill()
    return [answers[rank] for rank in range(count)]


def _next(results: Any, timeout: float) -> tuple[int, Any]:
    try:
        rank, answer, failure = results.get(timeout=timeout)
    except queue.Empty:
        raise AssertionError(f"the ranks were not done after {timeout:.0f} s: one of them hangs") from None
    assert failure is None, f"rank {rank} failed:\n{failure}"
    return rank, torch.load(io.BytesIO(answer), weights_only=False)


def _run(
    rank: int, count: int, folder: str, results: Any, timeout: float, function: Callable[..., Any], arguments: Any
) -> None:
    torch.set_num_threads(1)
    store = FileStore(str(Path(folder) / "store"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=timeout))
    try:
        answer = io.BytesIO()  # as bytes: a tensor in a queue is a file that ends with its process
        torch.save(function(*arguments), answer)
        results.put((rank, answer.getvalue(), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        results.close()
        results.join_thread()
        dist.destroy_process_group()
