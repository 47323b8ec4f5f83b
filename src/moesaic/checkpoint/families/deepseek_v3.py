"""DeepSeek-V3 and R1 (arXiv 2412.19437), and Kimi K2 (arXiv 2507.20534), which has the same form.

Latent attention as in DeepSeek-V2, and sigmoid experts whose selection bias takes the place of a balance loss.
"""

from moesaic.checkpoint.families.deepseek_v2 import LATENT_ATTENTION
from moesaic.checkpoint.families.family import Family
from moesaic.checkpoint.families.keys import (
    Always,
    GroupsOfTwo,
    Key,
    LeadingDenseLayers,
    NoEffect,
    Only,
    SpecialTokens,
    sizes,
)
from moesaic.checkpoint.families.layout import with_empty_shared_experts

FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    keys=(
        *sizes(max_position_embeddings=4096),
        Key("intermediate_size", "intermediate_size", int, 18432),
        *LATENT_ATTENTION,
        Key("rope_interleave", "rope_interleaved", bool, True),
        Key("n_routed_experts", "moe.num_experts", int, 256, also_called=("num_local_experts",)),
        Key("num_experts_per_tok", "moe.num_experts_per_tok", int, 8),
        Key("moe_intermediate_size", "moe.moe_intermediate_size", int, 2048),
        Key("n_shared_experts", "moe.n_shared_experts", int, 1, null=0),
        Key("n_group", "moe.n_group", int, 8, null=1),
        Key("topk_group", "moe.topk_group", int, 4, null=1),
        Key("norm_topk_prob", "moe.norm_topk_prob", bool, True),
        Key("routed_scaling_factor", "moe.routed_scaling_factor", float, 2.5),
        Only("scoring_func", "sigmoid"),
        Only("topk_method", "noaux_tc"),
        LeadingDenseLayers(default=3),
        Only("moe_layer_freq", 1),
        NoEffect(("num_nextn_predict_layers", "num_mtp_layers"), "layers that predict further tokens are not loaded"),
        NoEffect(("aux_loss_alpha", "seq_aux"), "they balance the experts in training"),
        GroupsOfTwo(),
        SpecialTokens(default_bos=0, default_eos=1),
        Always({"moe.router": "sigmoid_topk"}),
    ),
    layout=with_empty_shared_experts,
)
