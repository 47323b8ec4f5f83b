"""gpt-oss (arXiv 2508.10925): attention sinks, a window in every other layer, biases everywhere, a clamped SwiGLU.

The experts' matrices lie transposed, with the rows of gate and up interleaved. MXFP4 blocks, as the model was
published, are turned into such matrices before they get here.

E experts, D hidden size, F expert intermediate size.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from moesaic.checkpoint.families.family import Family
from moesaic.checkpoint.families.hf_config import HFConfig
from moesaic.checkpoint.families.keys import (
    Always,
    Fields,
    HeadSizes,
    Key,
    NoEffect,
    SharedBias,
    SpecialTokens,
    sizes,
    window_fields,
)
from moesaic.checkpoint.families.layout import (
    Alternatives,
    Names,
    Region,
    StoredTensor,
    decoder_layout,
    split_down,
    split_gate_up,
)
from moesaic.checkpoint.families.rope_keys import Rope
from moesaic.config import ModelConfig

DEFAULT_WINDOW = 128
DEFAULT_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


@dataclass(frozen=True)
class EveryOtherLayerSlides:
    """sliding_window and layer_types; without the latter every other layer slides, from the first on."""

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        kinds = ("sliding_attention", "full_attention")
        layer_types = hf.take_list("layer_types", str, None)
        if layer_types is None:
            layer_types = [kinds[index % 2] for index in range(fields["num_hidden_layers"])]
        if not set(layer_types) <= set(kinds):
            raise hf.unsupported("layer_types", " and ".join(kinds))
        return window_fields(layer_types, hf.take("sliding_window", int, DEFAULT_WINDOW, None))

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """With a window even where no layer slides, because transformers makes the mask all the same."""
        return {
            "layer_types": [config.layer_type(index) for index in range(config.num_hidden_layers)],
            "sliding_window": config.sliding_window or DEFAULT_WINDOW,
        }


def experts(config: ModelConfig, names: Names, ours: str, theirs: str) -> list[Alternatives]:
    def fused(leaf: str, region: Region, joined_axes: tuple[int, int] | None = None) -> tuple[StoredTensor, ...]:
        return (StoredTensor(f"{theirs}.{leaf}", (region,), joined_axes),)

    where = config, names, ours, theirs
    return [
        (fused("gate_up_proj", Region(f"{ours}.gate_up", _interleaved_columns), (2, 3)), split_gate_up(*where)),
        (fused("down_proj", Region(f"{ours}.down", _transposed)), split_down(*where)),
        (
            fused("gate_up_proj_bias", Region(f"{ours}.gate_up_bias", _interleaved), (1, 2)),
            split_gate_up(*where, bias=True),
        ),
        (fused("down_proj_bias", Region(f"{ours}.down_bias")), split_down(*where, bias=True)),
    ]


def _interleaved_columns(gate_up: Tensor) -> Tensor:
    """(E, 2F, D) -> (E, D, F, 2)."""
    return gate_up.unflatten(1, (2, -1)).permute(0, 3, 2, 1)


def _interleaved(gate_up_bias: Tensor) -> Tensor:
    """(E, 2F) -> (E, F, 2)."""
    return gate_up_bias.unflatten(1, (2, -1)).transpose(1, 2)


def _transposed(down: Tensor) -> Tensor:
    return down.transpose(1, 2)


FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    keys=(
        *sizes(max_position_embeddings=131072, rms_norm_eps=1e-5),
        HeadSizes(default_head_dim=64, default_key_value_heads=8),
        Rope(default_theta=150000.0, default_block=DEFAULT_ROPE),
        EveryOtherLayerSlides(),
        SharedBias("attention_bias", ("attention_bias", "attention_output_bias"), default=True),
        Key("num_local_experts", "moe.num_experts", int, 128, also_called=("num_experts",)),
        Key("num_experts_per_tok", "moe.num_experts_per_tok", int, 4, also_called=("experts_per_token",)),
        Key("intermediate_size", "moe.moe_intermediate_size", int, 2880),
        Key("swiglu_limit", "moe.swiglu_limit", float, 7.0),
        Key("swiglu_alpha", "moe.swiglu_alpha", float, 1.702),
        NoEffect(("initial_context_length",), "the block of rotary positions says the same"),
        SpecialTokens(),
        Always(
            {
                "qk_norm": "none",
                "attention_sinks": True,
                "moe.router": "topk_softmax",
                "moe.router_bias": True,
                "moe.activation": "clamped_swiglu",
                "moe.projection_bias": True,
            }
        ),
    ),
    layout=partial(decoder_layout, names=Names(router="router"), experts=experts),
)
