"""Qwen3-MoE: Qwen3 with softmax top-k experts, no shared experts, and no scaling of the routed output."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moesaic.checkpoint.families.hf_config import HFConfig, read_decoder, unsupported, write_decoder
from moesaic.checkpoint.families.qwen3 import refuse_unlike_qwen3, require_like_qwen3
from moesaic.checkpoint.families.rules import Layout, decoder_rules, ignored_in_every_family, zero_output_bias
from moesaic.config import ModelConfig, MoEConfig
from moesaic.errors import MoesaicError


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    hf = HFConfig(values)
    fields = read_decoder(hf)
    refuse_unlike_qwen3(hf, fields)
    hf.ignore("max_window_layers")
    hf.only("decoder_sparse_step", 1)
    mlp_only_layers = hf.take("mlp_only_layers", list, [])
    if mlp_only_layers != list(range(len(mlp_only_layers))):
        raise unsupported(hf.model_type, "mlp_only_layers", mlp_only_layers, "leading layers [0, 1, ...]")
    published_name = "num_experts" if "num_experts" in values else "num_local_experts"
    hf.ignore("num_experts", "num_local_experts")
    moe = MoEConfig(
        num_experts=hf.take(published_name, int),
        num_experts_per_tok=hf.take("num_experts_per_tok", int),
        moe_intermediate_size=hf.take("moe_intermediate_size", int),
        router="softmax_topk",
        norm_topk_prob=hf.take("norm_topk_prob", bool, False),
        first_k_dense_replace=len(mlp_only_layers),
    )
    hf.finish()
    return ModelConfig(**fields, qk_norm=True, moe=moe)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    assert config.moe is not None
    require_like_qwen3(config, "qwen3_moe")
    if config.moe.n_shared_experts:
        raise MoesaicError(
            f"qwen3_moe has no shared experts, and this model has n_shared_experts = {config.moe.n_shared_experts}; "
            "among the families only glm4_moe has them: train with moe.router = 'sigmoid_topk' to export it"
        )
    return write_decoder(config, model_type="qwen3_moe", architecture="Qwen3MoeForCausalLM") | {
        "use_sliding_window": False,
        "num_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.num_experts_per_tok,
        "moe_intermediate_size": config.moe.moe_intermediate_size,
        "norm_topk_prob": config.moe.norm_topk_prob,
        "mlp_only_layers": list(range(config.num_dense_layers)),
        "decoder_sparse_step": 1,
        "output_router_logits": False,
    }


def layout(config: ModelConfig) -> Layout:
    """The routed output is scaled by scaling the last projection of every expert: exact for powers of two, otherwise
    rounded once."""
    assert config.moe is not None
    rules = tuple(
        replace(rule, scale_on_write=config.moe.routed_scaling_factor) if rule.ours.endswith("experts.down") else rule
        for rule in decoder_rules(config)
    )
    return Layout(rules, zero_output_bias(config), ignored_in_every_family(config))
