"""OLMoE (arXiv 2409.02060): softmax top-k experts, queries and keys normalised over their whole width."""

from moesaic.checkpoint.families.family import Family
from moesaic.checkpoint.families.keys import Always, HeadSizes, Key, SharedBias, SpecialTokens, sizes
from moesaic.checkpoint.families.rope_keys import Rope

FAMILY = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    keys=(
        *sizes(max_position_embeddings=4096, rms_norm_eps=1e-5),
        HeadSizes(fixed_head_dim=True),
        Rope(),
        SharedBias("attention_bias", ("attention_bias", "attention_output_bias")),
        Key("clip_qkv", "clip_qkv", float, None),
        Key("num_experts", "moe.num_experts", int, 64, also_called=("num_local_experts",)),
        Key("num_experts_per_tok", "moe.num_experts_per_tok", int, 8),
        Key("intermediate_size", "moe.moe_intermediate_size", int, 2048),
        Key("norm_topk_prob", "moe.norm_topk_prob", bool, False),
        SpecialTokens(default_eos=50279),
        Always({"qk_norm": "width", "moe.router": "softmax_topk"}),
    ),
    folds_into_experts=True,
)
