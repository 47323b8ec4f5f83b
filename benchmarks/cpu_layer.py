"""Forward and backward of a layer's experts on the CPU, float32 and bfloat16, beside a dense layer of equal FLOPs.

All sides take turns in one run: our native kernels, our grouped backend, transformers' experts in each of their
implementations, and a dense SwiGLU feed-forward of width K x F by torch, as fast as it gets, all in the same type. The
limit is the time of the products alone at the rate of torch's own large product, measured in the same run; of bfloat16
in either type, because a CPU without products of bfloat16 is faster in float32. Then one token alone, where the time is
that of reading its experts' weights, and the same work with more and more experts, which should cost the same. On a
machine with other work, OpenMP's threads wait for each other and the peers look slow: `--threads 1` is fairer there.

T tokens, D hidden size, F inner width of an expert, E experts, K experts per token, N = T x K rows.
"""

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import matplotlib
import torch
from common import Row, note, positive, run_benchmark
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from moesaic.analysis.plots import DENSE, SPARSE, STYLE
from moesaic.ops import BACKENDS, ExpertWeights, Routing
from moesaic.ops.device import cpu_set_up_for_training, measured_matmul_peak

try:
    import transformers
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
except ModuleNotFoundError:
    raise SystemExit("this benchmark compares with transformers; install it: pip install 'transformers>=5.0'") from None

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GOAL_AGAINST_DENSE = {torch.float32: 1.0, torch.bfloat16: 1 / 1.15}
GOAL_OF_GROWTH = 1.10
WARM_UP_ROUNDS = 2
WORTH_TIMING = 3.0
"""A side that takes this many times as long as the fastest is not timed further."""
IMPLEMENTATIONS = ("grouped_mm", "eager")
"""Of transformers; batched_mm would copy the weights of an expert for each of its rows."""


@dataclass(frozen=True)
class Shape:
    T: int
    D: int
    F: int
    E: int
    K: int

    @property
    def flops(self) -> int:
        """Of the products in forward and backward: three matrices, three products each."""
        return 3 * 3 * 2 * self.T * self.K * self.D * self.F

    def __str__(self) -> str:
        return f"T {self.T} D {self.D} F {self.F} E {self.E} K {self.K}"


SHAPES = (Shape(4096, 256, 128, 64, 8), Shape(2048, 512, 256, 64, 8), Shape(2048, 1024, 512, 32, 4))
DECODED = Shape(1, 2048, 1024, 64, 8)
GROWING = tuple(Shape(4096, 256, 128, E, 8) for E in (8, 16, 32, 64, 128, 256))


@dataclass
class Side:
    """One way to compute the layer: its output from its leaves, and how long forward and backward took each time."""

    name: str
    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    seconds: list[float] = field(default_factory=list)

    def step(self, grad_y: Tensor) -> float:
        for leaf in self.leaves:
            leaf.grad = None
        start = time.perf_counter()
        self.forward().backward(grad_y)
        return time.perf_counter() - start

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        low, _, high = quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


class Layer:
    """Random inputs and weights of one shape, and every side of it."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.float32) -> None:
        T, D, F, E, K = shape.T, shape.D, shape.F, shape.E, shape.K
        self.shape, self.dtype = shape, dtype
        self.x = self.leaf(T, D)
        self.grad_y = torch.randn(T, D).to(dtype)
        self.gate_up = self.leaf(E, 2 * F, D, std=D**-0.5)
        self.down = self.leaf(E, D, F, std=F**-0.5)
        scores = torch.rand(T, E).topk(K, dim=-1)
        self.topk_ids = scores.indices
        self.topk_weights = scores.values.contiguous().requires_grad_()

    def leaf(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape).mul_(std).to(self.dtype).requires_grad_()

    def ours(self, backend: str) -> Side:
        def forward() -> Tensor:
            routing = Routing(
                token_ids=torch.arange(self.shape.T).unsqueeze(1).expand(-1, self.shape.K).reshape(-1),
                expert_ids=self.topk_ids.view(-1),
                weights=self.topk_weights.view(-1),
                logits=torch.empty(0).expand(self.shape.T, 0),
                num_experts=self.shape.E,
                top_k=self.shape.K,
            )
            return BACKENDS[backend].run(self.x, routing, ExpertWeights(self.gate_up, self.down))

        return Side(backend, forward, [self.x, self.topk_weights, self.gate_up, self.down])

    def transformers(self, implementation: str) -> Side:
        config = transformers.Qwen3MoeConfig(
            hidden_size=self.shape.D,
            moe_intermediate_size=self.shape.F,
            num_experts=self.shape.E,
            num_experts_per_tok=self.shape.K,
        )
        config._experts_implementation = implementation
        experts = Qwen3MoeExperts(config)
        experts.gate_up_proj, experts.down_proj = torch.nn.Parameter(self.gate_up), torch.nn.Parameter(self.down)

        def forward() -> Tensor:
            return experts(self.x, self.topk_ids, self.topk_weights)

        leaves = [self.x, self.topk_weights, *experts.parameters()]
        return Side(f"transformers {transformers.__version__} {implementation}", forward, leaves)

    def dense(self, *, compile_too: bool) -> list[Side]:
        """Gate and up in one product or in two, as they are and compiled."""
        D, width = self.shape.D, self.shape.K * self.shape.F
        gate_up = self.leaf(2 * width, D, std=D**-0.5)
        gate, up = (half.detach().clone().requires_grad_() for half in gate_up.chunk(2))
        down = self.leaf(D, width, std=width**-0.5)

        def fused(x: Tensor) -> Tensor:
            gate_TW, up_TW = functional.linear(x, gate_up).chunk(2, dim=-1)
            return functional.linear(functional.silu(gate_TW) * up_TW, down)

        def apart(x: Tensor) -> Tensor:
            return functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)

        sides = [
            Side("dense, gate and up fused", partial(fused, self.x), [self.x, gate_up, down]),
            Side("dense, gate and up apart", partial(apart, self.x), [self.x, gate, up, down]),
        ]
        if compile_too:
            compiled = torch.compile(fused)
            sides.append(Side("dense, fused and compiled", lambda: compiled(self.x), [self.x, gate_up, down]))
        return sides


def measure(arguments: argparse.Namespace) -> list[Row]:
    if reason := BACKENDS["native"].missing():
        raise SystemExit(f"the native backend {reason}")
    compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    rounds = arguments.rounds or (6 if arguments.quick else 24)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = []
    with cpu_set_up_for_training():
        for dtype in DTYPES.values() if arguments.dtype is None else (DTYPES[arguments.dtype],):
            for shape in SHAPES[:2] if arguments.quick else SHAPES:
                rows += _measure_shape(shape, dtype, rounds, compile_too=compiler and not arguments.quick)
            rows.append(_measure_decoding(dtype, rounds))
        if arguments.dtype != "bfloat16":
            growth = _measure_growth(rounds)
            rows += growth
            if arguments.plot:
                _plot(growth, Path(arguments.plot))
    return rows


def _measure_shape(shape: Shape, dtype: torch.dtype, rounds: int, *, compile_too: bool) -> list[Row]:
    layer = Layer(shape, dtype)
    native, grouped = layer.ours("native"), layer.ours("grouped")
    dense = layer.dense(compile_too=compile_too)
    peers = [layer.transformers(implementation) for implementation in IMPLEMENTATIONS]
    peak = _matmul_peak(dtype)
    _time([native, grouped, *dense, *peers], layer.grad_y, rounds)
    limit = shape.flops / max(peak, _matmul_peak(dtype))
    fastest_dense, fastest_peer = (min(sides, key=lambda side: side.median) for sides in (dense, peers))
    work = f"{shape} {_name(dtype)}: forward and backward"
    return [
        _row(f"{work}, against dense", native, fastest_dense, limit, GOAL_AGAINST_DENSE[dtype]),
        _row(work, native, fastest_peer, limit, None),
        _row(work, native, grouped, limit, None),
    ]


def _matmul_peak(dtype: torch.dtype) -> float:
    return max(measured_matmul_peak("cpu", one, seconds=0.5) for one in {dtype, torch.float32})


def _name(dtype: torch.dtype) -> str:
    return next(name for name, one in DTYPES.items() if one == dtype)


def _measure_decoding(dtype: torch.dtype, rounds: int) -> Row:
    """Bytes of weights per second of forward, one token at a time, each with other experts, against grouped."""
    layer = Layer(DECODED, dtype)
    native, grouped = layer.ours("native"), layer.ours("grouped")
    halves = torch.ones(2, 32 * 2**20)
    bytes_read = 3 * DECODED.K * DECODED.D * DECODED.F * dtype.itemsize
    rates: dict[str, list[float]] = {"ours": [], "peer": [], "dot": []}
    for _ in range(WARM_UP_ROUNDS + rounds):
        layer.topk_ids = torch.randperm(DECODED.E)[: DECODED.K].unsqueeze(0)
        for name, compute, size in (
            ("ours", native.forward, bytes_read),
            ("dot", lambda: torch.dot(*halves), halves.nbytes),
            ("peer", grouped.forward, bytes_read),
        ):
            with torch.no_grad():
                start = time.perf_counter()
                compute()
                rates[name].append(size / (time.perf_counter() - start) / 1e9)
    ours, peer, reading = (median(some[WARM_UP_ROUNDS:]) for some in rates.values())
    return Row(
        work=f"{DECODED} {_name(dtype)}: weights read by forward; the limit is torch's dot product",
        unit="GB/s",
        ours=ours,
        peer=peer,
        peer_name="grouped",
        limit=reading,
        ratio=ours / peer,
        goal=None,
        met=None,
    )


def _measure_growth(rounds: int) -> list[Row]:
    """Each number of experts against the fewest, float32."""
    layers = [Layer(shape) for shape in GROWING]
    sides = [layer.ours("native") for layer in layers]
    _time(sides, layers[0].grad_y, rounds)
    rows = []
    for shape, side in zip(GROWING[1:], sides[1:], strict=True):
        growth = median(a / b for a, b in zip(side.seconds, sides[0].seconds, strict=True))
        rows.append(
            Row(
                work=f"{shape}: time against E {GROWING[0].E}; less is better",
                unit="ms",
                ours=side.median * 1e3,
                peer=sides[0].median * 1e3,
                peer_name=f"ours with E {GROWING[0].E}",
                ratio=growth,
                goal=GOAL_OF_GROWTH,
                met=growth <= GOAL_OF_GROWTH,
            )
        )
    return rows


def _plot(growth: list[Row], path: Path) -> None:
    """Time over the number of experts, both relative to the fewest."""
    experts = [shape.E for shape in GROWING]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(
            experts,
            [1.0, *(row.ratio for row in growth if row.ratio is not None)],
            "o-",
            color=SPARSE,
            label="measured",
        )
        axes.axhline(GOAL_OF_GROWTH, color=DENSE, linestyle="--", label="goal")
        axes.set_xscale("log", base=2)
        axes.set_xticks(experts, map(str, experts))
        axes.set_ylim(0, 1.3)
        axes.set_xlabel("experts, of which each token visits as many")
        axes.set_title(f"time of forward and backward, over that with {experts[0]} experts")
        axes.legend(loc="lower right")
        FigureCanvasAgg(figure).print_png(path)


def _time(sides: list[Side], grad_y: Tensor, rounds: int) -> None:
    """One step of each in turn, there and back, so that nobody always follows the same one."""
    first = {side.name + str(i): min(side.step(grad_y) for _ in range(WARM_UP_ROUNDS)) for i, side in enumerate(sides)}
    limit = WORTH_TIMING * min(first.values())
    timed = [side for side, seconds in zip(sides, first.values(), strict=True) if seconds <= limit]
    for side, seconds in zip(sides, first.values(), strict=True):
        side.seconds = [seconds, seconds] if side not in timed else []
    for number in range(rounds):
        for side in timed if number % 2 == 0 else reversed(timed):
            side.seconds.append(side.step(grad_y))
    note(", ".join(f"{side.name} {side.median * 1e3:.4g} ms ±{side.spread:.0%}" for side in sides))


def _row(work: str, ours: Side, peer: Side, limit: float, goal: float | None) -> Row:
    """The ratio is the median over rounds: both sides of a round met the same disturbance by others."""
    if len(ours.seconds) == len(peer.seconds):
        ratio = median(b / a for a, b in zip(ours.seconds, peer.seconds, strict=True))
    else:
        ratio = peer.median / ours.median
    return Row(
        work=work,
        unit="ms",
        ours=ours.median * 1e3,
        peer=peer.median * 1e3,
        peer_name=peer.name,
        limit=limit * 1e3,
        ratio=ratio,
        goal=goal,
        met=None if goal is None else ratio >= goal,
    )


if __name__ == "__main__":
    run_benchmark(
        __doc__ or "",
        measure,
        ("--rounds", {"type": positive, "help": "timed steps of each side (default 24, quick 6)"}),
        ("--dtype", {"choices": list(DTYPES), "help": "only this type; default: both"}),
        ("--threads", {"type": positive, "help": "threads of every side; default: torch's"}),
        ("--plot", {"help": "draw the cost of more experts as a PNG here"}),
    )
