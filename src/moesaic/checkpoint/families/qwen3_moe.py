"""Qwen3-MoE (arXiv 2505.09388): Qwen3 with softmax top-k experts, no shared experts, and no scaling of their output."""

from moesaic.checkpoint.families.family import Family
from moesaic.checkpoint.families.keys import (
    Always,
    DenseLayersByName,
    HeadSizes,
    Key,
    SharedBias,
    SpecialTokens,
    WindowEverywhere,
    sizes,
)
from moesaic.checkpoint.families.rope_keys import Rope

FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    keys=(
        *sizes(max_position_embeddings=32768),
        HeadSizes(default_key_value_heads=4),
        Key("intermediate_size", "intermediate_size", int, 6144),
        Rope(),
        WindowEverywhere(default=4096, switch="use_sliding_window"),
        SharedBias("attention_bias", ("attention_bias", "attention_output_bias")),
        Key("num_experts", "moe.num_experts", int, 128, also_called=("num_local_experts",)),
        Key("num_experts_per_tok", "moe.num_experts_per_tok", int, 8),
        Key("moe_intermediate_size", "moe.moe_intermediate_size", int, 768),
        Key("norm_topk_prob", "moe.norm_topk_prob", bool, False),
        DenseLayersByName(),
        SpecialTokens(),
        Always({"qk_norm": "head", "moe.router": "softmax_topk"}),
    ),
    folds_into_experts=True,
)
