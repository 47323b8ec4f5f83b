"""Qwen3: the dense decoder with normalised queries and keys."""

from collections.abc import Mapping
from typing import Any

from moesaic.checkpoint.families.hf_config import HFConfig, read_decoder, unsupported, write_decoder
from moesaic.checkpoint.families.rules import Layout, decoder_rules, ignored_in_every_family, zero_output_bias
from moesaic.config import ModelConfig
from moesaic.errors import MoesaicError


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    hf = HFConfig(values)
    fields = read_decoder(hf, default_head_dim=128)
    refuse_unlike_qwen3(hf, fields)
    hf.ignore("max_window_layers")
    layer_types = hf.take("layer_types", list, [])
    if any(layer_type != "full_attention" for layer_type in layer_types):
        raise unsupported(hf.model_type, "layer_types", layer_types, "'full_attention'")
    hf.finish()
    return ModelConfig(**fields, qk_norm=True)


def refuse_unlike_qwen3(hf: HFConfig, fields: Mapping[str, Any]) -> None:
    """What qwen3 and qwen3_moe configs may say and this model does not do. `sliding_window` only counts when used."""
    hf.only("use_sliding_window", False)
    hf.ignore("sliding_window")
    if fields["partial_rotary_factor"] != 1.0:
        raise unsupported(hf.model_type, "partial_rotary_factor", fields["partial_rotary_factor"], "1.0")


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    require_like_qwen3(config, "qwen3")
    return write_decoder(config, model_type="qwen3", architecture="Qwen3ForCausalLM") | {"use_sliding_window": False}


def require_like_qwen3(config: ModelConfig, model_type: str) -> None:
    """Raises MoesaicError for what qwen3 and qwen3_moe cannot express."""
    if not config.qk_norm:
        raise MoesaicError(
            f"{model_type} always normalises queries and keys, and this model has qk_norm = false; {OTHER}"
        )
    if config.partial_rotary_factor != 1.0:
        raise MoesaicError(
            f"{model_type} turns whole heads, and this model has "
            f"partial_rotary_factor = {config.partial_rotary_factor}; {OTHER}"
        )


OTHER = "among the families only glm4_moe can say that: train with moe.router = 'sigmoid_topk' to export it"


def layout(config: ModelConfig) -> Layout:
    return Layout(tuple(decoder_rules(config)), zero_output_bias(config), ignored_in_every_family(config))
