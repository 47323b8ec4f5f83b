"""MiniMax-M2 (MiniMaxAI, 2025): sigmoid experts with a selection bias in every layer, and partial rotary positions."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from moesaic.checkpoint.families.family import Family
from moesaic.checkpoint.families.hf_config import HFConfig
from moesaic.checkpoint.families.keys import (
    Always,
    Fields,
    HeadSizes,
    Key,
    NoEffect,
    Only,
    SpecialTokens,
    sizes,
)
from moesaic.checkpoint.families.layout import Names, decoder_layout
from moesaic.checkpoint.families.rope_keys import Rope
from moesaic.config import ModelConfig

NAMES = Names(
    moe="block_sparse_moe", expert_bias="e_score_correction_bias", expert_projections=("w1", "w3", "w2")
)  # fmt: skip


@dataclass(frozen=True)
class RopeByWidth(Rope):
    """Published checkpoints say in rotary_dim how many dimensions of a head are turned."""

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        head_dim = max(fields["head_dim"], 1)  # smaller ones are refused when the config is made
        return Rope(self.default_theta, hf.take("rotary_dim", int, head_dim) / head_dim).read(hf, fields)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {**super().write(config), "rotary_dim": config.rotary_dim}


@dataclass(frozen=True)
class FullAttention:
    """attn_type_list has a 1 for each layer of softmax attention, the only kind that this generation has."""

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        if set(hf.take_list("attn_type_list", int, ())) - {1}:
            raise hf.unsupported("attn_type_list", "1 for every layer")
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"attn_type_list": [1] * config.num_hidden_layers}


FAMILY = Family(
    model_type="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    keys=(
        *sizes(max_position_embeddings=196608),
        HeadSizes(default_head_dim=128, default_key_value_heads=8),
        RopeByWidth(default_theta=5e6, default_partial=1.0),
        Key("num_local_experts", "moe.num_experts", int, 256, also_called=("num_experts",)),
        Key("num_experts_per_tok", "moe.num_experts_per_tok", int, 8),
        Key("intermediate_size", "moe.moe_intermediate_size", int, 1536),
        FullAttention(),
        Only("scoring_func", "sigmoid"),
        Only("use_routing_bias", True),
        Only("use_qk_norm", True),
        Only("qk_norm_type", "per_layer"),
        Only("shared_intermediate_size", 0),
        Only("layernorm_full_attention_beta", 1.0),
        Only("layernorm_linear_attention_beta", 1.0),
        Only("layernorm_mlp_beta", 1.0),
        NoEffect(("mlp_intermediate_size", "shared_moe_mode"), "no layer is dense, and there are no shared experts"),
        NoEffect(("swa_rope_theta",), "no layer slides"),
        NoEffect(("mtp_transformer_layers", "num_mtp_modules", "use_mtp"), "they predict further tokens"),
        SpecialTokens(default_bos=200034, default_eos=200020),
        Always({"qk_norm": "width", "moe.router": "sigmoid_topk"}),
    ),
    layout=partial(decoder_layout, names=NAMES),
)
