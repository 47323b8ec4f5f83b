"""Models by name, by file and by directory."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moesaic.checkpoint.families import family_of
from moesaic.config import ModelConfig
from moesaic.config_io import from_mapping, write_train_config
from moesaic.errors import UsageError
from moesaic.plan.subject import find_subject
from moesaic.presets import PRESETS
from moesaic.recipes import demo_config


def hugging_face(preset: str, family: str) -> dict[str, Any]:
    """The config.json of a preset's shape, as the family writes it."""
    config = from_mapping(ModelConfig, PRESETS[preset])
    return family_of(family).config_to_hf(replace(config, model_type=family))


@pytest.mark.parametrize(
    ("preset", "family"),
    [("mixtral-8x7b", "mixtral"), ("qwen3-30b-a3b", "qwen3_moe"), ("deepseek-v3", "deepseek_v3"),
     ("llama-2-7b", "llama")],
)  # fmt: skip
def test_a_config_file_counts_as_the_preset_of_its_shape(tmp_path: Path, preset: str, family: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(hugging_face(preset, family)))
    read, known = find_subject(str(tmp_path)), find_subject(preset)
    assert (read.total, read.active) == (known.total, known.active)
    assert find_subject(str(path)).name == tmp_path.name
    assert read.config.model_type == family


@pytest.mark.parametrize(
    ("keys", "stored_as"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "float8"),
        ({"torch_dtype": "float32"}, "float32"),
        ({}, "bfloat16"),
    ],
)
def test_a_file_tells_the_type_of_its_weights(tmp_path: Path, keys: dict[str, Any], stored_as: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(hugging_face("mixtral-8x7b", "mixtral") | keys))
    assert find_subject(str(path)).stored_as == stored_as


def test_a_run_is_planned_from_its_config(tmp_path: Path) -> None:
    config = demo_config("sparse")
    write_train_config(config, tmp_path / "config.json")
    assert find_subject(str(tmp_path)).config == config.model
    path = tmp_path / "run.toml"
    path.write_text('[model]\npreset = "demo-sparse"\n[data]\ntokenizer = "bpe:2048"\n')
    assert find_subject(str(path)).total == find_subject("demo-sparse").total


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", '{"model_type": "mixtrl"}', "did you mean mixtral"),
        ("config.json", '{"model_type": "qwen3_moe", "hidden_size": 64}', "has no"),
        ("config.json", "{}", "model_type"),
        ("config.json", "[1]", "not an object"),
        ("config.json", "{", "not valid JSON"),
    ],
)
def test_files_that_say_too_little_are_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=words) as refused:
        find_subject(str(tmp_path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "words"), [("mixtrl-8x7b", "mixtral-8x7b"), ("gpt3", "gpt-3-175b"), ("@@@@", "presets are")]
)
def test_the_nearest_name_is_told(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        find_subject(name)


def test_a_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json"):
        find_subject(str(tmp_path))
