"""Qwen3 (arXiv 2505.09388): the dense decoder with normalised queries and keys."""

from moesaic.checkpoint.families.family import Family
from moesaic.checkpoint.families.keys import Always, HeadSizes, Key, SharedBias, SpecialTokens, sizes
from moesaic.checkpoint.families.qwen2 import UpperLayersSlide
from moesaic.checkpoint.families.rope_keys import Rope

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    sparse=False,
    keys=(
        *sizes(max_position_embeddings=32768),
        HeadSizes(default_head_dim=128, default_key_value_heads=32),
        Key("intermediate_size", "intermediate_size", int),
        Rope(),
        UpperLayersSlide(),
        SharedBias("attention_bias", ("attention_bias", "attention_output_bias")),
        SpecialTokens(),
        Always({"qk_norm": "head"}),
    ),
)
