"""OLMo 2 (arXiv 2501.00656): dense, norms after the sub-layers, queries and keys normalised over their whole width."""

from functools import partial

from moesaic.checkpoint.families.family import Family
from moesaic.checkpoint.families.keys import Always, HeadSizes, Key, SharedBias, SpecialTokens, sizes
from moesaic.checkpoint.families.layout import Names, decoder_layout
from moesaic.checkpoint.families.rope_keys import Rope

NORMS_AFTER = Names(attention_norm="post_attention_layernorm", feed_forward_norm="post_feedforward_layernorm")

FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    sparse=False,
    keys=(
        *sizes(max_position_embeddings=2048, rms_norm_eps=1e-5),
        HeadSizes(),
        Key("intermediate_size", "intermediate_size", int),
        Rope(),
        SharedBias("attention_bias", ("attention_bias", "attention_output_bias")),
        SpecialTokens(default_eos=50279),
        Always({"qk_norm": "width", "norm_placement": "post"}),
    ),
    layout=partial(decoder_layout, names=NORMS_AFTER),
)
