"""Tiny configs of every supported family, as transformers has them: the rows of tests/checkpoint/test_families.py.

Each row is small but uneven, so that no two sizes are equal by chance, and turns on what the family can do: heads that
are shared or not, windows shorter than the prompt, stretched rotary positions, biases, tied heads, dense layers.
"""

from typing import Any

import transformers

VOCAB_SIZE = 97

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": [3, 5],
    "bos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
HEAD: dict[str, Any] = {"head_dim": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.5}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 5000.0, "short_factor": [1.1, 1.3, 1.9, 2.6], "short_mscale": 1.2,
    "long_factor": [1.3, 1.9, 3.1, 4.5], "long_mscale": 1.4, "original_max_position_embeddings": 64,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32}
YARN_MSCALE = {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 4.0}

QWEN3_MOE = {**SIZES, **HEAD, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GLM4_MOE = {
    **SIZES, **HEAD, "n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
    "n_shared_experts": 2, "routed_scaling_factor": 1.7, "eos_token_id": 3,
}  # fmt: skip
LATENT = {
    **SIZES, "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 28, "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 6, "v_head_dim": 10, "n_routed_experts": 16, "num_experts_per_tok": 3,
    "moe_intermediate_size": 24, "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.7,
}  # fmt: skip
DOTS1 = {**GLM4_MOE, "n_group": 1, "topk_group": 1}
ERNIE4_5_MOE = {
    **SIZES, "moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 2,
}  # fmt: skip
MINIMAX_M2 = {**SIZES, **HEAD, "num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 24}
HUNYUAN_V1_MOE = {**SIZES, **HEAD, "num_experts": 6, "moe_topk": 2, "intermediate_size": 24}
MIXTRAL = {**SIZES, "num_local_experts": 6, "num_experts_per_tok": 2}
QWEN2_MOE = {
    **SIZES, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}  # fmt: skip
OLMOE = {**SIZES, "num_experts": 6, "num_experts_per_tok": 3}
GPT_OSS = {**SIZES, **HEAD, "max_position_embeddings": 131072, "num_local_experts": 6, "num_experts_per_tok": 2}
PHIMOE = {**SIZES, "num_local_experts": 6, "router_jitter_noise": 0.3}
GRANITEMOE = {
    **SIZES, "num_local_experts": 6, "num_experts_per_tok": 3, "embedding_multiplier": 4.0, "attention_multiplier": 0.2,
    "residual_multiplier": 0.6, "logits_scaling": 0.7,
}  # fmt: skip
DBRX = {
    "vocab_size": VOCAB_SIZE, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 128, "eos_token_id": 3,
    "bos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
DBRX_FFN = {"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 3}
LLAMA4 = {**SIZES, **HEAD, "intermediate_size_mlp": 40, "num_local_experts": 6, "attention_chunk_size": 7}

FAMILY_CASES: dict[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama biases, llama3 rope, tied": transformers.LlamaConfig(
        **SIZES, **HEAD, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3, tie_word_embeddings=True
    ),
    "llama one key head, linear rope": transformers.LlamaConfig(
        **{**SIZES, "num_key_value_heads": 1}, rope_parameters=LINEAR
    ),
    "llama own key heads, dynamic rope": transformers.LlamaConfig(
        **{**SIZES, "num_key_value_heads": 4, "max_position_embeddings": 16}, rope_parameters=DYNAMIC
    ),
    "llama yarn": transformers.LlamaConfig(**SIZES, rope_parameters=YARN),
    "mistral window": transformers.MistralConfig(**SIZES, sliding_window=7),
    "mistral": transformers.MistralConfig(**SIZES, **HEAD, sliding_window=None, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen2 upper layers slide, tied": transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1, tie_word_embeddings=True
    ),
    "qwen3": transformers.Qwen3Config(**SIZES, **HEAD, rope_parameters={"rope_theta": 5000.0}),
    "qwen3 biases, slides, tied": transformers.Qwen3Config(
        **SIZES,
        **HEAD,
        tie_word_embeddings=True,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=2,
    ),
    "olmo2": transformers.Olmo2Config(**SIZES),
    "olmo2 biases, yarn, tied": transformers.Olmo2Config(
        **SIZES, attention_bias=True, rope_parameters=YARN, tie_word_embeddings=True
    ),
    "mixtral": transformers.MixtralConfig(**MIXTRAL),
    "mixtral window, top 3, linear rope": transformers.MixtralConfig(
        **{**MIXTRAL, "num_experts_per_tok": 3}, **HEAD, sliding_window=6, rope_parameters=LINEAR
    ),
    "mixtral top 1, tied": transformers.MixtralConfig(
        **{**MIXTRAL, "num_experts_per_tok": 1}, tie_word_embeddings=True
    ),
    "qwen2_moe": transformers.Qwen2MoeConfig(**QWEN2_MOE, norm_topk_prob=True),
    "qwen2_moe dense layers, slides, no bias": transformers.Qwen2MoeConfig(
        **QWEN2_MOE,
        norm_topk_prob=False,
        mlp_only_layers=[1],
        qkv_bias=False,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=2,
        tie_word_embeddings=True,
    ),
    "qwen2_moe without shared expert": transformers.Qwen2MoeConfig(
        **{**QWEN2_MOE, "shared_expert_intermediate_size": 0}, norm_topk_prob=True
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(**QWEN3_MOE, norm_topk_prob=True),
    "qwen3_moe dense first, not normalised": transformers.Qwen3MoeConfig(
        **QWEN3_MOE, norm_topk_prob=False, mlp_only_layers=[0, 1], tie_word_embeddings=True, attention_bias=True
    ),
    "qwen3_moe every second layer, slides, yarn": transformers.Qwen3MoeConfig(
        **QWEN3_MOE, decoder_sparse_step=2, use_sliding_window=True, sliding_window=9, rope_parameters=YARN
    ),
    "glm4_moe": transformers.Glm4MoeConfig(**GLM4_MOE, use_qk_norm=True, first_k_dense_replace=1),
    "glm4_moe without qk_norm": transformers.Glm4MoeConfig(
        **GLM4_MOE,
        use_qk_norm=False,
        first_k_dense_replace=0,
        attention_bias=True,
        rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.25},
    ),
    "glm4_moe groups": transformers.Glm4MoeConfig(**GLM4_MOE, n_group=3, topk_group=2, first_k_dense_replace=1),
    "glm4_moe without shared experts": transformers.Glm4MoeConfig(
        **{**GLM4_MOE, "n_shared_experts": 0}, norm_topk_prob=False, rms_norm_eps=1e-3
    ),
    "deepseek_v2": transformers.DeepseekV2Config(**LATENT, rms_norm_eps=1e-3),
    "deepseek_v2 groups, yarn, no query latent": transformers.DeepseekV2Config(
        **{**LATENT, "q_lora_rank": None},
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        rope_parameters=YARN_MSCALE,
    ),
    "deepseek_v2 biases, linear rope, tied": transformers.DeepseekV2Config(
        **{**LATENT, "first_k_dense_replace": 2, "num_experts_per_tok": 1},
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=LINEAR,
        tie_word_embeddings=True,
    ),
    "deepseek_v2 without shared experts or dense layers": transformers.DeepseekV2Config(
        **{**LATENT, "n_shared_experts": 0, "first_k_dense_replace": 0}, n_group=4, topk_group=2
    ),
    "deepseek_v3": transformers.DeepseekV3Config(**LATENT, n_group=4, topk_group=2, rms_norm_eps=1e-3),
    "deepseek_v3 yarn, no query latent, one group": transformers.DeepseekV3Config(
        **{**LATENT, "q_lora_rank": None, "first_k_dense_replace": 0},
        n_group=1,
        topk_group=1,
        attention_bias=True,
        rope_parameters=YARN_MSCALE,
    ),
    "deepseek_v3 biases, rope by halves, not normalised, tied": transformers.DeepseekV3Config(
        **{**LATENT, "first_k_dense_replace": 2},
        n_group=2,
        topk_group=1,
        norm_topk_prob=False,
        attention_bias=True,
        rope_interleave=False,
        tie_word_embeddings=True,
    ),
    "deepseek_v3 top 1, without shared experts, plain yarn": transformers.DeepseekV3Config(
        **{**LATENT, "n_shared_experts": 0, "num_experts_per_tok": 1}, n_group=2, topk_group=2, rope_parameters=YARN
    ),
    "dots1": transformers.Dots1Config(**DOTS1, norm_topk_prob=True, first_k_dense_replace=1),
    "dots1 slides, biases, not normalised, tied": transformers.Dots1Config(
        **{**DOTS1, "num_key_value_heads": 1},
        sliding_window=6,
        max_window_layers=1,
        attention_bias=True,
        tie_word_embeddings=True,
    ),
    "dots1 groups, layer types, yarn": transformers.Dots1Config(
        **{**DOTS1, "n_group": 3, "topk_group": 2, "num_key_value_heads": 4},
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        norm_topk_prob=True,
        first_k_dense_replace=2,
        rope_parameters=YARN,
    ),
    "dots1 without shared experts": transformers.Dots1Config(
        **{**DOTS1, "n_shared_experts": 0, "num_experts_per_tok": 1}, sliding_window=None
    ),
    "ernie4_5_moe": transformers.Ernie4_5_MoeConfig(**ERNIE4_5_MOE),
    "ernie4_5_moe biases, all sparse, no shared experts, smallest norm": transformers.Ernie4_5_MoeConfig(
        **{**ERNIE4_5_MOE, "moe_num_shared_experts": 0, "num_key_value_heads": 4},
        **HEAD,
        use_bias=True,
        tie_word_embeddings=False,
        moe_layer_start_index=0,
        moe_norm_min=0.6,
        rms_norm_eps=1e-3,
    ),
    "ernie4_5_moe every second layer, up to a layer, yarn": transformers.Ernie4_5_MoeConfig(
        **{**ERNIE4_5_MOE, "num_hidden_layers": 5, "num_key_value_heads": 1, "moe_k": 1},
        moe_layer_interval=2,
        moe_layer_start_index=0,
        moe_layer_end_index=3,
        tie_word_embeddings=False,
        rope_parameters=YARN,
    ),
    "minimax_m2": transformers.MiniMaxM2Config(**{**MINIMAX_M2, "rotary_dim": 6}),
    "minimax_m2 whole heads turned, yarn, tied": transformers.MiniMaxM2Config(
        **{**MINIMAX_M2, "num_key_value_heads": 1, "num_experts_per_tok": 3},
        rope_parameters=YARN,
        tie_word_embeddings=True,
    ),
    "minimax_m2 top 1, own key heads": transformers.MiniMaxM2Config(
        **{**MINIMAX_M2, "num_key_value_heads": 4, "num_experts_per_tok": 1},
        rope_parameters={"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.5, "partial_rotary_factor": 0.5},
        rms_norm_eps=1e-3,
    ),
    "hunyuan_v1_moe": transformers.HunYuanMoEV1Config(**HUNYUAN_V1_MOE),
    "hunyuan_v1_moe alpha, tied": transformers.HunYuanMoEV1Config(
        **{**HUNYUAN_V1_MOE, "num_key_value_heads": 1, "moe_topk": [3, 3, 3]},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 1.0, "alpha": 50.0},
        tie_word_embeddings=True,
    ),
    "hunyuan_v1_moe biases, dynamic rope": transformers.HunYuanMoEV1Config(
        **{**HUNYUAN_V1_MOE, "num_key_value_heads": 4, "moe_topk": 1, "max_position_embeddings": 16},
        attention_bias=True,
        rope_parameters=DYNAMIC,
        rms_norm_eps=1e-3,
    ),
    "olmoe": transformers.OlmoeConfig(**OLMOE, clip_qkv=0.8),
    "olmoe biases, normalised, tied": transformers.OlmoeConfig(
        **{**OLMOE, "num_key_value_heads": 1},
        attention_bias=True,
        norm_topk_prob=True,
        rope_parameters=LINEAR,
        tie_word_embeddings=True,
    ),
    "flex_olmo": transformers.FlexOlmoConfig(**OLMOE),
    "flex_olmo biases, normalised, tied": transformers.FlexOlmoConfig(
        **{**OLMOE, "num_key_value_heads": 4},
        attention_bias=True,
        norm_topk_prob=True,
        rope_parameters=YARN,
        tie_word_embeddings=True,
    ),
    "gpt_oss": transformers.GptOssConfig(**GPT_OSS, sliding_window=7, swiglu_limit=1.3),
    "gpt_oss no biases of attention, no windows, tied": transformers.GptOssConfig(
        **{**GPT_OSS, "num_experts_per_tok": 3, "num_key_value_heads": 4},
        attention_bias=False,
        layer_types=["full_attention"] * 3,
        swiglu_alpha=1.2,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
    ),
    "gpt_oss top 1, windows everywhere, one key head": transformers.GptOssConfig(
        **{**GPT_OSS, "num_experts_per_tok": 1, "num_key_value_heads": 1},
        layer_types=["sliding_attention"] * 3,
        sliding_window=5,
        rope_parameters=YARN,
    ),
    "phimoe": transformers.PhimoeConfig(**PHIMOE, attention_bias=True, lm_head_bias=True),
    "phimoe no biases, window, tied": transformers.PhimoeConfig(
        **{**PHIMOE, "num_key_value_heads": 1, "router_jitter_noise": 0.01}, sliding_window=6, tie_word_embeddings=True
    ),
    "phimoe longrope, within": transformers.PhimoeConfig(**PHIMOE, lm_head_bias=True, rope_parameters=LONGROPE),
    # One list of factors: beyond the original length transformers takes long_mscale but stays with short_factor.
    "phimoe longrope, beyond": transformers.PhimoeConfig(
        **PHIMOE,
        rope_parameters={**LONGROPE, "short_factor": LONGROPE["long_factor"], "original_max_position_embeddings": 16},
    ),
    "granitemoe": transformers.GraniteMoeConfig(**GRANITEMOE),
    "granitemoe biases, llama3 rope, tied": transformers.GraniteMoeConfig(
        **{**SIZES, "num_key_value_heads": 1},
        num_local_experts=6,
        num_experts_per_tok=1,
        attention_bias=True,
        rope_parameters=LLAMA3,
        tie_word_embeddings=True,
    ),
    "granitemoeshared": transformers.GraniteMoeSharedConfig(**GRANITEMOE, shared_intermediate_size=40),
    "granitemoeshared without shared experts, biases, tied": transformers.GraniteMoeSharedConfig(
        **GRANITEMOE, shared_intermediate_size=0, attention_bias=True, rope_parameters=YARN, tie_word_embeddings=True
    ),
    "dbrx": transformers.DbrxConfig(
        **DBRX,
        attn_config={"kv_n_heads": 2, "clip_qkv": 0.8, "rope_theta": 10000.0},
        ffn_config=DBRX_FFN,
    ),
    "dbrx norm of order 2, linear rope": transformers.DbrxConfig(
        **DBRX,
        attn_config={"kv_n_heads": 4, "clip_qkv": 3, "rope_theta": 5000.0},
        ffn_config={**DBRX_FFN, "moe_normalize_expert_weights": 2.0},
        rope_parameters=LINEAR,
    ),
    "dbrx not normalised, one key head": transformers.DbrxConfig(
        **DBRX,
        attn_config={"kv_n_heads": 1, "clip_qkv": 2, "rope_theta": 5000},
        ffn_config={**DBRX_FFN, "moe_normalize_expert_weights": None},
        rope_parameters={"rope_theta": 5000.0},
    ),
    "llama4_text": transformers.Llama4TextConfig(
        **{**LLAMA4, "num_hidden_layers": 4},
        num_experts_per_tok=2,
        interleave_moe_layer_step=2,
        no_rope_layer_interval=3,
        floor_scale=5,
        attn_scale=0.3,
        attention_bias=True,
    ),
    "llama4_text all sparse, no norm or temperature, tied": transformers.Llama4TextConfig(
        **{**LLAMA4, "num_key_value_heads": 1},
        use_qk_norm=False,
        no_rope_layers=[0, 1, 1],
        attn_temperature_tuning=False,
        rope_parameters=LLAMA3,
        tie_word_embeddings=True,
    ),
    "llama4_text layers by name": transformers.Llama4TextConfig(
        **{**LLAMA4, "num_key_value_heads": 4},
        num_experts_per_tok=3,
        moe_layers=[0, 2],
        no_rope_layers=[1, 0, 1],
        layer_types=["full_attention", "chunked_attention", "full_attention"],
        floor_scale=8,
    ),
}
