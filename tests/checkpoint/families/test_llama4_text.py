"""Llama 4 as it is published: a language model beside one that sees, and configs with what their authors wrote."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moesaic.checkpoint.families import FAMILIES, family_of
from moesaic.checkpoint.load import load
from moesaic.checkpoint.save import export_model
from moesaic.errors import MoesaicError

from ..family_cases import FAMILY_CASES
from ..helpers import load_theirs, random_tokens, randomize

VISION = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 8,
    "patch_size": 4, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
}  # fmt: skip
SCOUT: dict[str, Any] = {
    "architectures": ["Llama4ForConditionalGeneration"], "boi_token_index": 200080, "eoi_token_index": 200081,
    "image_token_index": 200092, "model_type": "llama4", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0.dev0", "vision_config": {"model_type": "llama4_vision_model", "rope_theta": 1e4},
    "text_config": {
        "_attn_implementation_autoset": True, "attention_bias": False, "attention_chunk_size": 8192,
        "attention_dropout": 0.0, "bos_token_id": 200000, "eos_token_id": [200001, 200007, 200008],
        "for_llm_compressor": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
        "initializer_range": 0.02, "interleave_moe_layer_step": 1, "intermediate_size": 8192,
        "intermediate_size_mlp": 16384, "max_position_embeddings": 10485760, "model_type": "llama4_text",
        "no_rope_layers": [], "num_attention_heads": 40, "num_experts_per_tok": 1, "num_hidden_layers": 48,
        "num_key_value_heads": 8, "num_local_experts": 16, "output_router_logits": False, "pad_token_id": 200018,
        "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
        "rope_scaling": {
            "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "torch_dtype": "bfloat16", "use_cache": True, "use_qk_norm": True, "vocab_size": 202048,
    },
}  # fmt: skip


@torch.no_grad()
def test_the_language_model_beside_vision_is_read_and_written_alone(tmp_path: Path) -> None:
    config = transformers.Llama4Config(
        text_config=FAMILY_CASES["llama4_text"].to_dict(), vision_config=VISION, image_token_index=96
    )
    theirs = transformers.Llama4ForConditionalGeneration(config).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "both")
    tokens = random_tokens().clamp(max=95)  # the last one stands for an image
    expected = theirs(tokens).logits
    ours = load(tmp_path / "both")
    assert (ours(tokens) - expected).abs().max() < 2e-4
    assert export_model(ours, None, tmp_path / "text") == "llama4_text"
    assert (load_theirs(tmp_path / "text")(tokens).logits - expected).abs().max() < 2e-4


def test_published_config() -> None:
    config = family_of("llama4").config_from_hf(SCOUT)
    assert config.model_type == "llama4_text"
    assert config.nope_layers == tuple(range(3, 48, 4))
    assert all((config.layer_type(index) == "full_attention") == (index in config.nope_layers) for index in range(48))
    assert (config.attn_scale, config.floor_scale, config.attention_chunk_size) == (0.1, 8192, 8192)
    assert config.moe is not None
    assert (config.num_dense_layers, config.moe.shared_intermediate_size) == (0, 8192)


def test_maverick_has_dense_layers_and_files_that_say_4_for_true() -> None:
    maverick = SCOUT["text_config"] | {
        "interleave_moe_layer_step": 2, "num_local_experts": 128, "use_qk_norm": False, "attn_temperature_tuning": 4,
    }  # fmt: skip
    config = FAMILIES["llama4_text"].config_from_hf(maverick)
    assert [config.is_moe_layer(index) for index in range(4)] == [False, True, False, True]
    assert (config.qk_norm, config.attn_scale, config.intermediate_size) == ("none", 0.1, 16384)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("no_rope_layer_interval", 0, "no_rope_layer_interval is 0"),
        ("interleave_moe_layer_step", 0, "interleave_moe_layer_step is 0"),
        ("no_rope_layers", [1, 0], "a 0 or 1 for each of 48 layers"),
        ("no_rope_layers", [2] * 48, "a 0 or 1 for each of 48 layers"),
        ("layer_types", ["sliding_attention"] * 48, "layer_types"),
        ("attention_chunk_size", None, "attention_chunk_size is not set"),
        ("attn_temperature_tuning", "yes", "attn_temperature_tuning"),
        ("moe_layers", [], "make all 48 layers dense"),
    ],
)
def test_wrong_values_are_refused_by_name(key: str, value: object, message: str) -> None:
    with pytest.raises(MoesaicError, match=message):
        family_of("llama4").config_from_hf(SCOUT | {"text_config": SCOUT["text_config"] | {key: value}})


@pytest.mark.parametrize("block", [None, [], "text"])
def test_a_config_without_a_language_model_is_refused(block: object) -> None:
    with pytest.raises(MoesaicError, match=r"text_config is .*; it must describe a language model"):
        family_of("llama4").config_from_hf(SCOUT | {"text_config": block})
