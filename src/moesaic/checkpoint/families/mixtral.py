"""Mixtral (arXiv 2401.04088): Mistral whose every feed-forward is a mixture of experts."""

from functools import partial

from moesaic.checkpoint.families.family import Family
from moesaic.checkpoint.families.keys import Always, HeadSizes, Key, SpecialTokens, WindowEverywhere, sizes
from moesaic.checkpoint.families.layout import Names, decoder_layout
from moesaic.checkpoint.families.rope_keys import Rope

FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    keys=(
        *sizes(max_position_embeddings=4096 * 32, rms_norm_eps=1e-5),
        HeadSizes(default_key_value_heads=8),
        Rope(default_theta=1e6),
        WindowEverywhere(),
        Key("num_local_experts", "moe.num_experts", int, 8),
        Key("num_experts_per_tok", "moe.num_experts_per_tok", int, 2),
        Key("intermediate_size", "moe.moe_intermediate_size", int),
        SpecialTokens(default_bos=1, default_eos=2),
        Always({"qk_norm": "none", "moe.router": "softmax_topk", "moe.norm_topk_prob": True}),
    ),
    layout=partial(decoder_layout, names=Names(moe="block_sparse_moe", expert_projections=("w1", "w3", "w2"))),
)
