"""dots.llm1 (arXiv 2506.05767): DeepSeek-V3's router, and Qwen3's attention."""

from moesaic.checkpoint.families.family import Family
from moesaic.checkpoint.families.keys import (
    Always,
    GroupsOfTwo,
    HeadSizes,
    Key,
    LeadingDenseLayers,
    NoEffect,
    Only,
    SharedBias,
    SpecialTokens,
    sizes,
)
from moesaic.checkpoint.families.layout import with_empty_shared_experts
from moesaic.checkpoint.families.qwen2 import UpperLayersSlide
from moesaic.checkpoint.families.rope_keys import Rope

FAMILY = Family(
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    keys=(
        *sizes(max_position_embeddings=2048),
        HeadSizes(default_key_value_heads=32),
        Key("intermediate_size", "intermediate_size", int, 10944),
        Rope(),
        UpperLayersSlide(default_first=62, default_switch=True),
        SharedBias("attention_bias", ("attention_bias", "attention_output_bias")),
        Key("n_routed_experts", "moe.num_experts", int, also_called=("num_local_experts",)),
        Key("num_experts_per_tok", "moe.num_experts_per_tok", int),
        Key("moe_intermediate_size", "moe.moe_intermediate_size", int, 1408),
        Key("n_shared_experts", "moe.n_shared_experts", int, 0),
        Key("n_group", "moe.n_group", int, 1),
        Key("topk_group", "moe.topk_group", int, 1),
        Key("norm_topk_prob", "moe.norm_topk_prob", bool, False),
        Key("routed_scaling_factor", "moe.routed_scaling_factor", float, 1.0),
        Only("scoring_func", "noaux_tc", ("sigmoid",)),  # the published name of both scores and method
        Only("topk_method", "noaux_tc"),
        LeadingDenseLayers(default=0),
        Only("moe_layer_freq", 1),
        NoEffect(("aux_loss_alpha", "seq_aux"), "they balance the experts in training"),
        GroupsOfTwo(),
        SpecialTokens(),
        Always({"qk_norm": "head", "moe.router": "sigmoid_topk"}),
    ),
    layout=with_empty_shared_experts,
)
