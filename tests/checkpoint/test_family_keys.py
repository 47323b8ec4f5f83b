"""Config keys: none that transformers has is ignored silently, defaults are the same, wrong values are named."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from moesaic.checkpoint.families import FAMILIES, family_for_export, family_of
from moesaic.config import ModelConfig
from moesaic.errors import MoesaicError

from .family_cases import FAMILY_CASES
from .helpers import CONFIGS, random_tokens, randomize

CANDIDATES: tuple[Any, ...] = (
    True, False, 0, 1, 2, 3, 5, 0.25, 0.5, 1.5, 7.0, "gelu", "greedy", "softmax", [0], [1, 2], [1, 0, 1],
    ["full_attention", "sliding_attention", "full_attention"], ["chunked_attention"] * 3, {"name": "gelu"},
    {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}, {"rope_type": "default", "rope_theta": 77.0},
)  # fmt: skip
SHAPING = {"vocab_size", "hidden_size", "num_hidden_layers", "d_model", "n_layers"}
"""Keys whose change gives another set of tensors; the walk has better things to do than to build giants."""


def plain_case(model_type: str) -> transformers.PreTrainedConfig:
    """The row that is named like its family, or the first of the family."""
    rows = [config for config in FAMILY_CASES.values() if config.model_type == model_type]
    return FAMILY_CASES.get(model_type, rows[0])


def published(model_type: str, **changes: object) -> dict[str, Any]:
    """A config.json of this family as transformers writes it."""
    return plain_case(model_type).to_dict() | changes


def flat_keys(values: dict[str, Any], nested: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        if key in nested and isinstance(value, dict):
            yield from ((key, inner) for inner in value)
        else:
            yield (key,)


def with_value(values: dict[str, Any], path: tuple[str, ...], value: object) -> dict[str, Any]:
    if len(path) == 1:
        return values | {path[0]: value}
    return values | {path[0]: values[path[0]] | {path[1]: value}}


def their_logits(config: transformers.PreTrainedConfig, seed: int, tokens: torch.Tensor) -> torch.Tensor | None:
    """What transformers computes with random weights of one seed; None when it cannot."""
    try:
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        torch.manual_seed(seed)
        randomize(model)
        with torch.no_grad():
            return model(tokens).logits
    except Exception:  # a config that transformers accepts and then fails on says nothing about us
        return None


@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_key_of_transformers_is_ignored_silently(model_type: str, seed: int) -> None:
    """Every key of the config class, with many values: each is refused by name, changes our config, or provably
    changes nothing in transformers either."""
    theirs = plain_case(model_type)
    family, values, tokens = FAMILIES[model_type], theirs.to_dict(), random_tokens()
    ours, expected = family.config_from_hf(values), their_logits(theirs, seed, tokens)
    assert expected is not None
    for path in flat_keys(values, family.nested):
        if path[-1] in SHAPING or path[-1].startswith("_") or path[-1] in ("model_type", "architectures"):
            continue
        for value in CANDIDATES:
            changed = with_value(values, path, value)
            try:
                config = type(theirs).from_dict(changed)
            except Exception:  # transformers refuses the value as well
                continue
            try:
                read = family.config_from_hf(changed)
            except MoesaicError:
                continue
            if read == ours:
                logits = their_logits(config, seed, tokens)
                same = logits is None or (logits.shape == expected.shape and torch.equal(logits, expected))
                assert same, f"{'.'.join(path)} = {value!r} changes what transformers computes, and we ignore it"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    """Leaving a key out means to us what it means to transformers, or we ask for it."""
    theirs, family = plain_case(model_type), FAMILIES[model_type]
    values = theirs.to_dict()
    for path in flat_keys(values, family.nested):
        if path[-1] == "model_type":
            continue
        without = {key: value for key, value in values.items() if (key,) != path}
        if len(path) == 2:
            without[path[0]] = {key: value for key, value in values[path[0]].items() if key != path[1]}
        try:
            read = family.config_from_hf(without)
        except MoesaicError as error:
            refusal = str(error)
        else:
            refusal = ""
        if refusal:
            default_token = path[-1].endswith("token_id") and "special token id" in refusal
            assert path[-1] in refusal or path[-1] in SHAPING or default_token, refusal
            continue
        try:
            filled_in = type(theirs).from_dict(without).to_dict()
        except Exception:  # a default that does not go with the other sizes
            continue
        assert family.config_from_hf(filled_in) == read, path


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_configs_survive_the_way_there_and_back(name: str) -> None:
    theirs = FAMILY_CASES[name]
    family = FAMILIES[theirs.model_type]
    config = family.config_from_hf(theirs.to_dict())
    written = family.config_to_hf(config)
    assert family.config_from_hf(written) == config
    assert family.config_from_hf(type(theirs).from_dict(written).to_dict()) == config


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rope_parameters", {"rope_type": "default", "mrope_section": [1, 2]}, "mrope_section"),
        ("rope_parameters", {"rope_type": "spiral", "rope_theta": 1e4}, "rope_type = 'spiral'"),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4}, "factor"),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": -1.0, "factor": 2.0}, "rope_theta is -1"),
        ("rope_parameters", [1, 2], "rope_parameters is .* of type dict"),
        ("attention_spiral", 128, "attention_spiral = 128 is not known"),
        ("vocab_size", None, "no vocab_size"),
        ("vocab_size", "97", "vocab_size is '97'; it must be of type int"),
        ("vocab_size", True, "vocab_size is True"),
        ("vocab_size", -3, "vocab_size is -3"),
        ("eos_token_id", "end", "eos_token_id is 'end'"),
        ("eos_token_id", 97, "special token id 97"),
        ("tie_word_embeddings", "yes", "tie_word_embeddings"),
        ("per_layer_config", {"0": {"hidden_size": 7}}, "per_layer_config"),
    ],
)
def test_wrong_values_are_refused_by_name(model_type: str, key: str, value: object, message: str) -> None:
    with pytest.raises(MoesaicError, match=message) as caught:
        FAMILIES[model_type].config_from_hf(published(model_type, **{key: value}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("qwen3", "partial_rotary_factor", 0.5),
        ("qwen3", "num_attention_heads", 0),
        ("qwen3", "num_key_value_heads", 3),
        ("qwen3", "hidden_size", -32),
        ("qwen3", "rms_norm_eps", "small"),
        ("qwen3", "layer_types", ["full_attention", "spiral_attention", "full_attention"]),
        ("qwen3_moe", "decoder_sparse_step", 0),
        ("qwen3_moe", "mlp_only_layers", ["first"]),
        ("qwen3_moe", "num_experts_per_tok", 7),
        ("qwen3_moe", "n_shared_experts", 1),
        ("glm4_moe", "topk_group", 2),
        ("glm4_moe", "use_qk_norm", 1),
        ("glm4_moe", "routed_scaling_factor", -1.0),
        ("glm4_moe", "scoring_func", "softmax"),
        ("mixtral", "hidden_act", "gelu"),
        ("mixtral", "sliding_window", 2.5),
    ],
)
def test_wrong_values_of_one_family(model_type: str, key: str, value: object) -> None:
    values = published(model_type, **{key: value})
    if key == "partial_rotary_factor":
        values["rope_parameters"] = None
    with pytest.raises(MoesaicError, match=key):
        FAMILIES[model_type].config_from_hf(values)


def test_a_value_of_any_size_gives_one_short_line() -> None:
    with pytest.raises(MoesaicError) as caught:
        FAMILIES["qwen3"].config_from_hf(published("qwen3", evil={"a": ["b" * 100_000]}))
    assert len(str(caught.value)) < 400


def test_nearest_key_is_suggested() -> None:
    with pytest.raises(
        MoesaicError, match="n_shared_expert = 1 is not known for glm4_moe; did you mean n_shared_experts"
    ):
        FAMILIES["glm4_moe"].config_from_hf(published("glm4_moe", n_shared_expert=1))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_keys_without_effect_pass(model_type: str) -> None:
    extra = {
        "_name_or_path": "x", "unsloth_fixed": True, "pad_token_id": 0, "use_cache": False, "rope_scaling": None,
        "unknown": None, "auto_map": {"AutoModelForCausalLM": "evil.py"}, "transformers_version": "4.40.0",
    }  # fmt: skip
    family = FAMILIES[model_type]
    assert family.config_from_hf(published(model_type, **extra)) == family.config_from_hf(published(model_type))


def test_old_rope_spelling_means_the_same() -> None:
    read = FAMILIES["llama"].config_from_hf
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    old = published("llama", rope_parameters=None, rope_theta=5000, rope_scaling={"type": "llama3", **scaling})
    new = published("llama", rope_parameters={"rope_type": "llama3", "rope_theta": 5000.0, **scaling})
    assert read(old) == read(new)


def test_fused_and_published_expert_count_agree() -> None:
    values = published("qwen3_moe")
    read = FAMILIES["qwen3_moe"].config_from_hf
    values.pop("num_experts", None)
    values.pop("num_local_experts", None)
    assert read(values | {"num_experts": 6}) == read(values | {"num_local_experts": 6})


@pytest.mark.parametrize("model_type", ["qwen9_moe", None, 7, ["qwen3"], "x" * 10_000])
def test_unknown_families_are_refused_with_the_known_ones(model_type: object) -> None:
    with pytest.raises(MoesaicError, match="qwen3, qwen3_moe") as caught:
        family_of(model_type)
    assert len(str(caught.value)) < 1000
    if model_type == "qwen9_moe":
        assert "did you mean qwen" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "moe_changes", "message"),
    [
        ("dense", {"qk_norm": "l2_after_rope"}, {}, "qk_norm = 'l2_after_rope' would become"),
        ("softmax", {"qk_norm": "none", "partial_rotary_factor": 0.5}, {}, "no Hugging Face family"),
        ("softmax", {}, {"n_shared_experts": 2, "router_bias": True}, "no Hugging Face family"),
        (
            "sigmoid",
            {"model_type": "qwen3_moe"},
            {},
            "qwen3_moe cannot express this model: moe.router = 'sigmoid_topk'",
        ),
    ],
)
def test_what_no_family_can_express_is_named(
    name: str, changes: dict[str, Any], moe_changes: dict[str, Any], message: str
) -> None:
    config: ModelConfig = CONFIGS[name]
    moe = replace(config.moe, **moe_changes) if config.moe else None
    with pytest.raises(MoesaicError, match=message):
        family_for_export(replace(config, moe=moe, **changes))
