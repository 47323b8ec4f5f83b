"""Granite 3 MoE: a softmax over the chosen logits only, and fixed multipliers on every stream (as in arXiv 2408.13359).

All experts of a layer lie in two tensors, as `ParallelExperts` of ScatterMoE (arXiv 2403.08245) names them.
"""

from functools import partial

from moesaic.checkpoint.families.family import Family
from moesaic.checkpoint.families.keys import Always, HeadSizes, Key, KeyPart, SharedBias, SpecialTokens, sizes
from moesaic.checkpoint.families.layout import (
    Alternatives,
    Names,
    Region,
    StoredTensor,
    decoder_layout,
    routed_experts,
)
from moesaic.checkpoint.families.rope_keys import Rope
from moesaic.config import ModelConfig

KEYS: tuple[KeyPart, ...] = (
    *sizes(max_position_embeddings=2048),
    HeadSizes(),
    Rope(),
    SharedBias("attention_bias", ("attention_bias", "attention_output_bias")),
    Key("embedding_multiplier", "embedding_multiplier", float, 1.0),
    Key("attention_multiplier", "attention_multiplier", float, 1.0, null=None),
    Key("residual_multiplier", "residual_multiplier", float, 1.0),
    Key("logits_scaling", "logits_scaling", float, 1.0),
    Key("num_local_experts", "moe.num_experts", int, 8),
    Key("num_experts_per_tok", "moe.num_experts_per_tok", int, 2),
    Key("intermediate_size", "moe.moe_intermediate_size", int, 11008),
    SpecialTokens(default_bos=1, default_eos=2),
    Always({"qk_norm": "none", "moe.router": "topk_softmax"}),
)
NAMES = Names(moe="block_sparse_moe", router="router.layer")


def experts(config: ModelConfig, names: Names, ours: str, theirs: str) -> list[Alternatives]:
    block = theirs.removesuffix(f".{names.experts}")
    published = (("gate_up", "input_linear"), ("down", "output_linear"))
    return [
        ((StoredTensor(f"{block}.{leaf}.weight", (Region(f"{ours}.{stacked}"),)),), *others)
        for (stacked, leaf), others in zip(published, routed_experts(config, names, ours, theirs), strict=True)
    ]


FAMILY = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    keys=KEYS,
    layout=partial(decoder_layout, names=NAMES, experts=experts),
)
