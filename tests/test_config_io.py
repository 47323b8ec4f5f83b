import json
import tomllib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.config import BalanceConfig, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig
from moesaic.config_io import (
    from_mapping,
    read_run_config,
    read_train_config,
    to_mapping,
    write_run_config,
    write_train_config,
)
from moesaic.errors import UsageError
from moesaic.presets import PRESETS
from moesaic.tokenizer import byte_tokenizer

TOML = """
steps = 7
[model]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 8
[model.moe]
num_experts = 8
num_experts_per_tok = 2
moe_intermediate_size = 16
[optimizer]
lr = 1
betas = [0.8, 0.9]
"""


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TOML)
    return path


@st.composite
def train_configs(draw):
    moe = None
    if draw(st.booleans()):
        num_experts = draw(st.integers(2, 64))
        moe = MoEConfig(
            num_experts=num_experts,
            num_experts_per_tok=draw(st.integers(2, num_experts)),
            moe_intermediate_size=draw(st.integers(1, 999)),
            router=draw(st.sampled_from(["softmax_topk", "sigmoid_topk"])),
            routed_scaling_factor=draw(st.floats(0.1, 8)),
        )
    key_value_heads = draw(st.integers(1, 4))
    model = ModelConfig(
        vocab_size=draw(st.integers(300, 999)),
        hidden_size=draw(st.integers(1, 99)),
        num_hidden_layers=draw(st.integers(1, 9)),
        num_attention_heads=key_value_heads * draw(st.integers(1, 4)),
        num_key_value_heads=key_value_heads,
        head_dim=2 * draw(st.integers(1, 64)),
        intermediate_size=64,
        moe=moe,
        bos_token_id=draw(st.none() | st.integers(0, 299)),
        eos_token_ids=tuple(draw(st.lists(st.integers(0, 299), max_size=3))),
    )
    return TrainConfig(
        model=model,
        data=DataConfig(source=draw(st.text(min_size=1, max_size=20)), tokenizer=draw(st.text(max_size=9))),
        optimizer=OptimizerConfig(lr=draw(st.floats(1e-9, 10)), name=draw(st.sampled_from(["adamw", "muon"]))),
        balance=BalanceConfig(aux_loss_coef=draw(st.floats(0, 1)) if moe else 0.0),
        steps=draw(st.integers(1, 10**9)),
        tensorboard=draw(st.booleans()),
    )


@given(config=train_configs())
def test_a_config_survives_mapping_and_json(config):
    mapping = to_mapping(config)
    assert from_mapping(TrainConfig, mapping) == config
    assert from_mapping(TrainConfig, json.loads(json.dumps(mapping))) == config


@settings(max_examples=20)
@given(config=train_configs())
def test_a_run_directory_gives_back_its_config(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    write_run_config(directory, config)
    assert read_run_config(directory) == config
    other = replace(config, steps=config.steps + 1)
    write_train_config(other, directory / "config.json")
    assert read_train_config(directory / "config.json") == other
    assert [path.name for path in directory.iterdir()] == ["config.json"]


def test_toml_with_defaults_and_the_byte_vocabulary(toml):
    config = read_train_config(toml)
    assert config.model.vocab_size == byte_tokenizer().vocab_size == 257
    assert config.optimizer == OptimizerConfig(lr=1.0, betas=(0.8, 0.9))
    assert type(config.optimizer.lr) is float
    assert config.model.moe is not None
    assert config.model.moe.num_experts == 8
    assert config.data == DataConfig()


def test_vocabulary_size_follows_the_tokenizer(toml):
    assert read_train_config(toml, ["--data.tokenizer", "bpe:777"]).model.vocab_size == 777
    assert read_train_config(toml, ["--data.tokenizer=bpe:777", "--model.vocab-size=800"]).model.vocab_size == 800


def test_flags_override_the_file(toml):
    flags = (
        "--optimizer.lr=1e-3 --model.moe.num-experts 16 --steps 50 --tensorboard --optimizer.betas [0.5,0.6] "
        "--data.source 2024 --schedule.name=cosine --model.qk_norm=none --data.text-field true "
        "--balance.aux-loss-coef 1"
    )
    config = read_train_config(toml, flags.split())
    assert config.optimizer.lr == 1e-3
    assert config.model.moe == MoEConfig(num_experts=16, num_experts_per_tok=2, moe_intermediate_size=16)
    assert (config.steps, config.tensorboard, config.schedule.name) == (50, True, "cosine")
    assert config.optimizer.betas == (0.5, 0.6)
    assert (config.data.source, config.data.text_field) == ("2024", "true")
    assert config.model.qk_norm == "none"
    assert config.balance.aux_loss_coef == 1.0


def test_none_switches_an_optional_part_off(toml):
    config = read_train_config(toml, ["--model.moe", "none", "--model.intermediate-size", "64"])
    assert config.model.moe is None


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_their_keys_can_be_overridden(name, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(f'[model]\npreset = "{name}"\nnum_hidden_layers = 5\n')
    model = read_train_config(path).model
    assert to_mapping(model) | {"num_hidden_layers": 0} == to_mapping(from_mapping(ModelConfig, PRESETS[name])) | {
        "num_hidden_layers": 0
    }
    assert model.num_hidden_layers == 5


def test_one_key_of_a_preset_s_mixture_can_be_overridden(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("")
    before = dict(PRESETS["demo-sparse"]["moe"])
    moe = read_train_config(path, ["--model.preset", "demo-sparse", "--model.moe.num-experts", "48"]).model.moe
    assert moe == from_mapping(MoEConfig, before | {"num_experts": 48})
    assert PRESETS["demo-sparse"]["moe"] == before


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--model.moe.num-expert", "8"], ["unknown key model.moe.num_expert", "did you mean num_experts?"]),
        (["--optimiser.lr", "1"], ["unknown key optimiser", "did you mean optimizer?"]),
        (["--zzz", "1"], ["unknown key zzz", "known are", "steps"]),
        (["--steps.x", "1"], ["unknown key steps.x", "steps is a single value"]),
        (["--steps", "many"], ["steps is 'many'", "whole number"]),
        (["--steps", "1.5"], ["steps is 1.5", "whole number"]),
        (["--steps", "true"], ["steps is True", "whole number"]),
        (["--optimizer.lr", "fast"], ["optimizer.lr is 'fast'", "a number"]),
        (["--optimizer.betas", "[0.9]"], ["optimizer.betas has 1 values", "takes 2"]),
        (["--optimizer.betas", "[0.9, 'x']"], ["optimizer.betas[1] is 'x'"]),
        (["--optimizer.betas", "0.9"], ["optimizer.betas is 0.9", "list"]),
        (["--optimizer.name", "sgd"], ["optimizer.name is 'sgd'", "adamw, muon"]),
        (["--tensorboard", "yes"], ["tensorboard is 'yes'", "true or false"]),
        (["--data", "stdlib"], ["data is 'stdlib'", "table"]),
        (["--model.moe.num-experts-per-tok", "9"], ["[model.moe] num_experts_per_tok is 9 but num_experts is 8"]),
        (["--model.moe.num-experts-per-tok", "1"], ["num_experts_per_tok is 1", "router gets no gradient"]),
        (["--model.num-key-value-heads", "3"], ["[model] num_attention_heads is 4"]),
        (["--sequence-length", "4096"], ["sequence_length is 4096 but model.max_position_embeddings is 2048"]),
        (["--model.preset", "demo-sparce"], ["unknown preset 'demo-sparce'", "did you mean demo-sparse?"]),
        (["--data.tokenizer", "bpe:12"], ["'bpe:12'", "257"]),
        (["steps", "5"], ["unexpected argument 'steps'"]),
    ],
)
def test_what_is_wrong_is_named_by_its_key_path(toml, flags, parts):
    with pytest.raises(UsageError) as caught:
        read_train_config(toml, flags)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_missing_keys_are_named(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("steps = 1")
    with pytest.raises(UsageError, match="missing model"):
        read_train_config(path)
    path.write_text("[model]\nhidden_size = 8\n[model.moe]\nnum_experts = 4")
    with pytest.raises(UsageError, match=r"missing model\.num_hidden_layers, .*model\.head_dim"):
        read_train_config(path)


def test_unreadable_files(tmp_path):
    path = tmp_path / "run.toml"
    with pytest.raises(UsageError, match=r"cannot read the config .*run\.toml"):
        read_train_config(path)
    path.write_text("steps = 1\nsteps = = 2\n")
    with pytest.raises(UsageError, match=r"run\.toml does not parse: .*line 2"):
        read_train_config(path)
    path.write_bytes(b"steps = 1 # caf\xe9")
    with pytest.raises(UsageError, match="not UTF-8 at byte 15"):
        read_train_config(path)
    (tmp_path / "config.json").write_text('{"steps": 1,\n')
    with pytest.raises(UsageError, match=r"config\.json does not parse: .*line 2"):
        read_train_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UsageError, match="table"):
        read_run_config(tmp_path)


def test_a_mapping_is_valid_toml_too(toml):
    config = read_train_config(toml)
    lines: list[str] = []

    def write(table: dict, path: str) -> None:
        lines.extend([f"[{path}]"] if path else [])
        lines.extend(f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict))
        for key, value in table.items():
            if isinstance(value, dict):
                write(value, f"{path}.{key}" if path else key)

    write(to_mapping(config), "")
    assert from_mapping(TrainConfig, tomllib.loads("\n".join(lines))) == config
