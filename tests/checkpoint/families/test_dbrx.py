"""DBRX as it is published: blocks full of keys that the model does not read."""

from typing import Any

import pytest

from moesaic.checkpoint.families import FAMILIES
from moesaic.errors import MoesaicError

CLUTTER = {
    "return_dict": True, "output_hidden_states": False, "torch_dtype": None, "tie_word_embeddings": True,
    "max_length": 20, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "id2label": {"0": "LABEL_0"}, "model_type": "",
}  # fmt: skip
PUBLISHED: dict[str, Any] = {
    "architectures": ["DbrxForCausalLM"],
    "attn_config": {**CLUTTER, "attn_pdrop": 0, "clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
    "ffn_config": {
        **CLUTTER, "ffn_act_fn": {"name": "silu"}, "ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4,
        "moe_jitter_eps": 0, "moe_loss_weight": 0.05, "moe_normalize_expert_weights": 1,
        "uniform_expert_assignment": False,
    },
    "d_model": 6144, "emb_pdrop": 0.0, "initializer_range": 0.02, "max_seq_len": 32768, "model_type": "dbrx",
    "n_heads": 48, "n_layers": 40, "output_router_logits": False, "resid_pdrop": 0.0, "router_aux_loss_coef": 0.05,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.39.2", "use_cache": True,
    "vocab_size": 100352,
}  # fmt: skip


def with_block(name: str, **changes: object) -> dict[str, Any]:
    return PUBLISHED | {name: PUBLISHED[name] | changes}


def test_published_config() -> None:
    config = FAMILIES["dbrx"].config_from_hf(PUBLISHED)
    assert (config.num_key_value_heads, config.head_dim, config.clip_qkv) == (8, 128, 8.0)
    assert (config.norm, config.norm_bias, config.rms_norm_eps) == ("layer", False, 1e-5)
    assert config.moe is not None
    assert (config.moe.norm_topk_prob, config.moe.norm_topk_order) == (True, 1.0)


def test_the_base_of_rotary_positions_is_that_of_the_block() -> None:
    """Where the model was published; transformers 5 looks elsewhere, so both places are written."""
    read = FAMILIES["dbrx"].config_from_hf
    assert read(PUBLISHED).rope_theta == 500000.0
    written = FAMILIES["dbrx"].config_to_hf(read(PUBLISHED))
    assert written["attn_config"]["rope_theta"] == written["rope_parameters"]["rope_theta"] == 500000.0
    with pytest.raises(MoesaicError, match=r"rope_theta is 10000.0 in rope_parameters and 500000.0 in attn_config"):
        read(PUBLISHED | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}})


def test_null_means_neither_clamped_nor_normalised() -> None:
    assert FAMILIES["dbrx"].config_from_hf(with_block("attn_config", clip_qkv=None)).clip_qkv is None
    values = with_block("ffn_config", moe_normalize_expert_weights=None)
    config = FAMILIES["dbrx"].config_from_hf(values)
    assert config.moe is not None
    assert not config.moe.norm_topk_prob
    assert FAMILIES["dbrx"].config_from_hf(FAMILIES["dbrx"].config_to_hf(config)) == config


@pytest.mark.parametrize(
    ("block", "changes", "message"),
    [
        ("ffn_config", {"ffn_act_fn": {"name": "gelu"}}, "ffn_config.ffn_act_fn"),
        ("ffn_config", {"moe_normalize_expert_weights": 0}, "norm_topk_order is 0"),
        ("attn_config", {"clip_qkv": -1}, "clip_qkv is -1"),
        ("attn_config", {"kv_n_heads": 5}, "num_key_value_heads is 5"),
        ("attn_config", {"window": 5}, "attn_config.window = 5 is not known"),
    ],
)
def test_wrong_values_of_a_block_are_refused_by_name(block: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MoesaicError, match=message):
        FAMILIES["dbrx"].config_from_hf(with_block(block, **changes))
