"""Phi-3.5-MoE as it is published, with the keys of its authors."""

from typing import Any

import pytest

from moesaic.checkpoint.families import FAMILIES
from moesaic.errors import MoesaicError

PUBLISHED: dict[str, Any] = {
    "architectures": ["PhiMoEForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "bos_token_id": 1,
    "auto_map": {"AutoConfig": "configuration_phimoe.PhiMoEConfig"}, "eos_token_id": 32000, "hidden_act": "silu",
    "hidden_dropout": 0.0, "hidden_size": 4096, "initializer_range": 0.02, "input_jitter_noise": 0.01,
    "intermediate_size": 6400, "lm_head_bias": True, "max_position_embeddings": 131072, "model_type": "phimoe",
    "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "num_local_experts": 16, "original_max_position_embeddings": 4096, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "router_aux_loss_coef": 0.0, "router_jitter_noise": 0.01,
    "rope_scaling": {
        "long_factor": [2] * 64, "long_mscale": 1.243163121016122, "original_max_position_embeddings": 4096,
        "short_factor": [1.0] * 64, "short_mscale": 1.243163121016122, "type": "longrope",
    },
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "transformers_version": "4.43.3", "vocab_size": 32064,
}  # fmt: skip


def test_published_config() -> None:
    config = FAMILIES["phimoe"].config_from_hf(PUBLISHED)
    scaling = config.rope_scaling
    assert scaling is not None
    assert (scaling.rope_type, scaling.original_max_position_embeddings) == ("longrope", 4096)
    assert (scaling.long_factor, scaling.long_mscale) == ((2.0,) * 64, 1.243163121016122)
    assert (config.norm, config.norm_bias, config.lm_head_bias) == ("layer", True, True)
    assert (config.attention_bias, config.attention_output_bias) == (True, True)
    assert config.moe is not None
    assert (config.moe.router, config.moe.router_jitter_noise) == ("sparsemixer", 0.01)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_experts_per_tok", 3, "num_experts_per_tok is 3, but sparsemixer always takes 2"),
        ("router_jitter_noise", -0.1, "router_jitter_noise"),
        ("rope_scaling", PUBLISHED["rope_scaling"] | {"long_factor": [2.0] * 63}, "63, 64"),
    ],
)
def test_wrong_values_are_refused_by_name(key: str, value: object, message: str) -> None:
    with pytest.raises(MoesaicError, match=message):
        FAMILIES["phimoe"].config_from_hf(PUBLISHED | {key: value})
