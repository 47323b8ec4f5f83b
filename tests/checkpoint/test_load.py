"""Doors of loading: what does not fit is named, types are kept, runs load their newest good state."""

import json
import os
import re
import resource
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from moesaic.checkpoint.load import load, load_tokenizer
from moesaic.checkpoint.run_state import save_run_state
from moesaic.config import TrainConfig
from moesaic.config_io import to_mapping, write_train_config
from moesaic.errors import MoesaicError, UsageError
from moesaic.tokenizer import byte_tokenizer, train_bpe

from .family_cases import FAMILY_CASES
from .helpers import CONFIGS, logit_difference, random_model, random_tokens, save_hf_model


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}
    edit(tensors)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def test_old_config_spellings_mean_the_same(tmp_path: Path) -> None:
    theirs = save_hf_model(FAMILY_CASES["glm4_moe without qk_norm"], tmp_path)
    edit_config(
        tmp_path, rope_parameters=None, rope_scaling=None, rope_theta=10000, partial_rotary_factor=0.25,
        dtype=None, torch_dtype="float32",
    )  # fmt: skip
    assert logit_difference(load(tmp_path), theirs) < 1e-4


def test_multi_token_prediction_layers_are_skipped(tmp_path: Path) -> None:
    theirs = save_hf_model(FAMILY_CASES["glm4_moe"], tmp_path)
    mtp = {"model.layers.3.eh_proj.weight": torch.randn(4, 8), "model.layers.3.mlp.gate.weight": torch.randn(6, 32)}
    edit_tensors(tmp_path, lambda tensors: tensors.update(mtp))
    assert logit_difference(load(tmp_path), theirs) < 1e-4


def test_tied_head_on_disk_is_not_used(tmp_path: Path) -> None:
    theirs = save_hf_model(FAMILY_CASES["qwen3 biases, slides, tied"], tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.randn(97, 32)}))
    assert logit_difference(load(tmp_path), theirs) < 1e-4


@pytest.mark.parametrize(("stored", "router"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_dtype_of_bfloat16_models(tmp_path: Path, stored: str, router: torch.dtype) -> None:
    """Weights take the dtype asked for; routers stored as float32 stay so, and the selection bias always is."""
    save_hf_model(FAMILY_CASES["glm4_moe"], tmp_path)
    exact = load(tmp_path).state_dict()
    if stored == "bfloat16":
        edit_config(tmp_path, dtype="bfloat16")
        edit_tensors(tmp_path, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    model = load(tmp_path, dtype="auto" if stored == "bfloat16" else "bfloat16")
    for name, tensor in model.state_dict().items():
        if name.endswith("expert_bias"):
            assert tensor.dtype == torch.float32
        else:
            assert tensor.dtype == (router if name.endswith("router.weight") else torch.bfloat16), name
        torch.testing.assert_close(tensor.float(), exact[name], rtol=2**-8, atol=0)
    assert torch.isfinite(model(random_tokens())).all()
    assert load(tmp_path, dtype="float32").embed_tokens.weight.dtype == torch.float32
    edit_config(tmp_path, dtype=None)
    assert load(tmp_path).embed_tokens.weight.dtype == getattr(torch, stored)


def test_generation_config_says_where_to_stop(tmp_path: Path) -> None:
    save_hf_model(FAMILY_CASES["qwen3"], tmp_path)
    assert load(tmp_path).config.eos_token_ids == (3, 5)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')
    assert load(tmp_path).config.eos_token_ids == (7, 5)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(MoesaicError, match="eos_token_id is 'end'"):
        load(tmp_path)


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("model.norm.weight"), "model.norm.weight is missing (expected [32])"),
        (drop("lm_head.weight"), "lm_head.weight is missing (expected [97, 32])"),
        (
            drop("model.layers.2.mlp.experts.4.up_proj.weight"),
            "model.layers.2.mlp.experts.4.up_proj.weight is missing (expected [24, 32])",
        ),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.experts.0.down_proj.weight": torch.zeros(24, 32)}),
            "model.layers.1.mlp.experts.0.down_proj.weight has shape [24, 32], expected [32, 24]",
        ),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.experts.6.down_proj.weight": torch.zeros(32, 24)}),
            "model.layers.1.mlp.experts.6.down_proj.weight [32, 24] is unknown",
        ),
        (
            lambda tensors: tensors.update({"model.layers.1.self_attn.sinks": torch.zeros(4)}),
            "model.layers.1.self_attn.sinks [4] is unknown",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, edit: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    save_hf_model(FAMILY_CASES["qwen3_moe"], tmp_path)
    edit_tensors(tmp_path, edit)
    with pytest.raises(MoesaicError, match=re.escape(message)) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000"),
        ({"num_hidden_layers": 9000}, r"config.json promises [\d,]+ parameters and the files hold [\d,]+"),
        ({"num_experts": 10**9}, "promises 3,000,000,000 experts"),
        ({"num_experts": 300_000}, "config.json promises"),
        ({"vocab_size": 10**30}, r"vocab_size is 10+; no size"),
        ({"vocab_size": 2**40}, "config.json promises"),
        ({"hidden_size": 2**39}, "config.json promises"),
        ({"moe_intermediate_size": 2**39, "hidden_size": 2**39}, "config.json promises"),
        ({"head_dim": 2**40}, "config.json promises"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_made(
    tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    save_hf_model(FAMILY_CASES["qwen3_moe"], tmp_path)
    edit_config(tmp_path, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MoesaicError, match=message):
        load(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_a_refused_directory_leaves_no_file_open(tmp_path: Path) -> None:
    save_hf_model(FAMILY_CASES["llama"], tmp_path)
    edit_config(tmp_path, vocab_size=10**7)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MoesaicError, match="promises"):
        load(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_wrong_dtype_and_device_are_wrong_requests(tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [{"dtype": "int3"}, {"device": "abacus"}]
    for arguments in wrong:
        with pytest.raises(UsageError, match=r"is not known; choose auto|is not here; this machine has"):
            load(tmp_path, **arguments)


def make_run(directory: Path, name: str = "sigmoid", steps: tuple[int, ...] = (1, 2)) -> dict[int, dict[str, Tensor]]:
    """A run directory as training leaves it; returns the weights of each saved step."""
    directory.mkdir(parents=True)
    config = TrainConfig(model=CONFIGS[name], sequence_length=32)
    write_train_config(config, directory / "config.json")
    byte_tokenizer().save(directory)
    extra = {"config": to_mapping(config), "tokenizer": byte_tokenizer().fingerprint}
    saved = {}
    for step in steps:
        saved[step] = random_model(CONFIGS[name]).state_dict()
        tensors = {f"model.{key}": tensor for key, tensor in saved[step].items()}
        save_run_state(directory, step, tensors | {"optimizer.x": torch.zeros(3)}, extra)
    return saved


@pytest.mark.parametrize("name", ["dense tied, biased", "softmax, dense first", "sigmoid, shared, partial rope"])
def test_run_loads_its_newest_state(tmp_path: Path, name: str) -> None:
    saved = make_run(tmp_path / "run", name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(tmp_path / "run")
    assert model.config == CONFIGS[name]
    assert model.state_dict().keys() == saved[2].keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[2][key])
    assert load(tmp_path / "run", dtype="bfloat16").embed_tokens.weight.dtype == torch.bfloat16
    assert load_tokenizer(tmp_path / "run").encode("ab") == [97, 98]


def test_run_with_a_damaged_state_says_so_and_loads_the_older(tmp_path: Path) -> None:
    saved = make_run(tmp_path / "run")
    (tmp_path / "run" / "states" / "step-00000002" / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"step 2 is damaged \(model\.safetensors.*going back to step 1"):
        model = load(tmp_path / "run")
    assert torch.equal(model.state_dict()["norm.weight"], saved[1]["norm.weight"])


def test_a_changed_config_file_does_not_change_the_model(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "sigmoid")
    changed = replace(CONFIGS["sigmoid"], rope_theta=90000.0)
    write_train_config(TrainConfig(model=changed, sequence_length=32), tmp_path / "run" / "config.json")
    assert load(tmp_path / "run").config == CONFIGS["sigmoid"]


def test_a_tokenizer_that_the_run_was_not_trained_with_is_noticed(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    train_bpe(["some other text " * 50], 280).save(tmp_path / "run")
    with pytest.raises(MoesaicError, match="the run was trained with another"):
        load_tokenizer(tmp_path / "run")


def test_run_without_states_is_a_wrong_request(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "states")
    with pytest.raises(UsageError, match="no saved state"):
        load(tmp_path / "run")
