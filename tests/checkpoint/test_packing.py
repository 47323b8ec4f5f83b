"""What config.json says of packed weights, and directories that hold them: complete, or refused by name."""

import contextlib
import copy
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.checkpoint.load import load
from moesaic.checkpoint.packing import quantization_from_config, quantization_to_config
from moesaic.checkpoint.quantize import quantize
from moesaic.errors import MoesaicError
from moesaic.model.quantize import SCHEMES, make_quantization
from moesaic.weight_reader import read_safetensors
from moesaic.weights_io import write_safetensors

from .helpers import CONFIGS, random_model, random_tokens
from .test_quantize import export

GOOD = quantization_to_config(make_quantization("int4", CONFIGS["softmax"]))
HOSTILE = (
    None,
    True,
    -1,
    0,
    2,
    48,
    10**30,
    1.5,
    math.nan,
    "",
    "int3",
    "x" * 10**5,
    "\x1b[31m\n",
    [],
    [32],
    {},
    {"": 1},
)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_written_is_read(scheme: str) -> None:
    quantization = make_quantization(scheme, CONFIGS["softmax"], group_size=32)
    assert quantization_from_config(json.loads(json.dumps(quantization_to_config(quantization)))) == quantization


@pytest.mark.parametrize("other", [None, {}, [], "moesaic", {"quant_method": "fp8"}, {"quant_method": ["moesaic"]}])
def test_other_methods_are_for_others(other: Any) -> None:
    assert quantization_from_config(other) is None


def test_hostile_values_are_refused_in_one_line() -> None:
    changed = [GOOD | {key: value} for key in [*GOOD, "bits", "\n"] for value in HOSTILE if key != "quant_method"]
    changed += [GOOD | {"formats": GOOD["formats"] | {"experts": value}} for value in HOSTILE]
    changed += [GOOD | {"formats": {key: "int8"}} for key in ("router", "", "\x1b[31m\n", "x" * 10**5)]
    changed += [{key: value for key, value in GOOD.items() if key != left} for left in GOOD if left != "quant_method"]
    changed.append(GOOD | {"group_size": 64, "formats": {"experts": "mxfp4"}})
    for values in changed:
        with pytest.raises(MoesaicError) as caught:
            quantization_from_config(values)
        assert type(caught.value) is MoesaicError
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    export(random_model(CONFIGS["sigmoid, shared, partial rope"]), tmp_path / "plain")
    quantize(tmp_path / "plain", tmp_path / "packed", "int4")
    return tmp_path / "packed"


def change_config(directory: Path, **values: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        ({"experts": "int4"}, "layers.0.attention.q_proj.weight has shape"),
        ({**GOOD["formats"], "attention": "int4"}, "layers.0.attention.q_proj.weight has shape"),
        ({**GOOD["formats"], "experts": "int8"}, "layers.1.feed_forward.experts.gate_up has shape"),
        ({kind: format for kind, format in GOOD["formats"].items() if kind != "lm_head"}, "lm_head.weight"),
    ],
)
def test_formats_that_the_files_contradict_are_refused(quantized: Path, formats: Any, message: str) -> None:
    change_config(quantized, quantization_config=GOOD | {"formats": formats})
    with pytest.raises(MoesaicError, match="do not fit its config") as caught:
        load(quantized)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"formats": {**GOOD["formats"], "experts": "mxfp4"}},  # of the same shape as int4
        {"formats": dict.fromkeys(GOOD["formats"], "mxfp4")},
        {"scheme": "int8"},
        {"scheme": "mxfp4"},
        {"formats": dict.fromkeys(GOOD["formats"], "int8")},
    ],
)
def test_formats_of_another_scheme_are_refused(quantized: Path, values: dict[str, Any]) -> None:
    change_config(quantized, quantization_config=GOOD | values)
    with pytest.raises(MoesaicError, match=r"packed: config\.json: .* which are not those of scheme \w+; quantise"):
        load(quantized)


@pytest.mark.parametrize("values", [None, {"quant_method": "fp8"}, {"quant_method": "mxfp4"}])
def test_packed_weights_without_their_config_are_recognised(quantized: Path, values: Any) -> None:
    change_config(quantized, quantization_config=values)
    with pytest.raises(MoesaicError, match=r"holds packed weights of moesaic, such as .*; copy the config\.json"):
        load(quantized)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "type", "plain", "cut short", "no method"])
def test_files_that_contradict_their_config_are_refused(quantized: Path, change: str) -> None:
    file = quantized / "model.safetensors"
    tensors = read_safetensors(file)
    name = random.choice([name for name, tensor in tensors.items() if tensor.dtype == torch.uint8])
    if change == "missing":
        del tensors[name]
    elif change == "unknown":
        tensors["layers.0.other"] = torch.zeros(3, dtype=torch.uint8)
    elif change == "shape":
        tensors[name] = tensors[name][..., :-1].contiguous()
    elif change == "type":
        tensors[name] = tensors[name].view(torch.int8)
    elif change == "plain":
        tensors["norm.weight"] = tensors["norm.weight"].to(torch.uint8)
    write_safetensors(file, tensors)
    if change == "cut short":
        os.truncate(file, file.stat().st_size - random.randrange(1, 1000))
    elif change == "no method":
        change_config(quantized, quantization_config=None)
    with pytest.raises(MoesaicError) as caught:
        load(quantized)
    assert str(caught.value).isprintable()


def test_random_damage_never_loads_as_something_else(quantized: Path) -> None:
    """A header or a config with some changed bytes is refused, or says the same."""
    tokens = random_tokens()
    with torch.no_grad():
        expected = load(quantized)(tokens)
    for file_name, reach in (("model.safetensors", 6000), ("config.json", 10**6)):
        whole = (quantized / file_name).read_bytes()
        for _ in range(40):
            damaged = bytearray(whole)
            for _ in range(random.choice((1, 1, 3))):
                damaged[random.randrange(min(reach, len(whole)))] = random.randrange(32, 127)
            (quantized / file_name).write_bytes(damaged)
            with contextlib.suppress(MoesaicError):
                model = load(quantized)
                with torch.no_grad():
                    assert model(tokens % model.config.vocab_size).shape[:2] == expected.shape[:2]
        (quantized / file_name).write_bytes(whole)


def test_a_config_may_not_promise_what_the_files_lack(quantized: Path) -> None:
    change_config(quantized, num_hidden_layers=10_000)
    with pytest.raises(MoesaicError, match="promises"):
        load(quantized)


def test_block_of_config_is_not_shared() -> None:
    values = copy.deepcopy(GOOD)
    quantization_from_config(values)
    assert values == GOOD
