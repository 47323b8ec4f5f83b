"""Tokens per second of a training step beside the same model in transformers, and what sparse costs over dense.

A step is forward, cross-entropy, backward, clipping and fused AdamW. Ours is `Trainer.train_step`, all of it. The peer
starts from our weights, exported, and does the same on the same batches with the fastest way it has to compute experts.
Before anything is timed both train a few steps: equal losses show that forward, backward and update agree.
"""

import argparse
import itertools
import math
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import Row, note, positive, run_benchmark
from torch import nn
from torch.nn import functional

from moesaic.accounting import training_flops_per_token
from moesaic.checkpoint.save import export_model
from moesaic.config import (
    BalanceConfig,
    DTypeName,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from moesaic.model.transformer import Transformer
from moesaic.ops.device import cpu_set_up_for_training, measured_matmul_peak
from moesaic.ops.instruction_set import cpu_features
from moesaic.recipes import demo_config
from moesaic.tokenizer import byte_tokenizer
from moesaic.train.data import PreparedData
from moesaic.train.token_file import TokenFile
from moesaic.train.trainer import DTYPES, Trainer

try:
    import transformers
except ModuleNotFoundError:
    raise SystemExit("this benchmark compares with transformers; install it: pip install 'transformers>=5.0'") from None

OPTIMIZER = OptimizerConfig(name="adamw", lr=3e-4)
SCHEDULE = ScheduleConfig(name="constant", warmup_fraction=0.0)
BATCHES = 4
"""Different batches; they repeat."""
WARM_UP_STEPS = 2
"""The loss of the first compares forward passes, that of the second also gradients and updates."""
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-2}
WORTH_TIMING = 2.0
"""A peer that takes this many times as long as the fastest peer is not timed further."""
EXPERTS_IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
"""Those of transformers that run on CPUs, the fastest as a rule first: it is the one to compile."""
GATHERED_AT_MOST = min(6 * 2**30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 3)
"""Bytes of expert weights that batched_mm may copy; with more it is far behind, if it does not run out of memory."""


@dataclass
class Contender:
    """One side of one model: a step to take, and how long it took each time."""

    name: str
    step: Callable[[], float]
    """Trains on the next batch and returns its loss."""
    may_fail: bool = False
    """torch.compile does not compile everything; then the others are the peer."""
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.seconds)


@dataclass
class Contest:
    """One model: our trainer and, started from the same weights, its peers."""

    name: str
    config: TrainConfig
    ours: Contender
    peers: list[Contender]

    @property
    def best_peer(self) -> Contender:
        return min(self.peers, key=lambda peer: peer.median)

    @property
    def contenders(self) -> list[Contender]:
        return [self.ours, *self.peers]


def measure(arguments: argparse.Namespace) -> list[Row]:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="Initializing zero-element tensors")  # glm4_moe without shared experts
    dtypes: list[DTypeName] = ["float32", "bfloat16"] if cpu_features()["avx512_bf16"] else ["float32"]
    with cpu_set_up_for_training():  # as every run here does; the peer gains from it too
        return [
            row
            for dtype in dtypes
            for name, twins in (("demo", _demo_twins()), ("64 experts", _larger_twins()))
            for row in _measure_twins(name, [_resized(twin, dtype, arguments) for twin in twins], arguments)
        ]


def _demo_twins() -> tuple[TrainConfig, TrainConfig]:
    return demo_config("sparse"), demo_config("dense")


def _larger_twins() -> tuple[TrainConfig, TrainConfig]:
    """D 256, 4 layers: 8 of 64 experts of width 128, or one of 1024."""
    dense = ModelConfig(
        vocab_size=2048,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=1024,
    )
    moe = MoEConfig(num_experts=64, num_experts_per_tok=8, moe_intermediate_size=128)
    sparse = replace(dense, intermediate_size=0, moe=moe)
    return (
        TrainConfig(model=sparse, batch_size=16, sequence_length=256),
        TrainConfig(model=dense, batch_size=16, sequence_length=256),
    )


def _resized(config: TrainConfig, dtype: DTypeName, arguments: argparse.Namespace) -> TrainConfig:
    """Shape and batch of `config`, trained as the peer is: AdamW at a constant rate, and nothing balances the load."""
    batch_size = config.batch_size // 4 if arguments.quick else config.batch_size
    if arguments.tokens:
        batch_size = max(1, arguments.tokens // config.sequence_length)
    return replace(
        config,
        batch_size=batch_size,
        dtype=dtype,
        optimizer=OPTIMIZER,
        schedule=SCHEDULE,
        balance=BalanceConfig(),
    )


def _measure_twins(name: str, configs: list[TrainConfig], arguments: argparse.Namespace) -> list[Row]:
    """Time a sparse model and its dense twin, ours and theirs, all interleaved."""
    rounds = arguments.rounds or (5 if arguments.quick else 15)
    peak_flops = measured_matmul_peak("cpu", DTYPES[configs[0].dtype], seconds=1.0)
    with tempfile.TemporaryDirectory() as scratch:
        contests = [
            _contest(f"{name} {twin}", config, Path(scratch) / twin, compile_too=not arguments.quick)
            for twin, config in zip(("sparse", "dense"), configs, strict=True)
        ]
        for contest in contests:
            _warm_up(contest)
        _time([contender for contest in contests for contender in contest.contenders], rounds)
    for contest in contests:
        note(f"{contest.name}: " + ", ".join(f"{one.name} {one.median:.3g} s" for one in contest.contenders))
    sparse, dense = contests
    return [*(_speed_row(contest, peak_flops) for contest in contests), _sparse_against_dense(name, sparse, dense)]


def _contest(name: str, config: TrainConfig, scratch: Path, *, compile_too: bool) -> Contest:
    model = Transformer(config.model)
    model.init_weights(seed=0)
    export_model(model, None, scratch)
    trainer = Trainer(config, model, _random_data(config), scratch)
    ours = Contender("moesaic", lambda: trainer.train_step().loss)
    return Contest(name, config, ours, list(_peers(config, trainer, scratch, compile_too=compile_too)))


def _random_data(config: TrainConfig) -> PreparedData:
    """Training ids drawn evenly from the vocabulary; what text they are does not change the work."""
    size = BATCHES * config.tokens_per_step + 1
    ids = np.random.default_rng(0).integers(config.model.vocab_size, size=size, dtype=np.uint16)
    return PreparedData(byte_tokenizer(), TokenFile(ids, size), TokenFile(ids[:0], 0), ())


def _peers(config: TrainConfig, trainer: Trainer, exported: Path, *, compile_too: bool) -> Iterator[Contender]:
    """Every way in which transformers can train this model here."""
    implementations: tuple[str | None, ...] = EXPERTS_IMPLEMENTATIONS if config.model.moe else (None,)
    for implementation in implementations:
        if implementation == "batched_mm" and _gathered_bytes(config) > GATHERED_AT_MOST:
            gathered = f"{_gathered_bytes(config) / 2**30:.0f} GiB"
            note(f"batched_mm copies the weights of an expert for each of its tokens, {gathered} here: not tried")
            continue
        yield _peer(implementation, config, trainer, exported, compiled=False)
    if not compile_too:
        return
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        note("no C++ compiler: torch.compile is not tried")
        return
    yield _peer(implementations[0], config, trainer, exported, compiled=True)


def _gathered_bytes(config: TrainConfig) -> int:
    """What batched_mm keeps for the backward pass: for each assignment of each layer the weights of its expert."""
    moe = config.model.moe
    assert moe is not None
    assignments = config.tokens_per_step * moe.num_experts_per_tok * config.model.num_moe_layers
    return assignments * 3 * config.model.hidden_size * moe.moe_intermediate_size * 4


def _peer(
    implementation: str | None, config: TrainConfig, trainer: Trainer, exported: Path, *, compiled: bool
) -> Contender:
    """transformers with our weights, as a careful user trains it."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        exported, dtype=torch.float32, attn_implementation="sdpa", experts_implementation=implementation
    )
    model.train()
    forward = torch.compile(model) if compiled else model
    optimizer = _adamw(model, config.optimizer)
    steps = itertools.count()

    def step() -> float:
        tokens, targets = trainer.batches.batch(next(steps))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.dtype == "bfloat16"):
            logits = forward(input_ids=tokens, use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    words = ["transformers", transformers.__version__, implementation or "", "compiled" if compiled else ""]
    return Contender(" ".join(filter(None, words)), step, may_fail=compiled)


def _adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Decay on attention and feed-forward matrices only, as ours."""
    decaying, others = [], []
    for name, one in model.named_parameters():
        spared = one.ndim == 1 or "embed_tokens" in name or "lm_head" in name or name.endswith("mlp.gate.weight")
        (others if spared else decaying).append(one)
    groups = [
        {"params": decaying, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _warm_up(contest: Contest) -> None:
    """First steps of all, whose losses must agree; keeps the peers that are fast enough to matter."""
    expected = [contest.ours.step() for _ in range(WARM_UP_STEPS)]
    tolerance = LOSS_TOLERANCE[contest.config.dtype]
    seconds: dict[str, float] = {}
    for peer in contest.peers:
        try:
            losses = [peer.step() for _ in range(WARM_UP_STEPS - 1)]
            start = time.perf_counter()
            losses.append(peer.step())
        except Exception as error:
            if not peer.may_fail:
                raise
            reason = " ".join(str(error).split())[:200]
            note(f"{contest.name}: {peer.name} failed: {type(error).__name__}: {reason}")
            continue
        seconds[peer.name] = time.perf_counter() - start
        if not all(math.isclose(a, b, rel_tol=0, abs_tol=tolerance) for a, b in zip(losses, expected, strict=True)):
            raise SystemExit(f"{contest.name}: losses of {peer.name} are {losses}, ours {expected}: not the same model")
    note(f"{contest.name}: losses agree, {expected}; " + ", ".join(f"{name} {s:.3g} s" for name, s in seconds.items()))
    limit = WORTH_TIMING * min(seconds.values())
    contest.peers = [peer for peer in contest.peers if seconds.get(peer.name, math.inf) <= limit]


def _time(contenders: list[Contender], rounds: int) -> None:
    """One step of each in turn, there and back, so that nobody always follows the same one."""
    for number in range(rounds):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            start = time.perf_counter()
            contender.step()
            contender.seconds.append(time.perf_counter() - start)


def _speed_row(contest: Contest, peak_flops: float) -> Row:
    """The limit is a machine that does nothing but matrix products, at the peak measured in this run."""
    config, ours, peer = contest.config, contest.ours, contest.best_peer
    flops = training_flops_per_token(config.model, config.sequence_length)
    return Row(
        work=f"{contest.name}: training step of {config.tokens_per_step} tokens, {config.dtype}",
        unit="tokens/s",
        ours=config.tokens_per_step / ours.median,
        peer=config.tokens_per_step / peer.median,
        peer_name=peer.name,
        limit=peak_flops / flops,
        ratio=peer.median / ours.median,
    )


def _sparse_against_dense(name: str, sparse: Contest, dense: Contest) -> Row:
    """The limit is what the router adds in FLOPs, as if they were all that takes time."""
    flops = [training_flops_per_token(one.config.model, one.config.sequence_length) for one in (sparse, dense)]
    ours = sparse.ours.median / dense.ours.median
    peer = sparse.best_peer.median / dense.best_peer.median
    return Row(
        work=f"{name}: step of sparse against dense of equal active FLOPs, {sparse.config.dtype}; less is better",
        unit="times as long",
        ours=ours,
        peer=peer,
        peer_name=sparse.best_peer.name,
        limit=flops[0] / flops[1],
        ratio=peer / ours,
    )


if __name__ == "__main__":
    run_benchmark(
        __doc__ or "",
        measure,
        ("--rounds", {"type": positive, "help": "timed steps of each side (default 15, quick 5)"}),
        ("--tokens", {"type": positive, "help": "tokens of a step; default: as the recipe says, quick a quarter"}),
    )
