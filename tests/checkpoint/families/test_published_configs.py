"""config.json as the authors published it: with keys of their own code, and in the spelling of older transformers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moesaic.checkpoint.families import FAMILIES, deepseek_v2, ernie4_5_moe, family_of
from moesaic.checkpoint.families.keys import field_of
from moesaic.checkpoint.families.layout import Layout
from moesaic.checkpoint.load import load
from moesaic.checkpoint.save import export_model
from moesaic.config import ModelConfig
from moesaic.errors import MoesaicError

from ..family_cases import FAMILY_CASES
from ..helpers import random_tokens, save_hf_model

YARN: dict[str, Any] = {
    "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096,
}  # fmt: skip
COMMON: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
    "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.39.3",
    "use_cache": True, "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    **COMMON, "aux_loss_alpha": 0.001, "ep_size": 1, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_layer_freq": 1, "pretraining_tp": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rope_theta": 10000,
    "seq_aux": True, "v_head_dim": 128,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "DeepSeek-V2": {
        **DEEPSEEK, "model_type": "deepseek_v2", "bos_token_id": 100000, "eos_token_id": 100001, "hidden_size": 5120,
        "first_k_dense_replace": 1, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_group": 8,
        "n_routed_experts": 160, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 128,
        "num_experts_per_tok": 6, "num_hidden_layers": 60, "num_key_value_heads": 128, "q_lora_rank": 1536,
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "routed_scaling_factor": 16.0,
        "scoring_func": "softmax", "topk_group": 3, "topk_method": "group_limited_greedy", "vocab_size": 102400,
    },
    "DeepSeek-V2-Lite": {
        **DEEPSEEK, "model_type": "deepseek_v2", "bos_token_id": 100000, "eos_token_id": 100001, "hidden_size": 2048,
        "first_k_dense_replace": 1, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1,
        "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
        "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None,
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, "routed_scaling_factor": 1.0,
        "scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy", "vocab_size": 102400,
    },
    "DeepSeek-V3": {
        **DEEPSEEK, "model_type": "deepseek_v3", "bos_token_id": 0, "eos_token_id": 1, "first_k_dense_replace": 3,
        "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_group": 8,
        "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc",
        "vocab_size": 129280,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    },
    "Kimi-K2": {
        **DEEPSEEK, "model_type": "kimi_k2", "bos_token_id": 163584, "eos_token_id": 163586,
        "first_k_dense_replace": 1, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "max_position_embeddings": 131072, "n_group": 1, "n_routed_experts": 384, "n_shared_experts": 1,
        "norm_topk_prob": True, "num_attention_heads": 64, "num_experts_per_tok": 8, "num_hidden_layers": 61,
        "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "q_lora_rank": 1536, "rope_theta": 50000.0,
        "rope_scaling": {**YARN, "factor": 32.0, "beta_fast": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        "routed_scaling_factor": 2.827, "scoring_func": "sigmoid", "topk_group": 1, "topk_method": "noaux_tc",
        "vocab_size": 163840,
    },
    "GLM-4.5": {
        **COMMON, "model_type": "glm4_moe", "attention_bias": True, "pad_token_id": 151329, "head_dim": 128,
        "eos_token_id": [151329, 151336, 151338], "hidden_size": 5120, "partial_rotary_factor": 0.5,
        "intermediate_size": 12288, "max_position_embeddings": 131072, "moe_intermediate_size": 1536,
        "norm_topk_prob": True, "num_attention_heads": 96, "n_group": 1, "topk_group": 1, "n_routed_experts": 160,
        "n_shared_experts": 1, "routed_scaling_factor": 2.5, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
        "num_hidden_layers": 92, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 1000000, "num_nextn_predict_layers": 1, "use_qk_norm": True, "vocab_size": 151552,
    },
    "dots.llm1": {
        **COMMON, "model_type": "dots1", "bos_token_id": None, "eos_token_id": 151645, "first_k_dense_replace": 1,
        "hidden_size": 4096, "intermediate_size": 10944, "max_position_embeddings": 32768, "max_window_layers": 62,
        "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 128,
        "n_shared_experts": 2, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts_per_tok": 6,
        "num_hidden_layers": 62, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 10000000, "routed_scaling_factor": 2.5, "scoring_func": "noaux_tc",
        "sliding_window": None, "topk_group": 1, "topk_method": "noaux_tc", "vocab_size": 152064,
    },
    "ERNIE-4.5-21B-A3B": {
        "model_type": "ernie4_5_moe", "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 2560,
        "intermediate_size": 12288, "max_position_embeddings": 131072, "num_attention_heads": 20,
        "num_key_value_heads": 4, "num_hidden_layers": 28, "pad_token_id": 0, "rms_norm_eps": 1e-05,
        "use_cache": False, "vocab_size": 103424, "rope_theta": 500000, "use_rmsnorm": True, "use_bias": False,
        "tie_word_embeddings": True, "moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
        "moe_intermediate_size": 1536, "moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_k": 6,
        "moe_layer_interval": 1, "moe_use_aux_free": True, "num_nextn_predict_layers": 1, "torch_dtype": "bfloat16",
    },
    "MiniMax-M2": {
        **COMMON, "model_type": "minimax_m2", "attn_type_list": [1] * 62, "bos_token_id": None, "eos_token_id": None,
        "head_dim": 128, "hidden_size": 3072, "intermediate_size": 1536, "layernorm_full_attention_beta": 1.0,
        "layernorm_linear_attention_beta": 1.0, "layernorm_mlp_beta": 1.0, "max_position_embeddings": 196608,
        "mlp_intermediate_size": 8192, "mtp_transformer_layers": 1, "num_attention_heads": 48,
        "num_experts_per_tok": 8, "num_hidden_layers": 62, "num_key_value_heads": 8, "num_local_experts": 256,
        "num_mtp_modules": 3, "output_router_logits": False, "qk_norm_type": "per_layer", "rope_theta": 5000000,
        "rotary_dim": 64, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "scoring_func": "sigmoid",
        "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid", "sliding_window": None, "swa_rope_theta": -1.0,
        "use_mtp": True, "use_qk_norm": True, "use_routing_bias": True, "vocab_size": 200064,
    },
    "Hunyuan-A13B": {
        **COMMON, "model_type": "hunyuan_v1_moe", "add_classification_head": False, "anyres_pooling_size": 2,
        "attention_head_dim": 128, "bos_token_id": 1, "cla_share_factor": 2, "class_num": 0, "dense_list": [4096, 0],
        "eod_token_id": 127967, "eos_token_id": 127960, "group_limited_greedy": False, "hidden_size": 4096,
        "im_end_id": 6, "im_newline_id": 12, "im_start_id": 5, "image_token_id": 9, "intermediate_size": 3072,
        "kv_lora_rank": None, "mask_init_id": 13, "max_position_embeddings": 32768, "mlp_bias": False,
        "moe_drop_tokens": False, "moe_intermediate_size": [3072] * 32, "moe_layer_num_skipped": 0,
        "moe_random_routing_dropped_token": False, "moe_topk": [8] * 32, "n_group": None, "norm_topk_prob": True,
        "num_attention_heads": 32, "num_experts": 64, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "num_media_embeds": 257, "num_shared_expert": [1] * 32, "org_vocab_size": 128167, "pad_id": 127961,
        "pad_token_id": 127961, "pool_type": "last", "position_embedding_xdrope": False, "pretraining_tp": 1,
        "q_lora_rank": None, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "routed_scaling_factor": 1.0,
        "rope_scaling": {
            "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "type": "dynamic",
        },
        "sep_token_id": 127962, "skip_cls_token": False, "text_end_id": 8, "text_start_id": 7,
        "tie_word_embeddings": True, "topk_group": None, "use_cla": False, "use_mixed_mlp_moe": True, "use_mla": False,
        "use_qk_norm": True, "use_rotary_pos_emb": True, "video_end_id": 11, "video_start_id": 10,
        "vit_input_resolution": 224, "vit_mapping_type": "resampler", "vit_norm_type": "fused", "vit_patch": 1,
        "vit_token": 64, "vocab_size": 128167,
    },
}  # fmt: skip


def read(values: dict[str, Any]) -> ModelConfig:
    return family_of(values["model_type"]).config_from_hf(values)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_means_what_transformers_reads_in_it(name: str) -> None:
    values = json.loads(json.dumps(PUBLISHED[name]))
    ours = read(PUBLISHED[name])
    model_type = "deepseek_v3" if name == "Kimi-K2" else values["model_type"]
    assert ours.model_type == model_type
    theirs = transformers.CONFIG_MAPPING[model_type].from_dict(values).to_dict()
    assert FAMILIES[model_type].config_from_hf(theirs | {"model_type": model_type}) == ours
    assert FAMILIES[model_type].config_from_hf(FAMILIES[model_type].config_to_hf(ours)) == ours


def test_sizes_that_follow_from_several_keys() -> None:
    deepseek, lite = read(PUBLISHED["DeepSeek-V3"]), read(PUBLISHED["DeepSeek-V2-Lite"])
    assert (deepseek.head_dim, deepseek.rotary_dim, deepseek.v_head_dim) == (192, 64, 128)
    assert (field_of(deepseek, "moe.n_group"), field_of(deepseek, "moe.topk_group")) == (8, 4)
    assert (lite.head_dim, field_of(lite, "mla.q_lora_rank")) == (192, None)
    assert field_of(read(PUBLISHED["Kimi-K2"]), "rope_scaling.mscale_all_dim") == 1.0
    assert read(PUBLISHED["MiniMax-M2"]).rotary_dim == 64
    hunyuan, ernie = read(PUBLISHED["Hunyuan-A13B"]), read(PUBLISHED["ERNIE-4.5-21B-A3B"])
    assert field_of(hunyuan, "moe.num_experts_per_tok") == 8
    assert field_of(hunyuan, "moe.shared_intermediate_size") == 3072
    assert [index for index in range(28) if not ernie.is_moe_layer(index)] == [0]
    assert field_of(ernie, "moe.has_expert_bias")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("DeepSeek-V2", "norm_topk_prob", True),
        ("DeepSeek-V2", "scoring_func", "sigmoid"),
        ("DeepSeek-V2", "topk_method", "noaux_tc"),
        ("DeepSeek-V2", "n_group", None),
        ("DeepSeek-V2", "moe_layer_freq", 2),
        ("DeepSeek-V2", "num_experts_per_tok", None),
        ("DeepSeek-V3", "scoring_func", "softmax"),
        ("DeepSeek-V3", "topk_method", "greedy"),
        ("DeepSeek-V3", "moe_layer_freq", 2),
        ("DeepSeek-V3", "head_dim", 192),
        ("DeepSeek-V3", "index_topk", 2048),
        ("DeepSeek-V3", "rope_scaling", {"type": "dynamic", "factor": 2.0, "mscale_all_dim": 1.0}),
        ("Kimi-K2", "topk_method", "greedy"),
        ("dots.llm1", "scoring_func", "softmax"),
        ("dots.llm1", "n_routed_experts", None),
        ("ERNIE-4.5-21B-A3B", "use_bias", True),
        ("ERNIE-4.5-21B-A3B", "moe_gate", "top2"),
        ("ERNIE-4.5-21B-A3B", "moe_use_aux_free", False),
        ("ERNIE-4.5-21B-A3B", "moe_layer_interval", 0),
        ("ERNIE-4.5-21B-A3B", "moe_num_experts", [64, 64]),
        ("MiniMax-M2", "attn_type_list", [1] * 61 + [0]),
        ("MiniMax-M2", "scoring_func", "softmax"),
        ("MiniMax-M2", "use_qk_norm", False),
        ("MiniMax-M2", "qk_norm_type", "per_head"),
        ("MiniMax-M2", "use_routing_bias", False),
        ("MiniMax-M2", "shared_intermediate_size", 512),
        ("MiniMax-M2", "layernorm_mlp_beta", 0.5),
        ("MiniMax-M2", "sliding_window", 4096),
        ("Hunyuan-A13B", "moe_topk", [8] * 31 + [4]),
        ("Hunyuan-A13B", "num_experts", [64] * 31 + [32]),
        ("Hunyuan-A13B", "moe_intermediate_size", [3072] * 31 + [1024]),
        ("Hunyuan-A13B", "moe_intermediate_size", [1024] * 32),
        ("Hunyuan-A13B", "num_shared_expert", [2] * 32),
        ("Hunyuan-A13B", "attention_head_dim", 64),
        ("Hunyuan-A13B", "moe_layer_num_skipped", 1),
        ("Hunyuan-A13B", "use_mixed_mlp_moe", False),
        ("Hunyuan-A13B", "norm_topk_prob", False),
        ("Hunyuan-A13B", "use_qk_norm", False),
        ("Hunyuan-A13B", "use_cla", True),
        ("Hunyuan-A13B", "use_mla", True),
        ("Hunyuan-A13B", "group_limited_greedy", True),
    ],
)
def test_what_we_do_not_do_is_refused_by_name(name: str, key: str, value: object) -> None:
    named = "mscale_all_dim" if key == "rope_scaling" else key
    with pytest.raises(MoesaicError, match=named):
        read(PUBLISHED[name] | {key: value})


def test_a_window_without_its_switch_does_not_slide() -> None:
    windowed = PUBLISHED["dots.llm1"] | {"sliding_window": 4096, "max_window_layers": 60}
    assert read(windowed).layer_types.count("sliding_attention") == 2
    assert read(windowed | {"use_sliding_window": False}).layer_types == ()


@pytest.mark.parametrize(
    ("start", "end", "interval", "sparse"),
    [(0, -1, 1, [0, 1, 2, 3, 4]), (1, 3, 1, [1, 2, 3]), (0, 4, 2, [1, 3]), (2, -1, 2, [3]), (0, -1, 3, [2])],
)
def test_sparse_layers_of_ernie(start: int, end: int, interval: int, sparse: list[int]) -> None:
    values = PUBLISHED["ERNIE-4.5-21B-A3B"] | {
        "num_hidden_layers": 5, "moe_layer_start_index": start, "moe_layer_end_index": end,
        "moe_layer_interval": interval,
    }  # fmt: skip
    config = read(values)
    assert [index for index in range(5) if config.is_moe_layer(index)] == sparse
    assert read(ernie4_5_moe.FAMILY.config_to_hf(config)) == config


def test_sparse_layers_that_ernie_cannot_name_are_refused() -> None:
    config = read(PUBLISHED["ERNIE-4.5-21B-A3B"])
    assert config.moe is not None
    uneven = replace(config, moe=replace(config.moe, mlp_only_layers=(2, 5, 6)))
    with pytest.raises(MoesaicError, match="mlp_only_layers"):
        ernie4_5_moe.FAMILY.config_to_hf(uneven)


def layout_of(name: str) -> Layout:
    """With few layers and experts, because layouts are long lists."""
    counts = ("n_routed_experts", "moe_num_experts", "num_local_experts", "num_experts")
    few = {key: 16 for key in counts if key in PUBLISHED[name]}
    config = read(PUBLISHED[name] | few | {"num_hidden_layers": 5})
    return family_of(config.model_type).layout(config)


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("DeepSeek-V3", "model.layers.5.eh_proj.weight"),
        ("DeepSeek-V3", "model.layers.5.shared_head.head.weight"),
        ("GLM-4.5", "model.layers.5.mlp.experts.0.up_proj.weight"),
        ("ERNIE-4.5-21B-A3B", "model.mtp_block.0.mlp.up_proj.weight"),
        ("ERNIE-4.5-21B-A3B", "model.mtp_linear_proj.0.weight"),
    ],
)
def test_blocks_that_predict_further_tokens_are_skipped(name: str, stored: str) -> None:
    layout = layout_of(name)
    assert layout.ignored(stored)
    assert not layout.ignored("model.layers.4.mlp.up_projection.weight")


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("ERNIE-4.5-21B-A3B", {"model.layers.1.mlp.moe_statics.e_score_correction_bias"}),
        (
            "MiniMax-M2",
            {
                "model.layers.0.block_sparse_moe.e_score_correction_bias", "model.layers.0.self_attn.q_norm.weight",
                "model.layers.4.block_sparse_moe.gate.weight", "model.layers.4.block_sparse_moe.experts.15.w3.weight",
            },
        ),
        (
            "Hunyuan-A13B",
            {
                "model.layers.0.mlp.gate.wg.weight", "model.layers.0.mlp.shared_mlp.up_proj.weight",
                "model.layers.4.self_attn.query_layernorm.weight", "model.layers.4.mlp.experts.15.down_proj.weight",
            },
        ),
        (
            "Kimi-K2",
            {
                "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "model.layers.0.self_attn.q_a_layernorm.weight",
                "model.layers.1.mlp.gate.e_score_correction_bias", "model.layers.1.mlp.shared_experts.down_proj.weight",
            },
        ),
    ],
)  # fmt: skip
def test_published_names_of_tensors(name: str, names: set[str]) -> None:
    """Of what these families call otherwise than most."""
    assert names <= {stored.name for alternatives in layout_of(name).tensors for stored in alternatives[0]}


@torch.no_grad()
def test_kimi_k2_loads_and_is_written_as_deepseek_v3(tmp_path: Path) -> None:
    theirs, tokens = save_hf_model(FAMILY_CASES["deepseek_v3"], tmp_path), random_tokens()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "kimi_k2"}))
    ours = load(tmp_path)
    assert (ours(tokens) - theirs(tokens).logits).abs().max() < 2e-4
    assert export_model(ours, None, tmp_path / "ours") == "deepseek_v3"


def test_shared_experts_that_do_not_exist_have_width_zero() -> None:
    with_none = read(PUBLISHED["DeepSeek-V2-Lite"] | {"n_shared_experts": None, "num_hidden_layers": 3})
    assert deepseek_v2.FAMILY.layout(with_none).fillers == {
        f"model.layers.{layer}.mlp.shared_experts.{leaf}.weight": shape
        for layer in (1, 2)
        for leaf, shape in (("gate_proj", (0, 2048)), ("up_proj", (0, 2048)), ("down_proj", (2048, 0)))
    }
    assert layout_of("DeepSeek-V2-Lite").fillers == {}
