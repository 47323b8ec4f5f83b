"""GLM-4-MoE: DeepSeek-V3's sigmoid router with a selection bias, shared experts, and grouped-query attention."""

from collections.abc import Mapping
from typing import Any

from moesaic.checkpoint.families.hf_config import HFConfig, read_decoder, write_decoder
from moesaic.checkpoint.families.rules import (
    Layout,
    TensorRule,
    decoder_rules,
    ignored_in_every_family,
    layer_of,
    mlp_rules,
)
from moesaic.config import ModelConfig, MoEConfig
from moesaic.errors import MoesaicError


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    hf = HFConfig(values)
    fields = read_decoder(hf, default_partial_rotary_factor=0.5)
    hf.only("n_group", 1)
    hf.only("topk_group", 1)
    hf.ignore("num_nextn_predict_layers", "num_mtp_layers")
    moe = MoEConfig(
        num_experts=hf.take("n_routed_experts", int),
        num_experts_per_tok=hf.take("num_experts_per_tok", int),
        moe_intermediate_size=hf.take("moe_intermediate_size", int),
        router="sigmoid_topk",
        norm_topk_prob=hf.take("norm_topk_prob", bool, True),
        routed_scaling_factor=hf.take("routed_scaling_factor", float, 1.0),
        n_shared_experts=hf.take("n_shared_experts", int, 1),
        first_k_dense_replace=hf.take("first_k_dense_replace", int, 1),
    )
    qk_norm = hf.take("use_qk_norm", bool, False)
    hf.finish()
    return ModelConfig(**fields, qk_norm=qk_norm, moe=moe)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    assert moe is not None
    if moe.num_experts < 2:
        raise MoesaicError("glm4_moe needs at least 2 experts, and this model has num_experts = 1; train it with more")
    return write_decoder(config, model_type="glm4_moe", architecture="Glm4MoeForCausalLM") | {
        "use_qk_norm": config.qk_norm,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "n_shared_experts": moe.n_shared_experts,
        "first_k_dense_replace": moe.first_k_dense_replace,
        "norm_topk_prob": moe.norm_topk_prob,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
    }


def layout(config: ModelConfig) -> Layout:
    """Layers after the last one predict further tokens (MTP): they are skipped."""
    assert config.moe is not None
    rules = decoder_rules(config)
    zeros: dict[str, tuple[int, ...]] = {}
    for index in range(config.num_dense_layers, config.num_hidden_layers):
        ours, theirs = f"layers.{index}.feed_forward", f"model.layers.{index}.mlp"
        rules.append(TensorRule(f"{ours}.router.expert_bias", f"{theirs}.gate.e_score_correction_bias"))
        if config.moe.n_shared_experts:
            rules += mlp_rules(f"{ours}.shared_experts", f"{theirs}.shared_experts")
        else:
            zeros |= _empty_shared_experts(theirs, config.hidden_size)
    ignored_elsewhere = ignored_in_every_family(config)
    return Layout(
        tuple(rules),
        zeros,
        lambda name: ignored_elsewhere(name) or (layer_of(name) or 0) >= config.num_hidden_layers,
    )


def _empty_shared_experts(theirs: str, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """transformers builds shared experts of width 0 when there are none."""
    return {
        f"{theirs}.shared_experts.gate_proj.weight": (0, hidden_size),
        f"{theirs}.shared_experts.up_proj.weight": (0, hidden_size),
        f"{theirs}.shared_experts.down_proj.weight": (hidden_size, 0),
    }
