"""ERNIE 4.5 (Baidu's technical report, 2025): softmax scores over all experts, chosen with a selection bias."""

from dataclasses import dataclass, replace
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
    dense_layer_fields,
    sizes,
)
from moesaic.checkpoint.families.layout import Layout, Names, Region, StoredTensor, decoder_layout
from moesaic.checkpoint.families.rope_keys import Rope
from moesaic.config import ModelConfig
from moesaic.errors import MoesaicError

BIASES = ("attention_bias", "attention_output_bias", "mlp_bias", "lm_head_bias")


@dataclass(frozen=True)
class SparseLayers:
    """Every `interval`-th layer from `start` to `end` is a mixture of experts; -1 is the last layer."""

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        layers = range(fields["num_hidden_layers"])
        start = hf.take("moe_layer_start_index", int, 1)
        end = hf.take("moe_layer_end_index", int, -1)
        interval = hf.take("moe_layer_interval", int, 1)
        if interval < 1:
            raise MoesaicError(f"config.json: moe_layer_interval is {interval}; it must be 1 or above")
        sparse = _every(interval, start, len(layers) - 1 if end == -1 else end)
        return dense_layer_fields([index for index in layers if index not in sparse])

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The interval that fits; where none does, the layers differ when they are read back."""
        layers = config.num_hidden_layers
        sparse = [index for index in range(layers) if config.is_moe_layer(index)] or [layers]
        start, end = sparse[0], sparse[-1]
        fitting = (interval for interval in range(1, layers + 1) if list(_every(interval, start, end)) == sparse)
        interval = next(fitting, 1)
        return {"moe_layer_start_index": start, "moe_layer_end_index": end, "moe_layer_interval": interval}


def _every(interval: int, start: int, end: int) -> range:
    """Indices i with start <= i <= end of which i + 1 is a multiple of `interval`."""
    first = -(-(start + 1) // interval) * interval - 1
    return range(first, end + 1, interval)


@dataclass(frozen=True)
class BiasEverywhere(SharedBias):
    """use_bias gives one to the head as well, which has no place for it when it is tied to the embedding."""

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        read = super().read(hf, fields)
        if read["lm_head_bias"] and fields["tie_word_embeddings"]:
            raise MoesaicError("config.json: use_bias = True is not supported with tie_word_embeddings = True")
        return read


def layout(config: ModelConfig) -> Layout:
    """The selection bias has a leading axis of size 1 on disk; blocks that predict further tokens are skipped."""
    usual = decoder_layout(config, Names(expert_bias="moe_statics.e_score_correction_bias"))
    tensors = tuple(
        tuple(tuple(_as_one_row(stored) for stored in one) for one in alternatives) for alternatives in usual.tensors
    )
    ignored = usual.ignored
    return replace(usual, tensors=tensors, ignored=lambda name: ignored(name) or name.startswith("model.mtp_"))


def _as_one_row(stored: StoredTensor) -> StoredTensor:
    if not stored.name.endswith("e_score_correction_bias"):
        return stored
    return StoredTensor(stored.name, (Region(stored.regions[0].ours, lambda bias: bias.unsqueeze(0)),))


FAMILY = Family(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    keys=(
        *sizes(max_position_embeddings=131072, rms_norm_eps=1e-5, tied=True),
        HeadSizes(default_key_value_heads=4),
        Key("intermediate_size", "intermediate_size", int, 12288),
        Rope(default_theta=500000.0),
        BiasEverywhere("use_bias", BIASES),
        Key("moe_num_experts", "moe.num_experts", int, 64, also_called=("num_experts",)),
        Key("moe_k", "moe.num_experts_per_tok", int, 6, also_called=("num_experts_per_tok",)),
        Key("moe_intermediate_size", "moe.moe_intermediate_size", int, 1536),
        Key("moe_num_shared_experts", "moe.n_shared_experts", int, 2),
        Key("moe_norm_min", "moe.norm_topk_min", float, 1e-12),
        SparseLayers(),
        Only("moe_gate", "topk", ("topk_fused",)),
        Only("moe_use_aux_free", True),
        Only("use_rmsnorm", True),
        NoEffect(("moe_capacity",), "no token is dropped"),
        NoEffect(("num_nextn_predict_layers",), "blocks that predict further tokens are not loaded"),
        SpecialTokens(default_bos=1, default_eos=2),
        Always(
            {
                "qk_norm": "none",
                "rope_interleaved": True,
                "moe.router": "softmax_topk",
                "moe.norm_topk_prob": True,
                "moe.expert_bias": True,
            }
        ),
    ),
    layout=layout,
)
