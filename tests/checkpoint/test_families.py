"""Config translation: defaults are those of transformers, every key is honoured or refused by name."""

from dataclasses import replace

import pytest
import transformers

from moesaic.checkpoint.families import FAMILIES, family_for_export, family_of
from moesaic.errors import MoesaicError

from .helpers import CONFIGS, HF_CONFIGS

HF_CLASSES = {
    "qwen3": transformers.Qwen3Config,
    "qwen3_moe": transformers.Qwen3MoeConfig,
    "glm4_moe": transformers.Glm4MoeConfig,
}
OPTIONAL = {
    "qwen3": [
        "head_dim", "attention_bias", "tie_word_embeddings", "initializer_range", "rope_parameters", "eos_token_id",
    ],
    "qwen3_moe": ["head_dim", "norm_topk_prob", "mlp_only_layers", "decoder_sparse_step", "rope_parameters"],
    "glm4_moe": [
        "head_dim", "norm_topk_prob", "routed_scaling_factor", "n_shared_experts", "first_k_dense_replace",
        "use_qk_norm", "n_group", "topk_group", "rope_parameters",
    ],
}  # fmt: skip


def published(model_type: str, **changes: object) -> dict[str, object]:
    """A config.json of this family as transformers writes it."""
    return HF_CONFIGS[model_type].to_dict() | changes


@pytest.mark.parametrize("name", HF_CONFIGS)
def test_what_transformers_writes_is_read_and_written_alike(name: str) -> None:
    values = HF_CONFIGS[name].to_dict()
    family = family_of(values["model_type"])
    config = family.config_from_hf(values)
    written = HF_CLASSES[family.model_type](**family.config_to_hf(config)).to_dict()
    changed = {key for key in values if written.get(key) != values[key]} - {
        "architectures", "num_nextn_predict_layers", "layer_types", "transformers_version", "output_router_logits",
        "dtype",
    }  # fmt: skip
    assert not changed, {key: (values[key], written.get(key)) for key in changed}


@pytest.mark.parametrize(("model_type", "key"), [(family, key) for family, keys in OPTIONAL.items() for key in keys])
def test_defaults_are_those_of_transformers(model_type: str, key: str) -> None:
    """Leaving `key` out means to us what it means to transformers."""
    values = published(model_type)
    values.pop(key, None)
    filled_in = HF_CLASSES[model_type](**values).to_dict()
    read = FAMILIES[model_type].config_from_hf
    assert read(values) == read(filled_in)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_act", "gelu", "hidden_act = 'gelu' .* only 'silu'"),
        ("attention_dropout", 0.1, "attention_dropout = 0.1"),
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "rope_type = 'yarn'"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "type = 'linear'"),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}, "rope_type = 'llama3'"),
        ("rope_parameters", {"rope_type": "default", "mrope_section": [1, 2]}, "mrope_section"),
        ("rope_parameters", [1, 2], "rope_parameters is .* of type dict"),
        ("attention_chunk_size", 128, "attention_chunk_size = 128 is not known"),
        ("vocab_size", None, "no vocab_size"),
        ("vocab_size", "97", "vocab_size is '97'; it must be of type int"),
        ("vocab_size", True, "vocab_size is True"),
        ("rms_norm_eps", "small", "rms_norm_eps"),
        ("num_attention_heads", 0, "num_attention_heads is 0"),
        ("num_key_value_heads", 3, "num_key_value_heads is 3"),
        ("hidden_size", -32, "hidden_size is -32"),
        ("eos_token_id", "end", "eos_token_id is 'end'"),
        ("eos_token_id", 97, "special token id 97"),
        ("tie_word_embeddings", "yes", "tie_word_embeddings"),
    ],
)
def test_unsupported_values_are_refused_by_name(model_type: str, key: str, value: object, message: str) -> None:
    with pytest.raises(MoesaicError, match=message) as caught:
        FAMILIES[model_type].config_from_hf(published(model_type, **{key: value}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("qwen3", "use_sliding_window", True),
        ("qwen3", "layer_types", ["full_attention", "sliding_attention", "full_attention"]),
        ("qwen3", "partial_rotary_factor", 0.5),
        ("qwen3_moe", "use_sliding_window", True),
        ("qwen3_moe", "decoder_sparse_step", 2),
        ("qwen3_moe", "mlp_only_layers", [1]),
        ("qwen3_moe", "mlp_only_layers", [0, 2]),
        ("qwen3_moe", "num_experts_per_tok", 7),
        ("qwen3_moe", "n_shared_experts", 1),
        ("glm4_moe", "n_group", 2),
        ("glm4_moe", "topk_group", 2),
        ("glm4_moe", "use_qk_norm", 1),
        ("glm4_moe", "routed_scaling_factor", -1.0),
        ("glm4_moe", "scoring_func", "softmax"),
    ],
)
def test_unsupported_values_of_one_family(model_type: str, key: str, value: object) -> None:
    values = published(model_type, **{key: value})
    if key == "partial_rotary_factor":
        values["rope_parameters"] = None
    with pytest.raises(MoesaicError, match=key):
        FAMILIES[model_type].config_from_hf(values)


def test_nearest_key_is_suggested() -> None:
    with pytest.raises(
        MoesaicError, match="n_shared_expert = 1 is not known for glm4_moe; did you mean n_shared_experts"
    ):
        FAMILIES["glm4_moe"].config_from_hf(published("glm4_moe", n_shared_expert=1))


def test_keys_without_effect_pass() -> None:
    extra = {
        "_name_or_path": "x", "unsloth_fixed": True, "pad_token_id": 0, "use_cache": False, "sliding_window": 4096,
        "router_aux_loss_coef": 0.01, "num_nextn_predict_layers": 1, "rope_scaling": None, "unknown": None,
    }  # fmt: skip
    for model_type, family in FAMILIES.items():
        mine = {key: value for key, value in extra.items() if key != "sliding_window" or model_type != "glm4_moe"}
        if model_type != "glm4_moe":
            mine.pop("num_nextn_predict_layers")
        assert family.config_from_hf(published(model_type, **mine)) == family.config_from_hf(published(model_type))


def test_fused_and_published_expert_count_agree() -> None:
    values = published("qwen3_moe")
    read = FAMILIES["qwen3_moe"].config_from_hf
    values.pop("num_experts", None)
    values.pop("num_local_experts", None)
    assert read(values | {"num_experts": 6}) == read(values | {"num_local_experts": 6})


@pytest.mark.parametrize("model_type", ["mixtral", None, 7, ["qwen3"]])
def test_unknown_families_are_refused_with_the_known_ones(model_type: object) -> None:
    with pytest.raises(MoesaicError, match="qwen3, qwen3_moe, glm4_moe"):
        family_of(model_type)


def test_router_without_a_family_is_refused() -> None:
    softmax = CONFIGS["softmax"]
    assert softmax.moe is not None
    with pytest.raises(MoesaicError, match=r"expert_choice.*softmax_topk, sigmoid_topk"):
        family_for_export(replace(softmax, moe=replace(softmax.moe, router="expert_choice")))
