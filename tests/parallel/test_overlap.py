"""Exchanges that overlap with compute change no number and no order of collectives.

T tokens, D hidden size, E experts.
"""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.config import ParallelConfig
from moesaic.model.dispatch import Aside
from moesaic.parallel.all_to_all import AllToAllDispatcher
from moesaic.parallel.exchange import Exchange
from moesaic.parallel.expert_parallel import apply_expert_parallel
from moesaic.parallel.ranks import make_ranks

from .processes import on_ranks
from .test_expert_parallel import B, D, L, assert_close, build, draw, learn, learn_on_ranks, whole, with_moe

CASES: dict[str, dict[str, Any]] = {
    "plain": {"router": "softmax_topk"},
    "shared experts": {"router": "sigmoid_topk", "n_shared_experts": 1},
    "gated shared experts": {"router": "softmax_topk", "n_shared_experts": 1, "shared_expert_gate": True},
    "expert choice": {"router": "expert_choice", "n_shared_experts": 1},
    "soft": {"router": "soft", "slots_per_expert": 2, "n_shared_experts": 1},
}
RECOMPUTED = [(overlap, case) for overlap in ("shared", "halves") for case in ("plain", "shared experts")]


@pytest.mark.parametrize("overlap", ["shared", "halves"])
@pytest.mark.parametrize("case", CASES)
def test_overlap_learns_what_one_process_does(case: str, overlap: str, seed: int) -> None:
    config = with_moe(**CASES[case])
    expected = learn(build(config, seed), seed, slice(None))
    parts = on_ranks(2, lambda: learn_on_ranks(config, seed, [0, 1, 4], overlap=overlap))
    assert_close(whole([part for part, _ in parts]), expected, 1e-12)


@pytest.mark.parametrize(("overlap", "case"), RECOMPUTED)
def test_ranks_without_tokens_and_blocks_computed_again(overlap: str, case: str, seed: int) -> None:
    """Six experts on four ranks, one without tokens, one with few."""
    config = with_moe(**CASES[case])
    expected = learn(build(config, seed), seed, slice(None), checkpointing=True)
    parts = on_ranks(4, lambda: learn_on_ranks(config, seed, [0, 3, 3, 4, 4], True, overlap=overlap))
    assert_close(whole([part for part, _ in parts]), expected, 1e-12)


def test_experts_without_tokens_take_part_when_blocks_are_computed_again(seed: int) -> None:
    """One expert for every token, so that of three ranks at least one gets no row, in a half or at all."""
    config = with_moe(num_experts_per_tok=1, router="softmax_topk")
    expected = learn(build(config, seed), seed, slice(0, 1), checkpointing=True)
    parts = on_ranks(3, lambda: learn_on_ranks(config, seed, [0, 1, 1, 1], True, overlap="halves"))
    assert_close(whole([part for part, _ in parts]), expected, 1e-12)


def events_on_ranks(overlap: str, seed: int) -> list[str]:
    """What happens in a layer, forward and backward, in its order on this rank."""
    seen: list[str] = []

    class Watched(Exchange):
        def start(self, rows: Tensor, *arguments: Any) -> Any:
            seen.append("rows start" if rows.shape[1] == D and rows.dtype == torch.float64 else "labels start")
            pending = super().start(rows, *arguments)
            return _Watched(pending, seen, rows)

    ranks = make_ranks(ParallelConfig(ep=2))
    assert ranks.mesh is not None
    model = build(with_moe(n_shared_experts=1), seed)
    apply_expert_parallel(model, ranks.mesh, overlap=overlap)
    layer = model.moe_layers[-1]
    assert layer.shared_experts is not None
    dispatcher = layer.dispatcher
    assert isinstance(dispatcher, AllToAllDispatcher)
    dispatcher.exchange = Watched(dispatcher.exchange.group)
    layer.experts.register_forward_hook(lambda *_: seen.append("experts"))
    layer.shared_experts.register_forward_hook(lambda *_: seen.append("shared"))
    layer.experts.register_full_backward_hook(lambda *_: seen.append("experts"))
    layer.shared_experts.register_full_backward_hook(lambda *_: seen.append("shared"))
    tokens_BL, _, _ = draw(seed)
    loss = model(tokens_BL[:2]).square().mean()
    seen.append("backward")
    loss.backward()
    return [event for event in seen if not event.startswith("labels")]


class _Watched:
    def __init__(self, pending: Any, seen: list[str], rows: Tensor) -> None:
        self.pending, self.seen = pending, seen
        self.name = "rows wait" if rows.shape[1] == D and rows.dtype == torch.float64 else "labels wait"

    def wait(self) -> Tensor:
        self.seen.append(self.name)
        return self.pending.wait()


PASS = ["rows start", "shared", "rows wait", "experts", "rows start", "shared", "rows wait"]
HALVES = [
    "rows start", "rows start", "shared", "rows wait", "experts", "rows start", "rows wait", "experts", "rows start",
    "shared", "rows wait", "rows wait",
]  # fmt: skip


@pytest.mark.parametrize(("overlap", "order"), [("shared", PASS), ("halves", HALVES)])
def test_compute_lies_between_start_and_wait_in_both_passes(overlap: str, order: list[str], seed: int) -> None:
    """Backward in the mirror: what was started last is waited for first."""
    turned = {"rows start": "rows wait", "rows wait": "rows start"}
    mirror = [turned.get(event, event) for event in reversed(order)]
    for seen in on_ranks(2, events_on_ranks, overlap, seed):
        assert seen == [*order, "backward", *mirror]


def late_exchange(delay: float) -> tuple[float, bool]:
    """Seconds until a late rank's rows could be waited for, and whether they were right."""
    exchange = Exchange(dist.group.WORLD)  # type: ignore[arg-type]
    rows_RD = torch.full((4, 3), float(exchange.rank))
    dist.barrier()
    if exchange.rank == 1:
        time.sleep(delay)
    start = time.perf_counter()
    pending = exchange.start(rows_RD, [2, 2], [2, 2])
    seconds = time.perf_counter() - start
    return seconds, torch.equal(pending.wait()[:, 0], torch.tensor([0.0, 0.0, 1.0, 1.0]))


def test_starting_waits_for_nobody() -> None:
    (seconds, right), (_, right_there) = on_ranks(2, late_exchange, 0.5)
    assert seconds < 0.25
    assert right
    assert right_there


@pytest.mark.parametrize("num_tokens", [0, 1, B * L])
def test_work_aside_is_done_once_and_in_order(num_tokens: int) -> None:
    x_TD, calls = torch.randn(num_tokens, D), []
    aside = Aside(lambda rows: calls.append(len(rows)) or rows * 2, x_TD)
    aside.advance()
    torch.testing.assert_close(aside.result(), x_TD * 2, rtol=0, atol=0)
    aside.advance()
    assert (len(calls), sum(calls)) == (2, num_tokens)
