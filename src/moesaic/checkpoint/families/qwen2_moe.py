"""Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671): softmax top-k, and a shared expert weighed by a gate of its own."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from moesaic.checkpoint.families.family import Family
from moesaic.checkpoint.families.hf_config import HFConfig
from moesaic.checkpoint.families.keys import Always, DenseLayersByName, Fields, HeadSizes, Key, SpecialTokens, sizes
from moesaic.checkpoint.families.layout import Names, with_empty_shared_experts
from moesaic.checkpoint.families.qwen2 import UpperLayersSlide
from moesaic.checkpoint.families.rope_keys import Rope
from moesaic.config import ModelConfig


@dataclass(frozen=True)
class SharedExpert:
    """One of any width, always weighed by a gate; of width 0 there is none, and nothing to weigh."""

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        width = hf.take("shared_expert_intermediate_size", int, 5632)
        return {"moe.shared_expert_intermediate_size": width, "moe.shared_expert_gate": width > 0}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"shared_expert_intermediate_size": config.moe.shared_intermediate_size if config.moe else None}


FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    keys=(
        *sizes(max_position_embeddings=32768),
        HeadSizes(default_key_value_heads=16),
        Key("intermediate_size", "intermediate_size", int, 5632),
        Rope(),
        UpperLayersSlide(alternating=True),
        Key("qkv_bias", "attention_bias", bool, True),
        Key("num_experts", "moe.num_experts", int, 60),
        Key("num_experts_per_tok", "moe.num_experts_per_tok", int, 4),
        Key("moe_intermediate_size", "moe.moe_intermediate_size", int, 1408),
        SharedExpert(),
        Key("norm_topk_prob", "moe.norm_topk_prob", bool, False),
        DenseLayersByName(),
        SpecialTokens(),
        Always({"qk_norm": "none", "moe.router": "softmax_topk"}),
    ),
    layout=partial(with_empty_shared_experts, names=Names(shared_experts="shared_expert"), gate=True),
)
