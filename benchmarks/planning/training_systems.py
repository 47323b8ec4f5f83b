"""Published speeds of training. Where a source gives hours or days, its time includes whatever stood still.

Every other row, in the order in which they stand here, is for fitting the constants of plan/efficiency.py; the rows
between judge them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MODEL_ZOO = "Megatron-MoE-ModelZoo, best_practice/Qwen3/readme.md"
BRIDGE = "NVIDIA Megatron-Bridge, docs/performance-summary-archive.md"
KORTHIKANTI = "Korthikanti et al. (arXiv 2205.05198), table 5: selective recompute and sequence parallel"


@dataclass(frozen=True, kw_only=True)
class TrainingSystem:
    """One published result; `tokens_per_device` is tokens per second of one device."""

    name: str
    model: str
    cluster: str
    layout: str
    """Empty: the fastest that the planner finds, where the source does not say."""
    sequence: int
    batch_tokens: float
    tokens_per_device: float
    source: str
    precision: str = "bfloat16"
    whole_run: bool = False
    """The source tells hours or days of a run, and so restarts, evaluations and what else stood still."""
    assumed: str = ""
    """What the source leaves open."""
    reason: str = ""
    """Why the prediction is far off, where it is."""


def _from_hours(tokens: float, hours: float) -> float:
    return tokens / (hours * 3600)


def _gpt(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    """GPT of Megatron's papers: MLPs of two matrices of width 4 D, as three of 8 D / 3."""
    return {
        "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": heads, "head_dim": hidden // heads, "intermediate_size": 8 * hidden // 3,
        "vocab_size": 51200, "tie_word_embeddings": True, "qk_norm": "none", "max_position_embeddings": 2048,
    }  # fmt: skip


OTHER_MODELS: Mapping[str, dict[str, Any]] = {
    "gpt-22b": _gpt(48, 6144, 64),
    "gpt-530b": _gpt(105, 20480, 128),
    "gpt-1t": _gpt(128, 25600, 160),
    "qwen2-57b-a14b": {
        "num_hidden_layers": 28, "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": 151936, "qk_norm": "none", "attention_bias": True,
        "moe": {
            "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 2560,
            "shared_expert_intermediate_size": 20480, "shared_expert_gate": True,
        },
    },
}  # fmt: skip
"""Models of these papers that are no presets."""

TRAINING_SYSTEMS: tuple[TrainingSystem, ...] = (
    # dense, A100
    TrainingSystem(
        whole_run=True, name="Llama-2 7B, 2.0 T tokens in 184,320 hours", model="llama-2-7b", cluster="1024xA100",
        layout="", sequence=4096, batch_tokens=4.2e6, tokens_per_device=_from_hours(2.0e12, 184_320),
        source="Llama 2 (arXiv 2307.09288), table 2", assumed="1,024 devices",
    ),
    TrainingSystem(
        whole_run=True, name="Llama-2 13B, 2.0 T tokens in 368,640 hours", model="llama-2-13b", cluster="1024xA100",
        layout="", sequence=4096, batch_tokens=4.2e6, tokens_per_device=_from_hours(2.0e12, 368_640),
        source="Llama 2 (arXiv 2307.09288), table 2", assumed="1,024 devices",
    ),
    TrainingSystem(
        whole_run=True, name="Llama-2 70B, 2.0 T tokens in 1,720,320 hours", model="llama-2-70b", cluster="2048xA100",
        layout="", sequence=4096, batch_tokens=4.2e6,
        tokens_per_device=_from_hours(2.0e12, 1_720_320), source="Llama 2 (arXiv 2307.09288), table 2",
        assumed="2,048 devices",
    ),
    TrainingSystem(
        name="GPT 22B, iteration of 1.10 s", model="gpt-22b", cluster="8xA100",
        layout="tp=8,micro=4,recompute=selective",
        sequence=2048, batch_tokens=4 * 2048, tokens_per_device=4 * 2048 / 1.10 / 8, source=KORTHIKANTI,
    ),
    TrainingSystem(
        name="GPT-3 175B, iteration of 13.75 s", model="gpt-3-175b", cluster="64xA100",
        layout="tp=8,pp=8,vp=3,recompute=selective", sequence=2048, batch_tokens=64 * 2048,
        tokens_per_device=64 * 2048 / 13.75 / 64, source=KORTHIKANTI,
    ),
    TrainingSystem(
        name="GPT 530B, iteration of 37.83 s", model="gpt-530b", cluster="280xA100",
        layout="tp=8,pp=35,vp=3,recompute=selective", sequence=2048, batch_tokens=280 * 2048,
        tokens_per_device=280 * 2048 / 37.83 / 280, source=KORTHIKANTI,
    ),
    TrainingSystem(
        name="GPT 1T, iteration of 71.49 s", model="gpt-1t", cluster="512xA100",
        layout="tp=8,pp=64,recompute=selective",
        sequence=2048, batch_tokens=512 * 2048, tokens_per_device=512 * 2048 / 71.49 / 512, source=KORTHIKANTI,
    ),
    TrainingSystem(
        name="GPT-3 175B, 10,000 V100, 14.8 days", model="gpt-3-175b", cluster="10000xV100",
        layout="dp=125,tp=8,pp=10,recompute=full", sequence=2048, batch_tokens=3.2e6,
        tokens_per_device=3.0e11 / (14.8 * 86400 * 10_000), source="Patterson et al. (arXiv 2104.10350), table 4",
        assumed="the layout; full recompute",
    ),
    # dense, H100
    TrainingSystem(
        name="Llama-3 405B, 8,192 H100", model="llama-3-405b", cluster="8192xH100:eth400",
        layout="dp=64,tp=8,pp=16,vp=7",
        sequence=8192, batch_tokens=64 * 32 * 8192, tokens_per_device=430e12 / 2.54e12,
        source="Llama 3 (arXiv 2407.21783), table 4: 430 TFLOP/s",
    ),
    TrainingSystem(
        name="Llama-3 405B, 16,384 H100", model="llama-3-405b", cluster="16384xH100:eth400",
        layout="dp=128,tp=8,pp=16,vp=7", sequence=8192, batch_tokens=128 * 16 * 8192,
        tokens_per_device=400e12 / 2.54e12,
        source="Llama 3 (arXiv 2407.21783), table 4: 400 TFLOP/s",
    ),
    TrainingSystem(
        whole_run=True, name="Llama-3.1 70B, 15 T tokens in 7.0 M hours", model="llama-3-70b",
        cluster="8192xH100:eth400",
        layout="", sequence=8192, batch_tokens=16.8e6, tokens_per_device=_from_hours(15e12, 7.0e6),
        source="meta-llama/Llama-3.1-70B, model card", assumed="8,192 devices and 15.0 T tokens",
    ),
    TrainingSystem(
        whole_run=True, name="Llama-3.1 405B, 15 T tokens in 30.84 M hours", model="llama-3-405b",
        cluster="16384xH100:eth400",
        layout="dp=128,tp=8,pp=16,vp=7", sequence=8192, batch_tokens=16.8e6,
        tokens_per_device=_from_hours(15.6e12, 30.84e6), source="meta-llama/Llama-3.1-405B, model card",
        assumed="the layout",
    ),
    TrainingSystem(
        name="Llama-3 8B, fp8, 8 H100", model="llama-3-8b", cluster="8xH100", layout="fsdp=8", sequence=8192,
        batch_tokens=128 * 8192, tokens_per_device=14_451, precision="float8", source=f"{BRIDGE}, 25.11",
    ),
    TrainingSystem(
        name="Llama-3 70B, fp8, 64 H100", model="llama-3-70b", cluster="64xH100", layout="dp=2,tp=4,pp=8,vp=5",
        sequence=8192, batch_tokens=256 * 8192, tokens_per_device=1621, precision="float8", source=f"{BRIDGE}, 26.02",
    ),
    TrainingSystem(
        name="Llama-3.1 405B, fp8, 1,024 H100", model="llama-3-405b", cluster="1024xH100",
        layout="dp=16,tp=8,pp=8,vp=8",
        sequence=8192, batch_tokens=1536 * 8192, tokens_per_device=311, precision="float8", source=f"{BRIDGE}, 26.02",
        assumed="context parallel 2 counts as data parallel",
    ),
    # sparse
    TrainingSystem(
        name="DeepSeek-V3, 14.8 T tokens in 2.664 M hours", model="deepseek-v3", cluster="2048xH800:ib400",
        layout="dp=128,ep=64,pp=16,vp=2,recompute=selective", sequence=4096, batch_tokens=15360 * 4096,
        tokens_per_device=_from_hours(14.8e12, 2.664e6), precision="float8",
        source="DeepSeek-V3 (arXiv 2412.19437), tables 1 and section 3.2",
        assumed="DualPipe as an interleaved pipeline; without its MTP module",
    ),
    TrainingSystem(
        name="DeepSeek-V3, fp8, 1,024 H100", model="deepseek-v3", cluster="1024xH100",
        layout="dp=64,ep=64,tp=2,pp=8,vp=4,recompute=selective", sequence=4096, batch_tokens=8192 * 4096,
        tokens_per_device=1297, precision="float8", source=f"{BRIDGE}, 25.09",
    ),
    TrainingSystem(
        name="Mixtral-8x7B, 64 H100", model="mixtral-8x7b", cluster="64xH100", layout="dp=16,ep=8,pp=4,vp=8",
        sequence=4096,
        batch_tokens=256 * 4096, tokens_per_device=468e12 / 7.9e10, source="Megatron-Core 0.9, MoE README: 468 TFLOP/s",
        assumed="64 devices, ep 8 and pp 4 of its example",
    ),
    TrainingSystem(
        name="Mixtral-8x22B, 128 H100", model="mixtral-8x22b", cluster="128xH100", layout="dp=8,ep=8,tp=2,pp=8,vp=7",
        sequence=4096, batch_tokens=256 * 4096, tokens_per_device=0.493 * 989e12 / 2.41e11,
        source="MoE Parallel Folding (arXiv 2504.14960), abstract: MFU 49.3 %", assumed="the layout",
    ),
    TrainingSystem(
        name="Qwen2-57B-A14B, 64 H100", model="qwen2-57b-a14b", cluster="64xH100", layout="dp=8,ep=4,tp=2,pp=4,vp=7",
        sequence=4096, batch_tokens=256 * 4096, tokens_per_device=0.39 * 989e12 / 9.2e10,
        source="MoE Parallel Folding (arXiv 2504.14960), abstract: MFU 39.0 %", assumed="the layout",
    ),
    TrainingSystem(
        name="Qwen3-235B, 256 H100, step of 17.6 s", model="qwen3-235b-a22b", cluster="256xH100",
        layout="dp=16,ep=32,tp=2,pp=8,vp=4,recompute=selective", sequence=4096, batch_tokens=2048 * 4096,
        tokens_per_device=2048 * 4096 / 17.6 / 256, source=MODEL_ZOO,
    ),
    TrainingSystem(
        name="Qwen3-235B, 256 H100, FSDP, step of 17.6 s", model="qwen3-235b-a22b", cluster="256xH100",
        layout="fsdp=128,ep=8,tp=2,micro=4,recompute=full", sequence=4096, batch_tokens=2048 * 4096,
        tokens_per_device=2048 * 4096 / 17.6 / 256, source=MODEL_ZOO,
    ),
    TrainingSystem(
        name="Qwen3-235B, 256 H100, pp 32, step of 24.2 s", model="qwen3-235b-a22b", cluster="256xH100",
        layout="dp=4,ep=8,tp=2,pp=32,recompute=selective", sequence=4096, batch_tokens=2048 * 4096,
        tokens_per_device=2048 * 4096 / 24.2 / 256, source=MODEL_ZOO,
    ),
    TrainingSystem(
        name="Qwen3-235B, fp8, 256 H100", model="qwen3-235b-a22b", cluster="256xH100",
        layout="dp=16,ep=32,tp=2,pp=8,vp=4,recompute=selective", sequence=4096, batch_tokens=8192 * 4096,
        tokens_per_device=1633, precision="float8", source=f"{BRIDGE}, 26.02",
    ),
    TrainingSystem(
        name="gpt-oss-120b, 64 H100", model="gpt-oss-120b", cluster="64xH100", layout="dp=16,ep=8,pp=4", sequence=4096,
        batch_tokens=1280 * 4096, tokens_per_device=5993, source=f"{BRIDGE}, 26.02",
        reason="attention with sinks and the clamped activation with biases had no fused kernels",
    ),
    TrainingSystem(
        name="Qwen3-30B, fp8, 16 H100", model="qwen3-30b-a3b", cluster="16xH100", layout="dp=8,ep=8,pp=2,vp=12",
        sequence=4096, batch_tokens=1024 * 4096, tokens_per_device=5113, precision="float8", source=f"{BRIDGE}, 26.02",
        reason="dropless: the host waits for counts of each layer; with tokens dropped the source has twice the speed",
    ),
    TrainingSystem(
        name="Qwen3-30B, fp8, 16 H100, tokens dropped", model="qwen3-30b-a3b", cluster="16xH100",
        layout="dp=8,ep=8,pp=2,vp=24,micro=2", sequence=4096, batch_tokens=512 * 4096, tokens_per_device=10_494,
        precision="float8", source=f"{BRIDGE}, 25.09",
    ),
    TrainingSystem(
        whole_run=True, name="OLMoE-1B-7B, 256 H100, 10 days", model="olmoe-1b-7b", cluster="256xH100", layout="",
        sequence=4096, batch_tokens=4.2e6, tokens_per_device=5.133e12 / (10 * 86400 * 256),
        source="OLMoE (arXiv 2409.02060), appendix A: about 10 days",
    ),
    TrainingSystem(
        name="DeepSeek-V3, mxfp8, 256 GB200", model="deepseek-v3", cluster="256xGB200",
        layout="dp=64,ep=64,pp=4,vp=4", sequence=4096, batch_tokens=4096 * 4096, tokens_per_device=3955,
        precision="float8", source=f"{BRIDGE}, 26.02",
    ),
    TrainingSystem(
        name="Qwen3-235B, mxfp8, 256 GB200", model="qwen3-235b-a22b", cluster="256xGB200", layout="dp=32,ep=32,pp=8",
        sequence=4096, batch_tokens=8192 * 4096, tokens_per_device=5448, precision="float8", source=f"{BRIDGE}, 26.02",
    ),
    TrainingSystem(
        name="Qwen3-30B, mxfp8, 8 GB200", model="qwen3-30b-a3b", cluster="8xGB200", layout="dp=8,ep=8,micro=4",
        sequence=4096, batch_tokens=512 * 4096, tokens_per_device=26_084, precision="float8", source=f"{BRIDGE}, 26.02",
    ),
    TrainingSystem(
        name="gpt-oss-120b, 64 GB200", model="gpt-oss-120b", cluster="64xGB200", layout="dp=64,ep=64,micro=4",
        sequence=4096, batch_tokens=1280 * 4096, tokens_per_device=15_784, source=f"{BRIDGE}, 26.02",
        reason="attention with sinks and the clamped activation with biases had no fused kernels",
    ),
)  # fmt: skip
