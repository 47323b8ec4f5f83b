"""Hunyuan-A13B (Tencent, 2025): softmax experts and one shared expert; queries and keys are normalised after RoPE."""

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
    SharedBias,
    SpecialTokens,
    sizes,
)
from moesaic.checkpoint.families.layout import Names, decoder_layout
from moesaic.checkpoint.families.rope_keys import Rope
from moesaic.config import ModelConfig

NAMES = Names(
    query_norm="query_layernorm", key_norm="key_layernorm", router="gate.wg", shared_experts="shared_mlp"
)  # fmt: skip
OTHER_TASKS = (
    "add_classification_head", "anyres_pooling_size", "anyres_vit_max_image_size", "anyres_vit_two_views", "class_num",
    "dense_list", "num_media_embeds", "pool_type", "skip_cls_token", "vit_add_patchemb_bias", "vit_input_resolution",
    "vit_mapping_type", "vit_norm_type", "vit_patch", "vit_remove_prenorm", "vit_token", "vit_used_rms_norm",
)  # fmt: skip
TOKEN_IDS = (
    "eod_token_id", "im_end_id", "im_newline_id", "im_start_id", "image_token_id", "mask_init_id", "org_vocab_size",
    "pad_id", "sep_token_id", "text_end_id", "text_start_id", "video_end_id", "video_start_id",
)  # fmt: skip


@dataclass(frozen=True)
class EqualInAllLayers:
    """Keys that may be a list with one value per layer: all must be the same, and later parts read that one value."""

    keys: tuple[str, ...]

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        for key in self.keys:
            values = hf.values.get(key)
            if isinstance(values, list) and values:
                if any(value != values[0] for value in values):
                    raise hf.unsupported(key, "the same value for all layers")
                hf.values[key] = values[0]
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class OneWidth:
    """intermediate_size holds for the routed experts and for the one shared expert; other keys may only repeat it."""

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        width = hf.take("intermediate_size", int, 11008)
        hf.only("moe_intermediate_size", width)
        hf.only("num_shared_expert", 1)
        hf.only("attention_head_dim", fields["head_dim"])
        return {"moe.moe_intermediate_size": width, "moe.n_shared_experts": 1}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        width = config.moe.moe_intermediate_size if config.moe else None
        return {"intermediate_size": width, "moe_intermediate_size": width, "num_shared_expert": 1}


FAMILY = Family(
    model_type="hunyuan_v1_moe",
    architecture="HunYuanMoEV1ForCausalLM",
    keys=(
        EqualInAllLayers(("num_experts", "moe_topk", "moe_intermediate_size", "num_shared_expert")),
        *sizes(max_position_embeddings=2048, rms_norm_eps=1e-5),
        HeadSizes(),
        Rope(),
        SharedBias("attention_bias", ("attention_bias", "attention_output_bias")),
        Key("num_experts", "moe.num_experts", int, 1, also_called=("num_local_experts",)),
        Key("moe_topk", "moe.num_experts_per_tok", int, 1, also_called=("num_experts_per_tok",)),
        OneWidth(),
        Only("use_mixed_mlp_moe", True),
        Only("moe_layer_num_skipped", 0),
        Only("norm_topk_prob", True),
        Only("routed_scaling_factor", 1.0),
        Only("group_limited_greedy", False),
        Only("use_qk_norm", True),
        Only("use_rotary_pos_emb", True),
        Only("position_embedding_xdrope", False),
        Only("use_cla", False),
        Only("use_mla", False),
        Only("mlp_bias", False),
        NoEffect(("cla_share_factor",), "keys and values are not shared between layers"),
        NoEffect(("moe_drop_tokens", "moe_random_routing_dropped_token"), "no token is dropped"),
        NoEffect(OTHER_TASKS, "these files hold text models with a language head"),
        NoEffect(TOKEN_IDS, "the tokenizer's business"),
        SpecialTokens(default_bos=1, default_eos=2),
        Always({"qk_norm": "head_after_rope", "moe.router": "softmax_topk"}),
    ),
    layout=partial(decoder_layout, names=NAMES),
)
