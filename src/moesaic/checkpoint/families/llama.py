"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783), and the many dense models that keep to their form."""

from moesaic.checkpoint.families.family import Family
from moesaic.checkpoint.families.keys import Always, HeadSizes, Key, SharedBias, SpecialTokens, sizes
from moesaic.checkpoint.families.rope_keys import Rope

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    sparse=False,
    keys=(
        *sizes(max_position_embeddings=2048),
        HeadSizes(),
        Key("intermediate_size", "intermediate_size", int),
        Rope(),
        SharedBias("attention_bias", ("attention_bias", "attention_output_bias")),
        Key("mlp_bias", "mlp_bias", bool, False),
        SpecialTokens(default_bos=1, default_eos=2),
        Always({"qk_norm": "none"}),
    ),
)
