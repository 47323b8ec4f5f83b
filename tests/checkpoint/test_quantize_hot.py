"""A directory whose hot experts have 8 bits beside 4: planned by a record, written, read, and refused by name."""

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.checkpoint.load import load
from moesaic.checkpoint.packing import quantization_from_config, quantization_to_config
from moesaic.checkpoint.quantize import quantize
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.mixed_precision import HotBudget
from moesaic.model.quantize import make_quantization, packed_weights, quantize_model
from moesaic.weight_reader import WeightDirectory

from .family_cases import FAMILY_CASES
from .helpers import CONFIGS, random_model, save_hf_model
from .test_quantize import assert_same, export

FAMILIES = ["mixtral", "deepseek_v3", "gpt_oss", "dbrx"]
"""With experts one by one on disk and fused, gate and up apart and joined, biases, and dense layers before."""
SOFTMAX = CONFIGS["softmax"]
GOOD = quantization_to_config(make_quantization("int4", SOFTMAX, hot=((0, 3), (), (1,))))


def record(directory: Path, num_layers: int, num_experts: int) -> Path:
    """Counts that differ a lot, so that layers get different numbers of hot experts."""
    counts = (1 + np.random.pareto(1.0, (num_layers, num_experts)) * 100).astype(int).tolist()
    file = directory / "uses.json"
    file.write_text(json.dumps({"tokens_per_expert": counts}))
    return file


@pytest.mark.parametrize("name", FAMILIES)
def test_a_directory_holds_what_packing_in_memory_gives(tmp_path: Path, name: str) -> None:
    save_hf_model(FAMILY_CASES[name], tmp_path / "plain")
    in_memory = load(tmp_path / "plain")
    moe, layers = in_memory.config.moe, in_memory.config.num_moe_layers
    assert moe is not None
    uses = record(tmp_path, layers, moe.num_experts)
    budget = HotBudget(uses, share=0.4)
    made = quantize(tmp_path / "plain", tmp_path / "packed", "int4", hot=budget, max_shard_bytes=20_000)
    hot = made.quantization.hot
    assert sum(map(len, hot)) == int(0.4 * layers * moe.num_experts)
    quantize_model(in_memory, make_quantization("int4", in_memory.config, hot=hot))
    loaded = load(tmp_path / "packed")
    assert_same(loaded, in_memory)
    assert_same(load(tmp_path / "packed", quantization="int4"), in_memory)
    assert loaded.config == in_memory.config
    assert made.nbytes == sum(tensor.nbytes for tensor in loaded.state_dict().values())
    with WeightDirectory(tmp_path / "packed") as weights:
        assert set(weights.names) == set(loaded.state_dict())
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert config["hot_experts"] == [list(numbers) for numbers in hot]
    assert config["formats"]["hot_experts"] == "int8"


def test_the_report_adds_up(tmp_path: Path) -> None:
    export(random_model(SOFTMAX), tmp_path / "plain")
    counts = [[90, 10, 0, 0, 0], [20, 20, 21, 19, 20], [0, 0, 0, 30, 70]]
    (tmp_path / "uses.json").write_text(json.dumps({"tokens_per_expert": counts}))
    made = quantize(tmp_path / "plain", tmp_path / "packed", "int4", hot=HotBudget(tmp_path / "uses.json", share=0.2))
    assert made.quantization.hot == ((0,), (), (3, 4))
    assert made.hot_uses == pytest.approx((0.9 + 0 + 1) / 3)
    of_one = 3 * 32 * 24
    assert made.kinds["hot_experts"].weights == 3 * of_one
    assert made.kinds["experts"].weights == 12 * of_one
    # 24 inputs of the second product fill one group of 32.
    assert made.expert_bits == pytest.approx(8 * (3 * (32 + 512) + 12 * (32 + 256)) * (3 + 2) / (15 * of_one))
    assert made.kinds["hot_experts"].relative_error < 0.01 < 0.05 < made.kinds["experts"].relative_error < 0.1
    plain = quantize(tmp_path / "plain", tmp_path / "int4", "int4")
    assert plain.quantization.hot == ()
    assert "hot_experts" not in (tmp_path / "int4" / "config.json").read_text()
    assert made.weights == plain.weights
    assert made.packed_share == plain.packed_share
    assert made.plain_nbytes == plain.plain_nbytes


def test_bits_are_a_limit(tmp_path: Path) -> None:
    export(random_model(SOFTMAX), tmp_path / "plain")
    uses = record(tmp_path, 3, 5)
    cold, hot = (8 * 5 * block / (3 * 32 * 24) for block in (32 + 256, 32 + 512))  # 3 panels of gate_up, 2 of down
    step = (hot - cold) / 15
    for number in range(3):
        limit = random.uniform(cold + step, hot)
        made = quantize(tmp_path / "plain", tmp_path / f"{number}", "int4", hot=HotBudget(uses, bits=limit))
        assert limit - step - 1e-9 < made.expert_bits <= limit + 1e-9


def test_records_and_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    export(random_model(SOFTMAX), tmp_path / "plain")
    export(random_model(CONFIGS["dense"]), tmp_path / "dense")
    uses = record(tmp_path, 3, 5)
    (tmp_path / "other").mkdir()
    other = record(tmp_path / "other", 3, 6)
    before = sorted(path.name for path in tmp_path.iterdir())
    out = tmp_path / "out"
    for source, scheme, hot, message in (
        ("plain", "int8", HotBudget(uses, share=0.5), "scheme int8 has none of these; choose scheme int4"),
        ("plain", "mxfp4", HotBudget(uses, share=0.5), "scheme mxfp4 has none of these; choose scheme int4"),
        ("plain", "int4", HotBudget(other, share=0.5), "is of 3 x 6 layers and experts, and this model has 3 x 5"),
        ("plain", "int4", HotBudget(tmp_path / "none", share=0.5), "none is no trace; record one: moesaic inspect"),
        ("plain", "int4", HotBudget(uses, share=0.05), "hot share 0.05 of 15 experts is none"),
        ("plain", "int4", HotBudget(uses, bits=2), "2 bits: the experts take"),
        ("dense", "int4", HotBudget(uses, share=0.5), "this one is dense; leave --hot out"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            quantize(tmp_path / source, out, scheme, hot=hot)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_budget_of_memory_is_refused_in_one_line(tmp_path: Path) -> None:
    export(random_model(SOFTMAX), tmp_path / "plain")
    quantize(tmp_path / "plain", tmp_path / "packed", "int4", hot=HotBudget(record(tmp_path, 3, 5), share=0.4))
    with pytest.raises(UsageError, match="quantise the model without --hot, or leave memory out"):
        load(tmp_path / "packed", memory="4GiB")


def test_what_is_written_is_read() -> None:
    quantization = make_quantization("int4", SOFTMAX, hot=((0, 3), (), (1,)))
    assert quantization_from_config(json.loads(json.dumps(quantization_to_config(quantization)))) == quantization


HOSTILE = (None, True, -1, 1.5, "", "x" * 10**5, {}, {"0": [1]}, [], [[]], [1], [[1], 2], [[True]], [["1"]], [[1.0]])


def test_hostile_hot_experts_are_refused_in_one_line() -> None:
    changed = [GOOD | {"hot_experts": value} for value in HOSTILE]
    changed.append({key: value for key, value in GOOD.items() if key != "hot_experts"})
    changed.append(GOOD | {"formats": {kind: each for kind, each in GOOD["formats"].items() if kind != "hot_experts"}})
    changed += [GOOD | {"formats": GOOD["formats"] | {"hot_experts": format}} for format in ("int4", "mxfp4")]
    changed.append(GOOD | {"formats": GOOD["formats"] | {"experts": "int8"}})
    for values in changed:
        with pytest.raises(MoesaicError) as caught:
            quantization_from_config(values)
        assert type(caught.value) is MoesaicError
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("hot", "message"),
    [
        ([[0, 3], []], "given for 2 layers, and 3 layers of this model have experts"),
        ([[0, 3], [], [1], []], "given for 4 layers"),
        ([[0, 3], [], [5]], "layer 2 of 3: they need to be numbers from 0 to 4"),
        ([[0, 3], [], [-1]], "layer 2 of 3"),
        ([[0, 3], [], [10**30]], "layer 2 of 3"),
        ([[3, 0], [], [1]], "layer 0 of 3"),
        ([[0, 0], [], [1]], "layer 0 of 3"),
        ([[0, 3], [1], []], "do not fit its config.json"),
        ([[0, 2, 3], [], [1]], "experts.gate_up has shape"),
    ],
)
def test_hot_experts_that_the_model_contradicts_are_refused(tmp_path: Path, hot: Any, message: str) -> None:
    export(random_model(SOFTMAX), tmp_path / "plain")
    counts = [[90, 0, 0, 60, 0], [20, 20, 20, 20, 20], [30, 60, 0, 0, 10]]
    (tmp_path / "uses.json").write_text(json.dumps({"tokens_per_expert": counts}))
    made = quantize(tmp_path / "plain", tmp_path / "packed", "int4", hot=HotBudget(tmp_path / "uses.json", share=0.2))
    assert made.quantization.hot == ((0, 3), (), (1,))
    assert {weight.format for kind, _, weight in packed_weights(load(tmp_path / "packed")) if kind == "experts"} == {
        "int4"
    }
    file = tmp_path / "packed" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"quantization_config": config["quantization_config"] | {"hot_experts": hot}}))
    with pytest.raises(MoesaicError) as caught:
        load(tmp_path / "packed")
    assert message in str(caught.value)
    assert str(caught.value).isprintable()
