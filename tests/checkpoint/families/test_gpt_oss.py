"""gpt-oss as it is published: MXFP4 blocks, and a config with its authors' keys."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moesaic.checkpoint.families import FAMILIES
from moesaic.checkpoint.load import load
from moesaic.checkpoint.packed import pack_mxfp4
from moesaic.config import RopeScaling
from moesaic.errors import MoesaicError

from ..family_cases import GPT_OSS
from ..helpers import random_tokens, save_hf_model

MXFP4 = {
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    "quant_method": "mxfp4",
}
PUBLISHED: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002,
    "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "initializer_range": 0.02, "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False,
    "pad_token_id": 199999, "quantization_config": MXFP4, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0", "use_cache": True, "vocab_size": 201088,
}  # fmt: skip


@torch.no_grad()
def test_a_packed_checkpoint_computes_what_its_numbers_say(tmp_path: Path) -> None:
    config = transformers.GptOssConfig(**{**GPT_OSS, "hidden_size": 64, "intermediate_size": 32}, sliding_window=7)
    theirs = save_hf_model(config, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        blocks, scales = pack_mxfp4(tensors.pop(name))
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        theirs.get_parameter(name).copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"quantization_config": MXFP4}))
    tokens = random_tokens()
    assert (load(tmp_path)(tokens) - theirs(tokens).logits).abs().max() < 2e-4


def test_published_config() -> None:
    config = FAMILIES["gpt_oss"].config_from_hf(PUBLISHED)
    assert config.layer_types == ("sliding_attention", "full_attention") * 12
    assert config.rope_theta == 150000.0
    assert config.rope_scaling == RopeScaling(
        rope_type="yarn", factor=32.0, original_max_position_embeddings=4096, truncate=False
    )


def test_what_is_left_out_is_as_published() -> None:
    named = ("experts_per_token", "initial_context_length", "layer_types", "rope_scaling", "rope_theta", "swiglu_limit")
    shorter = {key: value for key, value in PUBLISHED.items() if key not in named}
    assert FAMILIES["gpt_oss"].config_from_hf(shorter) == FAMILIES["gpt_oss"].config_from_hf(PUBLISHED)


def test_a_window_is_needed_where_a_layer_slides() -> None:
    with pytest.raises(MoesaicError, match="sliding_window is not set"):
        FAMILIES["gpt_oss"].config_from_hf(PUBLISHED | {"sliding_window": None})
