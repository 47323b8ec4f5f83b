"""DBRX: softmax top-k experts whose weights are divided by a norm of any order, LayerNorm, clamped queries and keys.

One tensor holds queries, keys and values; one tensor per projection holds all experts, one below the other.

E experts, D hidden size, F expert intermediate size.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from moesaic.checkpoint.families.family import Family
from moesaic.checkpoint.families.hf_config import HFConfig
from moesaic.checkpoint.families.keys import (
    MAX_LAYERS,
    Always,
    Fields,
    InitializerRange,
    Key,
    NoEffect,
    Only,
    SpecialTokens,
)
from moesaic.checkpoint.families.layout import (
    Alternatives,
    Names,
    Region,
    StoredTensor,
    decoder_layout,
    output_and_extras,
    routed_experts,
)
from moesaic.checkpoint.families.rope_keys import Rope
from moesaic.config import ModelConfig
from moesaic.errors import MoesaicError

BLOCKS = ("attn_config", "ffn_config")
# Defaults of generation that old versions of transformers wrote into every block of a config.
OF_GENERATION = (
    "diversity_penalty", "length_penalty", "max_length", "min_length", "num_beam_groups", "num_beams",
    "num_return_sequences", "repetition_penalty", "temperature", "tie_word_embeddings", "top_k", "top_p", "typical_p",
)  # fmt: skip


@dataclass(frozen=True)
class Heads:
    """d_model and n_heads, which give the width of a head, and attn_config.kv_n_heads."""

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        given = Key("d_model", "hidden_size", int, 2048, also_called=("hidden_size",)).read(hf, fields)
        given |= Key("n_heads", "num_attention_heads", int, 16, also_called=("num_attention_heads",)).read(hf, fields)
        heads = given["num_attention_heads"]
        if heads < 1:
            raise MoesaicError(f"config.json: n_heads is {heads}; it must be above 0")
        key_value_heads = hf.take("attn_config.kv_n_heads", int, 1)
        return {**given, "num_key_value_heads": key_value_heads, "head_dim": given["hidden_size"] // heads}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "d_model": config.hidden_size,
            "n_heads": config.num_attention_heads,
            "attn_config.kv_n_heads": config.num_key_value_heads,
        }


@dataclass(frozen=True)
class RopeOfAttention:
    """attn_config.rope_theta as the model was published, rope_parameters as transformers 5 reads it; or both."""

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        published = hf.take("attn_config.rope_theta", float, None)
        rope = Rope(default_theta=published or 10000.0).read(hf, fields)
        if published is not None and rope["rope_theta"] != published:
            raise MoesaicError(
                f"config.json: rope_theta is {rope['rope_theta']} in rope_parameters and {published} in attn_config; "
                "keep the one that the model was trained with"
            )
        return rope

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {**Rope().write(config), "attn_config.rope_theta": config.rope_theta}


@dataclass(frozen=True)
class NormOfWeights:
    """ffn_config.moe_normalize_expert_weights: the order of the norm; null leaves the weights as they are."""

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        order = hf.take("ffn_config.moe_normalize_expert_weights", float, 1.0, None)
        return {"moe.norm_topk_prob": False} if order is None else {"moe.norm_topk_order": order}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        assert config.moe is not None
        order = config.moe.norm_topk_order if config.moe.norm_topk_prob else None
        return {"ffn_config.moe_normalize_expert_weights": order}


def attention(config: ModelConfig, names: Names, ours: str, theirs: str) -> list[Alternatives]:
    regions = tuple(Region(f"{ours}.{leaf}.weight") for leaf in ("q_proj", "k_proj", "v_proj"))
    return [((StoredTensor(f"{theirs}.Wqkv.weight", regions),),), *output_and_extras(config, names, ours, theirs)]


def experts(config: ModelConfig, names: Names, ours: str, theirs: str) -> list[Alternatives]:
    assert config.moe is not None
    width = config.moe.moe_intermediate_size

    def stacked(leaf: str, region: Region) -> StoredTensor:
        return StoredTensor(f"{theirs}.mlp.{leaf}", (region,), joined_axes=(0, 1))

    def gate(gate_up: Tensor) -> Tensor:
        return gate_up[:, :width]

    def up(gate_up: Tensor) -> Tensor:
        return gate_up[:, width:]

    def transposed(down: Tensor) -> Tensor:
        return down.transpose(1, 2)

    gate_up, down = routed_experts(config, names, ours, theirs)
    first = stacked("w1", Region(f"{ours}.gate_up", gate)), stacked("v1", Region(f"{ours}.gate_up", up))
    return [(first, *gate_up), ((stacked("w2", Region(f"{ours}.down", transposed)),), *down)]


FAMILY = Family(
    model_type="dbrx",
    architecture="DbrxForCausalLM",
    nested=BLOCKS,
    keys=(
        Key("n_layers", "num_hidden_layers", int, 24, also_called=("num_hidden_layers",), most=MAX_LAYERS),
        Key("vocab_size", "vocab_size", int),
        Key("max_seq_len", "max_position_embeddings", int, 2048, also_called=("max_position_embeddings",)),
        Heads(),
        RopeOfAttention(),
        Key("attn_config.clip_qkv", "clip_qkv", float, None),
        Key("ffn_config.moe_num_experts", "moe.num_experts", int, 4),
        Key("ffn_config.moe_top_k", "moe.num_experts_per_tok", int, 1),
        Key("ffn_config.ffn_hidden_size", "moe.moe_intermediate_size", int, 3584),
        NormOfWeights(),
        Only("ffn_config.ffn_act_fn", {"name": "silu"}),
        Only("tie_word_embeddings", False),
        InitializerRange(),
        SpecialTokens(),
        NoEffect(
            ("resid_pdrop", "emb_pdrop", "attn_config.attn_pdrop", "ffn_config.moe_jitter_eps"),
            "only training by others drops or shakes values",
        ),
        NoEffect(("ffn_config.moe_loss_weight",), "training has a setting of its own"),
        NoEffect(("ffn_config.hidden_size", "num_key_value_heads"), "d_model and kv_n_heads say it, whatever these do"),
        NoEffect(tuple(f"{block}.{key}" for block in BLOCKS for key in OF_GENERATION), "the model does not read them"),
        Always(
            {
                "qk_norm": "none",
                "norm": "layer",
                "rms_norm_eps": 1e-5,
                "moe.router": "softmax_topk",
            }
        ),
    ),
    layout=partial(
        decoder_layout,
        names=Names(
            embedding="transformer.wte",
            final_norm="transformer.norm_f",
            layer="transformer.blocks.{}",
            attention_norm="norm_attn_norm.norm_1",
            feed_forward_norm="norm_attn_norm.norm_2",
            attention="norm_attn_norm.attn",
            output="out_proj",
            moe="ffn",
            router="router.layer",
            expert_projections=("w1", "v1", "w2"),
        ),
        attention=attention,
        experts=experts,
    ),
)
