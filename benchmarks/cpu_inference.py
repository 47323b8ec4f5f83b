"""Prefill and decode on the CPU, 4-bit, 8-bit and bfloat16, beside llama.cpp and transformers.

The model has OLMoE-1B-7B's layer shape and random weights. Each side is a process of its own; all sides of a format
take turns, so that a machine whose speed drifts favours none. Every side gets the same random tokens and computes
logits of the last position only. llama.cpp reads a GGUF file that its own quantiser made, every matrix of the named
type (Q4_K_M: its usual mixture). Beside each pair stands the limit, measured in the same run: for decode the bytes of
our weights that one step must read over the rate at which all threads read memory, for prefill the multiply-adds over
the peak of 8-bit dot products (bfloat16: of the faster of torch's bfloat16 product and float32 multiply-adds). torch's
own operators for 8 and 4 bits, which make no whole model, are compared in one linear layer.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch
from common import Row, note, positive, run_benchmark
from inference.limits import Limits, measure_limits
from inference.linear import PEERS, linear_rows
from inference.runners import Llama, Ours, Transformers
from inference.sides import Contest, Side, Tokens

import moesaic
from moesaic.accounting import count_parameters, flops_per_token
from moesaic.checkpoint.save import export_model
from moesaic.config import ModelConfig, MoEConfig
from moesaic.model.transformer import Transformer

try:
    TRANSFORMERS = version("transformers")  # not imported here: it takes 30 MB, which sides in little memory would have
    from inference.gguf_model import quantize, write_gguf
except ModuleNotFoundError as error:
    raise SystemExit(f"this benchmark needs {error.name}; install the peers: pip install -e '.[peers]'") from None

LAYERS, WIDTH, EXPERT_WIDTH, EXPERTS, TOP_K, HEADS, VOCABULARY = 4, 2048, 1024, 64, 8, 16, 50304
PREFILL_TOKENS = 512
PROMPT_TOKENS = 32
"""Before decoding; short, so that weights and not keys and values are what is read."""
DECODE_STEPS = {1: 24, 16: 6}
"""By batch: steps of one turn."""
CHECKED_TOKENS = 48
LEAST_CORRELATION = {"int4": 0.7, "int8": 0.95, "bf16": 0.98}
"""Of logits with those of ours; random weights feel every rounding, for it sends tokens to other experts."""


@dataclass(frozen=True)
class Format:
    """How we hold the weights, and what is compared with it."""

    quantization: str | None
    """As for `moesaic.load`, or `int4 everywhere`, which packs in 4 bits also what int4 leaves in 8."""
    gguf: tuple[str, ...]
    transformers: bool
    goals: dict[str, float]
    """By work: `prefill`, or `decode` and the batch."""

    @property
    def works(self) -> tuple[str, ...]:
        return tuple(self.goals)


INT4_GOALS = {"prefill": 3.0, "decode 1": 1.3, "decode 16": 2.0}
FORMATS = {
    "int4": Format("int4", ("Q4_0", "Q4_K_M"), False, INT4_GOALS),
    "int4 everywhere": Format("int4 everywhere", ("Q4_0", "Q4_K_M"), False, INT4_GOALS),
    "int8": Format("int8", ("Q8_0",), False, {"prefill": 3.0, "decode 1": 1.3}),
    "bf16": Format(None, ("BF16",), True, {"prefill": 1.6, "decode 1": 1.0}),
}


def measure(arguments: argparse.Namespace) -> list[Row]:
    if arguments.quick:
        arguments.layers, arguments.vocabulary = min(arguments.layers, 1), min(arguments.vocabulary, 4096)
    config = bench_config(arguments)
    rounds = arguments.rounds or (3 if arguments.quick else 9)
    torch.set_num_threads(arguments.threads)
    note(f"{count_parameters(config).total / 1e9:.2f} B parameters, {arguments.threads} threads")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.scratch or temporary) / folder_name(config)
        names = _chosen(arguments.formats)
        files = prepare(config, folder, [each for name in names for each in FORMATS[name].gguf], arguments.threads)
        for name in names:
            limits = measure_limits(arguments.threads)
            note(
                f"limits: reading {limits.read / 1e9:.1f} GB/s; int8 {limits.int8 / 1e9:.0f}, float32 "
                f"{limits.float32 / 1e9:.0f}, bfloat16 {limits.bfloat16 / 1e9:.0f} G operations/s"
            )
            rows += _measure_format(name, config, files, limits, rounds, arguments)
            if name in PEERS:
                rows += linear_rows(name, rounds)
    return rows


MODEL_FLAGS: tuple[tuple[str, dict[str, object]], ...] = (
    ("--layers", {"type": positive, "default": LAYERS}),
    ("--width", {"type": positive, "default": WIDTH, "help": "of the residual stream"}),
    ("--expert-width", {"type": positive, "default": EXPERT_WIDTH, "help": "inner width of an expert"}),
    ("--experts", {"type": positive, "default": EXPERTS}),
    ("--top-k", {"type": positive, "default": TOP_K, "help": "experts per token"}),
    ("--heads", {"type": positive, "default": HEADS}),
    ("--vocabulary", {"type": positive, "default": VOCABULARY}),
)
"""What `bench_config` reads."""


def bench_config(arguments: argparse.Namespace) -> ModelConfig:
    return ModelConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.heads,
        head_dim=arguments.width // arguments.heads,
        max_position_embeddings=4096,
        model_type="olmoe",
        qk_norm="width",
        moe=MoEConfig(
            num_experts=arguments.experts,
            num_experts_per_tok=arguments.top_k,
            moe_intermediate_size=arguments.expert_width,
            norm_topk_prob=False,
        ),
    )


def prepare(
    config: ModelConfig, folder: Path, gguf_types: Sequence[str], threads: int, *, embedding: float | None = None
) -> dict[str, Path]:
    """The random model as a Hugging Face directory and as GGUF files, by `hf` and type; what is there stays.

    `embedding` is the size of the embedding's numbers; where it is large, routing depends on the token alone.
    """
    files = {"hf": folder / "hf", "BF16": folder / "BF16.gguf"}
    if not files["hf"].exists():
        note(f"writing a random model to {folder}")
        export_model(random_model(config, embedding), None, files["hf"])
    if any(not (folder / f"{name}.gguf").exists() for name in gguf_types) and not files["BF16"].exists():
        write_gguf(moesaic.load(files["hf"], device="cpu"), files["BF16"])
    for name in gguf_types:
        files[name] = folder / f"{name}.gguf"
        if not files[name].exists():
            note(f"llama.cpp quantises to {name}")
            quantize(files["BF16"], files[name], name, pure=name != "Q4_K_M", threads=threads)
    return files


def random_model(config: ModelConfig, embedding: float | None = None) -> Transformer:
    """In bfloat16; matrices keep the size of what passes through them, norms change nothing."""
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1:
                tensor.fill_(1.0)
            else:
                own_size = embedding if name == "embed_tokens.weight" else None
                tensor.normal_(0.0, own_size or tensor.shape[-1] ** -0.5, generator=generator)
    return model


def folder_name(config: ModelConfig) -> str:
    moe = config.moe
    assert moe is not None
    sizes = (config.num_hidden_layers, config.hidden_size, moe.moe_intermediate_size, moe.num_experts)
    rest = (moe.num_experts_per_tok, config.num_attention_heads, config.vocab_size)
    return "model-" + "-".join(map(str, sizes + rest))


def _chosen(formats: str) -> list[str]:
    names = formats.split(",")
    for name in names:
        if name not in FORMATS:
            raise SystemExit(f"unknown format '{name}'; there are {', '.join(FORMATS)}")
    return names


def _measure_format(
    name: str,
    config: ModelConfig,
    files: dict[str, Path],
    limits: Limits,
    rounds: int,
    arguments: argparse.Namespace,
) -> list[Row]:
    """All works of one format, its sides alive together."""
    kind, threads = FORMATS[name], arguments.threads
    capacity = max(arguments.prefill, PROMPT_TOKENS + max(DECODE_STEPS.values()))
    dtype = "auto" if kind.quantization else "bfloat16"
    ours = Side("moesaic", partial(Ours, files["hf"], threads, dtype=dtype, quantization=kind.quantization))
    peers = [
        Side(f"llama.cpp {each}", partial(Llama, files[each], threads, capacity=capacity, all_logits=False))
        for each in kind.gguf
    ]
    if kind.transformers:
        side = partial(Transformers, files["hf"], threads, dtype="bfloat16")
        peers.append(Side(f"transformers {TRANSFORMERS}", side))
    generator = np.random.default_rng(arguments.seed)
    rows = []
    with Contest([ours, *peers], threads) as contest:
        _require_one_model(contest, name, generator.integers(config.vocab_size, size=CHECKED_TOKENS))
        for work in kind.works:
            rows += _measure_work(contest, name, work, config, limits, rounds, arguments, generator)
    return rows


def _require_one_model(contest: Contest, name: str, tokens: Tokens) -> None:
    """Logits of every side against ours: they must be those of the same model, rounded in another way."""
    ours, *others = [contest.ask(side, "logits", tokens) for side in contest.names]
    for side, logits in zip(contest.names[1:], others, strict=True):
        correlation = float(np.corrcoef(ours.ravel(), logits.ravel())[0, 1])
        note(f"{name}: logits of {side} correlate with ours by {correlation:.4f}")
        if not correlation >= LEAST_CORRELATION[name.split()[0]]:
            raise SystemExit(f"{name}: {side} does not compute the same model: correlation {correlation:.4f}")


def _measure_work(
    contest: Contest,
    name: str,
    work: str,
    config: ModelConfig,
    limits: Limits,
    rounds: int,
    arguments: argparse.Namespace,
    generator: np.random.Generator,
) -> list[Row]:
    def random_tokens(*shape: int) -> Tokens:
        return generator.integers(config.vocab_size, size=shape)

    if work == "prefill":
        tokens = arguments.prefill
        turns = [(random_tokens(tokens),) for _ in range(rounds + 1)]
        seconds = contest.take_turns("prefill", turns)
        limit = _prefill_limit(config, tokens, limits.bfloat16 if name == "bf16" else limits.int8)
        label = f"{name}: prefill {tokens}"
    else:
        batch = int(work.split()[1])
        steps = DECODE_STEPS[batch]
        tokens = batch * steps
        turns = [(random_tokens(batch, PROMPT_TOKENS), random_tokens(batch, steps)) for _ in range(rounds + 1)]
        seconds = contest.take_turns("decode", turns)
        limit = batch * limits.read / contest.ask("moesaic", "bytes_per_step", batch)
        label = f"{name}: decode, batch {batch}"
    _describe(contest, label, work, tokens, seconds, arguments)
    return _rows(label, tokens, seconds, limit, FORMATS[name].goals[work])


def _describe(
    contest: Contest, label: str, work: str, tokens: int, seconds: dict[str, list], arguments: argparse.Namespace
) -> None:
    speeds = ", ".join(f"{side} {tokens / median(each):.1f}" for side, each in seconds.items())
    note(f"{label}: {speeds} tokens/s")
    for side in contest.names:
        if side.startswith("transformers"):
            key = ("prefill", arguments.prefill) if work == "prefill" else ("decode", int(work.split()[1]))
            note(f"{label}: {side} is fastest with {contest.ask(side, 'implementation', *key)}")


def _prefill_limit(config: ModelConfig, tokens: int, peak: float) -> float:
    """Tokens per second if nothing but products took time, logits of the last token only."""
    without_head = replace(config, vocab_size=1)
    flops = (
        tokens * flops_per_token(without_head, (tokens + 1) / 2).forward + 2.0 * config.vocab_size * config.hidden_size
    )
    return tokens * peak / flops


def _rows(label: str, tokens: int, seconds: dict[str, list[float]], limit: float, goal: float) -> list[Row]:
    """A row per peer. The ratio is the median over rounds: both sides of a round met the same disturbance."""
    ours = seconds["moesaic"]
    speed = tokens / median(ours)
    rows = []
    for side, theirs in seconds.items():
        if side == "moesaic":
            continue
        ratio = median(b / a for a, b in zip(ours, theirs, strict=True))
        rows.append(
            Row(
                work=f"{label} ({speed / limit:.2f} of the limit)",
                unit="tokens/s",
                ours=speed,
                peer=tokens / median(theirs),
                peer_name=side,
                limit=limit,
                ratio=ratio,
                goal=goal,
                met=ratio >= goal,
            )
        )
    return rows


if __name__ == "__main__":
    run_benchmark(
        __doc__ or "",
        measure,
        ("--formats", {"default": ",".join(FORMATS), "help": "which of them, separated by commas"}),
        ("--rounds", {"type": positive, "help": "timed turns of each side and work (default 9, quick 3)"}),
        ("--threads", {"type": positive, "default": 2, "help": "of every side"}),
        ("--prefill", {"type": positive, "default": PREFILL_TOKENS, "help": "tokens of a prompt"}),
        *MODEL_FLAGS,
        ("--seed", {"type": int, "default": 0, "help": "of the tokens"}),
        ("--scratch", {"help": "a folder that keeps the models (12 GB for all formats), so that a second run starts"}),
    )
