"""Qwen2 (arXiv 2407.10671): dense, biases on query, key and value; the upper layers may slide."""

from dataclasses import dataclass
from typing import Any

from moesaic.checkpoint.families.family import Family
from moesaic.checkpoint.families.hf_config import HFConfig
from moesaic.checkpoint.families.keys import Always, Fields, HeadSizes, Key, SpecialTokens, sizes, window_fields
from moesaic.checkpoint.families.rope_keys import Rope
from moesaic.config import ModelConfig

LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class UpperLayersSlide:
    """layer_types, or use_sliding_window with the window of the layers from max_window_layers on (Qwen2, Qwen3)."""

    default_window: int | None = 4096
    default_first: int | None = 28
    alternating: bool = False
    """Qwen2-MoE: every second layer below max_window_layers slides instead."""
    default_switch: bool = False
    """What use_sliding_window is when the config does not say."""

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        used = hf.take("use_sliding_window", bool, self.default_switch)
        window = hf.take("sliding_window", int, self.default_window, None) if used else None
        hf.ignore("sliding_window")
        bound = hf.take("max_window_layers", int, self.default_first)
        layer_types = hf.take_list("layer_types", str, None)
        if layer_types is None:
            layers = range(fields["num_hidden_layers"])
            layer_types = [LAYER_TYPES[window is not None and self._slides(index, bound)] for index in layers]
        if not set(layer_types) <= set(LAYER_TYPES):
            raise hf.unsupported("layer_types", " and ".join(LAYER_TYPES))
        return window_fields(layer_types, window)

    def _slides(self, index: int, bound: int) -> bool:
        return index % 2 == 0 and index < bound if self.alternating else index >= bound

    def write(self, config: ModelConfig) -> dict[str, Any]:
        layer_types = [config.layer_type(index) for index in range(config.num_hidden_layers)]
        return {
            "use_sliding_window": "sliding_attention" in layer_types,
            "sliding_window": config.sliding_window,
            "max_window_layers": config.num_hidden_layers,
            "layer_types": layer_types,
        }


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    sparse=False,
    keys=(
        *sizes(max_position_embeddings=32768),
        HeadSizes(default_key_value_heads=32),
        Key("intermediate_size", "intermediate_size", int),
        Rope(),
        UpperLayersSlide(),
        SpecialTokens(),
        Always({"qk_norm": "none", "attention_bias": True}),
    ),
)
