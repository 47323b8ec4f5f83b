"""Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671): softmax top-k, and a shared expert weighed by a gate of its own."""

from functools import partial

from moesaic.checkpoint.families.family import Family
from moesaic.checkpoint.families.keys import Always, DenseLayersByName, HeadSizes, Key, SpecialTokens, sizes
from moesaic.checkpoint.families.layout import Names, decoder_layout
from moesaic.checkpoint.families.qwen2 import UpperLayersSlide
from moesaic.checkpoint.families.rope_keys import Rope

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
        Key("shared_expert_intermediate_size", "moe.shared_expert_intermediate_size", int, 5632),
        Key("norm_topk_prob", "moe.norm_topk_prob", bool, False),
        DenseLayersByName(),
        SpecialTokens(),
        Always({"qk_norm": "none", "moe.router": "softmax_topk", "moe.shared_expert_gate": True}),
    ),
    layout=partial(decoder_layout, names=Names(shared_experts="shared_expert")),
)
