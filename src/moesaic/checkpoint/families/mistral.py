"""Mistral (arXiv 2310.06825): Llama without biases, with a sliding window in all layers or in none."""

from moesaic.checkpoint.families.family import Family
from moesaic.checkpoint.families.keys import Always, HeadSizes, Key, SpecialTokens, WindowEverywhere, sizes
from moesaic.checkpoint.families.rope_keys import Rope

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    sparse=False,
    keys=(
        *sizes(max_position_embeddings=4096 * 32),
        HeadSizes(default_key_value_heads=8),
        Key("intermediate_size", "intermediate_size", int),
        Rope(),
        WindowEverywhere(default=4096),
        SpecialTokens(default_bos=1, default_eos=2),
        Always({"qk_norm": "none"}),
    ),
)
