"""Planted truths are found, and the numbers of an inspection are their definitions. E experts, K experts per token."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moesaic.analysis.coactivation import coactivation, lift, partners
from moesaic.analysis.inspection import inspect_trace, labels_of
from moesaic.analysis.movement import movement, require_comparable
from moesaic.analysis.similarity import InputSample, similarity
from moesaic.analysis.token_types import TOKEN_TYPES, token_type
from moesaic.analysis.typical import typical_places, typical_tokens
from moesaic.analysis.usage import relative_entropy, usage
from moesaic.errors import UsageError
from moesaic.model.transformer import Transformer

from .test_record import CONFIG, make_model
from .traces import random_ids, write_trace


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (b" the", "space + letters"),
        (b"ing", "letters"),
        ("größe".encode(), "letters"),
        (b"1984", "digits"),
        (b" 7", "digits"),
        (b" (", "punctuation"),
        (b"    ", "space"),
        (b"\n\n    ", "line break"),
        (b"\xc3", "part of a character"),
        (b"x1", "mixed"),
        (b"<|endoftext|>", "special"),
        (b"</s>", "special"),
        (b"", "special"),
        (b"<=", "punctuation"),
    ],
)
def test_types_of_tokens(text: bytes, name: str) -> None:
    assert TOKEN_TYPES[token_type(text)] == name


def test_a_planted_layer_is_found(tmp_path: Path) -> None:
    """Layer 0: expert = type of the token. Layer 1: expert = domain. Layer 2: none; expert 5 is never used in any."""
    token_ids = np.random.choice(np.frombuffer(b"abcxyz0123456789(){}[] ", np.uint8), 4000).astype(np.int64)
    sources = np.repeat([0, 1], 2000)
    types = np.array([token_type(bytes([token])) for token in token_ids])
    classes = np.unique(types, return_inverse=True)[1]
    layers = [classes[:, None], sources[:, None], np.random.randint(0, 5, (4000, 1))]
    trace = write_trace(tmp_path / "t", layers, 6, token_ids=token_ids, sources=sources, names=["code", "prose"])
    inspection = inspect_trace(trace)
    share = np.bincount(classes) / 4000
    told = [layer["information"] for layer in inspection.layers]
    assert told[0]["token type"]["bits"] == pytest.approx(-(share * np.log2(share)).sum(), rel=1e-12)
    assert told[1]["domain"]["bits"] == pytest.approx(1.0, rel=1e-12)
    assert told[0]["token type"]["p"] == told[1]["domain"]["p"] == 0.01
    assert told[2]["domain"]["bits"] < 0.02
    assert told[2]["domain"]["z"] < 8
    assert inspection.layers[1]["overlap"].tolist() == [[1, 0], [0, 1]]
    assert [5 in layer["dead"] for layer in inspection.layers] == [True] * 3
    assert inspection.layers[1]["dead"].tolist() == [2, 3, 4, 5]
    digits = classes[token_ids == ord("7")][0]
    assert {token["text"] for token in inspection.layers[0]["typical"][digits]} == set("0123456789")
    context = inspection.layers[0]["contexts"][digits][0]
    assert context["text"][1] in "0123456789"
    plain = json.loads(json.dumps(inspection.plain(), allow_nan=False))
    assert plain["dead_experts"] == sum(len(layer["dead"]) for layer in plain["layers"])
    assert [len(layer["load"]) for layer in plain["layers"]] == [6, 6, 6]


def test_usage_is_its_definition(tmp_path: Path) -> None:
    ids = random_ids(500, 6, 2)
    weights = np.random.rand(500, 2).astype(np.float32)
    found = usage(write_trace(tmp_path / "t", [ids], 6, weights=[weights]).layer(0))
    loads = [(ids == expert).sum() for expert in range(6)]
    assert found["load"].tolist() == loads
    assert found["max_vio"] == pytest.approx(max(loads) / np.mean(loads) - 1)
    for expert in range(6):
        assert found["weight"][expert] == pytest.approx(weights[ids == expert].mean(), rel=1e-5)
    assert found["top_share"] == pytest.approx((weights.max(1) / weights.sum(1)).mean(), rel=1e-5)
    assert found["experts_per_token"] == 2
    assert relative_entropy(np.array([3, 3, 3])) == pytest.approx(1)
    assert relative_entropy(np.array([0, 9, 0])) == 0


def test_coactivation_is_counted_and_judged_against_chance(tmp_path: Path) -> None:
    one, other = random_ids(300, 5, 2), random_ids(300, 5, 3)
    trace = write_trace(tmp_path / "t", [one, other], 5)
    within, across = coactivation(trace.layer(0)), coactivation(trace.layer(0), trace.layer(1))
    for i in range(5):
        for j in range(5):
            assert within[i, j] == ((one == i).any(1) & (one == j).any(1)).sum()
            assert across[i, j] == ((one == i).any(1) & (other == j).any(1)).sum()
    loads = [np.bincount(ids.ravel(), minlength=5) for ids in (one, other)]
    lifts = lift(across, loads[0], loads[1], 300)
    assert lifts[2, 3] == pytest.approx(across[2, 3] / 300 / (loads[0][2] / 300 * loads[1][3] / 300))
    told = partners(lifts, across, 2, 1)
    assert all(value > 1 for row in told for _, value in row)
    assert told[0] == sorted(told[0], key=lambda pair: -pair[1])


def test_favourites_are_what_an_expert_gets_more_often(tmp_path: Path) -> None:
    token_ids = np.random.randint(0, 20, 3000)
    ids = np.random.randint(0, 4, (3000, 1))
    ids[token_ids == 7] = 2
    rows = write_trace(tmp_path / "t", [ids], 4, token_ids=token_ids).layer(0)
    best = typical_tokens(token_ids, rows, 3)[2][0]
    count = (token_ids == 7).sum()
    assert (best.token_id, best.count) == (7, count)
    assert best.lift == pytest.approx(3000 / (ids == 2).sum())
    for expert, places in enumerate(typical_places(token_ids, rows, 4)):
        assert len({token_ids[place] for place in places}) == len(places) == 4
        strongest = rows.weights[ids[:, 0] == expert].max()
        assert rows.weights[places[0], 0] == strongest


def test_movement_is_its_definition(tmp_path: Path) -> None:
    before = random_ids(400, 6, 2)
    after = np.where(np.random.rand(400, 1) < 0.3, random_ids(400, 6, 2), before[:, ::-1])
    sources = np.repeat([0, 1], 200)
    token_ids = np.random.randint(0, 9, 400)
    one, other = (
        write_trace(tmp_path / name, [ids], 6, token_ids=token_ids, sources=sources, names=["a", "b"])
        for name, ids in (("one", before), ("other", after))
    )
    require_comparable(one, other)
    found = movement(one.layer(0), other.layer(0), sources, 2)
    changed = np.array([set(a) != set(b) for a, b in zip(before, after, strict=True)])
    assert found["changed"] == pytest.approx(changed.mean())
    assert found["changed_by_source"].tolist() == pytest.approx([changed[:200].mean(), changed[200:].mean()])
    assert found["first_changed"] == pytest.approx((before[:, 0] != after[:, 0]).mean())
    kept = [len(set(a) & set(b)) / 2 for a, b in zip(before, after, strict=True)]
    assert found["kept"] == pytest.approx(np.mean(kept), rel=1e-5)
    loads = [np.bincount(ids.ravel(), minlength=6) / 800 for ids in (before, after)]
    assert found["load_shift"] == pytest.approx(np.abs(loads[1] - loads[0]).sum() / 2)
    assert found["flow"].sum() == pytest.approx(sum(len(set(a) - set(b)) for a, b in zip(before, after, strict=True)))
    same = movement(one.layer(0), one.layer(0), sources, 2)
    assert (same["changed"], same["kept"], same["load_shift"], same["flow"].sum()) == (0, 1, 0, 0)


def test_traces_of_other_text_or_shape_are_not_compared(tmp_path: Path) -> None:
    ids = random_ids(50, 4, 1)
    trace = write_trace(tmp_path / "one", [ids], 4, token_ids=np.zeros(50, int))
    for number, (other, message) in enumerate(
        [
            ({"layers": [ids], "num_experts": 4, "token_ids": np.arange(50) // 30}, "differ in token 30"),
            ({"layers": [ids], "num_experts": 5, "token_ids": np.zeros(50, int)}, "compare models of one shape"),
            ({"layers": [ids[:40]], "num_experts": 4, "token_ids": np.zeros(40, int)}, "50 and 40 tokens"),
        ]
    ):
        with pytest.raises(UsageError, match=message):
            require_comparable(trace, write_trace(tmp_path / str(number), **other))  # type: ignore[arg-type]


def planted_model() -> Transformer:
    """In both layers expert 4 has the weights of expert 1, and expert 5 those of expert 0 in another order of units."""
    assert CONFIG.moe is not None
    model = Transformer(replace(CONFIG, hidden_size=32, moe=replace(CONFIG.moe, moe_intermediate_size=32)))
    model.init_weights(int(torch.randint(0, 2**31, ())))
    with torch.no_grad():
        for layer in model.moe_layers:
            gate_up, down = layer.experts.gate_up, layer.experts.down
            gate_up[4], down[4] = gate_up[1], down[1]
            order = torch.randperm(32)
            gate_up[5] = gate_up[0][torch.cat([order, 32 + order])]
            down[5] = down[0][:, order]
    return model


@pytest.mark.parametrize("packed", [None, "int8"])
def test_duplicates_are_found(packed: str | None) -> None:
    model = planted_model().eval()
    if packed is not None:
        for layer in model.moe_layers:
            layer.experts.quantize(packed, 32)
    with InputSample(model) as sample:
        model(torch.randint(0, 50, (4, 30)))
    for index, layer in enumerate(model.moe_layers):
        found = similarity(model, index, sample.of_layer(index))
        assert set(found.duplicates()) == {(1, 4), (0, 5)}
        assert float(found.weights[0, 5]) < 0.9
        weights = layer.experts.weights(torch.float32)
        matrices = [weights.matrices_of(expert, torch.float32) for expert in range(6)]
        flat = torch.stack([torch.cat([matrix.reshape(-1) for matrix in both]) for both in matrices])
        cosines = torch.corrcoef(torch.cat([flat, -flat], dim=1))  # means of zero: correlations are cosines
        torch.testing.assert_close(found.weights, cosines, atol=1e-4, rtol=0)
        assert found.compared == found.numbers == flat.shape[1]


def test_outputs_are_those_of_the_experts_on_what_the_layer_got() -> None:
    model = make_model().eval()
    got: list[torch.Tensor] = []
    model.moe_layers[1].experts.register_forward_pre_hook(lambda module, args: got.append(args[0]))
    with InputSample(model) as sample:
        model(torch.randint(0, 50, (2, 20)))
    x_SD = sample.of_layer(1)
    assert all((got[0] == row).all(1).any() for row in x_SD)
    weights = model.moe_layers[1].experts.weights(torch.float32)
    outputs = []
    for expert in range(6):
        gate_up, down = weights.matrices_of(expert, torch.float32)
        gate, up = (x_SD @ gate_up.T).chunk(2, dim=1)
        outputs.append(((torch.nn.functional.silu(gate) * up) @ down.T).flatten())
    expected = torch.nn.functional.cosine_similarity(torch.stack(outputs)[:, None], torch.stack(outputs)[None], dim=2)
    torch.testing.assert_close(similarity(model, 1, x_SD).outputs, expected, atol=1e-4, rtol=1e-3)


def test_positions_are_told_in_powers_of_two(tmp_path: Path) -> None:
    labels = labels_of(write_trace(tmp_path / "t", [random_ids(300, 4, 1)], 4, length=20))
    position = next(label for label in labels if label.name == "position")
    assert list(position.values) == ["0", "1", "2–3", "4–7", "8–15", "16–31"]
    assert position.of_token[:20].tolist() == [0, 1, 2, 2, 3, 3, 3, 3, *[4] * 8, *[5] * 4]


def test_a_long_trace_is_analysed_quickly(tmp_path: Path) -> None:
    """A fortieth of a million tokens and a quarter of 16 layers; the limit for all is a minute, and this is lenient."""
    layers = [random_ids(25_000, 64, 8) for _ in range(4)]
    trace = write_trace(tmp_path / "t", layers, 64, length=250, document=2000)
    start = time.process_time()
    inspection = inspect_trace(trace)
    assert time.process_time() - start < 20
    assert inspection.layers[3]["hits"][-1] == 25_000 * 8 - 64
