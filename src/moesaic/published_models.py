"""Shapes of published models, with their authors' parameter counts and where these are printed.

Presets and `moesaic plan` read them. Only what decides cost is here, sizes and kinds of layers; who wants the weights
reads the model's own directory.

Two escapes, where our decoder is another one than the model's. An MLP of two matrices (without a gate) of width W is
written as one of three of width 2 W / 3, which has the same parameters and the same products. What our layers have too
much or too little is an `extra` with a name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A model that others trained, and what they say of it."""

    config: Mapping[str, Any]
    """Fields of ModelConfig."""
    total: float
    """Parameters, as printed in `source`."""
    active: float | None
    """Parameters per token, as printed; None where nobody prints them."""
    source: str
    active_excludes: Literal["", "input embedding", "embeddings"] = ""
    """What the authors leave out of the active ones."""
    extra: Mapping[str, int] = field(default_factory=dict)
    """Parameters that our layers have too few, or too many (below 0); each is used by every token."""
    kv_layers: int | None = None
    """Layers that keep keys and values, where not all do."""
    stored_as: str = "bfloat16"
    """Type of the published weights."""


def _shape(
    layers: int, hidden: int, heads: tuple[int, int, int], vocab: int, inner: int = 0, **more: Any
) -> dict[str, Any]:
    """`heads` are query heads, key-value heads and their width."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "vocab_size": vocab,
        "intermediate_size": inner,
        "qk_norm": "none",
        "max_position_embeddings": 4096,
    } | more


def _moe(experts: int, top_k: int, inner: int, **more: Any) -> dict[str, Any]:
    return {"num_experts": experts, "num_experts_per_tok": top_k, "moe_intermediate_size": inner} | more


def _latent(query_rank: int | None) -> dict[str, Any]:
    """The latent attention that DeepSeek-V2, DeepSeek-V3 and Kimi-K2 share."""
    sizes = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    return sizes | ({} if query_rank is None else {"q_lora_rank": query_rank})


_GPT_OSS: dict[str, Any] = {
    "attention_bias": True,
    "attention_output_bias": True,
    "attention_sinks": True,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
}
_GPT_OSS_MOE: dict[str, Any] = {
    "router": "topk_softmax",
    "router_bias": True,
    "projection_bias": True,
    "activation": "clamped_swiglu",
}
_LFM2_CONVOLUTIONS = 18
"""Of 24 layers; each has four D x D matrices and a kernel of 3 in the place of attention."""

PUBLISHED: Mapping[str, PublishedModel] = {
    "granite-3.1-1b-a400m": PublishedModel(
        config=_shape(24, 1024, (16, 8, 64), 49155, tie_word_embeddings=True, max_position_embeddings=131072,
                      moe=_moe(32, 8, 512, router="topk_softmax")),
        total=1.335e9, active=0.43e9,
        source="ibm-granite/granite-3.1-1b-a400m-base, model card",
    ),
    "olmoe-1b-7b": PublishedModel(
        config=_shape(16, 2048, (16, 16, 128), 50304, qk_norm="width", moe=_moe(64, 8, 1024, norm_topk_prob=False)),
        total=6.92e9, active=1.28e9,
        source="OLMoE (arXiv 2409.02060), table 2 and allenai/OLMoE-1B-7B-0924",
    ),
    "lfm2-8b-a1b": PublishedModel(
        config=_shape(24, 2048, (32, 8, 64), 65536, 7168, qk_norm="head", tie_word_embeddings=True,
                      max_position_embeddings=128000,
                      moe=_moe(32, 4, 1792, router="sigmoid_topk", first_k_dense_replace=2)),
        total=8.34e9, active=1.56e9,
        source="LiquidAI/LFM2-8B-A1B, model card and config.json",
        extra={
            "short convolutions in 18 layers": _LFM2_CONVOLUTIONS * (4 * 2048**2 + 3 * 2048),
            "attention that these layers do not have": -_LFM2_CONVOLUTIONS * (5 * 2048**2 // 2 + 2 * 64),
        },
        kv_layers=6,
    ),
    "deepseek-v2-lite": PublishedModel(
        config=_shape(27, 2048, (16, 16, 192), 102400, 10944, mla=_latent(None), max_position_embeddings=163840,
                      moe=_moe(64, 6, 1408, n_shared_experts=2, first_k_dense_replace=1, norm_topk_prob=False)),
        total=15.7e9, active=2.66e9,
        source="DeepSeek-V2 (arXiv 2405.04434), appendix B, and deepseek-ai/DeepSeek-V2-Lite",
    ),
    "gpt-oss-20b": PublishedModel(
        config=_shape(24, 2880, (64, 8, 64), 201088, layer_types=("sliding_attention", "full_attention") * 12,
                      moe=_moe(32, 4, 2880, **_GPT_OSS_MOE), **_GPT_OSS | {"max_position_embeddings": 131072}),
        total=20.91e9, active=3.61e9, active_excludes="input embedding", stored_as="mxfp4",
        source="gpt-oss model card (arXiv 2508.10925), table 1",
    ),
    "gpt-oss-120b": PublishedModel(
        config=_shape(36, 2880, (64, 8, 64), 201088, layer_types=("sliding_attention", "full_attention") * 18,
                      moe=_moe(128, 4, 2880, **_GPT_OSS_MOE), **_GPT_OSS | {"max_position_embeddings": 131072}),
        total=116.83e9, active=5.13e9, active_excludes="input embedding", stored_as="mxfp4",
        source="gpt-oss model card (arXiv 2508.10925), table 1",
    ),
    "qwen3-30b-a3b": PublishedModel(
        config=_shape(48, 2048, (32, 4, 128), 151936, qk_norm="head", max_position_embeddings=40960,
                      moe=_moe(128, 8, 768)),
        total=30.5e9, active=3.35e9,
        source="Qwen/Qwen3-30B-A3B, model card (30.5B in total, 3.3B activated) and config.json",
    ),
    "qwen3-235b-a22b": PublishedModel(
        config=_shape(94, 4096, (64, 4, 128), 151936, qk_norm="head", max_position_embeddings=40960,
                      moe=_moe(128, 8, 1536)),
        total=235e9, active=22e9,
        source="Qwen/Qwen3-235B-A22B, model card",
    ),
    "mixtral-8x7b": PublishedModel(
        config=_shape(32, 4096, (32, 8, 128), 32000, max_position_embeddings=32768, moe=_moe(8, 2, 14336)),
        total=46.7e9, active=12.9e9,
        source="mistral.ai/news/mixtral-of-experts (11 Dec 2023)",
    ),
    "mixtral-8x22b": PublishedModel(
        config=_shape(56, 6144, (48, 8, 128), 32768, max_position_embeddings=65536, moe=_moe(8, 2, 16384)),
        total=141e9, active=39e9,
        source="mistral.ai/news/mixtral-8x22b (17 Apr 2024)",
    ),
    "deepseek-v3": PublishedModel(
        config=_shape(61, 7168, (128, 128, 192), 129280, 18432, mla=_latent(1536), max_position_embeddings=163840,
                      moe=_moe(256, 8, 2048, router="sigmoid_topk", n_shared_experts=1, first_k_dense_replace=3,
                               n_group=8, topk_group=4, routed_scaling_factor=2.5)),
        total=671e9, active=37e9, active_excludes="input embedding", stored_as="float8",
        source="DeepSeek-V3 (arXiv 2412.19437), section 4.2; without the MTP module",
    ),
    "kimi-k2": PublishedModel(
        config=_shape(61, 7168, (64, 64, 192), 163840, 18432, mla=_latent(1536), max_position_embeddings=131072,
                      moe=_moe(384, 8, 2048, router="sigmoid_topk", n_shared_experts=1, first_k_dense_replace=1,
                               routed_scaling_factor=2.827)),
        total=1040e9, active=32.6e9,  stored_as="float8",
        source="Kimi K2 (arXiv 2507.20534), table 2",
    ),
    "llama-4-maverick": PublishedModel(
        config=_shape(48, 5120, (40, 8, 128), 202048, 16384, max_position_embeddings=1048576,
                      layer_types=(*("chunked_attention",) * 3, "full_attention") * 12, attention_chunk_size=8192,
                      nope_layers=tuple(range(3, 48, 4)),
                      moe=_moe(128, 1, 8192, router="topk_sigmoid_input", n_shared_experts=1,
                               mlp_only_layers=tuple(range(0, 48, 2)))),
        total=400e9, active=17e9,
        source="meta-llama/Llama-4-Maverick-17B-128E, model card; the language model alone",
    ),
    "switch-c": PublishedModel(
        config=_shape(30, 2080, (32, 32, 64), 32128, tie_word_embeddings=True, max_position_embeddings=512,
                      moe=_moe(2048, 1, 4096, router="softmax_topk", norm_topk_prob=False, capacity_factor=1.25)),
        total=1571e9, active=None, stored_as="bfloat16",
        source="Switch Transformer (arXiv 2101.03961), table 9; 15 encoder and 15 decoder layers, MLPs without a gate",
        extra={"cross-attention of 15 decoder layers": 15 * (4 * 2080 * 32 * 64 + 2080)},
    ),
    "gpt-3-175b": PublishedModel(
        config=_shape(96, 12288, (96, 96, 128), 50257, 32768, norm="layer", norm_bias=True, attention_bias=True,
                      attention_output_bias=True, mlp_bias=True, tie_word_embeddings=True,
                      max_position_embeddings=2048),
        total=174.6e9, active=None,
        source="GPT-3 (arXiv 2005.14165), table D.1; MLPs without a gate",
        extra={
            "learned positions": 2048 * 12288,
            "biases of the gate, which there is none of": 96 * (49152 - 2 * 32768),
        },
    ),
    "llama-2-7b": PublishedModel(
        config=_shape(32, 4096, (32, 32, 128), 32000, 11008),
        total=6.74e9, active=None,
        source="Llama 2 (arXiv 2307.09288) and meta-llama/Llama-2-7b-hf",
    ),
    "llama-2-13b": PublishedModel(
        config=_shape(40, 5120, (40, 40, 128), 32000, 13824),
        total=13.02e9, active=None,
        source="Llama 2 (arXiv 2307.09288) and meta-llama/Llama-2-13b-hf",
    ),
    "llama-2-70b": PublishedModel(
        config=_shape(80, 8192, (64, 8, 128), 32000, 28672),
        total=68.98e9, active=None,
        source="Llama 2 (arXiv 2307.09288) and meta-llama/Llama-2-70b-hf",
    ),
    "llama-3-8b": PublishedModel(
        config=_shape(32, 4096, (32, 8, 128), 128256, 14336, max_position_embeddings=131072),
        total=8.03e9, active=None,
        source="Llama 3 (arXiv 2407.21783), table 3, and meta-llama/Llama-3.1-8B",
    ),
    "llama-3-70b": PublishedModel(
        config=_shape(80, 8192, (64, 8, 128), 128256, 28672, max_position_embeddings=131072),
        total=70.6e9, active=None,
        source="Llama 3 (arXiv 2407.21783), table 3, and meta-llama/Llama-3.1-70B",
    ),
    "llama-3-405b": PublishedModel(
        config=_shape(126, 16384, (128, 8, 128), 128256, 53248, max_position_embeddings=131072),
        total=405e9, active=None,
        source="Llama 3 (arXiv 2407.21783), table 3",
    ),
}  # fmt: skip
