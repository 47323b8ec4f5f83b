"""What fewer bits cost in quality: our int8 and int4 beside llama.cpp's quantisations of the same trained model.

The model is a run directory, or trained here on the embedded corpus: 16 experts, 2 per token, widths that llama.cpp's
K-quants divide. All sides read the same windows of validation text. Their cost is the Kullback-Leibler divergence of
the distributions they predict from those of the float32 model, the mean over all positions, in nats per token. Bits per
weight count everything in memory but the input embedding, of which a token reads one row; factors and norms included.
`everywhere` packs what the scheme leaves in 8 bits, too; `pure` does that to llama.cpp's.

L positions, V vocabulary.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import Row, note, positive, run_benchmark
from inference.runners import int4_everywhere
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

import moesaic
from moesaic.accounting import count_parameters
from moesaic.checkpoint.save import export_model
from moesaic.config import BalanceConfig, ModelConfig, MoEConfig, TrainConfig
from moesaic.config_io import read_run_config
from moesaic.model.quantize import Quantization, make_quantization, quantize_model
from moesaic.model.transformer import Transformer
from moesaic.recipes import demo_config
from moesaic.train.data import prepare_data, validation_batches
from moesaic.train.run import run_training
from moesaic.train.screen import Screen

try:
    from inference.gguf_model import quantize, tensor_bytes, write_gguf
    from inference.llama import LlamaModel
except ModuleNotFoundError as error:
    raise SystemExit(f"this benchmark needs {error.name}; install the peers: pip install -e '.[peers]'") from None

Tokens = NDArray[np.int64]

SCHEMES = {
    "int8": ("int8", 32),
    "int4": ("int4", 32),
    "int4, groups of 64": ("int4", 64),
    "int4 everywhere": ("everywhere", 32),
    "int4 everywhere, groups of 64": ("everywhere", 64),
}
"""Ours: scheme and size of groups."""
GGUF_TYPES = {
    "Q8_0": ("Q8_0", False),
    "Q4_0": ("Q4_0", False),
    "Q4_0 pure": ("Q4_0", True),
    "Q4_K_M": ("Q4_K_M", False),
}
"""llama.cpp's: type, and whether it is forced on every matrix."""
PAIRS = (
    ("int8", "Q8_0"),
    ("int4", "Q4_0"),
    ("int4", "Q4_K_M"),
    ("int4, groups of 64", "Q4_K_M"),
    ("int4 everywhere", "Q4_0 pure"),
    ("int4 everywhere", "Q4_K_M"),
    ("int4 everywhere, groups of 64", "Q4_0 pure"),
)


@dataclass(frozen=True)
class Quality:
    """What one side showed on the validation text."""

    divergence: float
    """Mean Kullback-Leibler divergence from the float32 model, nats per token."""
    perplexity: float
    bits: float
    """Per weight."""


@dataclass(frozen=True)
class Contender:
    """A way to hold the weights: logits (L, V) of tokens (L,), and the bytes of all but the input embedding."""

    logits: Callable[[Tokens], Tensor]
    nbytes: int


def measure(arguments: argparse.Namespace) -> list[Row]:
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(arguments.scratch or temporary)
        run = Path(arguments.run) if arguments.run else _trained(scratch / "run", arguments)
        config = read_run_config(run)
        exported = Path(temporary) / "exported"
        export_model(moesaic.load(run, device="cpu"), None, exported)
        windows = _windows(config, run, arguments)
        reference = moesaic.load(exported, device="cpu", dtype="float32")
        write_gguf(reference, Path(temporary) / "float32.gguf")
        found = {"float32": _quality(reference, _contender(reference), windows)}
        for name, make in _contenders(exported, Path(temporary), windows, arguments.threads).items():
            with make() as contender:
                found[name] = _quality(reference, contender, windows)
            each = found[name]
            note(
                f"{name}: divergence {each.divergence:.6f}, perplexity {each.perplexity:.4f}, {each.bits:.2f} bits per "
                "weight"
            )
    return [*(_pair_row(*pair, found) for pair in PAIRS), *(_perplexity_row(*one) for one in found.items())]


def run_config(steps: int, seed: int) -> TrainConfig:
    """The demo's recipe on a model four times as wide, of a family that llama.cpp knows."""
    model = ModelConfig(
        vocab_size=2048,
        hidden_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=1024,
        initializer_range=0.0,
        moe=MoEConfig(num_experts=16, num_experts_per_tok=2, moe_intermediate_size=256, router="softmax_topk"),
    )
    recipe = demo_config("sparse", seed=seed)
    return replace(recipe, model=model, balance=BalanceConfig(aux_loss_coef=0.01), steps=steps, evaluate_every=0)


def _trained(run: Path, arguments: argparse.Namespace) -> Path:
    steps = 12 if arguments.quick else arguments.steps
    run = run.with_name(f"{run.name}-{steps}-{arguments.seed}")
    if not run.exists():
        note(f"training a model for {steps} steps in {run}")
        config, screen = run_config(steps, arguments.seed), Screen(Console(stderr=True), live=False)
        if run_training(config, run, screen).stop_requested:
            raise SystemExit("stopped; remove the run or go on with moesaic train --resume")
    return run


def _windows(config: TrainConfig, run: Path, arguments: argparse.Namespace) -> list[tuple[Tokens, Tensor]]:
    """Tokens (L,) and what follows each, spread over the validation text of the run."""
    length = config.sequence_length
    needed = config.steps * config.tokens_per_step + 1
    data = prepare_data(config.data, run / "data", tokens_needed=needed, sequence_length=length)
    tokens = 4 * length if arguments.quick else arguments.tokens
    batches = validation_batches(data.validation, length, 1, tokens)
    return [(tokens_1L[0].numpy(), targets_1L[0]) for tokens_1L, targets_1L, _ in batches]


def _contenders(
    exported: Path, scratch: Path, windows: list[tuple[Tokens, Tensor]], threads: int
) -> dict[str, Callable[[], AbstractContextManager[Contender]]]:
    @contextmanager
    def plain_bfloat16() -> Iterator[Contender]:
        yield _contender(moesaic.load(exported, device="cpu", dtype="bfloat16"))

    @contextmanager
    def ours(scheme: str, group_size: int) -> Iterator[Contender]:
        model = moesaic.load(exported, device="cpu", dtype="float32")
        quantize_model(model, _quantization(scheme, model.config, group_size))
        yield _contender(model)

    @contextmanager
    def theirs(file_type: str, pure: bool) -> Iterator[Contender]:
        path = scratch / "quantized.gguf"
        quantize(scratch / "float32.gguf", path, file_type, pure=pure, threads=threads)
        with closing(LlamaModel(path, threads=threads, capacity=len(windows[0][0]), all_logits=True)) as model:
            yield Contender(lambda tokens: torch.from_numpy(model.logits(tokens)), tensor_bytes(path))

    return {
        "bfloat16": plain_bfloat16,
        **{name: partial(ours, *each) for name, each in SCHEMES.items()},
        **{name: partial(theirs, *each) for name, each in GGUF_TYPES.items()},
    }


def _quantization(scheme: str, config: ModelConfig, group_size: int) -> Quantization:
    if scheme == "everywhere":
        return int4_everywhere(group_size)
    return make_quantization(scheme, config, group_size)


def _contender(model: Transformer) -> Contender:
    assert not model.config.tie_word_embeddings
    tensors = [*model.named_parameters(), *model.named_buffers()]
    nbytes = sum(tensor.numel() * tensor.element_size() for name, tensor in tensors if name != "embed_tokens.weight")
    return Contender(partial(_logits, model), nbytes)


@torch.inference_mode()
def _logits(model: Transformer, tokens: Tokens) -> Tensor:
    return model(torch.from_numpy(tokens)[None])[0].float()


def _quality(reference: Transformer, contender: Contender, windows: list[tuple[Tokens, Tensor]]) -> Quality:
    divergence, nats, count = 0.0, 0.0, 0
    for tokens_L, targets_L in windows:
        expected_LV = _logits(reference, tokens_L).double().log_softmax(-1)
        found_LV = contender.logits(tokens_L).double().log_softmax(-1)
        divergence += float((expected_LV.exp() * (expected_LV - found_LV)).sum())
        nats -= float(found_LV.gather(1, targets_L.unsqueeze(1)).sum())
        count += len(tokens_L)
    embedding = reference.config.vocab_size * reference.config.hidden_size
    bits = 8 * contender.nbytes / (count_parameters(reference.config).total - embedding)
    return Quality(divergence / count, math.exp(nats / count), bits)


def _pair_row(ours: str, peer: str, found: dict[str, Quality]) -> Row:
    """Divergence, where less is better: the ratio is the peer's to ours. Only equal bits have a goal."""
    a, b = found[ours], found[peer]
    ratio = b.divergence / max(a.divergence, 1e-12)
    goal = 1.0 if a.bits <= 1.02 * b.bits else None
    return Row(
        work=f"{ours} ({a.bits:.2f} bits): divergence; {peer} has {b.bits:.2f} bits",
        unit="nats per token",
        ours=a.divergence,
        peer=b.divergence,
        peer_name=f"llama.cpp {peer}",
        ratio=ratio,
        goal=goal,
        met=None if goal is None else ratio >= goal,
    )


def _perplexity_row(name: str, quality: Quality) -> Row:
    return Row(work=f"{name} ({quality.bits:.2f} bits): perplexity", unit="per token", ours=quality.perplexity)


if __name__ == "__main__":
    run_benchmark(
        __doc__ or "",
        measure,
        ("--run", {"help": "a run directory of softmax top-k experts; default: a model trained here"}),
        ("--steps", {"type": positive, "default": 400, "help": "of the training here, 4,096 tokens each"}),
        ("--tokens", {"type": positive, "default": 32768, "help": "of validation text"}),
        ("--seed", {"type": int, "default": 0, "help": "of the training here"}),
        ("--threads", {"type": positive, "default": 2}),
        ("--scratch", {"help": "a folder that keeps the trained model, so that a second run starts at once"}),
    )
