"""FlexOlmo (arXiv 2507.07024): OLMo 2 with softmax top-k experts, so norms come after the sub-layers."""

from functools import partial

from moesaic.checkpoint.families.family import Family
from moesaic.checkpoint.families.keys import Always, HeadSizes, Key, SharedBias, SpecialTokens, sizes
from moesaic.checkpoint.families.layout import decoder_layout
from moesaic.checkpoint.families.olmo2 import NORMS_AFTER
from moesaic.checkpoint.families.rope_keys import Rope

FAMILY = Family(
    model_type="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    keys=(
        *sizes(max_position_embeddings=4096),
        HeadSizes(),
        Rope(default_theta=500000.0),
        SharedBias("attention_bias", ("attention_bias", "attention_output_bias")),
        Key("num_experts", "moe.num_experts", int, 7, also_called=("num_local_experts",)),
        Key("num_experts_per_tok", "moe.num_experts_per_tok", int, 5),
        Key("intermediate_size", "moe.moe_intermediate_size", int, 11008),
        Key("norm_topk_prob", "moe.norm_topk_prob", bool, False),
        SpecialTokens(default_eos=100257),
        Always({"qk_norm": "width", "norm_placement": "post", "moe.router": "softmax_topk"}),
    ),
    layout=partial(decoder_layout, names=NORMS_AFTER),
    folds_into_experts=True,
)
