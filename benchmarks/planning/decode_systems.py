"""Published speeds of decoding one text. Every other row is for fitting, the rows between for judging."""

from dataclasses import dataclass

GPU_BENCHMARKS = "XiongjieDai/GPU-Benchmarks-on-LLM-Inference, README: tg 512, May 2024"
GPU_OVERVIEW = "XiongjieDai/GPU-Benchmarks-on-LLM-Inference, README: average eval speed, December 2023"
GEERLING = "geerlingguy/ai-benchmarks, README: gpt-oss 20b, issues"
KTRANSFORMERS = "ktransformers, doc/en/DeepseekR1_V3_tutorial.md, v0.2 with 8 experts"


@dataclass(frozen=True, kw_only=True)
class DecodeSystem:
    name: str
    model: str
    cluster: str
    precision: str
    tokens_per_second: float
    source: str
    dense_precision: str = ""
    context: int = 256
    """Tokens before the new one, in the middle of what was generated."""
    reason: str = ""
    """Why the prediction is far off, where it is."""


def _llama(gpu: str, cluster: str, model: str, precision: str, speed: float, reason: str = "") -> DecodeSystem:
    shown = {"q4_k_m": "Q4_K_M", "f16": "F16"}[precision]
    size = {"llama-3-8b": "Llama-3 8B", "llama-3-70b": "Llama-3 70B"}[model]
    return DecodeSystem(name=f"llama.cpp, {size} {shown}, {gpu}", model=model, cluster=cluster, precision=precision,
                        tokens_per_second=speed, source=GPU_BENCHMARKS, reason=reason)  # fmt: skip


def _llama_2(gpu: str, cluster: str, model: str, precision: str, speed: float) -> DecodeSystem:
    shown = {"q4_0": "Q4_0", "f16": "F16"}[precision]
    size = {"llama-2-7b": "Llama-2 7B", "llama-2-70b": "Llama-2 70B"}[model]
    return DecodeSystem(name=f"llama.cpp, {size} {shown}, {gpu}", model=model, cluster=cluster, precision=precision,
                        tokens_per_second=speed, source=GPU_OVERVIEW)  # fmt: skip


def _gpt_oss(gpu: str, cluster: str, speed: float, source: str, model: str = "gpt-oss-20b",
             reason: str = "") -> DecodeSystem:  # fmt: skip
    """llama.cpp's file: experts in mxfp4, everything else in Q8_0."""
    return DecodeSystem(name=f"llama.cpp, {model}, {gpu}", model=model, cluster=cluster, precision="mxfp4",
                        dense_precision="q8_0", tokens_per_second=speed, source=source, reason=reason)  # fmt: skip


DECODE_SYSTEMS: tuple[DecodeSystem, ...] = (
    _llama("RTX 4090", "1xRTX-4090", "llama-3-8b", "q4_k_m", 130.58),
    _llama("RTX 4090", "1xRTX-4090", "llama-3-8b", "f16", 54.84),
    _llama("RTX 3090", "1xRTX-3090", "llama-3-8b", "f16", 47.40),
    _llama("RTX 3090", "1xRTX-3090", "llama-3-8b", "q4_k_m", 115.42),
    _llama("RTX 4080", "1xRTX-4080", "llama-3-8b", "q4_k_m", 108.15),
    _llama_2("RTX A6000", "1xRTX-A6000", "llama-2-7b", "q4_0", 111.57),
    _llama_2("RTX A6000", "1xRTX-A6000", "llama-2-7b", "f16", 44.01),
    _llama_2("RTX A6000", "1xRTX-A6000", "llama-2-70b", "q4_0", 15.18),
    _llama_2("RTX 3090", "1xRTX-3090", "llama-2-7b", "q4_0", 120.60),
    _llama_2("RTX 4090", "1xRTX-4090", "llama-2-7b", "q4_0", 149.37),
    _llama_2("RTX 4080", "1xRTX-4080", "llama-2-7b", "q4_0", 118.01),
    _gpt_oss("RTX 4090", "1xRTX-4090", 279.65, f"{GEERLING}/43"),
    DecodeSystem(
        name="llama.cpp, Qwen3-30B Q4_K_M, RTX 5090", model="qwen3-30b-a3b", cluster="1xRTX-5090", precision="q4_k_m",
        tokens_per_second=366, source="gittensor-ai-lab/sparkinfer, release v0.3.7: llama-bench as its peer",
    ),
    _llama("M1 Max", "1xM1-Max", "llama-3-8b", "q4_k_m", 35.73, "this GPU unpacks K formats slower than it reads them"),
    _llama("M1 Max", "1xM1-Max", "llama-3-8b", "f16", 18.75),
    _llama("M2 Ultra", "1xM2-Ultra", "llama-3-8b", "q4_k_m", 78.81),
    _llama_2("M2 Ultra", "1xM2-Ultra", "llama-2-7b", "q4_0", 91.89),
    _llama_2("M2 Ultra", "1xM2-Ultra", "llama-2-7b", "f16", 40.68),
    _llama_2("M2 Ultra", "1xM2-Ultra", "llama-2-70b", "q4_0", 14.37),
    _llama_2("M2 Ultra", "1xM2-Ultra", "llama-2-70b", "f16", 4.81),
    _llama_2("M3 Max", "1xM3-Max", "llama-2-7b", "q4_0", 63.11),
    _llama_2("M3 Max", "1xM3-Max", "llama-2-7b", "f16", 24.76),
    _gpt_oss("M2 Ultra", "1xM2-Ultra", 130.45, "llama.cpp, benches/mac-m2-ultra: tg 32 after 512"),
    _gpt_oss("M3 Ultra", "1xM3-Ultra", 115.29, f"{GEERLING}/42"),
    _gpt_oss("M1 Ultra", "1xM1-Ultra", 100.43, f"{GEERLING}/48"),
    DecodeSystem(
        name="llama.cpp, DeepSeek-R1 Q4_K_M, M3 Ultra", model="deepseek-v3", cluster="1xM3-Ultra", precision="q4_k_m",
        tokens_per_second=20.21, source="geerlingguy/beowulf-ai-cluster, issue 17: tg128",
    ),
    _gpt_oss("DGX Spark", "1xDGX-Spark", 80.13, "llama.cpp, benches/dgx-spark: tg 32 after 512"),
    DecodeSystem(
        name="vLLM, gpt-oss-120b, DGX Spark", model="gpt-oss-120b", cluster="1xDGX-Spark", precision="mxfp4",
        tokens_per_second=58.82, source="spark-arena/recipe-registry, issue 17: 58.82 and, repeated, 59.5",
    ),
    DecodeSystem(
        name="llama.cpp, Qwen3-30B Q4_K_M, DGX Spark", model="qwen3-30b-a3b", cluster="1xDGX-Spark", precision="q4_k_m",
        tokens_per_second=89, source="DandinPower/llama.cpp_bench, README: about 89",
    ),
    _gpt_oss("Strix Halo", "1xStrix-Halo", 45.01,
    "geerlingguy/ai-benchmarks, issue 21: tg128 with Vulkan, August 2025",
             reason="two days after the model came out, with flash attention off since it crashed"),
    DecodeSystem(
        name="ktransformers, DeepSeek-V3 int4, RTX 4090 and one socket", model="deepseek-v3",
        cluster="1xRTX-4090:host384GiB:ddr5x8", precision="q4_k_m", tokens_per_second=8.73, source=KTRANSFORMERS,
        context=500,
    ),
    DecodeSystem(
        name="ktransformers, DeepSeek-V3 int4, RTX 4090 and two sockets", model="deepseek-v3",
        cluster="1xRTX-4090:host1TiB:ddr5x16", precision="q4_k_m", tokens_per_second=12.208, source=KTRANSFORMERS,
        context=500,
    ),
)  # fmt: skip
