"""Tiny models of both sides: ours for each family, and transformers' own as the oracle."""

from pathlib import Path
from typing import Any

import torch
import transformers

from moesaic.config import ModelConfig, MoEConfig
from moesaic.model.transformer import Transformer

VOCAB_SIZE = 97

HF_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip
HF_QWEN3_MOE: dict[str, Any] = {**HF_BASE, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
HF_GLM4_MOE: dict[str, Any] = {
    **HF_BASE, "n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_shared_experts": 2,
    "routed_scaling_factor": 1.7,
}  # fmt: skip

HF_CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "qwen3": transformers.Qwen3Config(
        **HF_BASE, rope_parameters={"rope_theta": 5000.0}, eos_token_id=[3, 5], bos_token_id=1
    ),
    "qwen3 tied, biased": transformers.Qwen3Config(**HF_BASE, tie_word_embeddings=True, attention_bias=True),
    "qwen3_moe": transformers.Qwen3MoeConfig(**HF_QWEN3_MOE, norm_topk_prob=True),
    "qwen3_moe dense first, not normalised": transformers.Qwen3MoeConfig(
        **HF_QWEN3_MOE, norm_topk_prob=False, mlp_only_layers=[0, 1], tie_word_embeddings=True
    ),
    "glm4_moe": transformers.Glm4MoeConfig(**HF_GLM4_MOE, use_qk_norm=True, first_k_dense_replace=1),
    "glm4_moe without qk_norm": transformers.Glm4MoeConfig(
        **HF_GLM4_MOE,
        use_qk_norm=False,
        first_k_dense_replace=0,
        attention_bias=True,
        rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.25},
    ),
    "glm4_moe without shared experts": transformers.Glm4MoeConfig(
        **{**HF_GLM4_MOE, "n_shared_experts": 0}, norm_topk_prob=False, rms_norm_eps=1e-3
    ),
}


def save_hf_model(config: transformers.PreTrainedConfig, directory: Path) -> transformers.PreTrainedModel:
    """Writes a random model of `config` as transformers does, and returns it."""
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomize(model)
    model.save_pretrained(directory)
    return model


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Every weight and bias takes part: norms are not 1, biases are not 0, and matrices are large enough to matter."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name:
            tensor.normal_(1.0, 0.3)
        elif "bias" in name:
            tensor.normal_(0.0, 0.1)
        elif "inv_freq" not in name:
            tensor.normal_(0.0, 0.2)
    for name, tensor in model.named_parameters():
        if name.endswith("o_proj.bias"):  # Qwen3's output bias, which ours cannot say
            tensor.zero_()


def random_tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (2, 40))


@torch.no_grad()
def largest_difference(ours: Transformer, theirs: transformers.PreTrainedModel) -> float:
    tokens = random_tokens()
    expected = theirs(tokens).logits
    assert expected.std() > 0.5  # logits that a difference would show in
    return (ours(tokens) - expected).abs().max().item()


BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 40, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

CONFIGS = {
    "dense": ModelConfig(**BASE, rope_theta=777.0, eos_token_ids=(3,)),
    "dense tied, biased": ModelConfig(**BASE, tie_word_embeddings=True, attention_bias=True, initializer_range=0.0),
    "softmax": ModelConfig(**BASE, moe=MoEConfig(**EXPERTS), eos_token_ids=(3, 4), bos_token_id=2),
    "softmax, dense first": ModelConfig(
        **BASE, moe=MoEConfig(**EXPERTS, first_k_dense_replace=2, norm_topk_prob=False), rms_norm_eps=1e-3
    ),
    "softmax of width 0 outside experts": ModelConfig(**{**BASE, "intermediate_size": 0}, moe=MoEConfig(**EXPERTS)),
    "sigmoid": ModelConfig(**BASE, moe=MoEConfig(**EXPERTS, router="sigmoid_topk", routed_scaling_factor=2.5)),
    "sigmoid, shared, partial rope": ModelConfig(
        **BASE,
        moe=MoEConfig(**EXPERTS, router="sigmoid_topk", n_shared_experts=1, first_k_dense_replace=1),
        partial_rotary_factor=0.5, qk_norm=False, attention_bias=True, tie_word_embeddings=True,
    ),
}  # fmt: skip


def random_model(config: ModelConfig) -> Transformer:
    model = Transformer(config).eval()
    randomize(model)
    return model
