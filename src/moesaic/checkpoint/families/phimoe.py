"""Phi-3.5-MoE (arXiv 2404.14219): the SparseMixer router (arXiv 2409.12136), LayerNorm, biases, LongRoPE."""

from functools import partial

from moesaic.checkpoint.families.family import Family
from moesaic.checkpoint.families.keys import (
    Always,
    HeadSizes,
    Key,
    NoEffect,
    SharedBias,
    SpecialTokens,
    WindowEverywhere,
    sizes,
)
from moesaic.checkpoint.families.layout import Names, decoder_layout
from moesaic.checkpoint.families.rope_keys import Rope

FAMILY = Family(
    model_type="phimoe",
    architecture="PhimoeForCausalLM",
    keys=(
        *sizes(max_position_embeddings=4096 * 32, rms_norm_eps=1e-5),
        HeadSizes(default_key_value_heads=8),
        Rope(default_theta=1e6),
        WindowEverywhere(),
        SharedBias("attention_bias", ("attention_bias", "attention_output_bias")),
        Key("lm_head_bias", "lm_head_bias", bool, False),
        Key("num_local_experts", "moe.num_experts", int, 16),
        Key("num_experts_per_tok", "moe.num_experts_per_tok", int, 2),
        Key("intermediate_size", "moe.moe_intermediate_size", int, 6400),
        Key("router_jitter_noise", "moe.router_jitter_noise", float, 0.01),
        NoEffect(("hidden_dropout",), "only training by others drops values"),
        SpecialTokens(default_bos=1, default_eos=2),
        Always({"qk_norm": "none", "norm": "layer", "norm_bias": True, "moe.router": "sparsemixer"}),
    ),
    layout=partial(decoder_layout, names=Names(moe="block_sparse_moe", expert_projections=("w1", "w3", "w2"))),
)
