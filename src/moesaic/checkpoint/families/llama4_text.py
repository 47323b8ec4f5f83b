"""Llama 4, the language model: chunks of attention, layers without RoPE whose queries grow (arXiv 2501.19399), and
experts whose input is weighed.

The experts' matrices lie transposed. `llama4` is the same within a model that also sees; what sees is skipped.

E experts, D hidden size, F expert intermediate size.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from moesaic.checkpoint.families.family import Family
from moesaic.checkpoint.families.hf_config import HFConfig
from moesaic.checkpoint.families.keys import (
    Always,
    Fields,
    Flag,
    HeadSizes,
    Key,
    NoEffect,
    SharedBias,
    SpecialTokens,
    dense_layer_fields,
    sizes,
    window_fields,
)
from moesaic.checkpoint.families.layout import (
    Alternatives,
    Layout,
    Names,
    Region,
    StoredTensor,
    decoder_layout,
    split_down,
    split_gate_up,
)
from moesaic.checkpoint.families.rope_keys import Rope
from moesaic.config import ModelConfig
from moesaic.errors import MoesaicError

DEFAULT_CHUNK = 8192


@dataclass(frozen=True)
class RopeLayers:
    """no_rope_layers, which says 1 where a layer has RoPE, or every layer but each no_rope_layer_interval-th; and
    layer_types, or chunks of attention_chunk_size in the layers with RoPE."""

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        layers = range(fields["num_hidden_layers"])
        interval = _step(hf, "no_rope_layer_interval", 4)
        has_rope = hf.take_list("no_rope_layers", int, ()) or [int((index + 1) % interval != 0) for index in layers]
        if len(has_rope) < len(layers) or not set(has_rope) <= {0, 1}:
            raise hf.unsupported("no_rope_layers", f"a 0 or 1 for each of {len(layers)} layers")
        kinds = ("full_attention", "chunked_attention")
        layer_types = hf.take_list("layer_types", str, None)
        if layer_types is None:
            layer_types = [kinds[has_rope[index]] for index in layers]
        if not set(layer_types) <= set(kinds):
            raise hf.unsupported("layer_types", " and ".join(kinds))
        return {
            **window_fields(layer_types, None),
            "attention_chunk_size": hf.take("attention_chunk_size", int, DEFAULT_CHUNK, None),
            "nope_layers": tuple(index for index in layers if not has_rope[index]),
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """With a size even where there are no chunks, because transformers makes the mask all the same."""
        layers = range(config.num_hidden_layers)
        return {
            "no_rope_layers": [int(index not in config.nope_layers) for index in layers],
            "layer_types": [config.layer_type(index) for index in layers],
            "attention_chunk_size": config.attention_chunk_size or DEFAULT_CHUNK,
        }


@dataclass(frozen=True)
class Temperature:
    """attn_scale and floor_scale, which count while attn_temperature_tuning is true; some files say 4 for true."""

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        hf.only("attn_temperature_tuning", True, False, 4)
        tuned = hf.values.get("attn_temperature_tuning") in (None, True, 4)
        scale = hf.take("attn_scale", float, 0.1)
        return {"attn_scale": scale if tuned else 0.0, "floor_scale": hf.take("floor_scale", int, 8192)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        tuned = config.attn_scale != 0
        scales = {"attn_scale": config.attn_scale, "floor_scale": config.floor_scale}
        return {"attn_temperature_tuning": tuned, **(scales if tuned else {})}


@dataclass(frozen=True)
class SparseLayers:
    """moe_layers, or the last of every interleave_moe_layer_step layers."""

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        layers = range(fields["num_hidden_layers"])
        step = _step(hf, "interleave_moe_layer_step", 1)
        sparse = hf.take_list("moe_layers", int, None)
        if sparse is None:
            sparse = layers[step - 1 :: step]
        return dense_layer_fields([index for index in layers if index not in sparse])

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"moe_layers": [index for index in range(config.num_hidden_layers) if config.is_moe_layer(index)]}


def _step(hf: HFConfig, key: str, default: int) -> int:
    step: int = hf.take(key, int, default)
    if step < 1:
        raise MoesaicError(f"config.json: {key} is {step}; it must be 1 or above")
    return step


def experts(config: ModelConfig, names: Names, ours: str, theirs: str) -> list[Alternatives]:
    """Transposed, all experts in one tensor, as published; or one tensor per expert and projection."""
    where = config, names, ours, theirs
    return [
        ((StoredTensor(f"{theirs}.{fused}", (Region(f"{ours}.{stacked}", _transposed),)),), split)
        for stacked, fused, split in (
            ("gate_up", "gate_up_proj", split_gate_up(*where)),
            ("down", "down_proj", split_down(*where)),
        )
    ]


def _transposed(stacked: Tensor) -> Tensor:
    return stacked.transpose(1, 2)


NAMES = Names(mlp="feed_forward", moe="feed_forward", router="router", shared_experts="shared_expert")

FAMILY = Family(
    model_type="llama4_text",
    architecture="Llama4ForCausalLM",
    keys=(
        *sizes(max_position_embeddings=4096 * 32, rms_norm_eps=1e-5),
        HeadSizes(default_head_dim=128, default_key_value_heads=8),
        Rope(default_theta=500000.0),
        RopeLayers(),
        Temperature(),
        Flag("use_qk_norm", "qk_norm", {True: "l2_after_rope", False: "none"}, True),
        SharedBias("attention_bias", ("attention_bias", "attention_output_bias")),
        Key("intermediate_size_mlp", "intermediate_size", int, 16384),
        SparseLayers(),
        Key("num_local_experts", "moe.num_experts", int, 16),
        Key("num_experts_per_tok", "moe.num_experts_per_tok", int, 1),
        Key("intermediate_size", "moe.moe_intermediate_size", int, 8192),
        NoEffect(("cache_implementation", "for_llm_compressor"), "they say how others run it"),
        SpecialTokens(default_bos=1, default_eos=2),
        Always({"rope_interleaved": True, "moe.router": "topk_sigmoid_input", "moe.n_shared_experts": 1}),
    ),
    layout=partial(decoder_layout, names=NAMES, experts=experts),
)


def layout_beside_vision(config: ModelConfig) -> Layout:
    inner = {block: f"language_model.{getattr(NAMES, block)}" for block in ("embedding", "final_norm", "head", "layer")}
    layout = decoder_layout(config, replace(NAMES, **inner), experts=experts)
    vision = ("vision_model.", "multi_modal_projector.")
    return replace(layout, ignored=lambda name: name.startswith(vision) or layout.ignored(name))


BESIDE_VISION = replace(FAMILY, inside="text_config", layout=layout_beside_vision)
