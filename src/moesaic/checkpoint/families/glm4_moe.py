"""GLM-4-MoE (arXiv 2508.06471): DeepSeek-V3's sigmoid router with a selection bias, and grouped-query attention."""

from moesaic.checkpoint.families.family import Family
from moesaic.checkpoint.families.keys import (
    Always,
    Flag,
    GroupsOfTwo,
    HeadSizes,
    Key,
    LeadingDenseLayers,
    NoEffect,
    SpecialTokens,
    sizes,
)
from moesaic.checkpoint.families.layout import with_empty_shared_experts
from moesaic.checkpoint.families.rope_keys import Rope

FAMILY = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    keys=(
        *sizes(max_position_embeddings=131072, rms_norm_eps=1e-5),
        HeadSizes(default_key_value_heads=8),
        Key("intermediate_size", "intermediate_size", int, 10944),
        Rope(default_partial=0.5),
        Flag("use_qk_norm", "qk_norm", {True: "head", False: "none"}, False),
        Key("attention_bias", "attention_bias", bool, False),
        Key("n_routed_experts", "moe.num_experts", int, 128, also_called=("num_experts", "num_local_experts")),
        Key("num_experts_per_tok", "moe.num_experts_per_tok", int, 8),
        Key("moe_intermediate_size", "moe.moe_intermediate_size", int, 1408),
        Key("n_shared_experts", "moe.n_shared_experts", int, 1),
        Key("n_group", "moe.n_group", int, 1),
        Key("topk_group", "moe.topk_group", int, 1),
        Key("norm_topk_prob", "moe.norm_topk_prob", bool, True),
        Key("routed_scaling_factor", "moe.routed_scaling_factor", float, 1.0),
        LeadingDenseLayers(default=1),
        NoEffect(
            ("num_nextn_predict_layers", "num_mtp_layers"),
            "layers that predict further tokens are not loaded",
            {"num_nextn_predict_layers": 0},
        ),
        GroupsOfTwo(),
        SpecialTokens(),
        Always({"moe.router": "sigmoid_topk"}),
    ),
    layout=with_empty_shared_experts,
)
