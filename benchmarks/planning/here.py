"""This machine: what its measured limits predict for our own code, beside what that does. For idle machines only."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import note
from cpu_inference import random_model
from hosts import Hosts, why_not
from inference.runners import Texts

import moesaic
from moesaic.checkpoint.quantize import quantize
from moesaic.checkpoint.save import export_model
from moesaic.config import ModelConfig
from moesaic.plan.calibrate import Calibration, calibrate, calibrated_cluster, link_rate
from moesaic.plan.cluster import Cluster
from moesaic.plan.communication import all_to_all_seconds
from moesaic.plan.efficiency import TRAINING
from moesaic.plan.inference import InferenceTask, Phase, estimate_inference
from moesaic.plan.layout import Layout
from moesaic.plan.subject import Subject, find_subject
from moesaic.residency.expert_readers import StoredExperts
from moesaic.residency.residency import residency_of

PROMPT, SHORT_PROMPT, STEPS, ROUNDS = 512, 32, 24, 5
LAYERS, VOCABULARY = 4, 16384
"""Of OLMoE-1B-7B's shape, so that a step's weights are larger than caches and all are made in seconds."""
SHARE = 0.67
"""Of a directory's size that the whole process may take."""
LINK_MBIT, DELAY_MS = 1000, 2.0
EXCHANGED = (64, 1024)
"""Tokens of each rank: some texts that decode, and a prompt."""


@dataclass(frozen=True)
class Here:
    work: str
    predicted: float
    measured: float
    """Tokens per second, medians of the rounds."""


def measure_here(formats: Sequence[str] = ("int4", "int8")) -> list[Here]:
    # Ranks are forked, so they come before anything that starts threads.
    found = _exchanges()
    config = replace(find_subject("olmoe-1b-7b").config, num_hidden_layers=LAYERS, vocab_size=VOCABULARY)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        export_model(random_model(config), None, folder / "plain")
        for precision in formats:
            quantize(folder / "plain", folder / precision, precision)
        for precision in formats:
            limits = _limits(folder)
            found += _in_memory(config, folder / precision, precision, limits)
        found.append(_capped(config, folder / formats[0], formats[0], _limits(folder)))
    return found


def _limits(folder: Path) -> Calibration:
    """Anew before each model: machines have neighbours."""
    found = calibrate(folder)
    rates = f"reads {found.bandwidth / 1e9:.1f} GB/s, {found.disk / 1e9:.2f} from disk"
    note(f"this machine {rates}, computes {found.flops_int8 / 1e9:.0f} Gop/s in packed products")
    return found


def _predicted(
    config: ModelConfig, cluster: Cluster, phase: Phase, precision: str, hit_rate: float | None = None
) -> float:
    context = PROMPT if phase == "prefill" else SHORT_PROMPT + STEPS // 2
    # Our int4 keeps in 8 bits what is small.
    task = InferenceTask(phase=phase, context=context, precision=precision, dense_precision="int8", hit_rate=hit_rate)
    subject = Subject(name="made up", config=config)
    return estimate_inference(subject, cluster, Layout(), task).tokens_per_second


def _in_memory(config: ModelConfig, directory: Path, precision: str, limits: Calibration) -> list[Here]:
    model = moesaic.load(directory, device="cpu")
    texts = Texts(model, 1, 2 * PROMPT)
    tokens_1L = torch.randint(0, VOCABULARY, (1, PROMPT))
    prefill, decode = [], []
    for _ in range(ROUNDS):
        prefill.append(PROMPT / _prefill_seconds(texts, tokens_1L))
        decode.append(STEPS / _decode_seconds(texts))
    cluster = calibrated_cluster(limits)
    speeds: dict[Phase, float] = {"prefill": statistics.median(prefill), "decode": statistics.median(decode)}
    return [
        Here(f"this machine: {phase}, {precision}", _predicted(config, cluster, phase, precision), speed)
        for phase, speed in speeds.items()
    ]


def _capped(config: ModelConfig, directory: Path, precision: str, limits: Calibration) -> Here:
    """Decoding with experts on disk. The hits are those that were measured."""
    budget = int(SHARE * sum(file.stat().st_size for file in directory.glob("*.safetensors")))
    with mp.get_context("spawn").Pool(1) as pool:  # the budget is that of a whole process
        speed, hit_rate = pool.apply(_decode_within, (directory, budget))
    note(f"within {SHARE:.0%} of its size {hit_rate:.0%} of the experts were in memory")
    cluster = calibrated_cluster(replace(limits, memory=budget))
    predicted = _predicted(config, cluster, "decode", precision, hit_rate)
    return Here(f"this machine: decode, {precision}, {SHARE:.0%} of the memory", predicted, speed)


def _decode_within(directory: Path, budget: int) -> tuple[float, float]:
    """Tokens per second, and the hit rate."""
    model = moesaic.load(directory, device="cpu", memory=str(budget))
    residency = residency_of(model)
    assert residency is not None
    for layer in residency.cache.layers:
        assert isinstance(layer.reader, StoredExperts)
        layer.reader.reader.direct = True  # what the page cache has kept would hide the disk
    seconds, hits, used = [], 0, 0
    with residency.room(cached_tokens=SHORT_PROMPT + STEPS, pass_tokens=SHORT_PROMPT):
        texts = Texts(model, 1, SHORT_PROMPT + STEPS)
        _decode_seconds(texts)  # fills the cache
        for _ in range(ROUNDS):
            tokens_1L = _read_prompt(texts)
            before = residency.statistics
            seconds.append(_steps_seconds(texts, tokens_1L))
            after = residency.statistics
            hits += after.hits - before.hits
            used += after.hits + after.misses - before.hits - before.misses
    return STEPS / statistics.median(seconds), hits / used


@torch.inference_mode()
def _prefill_seconds(texts: Texts, tokens_1L: torch.Tensor) -> float:
    texts.forget()
    start = time.perf_counter()
    texts.read(tokens_1L)
    return time.perf_counter() - start


def _decode_seconds(texts: Texts) -> float:
    return _steps_seconds(texts, _read_prompt(texts))


@torch.inference_mode()
def _read_prompt(texts: Texts) -> torch.Tensor:
    """The tokens that come after it (1, STEPS)."""
    texts.forget()
    texts.read(torch.randint(0, VOCABULARY, (1, SHORT_PROMPT)))
    return torch.randint(0, VOCABULARY, (1, STEPS))


@torch.inference_mode()
def _steps_seconds(texts: Texts, tokens_1L: torch.Tensor) -> float:
    start = time.perf_counter()
    for index in range(STEPS):
        texts.read(tokens_1L[:, index : index + 1])
    return time.perf_counter() - start


def _exchanges() -> list[Here]:
    """Rows of tokens to the experts of two hosts, one way; limits are measured on the same links."""
    if reason := why_not():
        note(f"no exchange between hosts: {reason}")
        return []
    config = find_subject("olmoe-1b-7b").config
    assert config.moe is not None
    with Hosts(2, LINK_MBIT, DELAY_MS) as hosts:
        delayed = f" and {DELAY_MS:g} ms" if hosts.is_delayed else ""
        (link, latency, measured), _ = hosts.run(_exchange_on_rank, config)
    note(f"a link of {LINK_MBIT / 1000:g} Gbit/s{delayed} sends {link / 1e6:.0f} MB/s after {latency * 1e3:.2f} ms")
    # Only its links count.
    limits = Calibration("two hosts", 1e9, 1e9, 1e9, 1e9, 1e9, link, latency, ranks=len(hosts.names), memory=2**30)
    cluster, top_k = calibrated_cluster(limits), config.moe.num_experts_per_tok
    found = []
    for tokens, seconds in zip(EXCHANGED, measured, strict=True):
        size = 4.0 * tokens * config.hidden_size
        predicted = all_to_all_seconds(size, top_k, top_k, cluster, len(hosts.names), TRAINING)
        work = f"this machine: exchange of {tokens} tokens, {LINK_MBIT / 1000:g} Gbit/s{delayed}"
        found.append(Here(work, tokens / predicted, tokens / seconds))
    return found


def _exchange_on_rank(config: ModelConfig) -> tuple[float, float, list[float]]:
    """Bytes/s and seconds that calibration finds, and seconds of an exchange of each of EXCHANGED."""
    link, latency = link_rate(dist.get_world_size())
    return link, latency, [_row_seconds(tokens, config) for tokens in EXCHANGED]


def _row_seconds(tokens: int, config: ModelConfig) -> float:
    """Each token goes once to every other rank that has one of its experts; which ones are drawn evenly."""
    ranks, rank, moe = dist.get_world_size(), dist.get_rank(), config.moe
    assert moe is not None
    ranks_TK = torch.rand(tokens, moe.num_experts).topk(moe.num_experts_per_tok).indices * ranks // moe.num_experts
    sent = [0 if other == rank else int((ranks_TK == other).any(1).sum()) for other in range(ranks)]
    received = torch.empty(ranks, dtype=torch.int64)
    dist.all_to_all_single(received, torch.tensor(sent))
    rows, target = torch.ones(sum(sent), config.hidden_size), torch.empty(int(received.sum()), config.hidden_size)
    seconds = []
    for _ in range(ROUNDS):
        dist.barrier()
        start = time.perf_counter()
        dist.all_to_all_single(target, rows, received.tolist(), sent)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
