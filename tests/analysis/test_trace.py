"""A trace on disk holds what the routers decided, whole or with a clear error. T tokens, E experts, K per token."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import moesaic
from moesaic.analysis import trace_writer
from moesaic.analysis.locality import hit_curve
from moesaic.analysis.text_rows import record_text, text_rows
from moesaic.analysis.trace import read_trace
from moesaic.analysis.trace_writer import TraceWriter, by_token
from moesaic.errors import MoesaicError, UsageError
from moesaic.ops import Routing
from moesaic.residency.placement import read_record, read_uses

from .test_record import make_model
from .traces import random_ids, routing_of, rows_of, write_trace


def some_text(*lengths: int, sequence_length: int = 8):
    """Two sources, each of documents of these lengths."""
    documents = [[np.random.randint(0, 50, length).astype(np.uint32) for length in lengths] for _ in range(2)]
    return text_rows(documents, [2] * 50, sequence_length=sequence_length, limit=10_000)


@pytest.mark.parametrize(
    "moe",
    [{}, {"router": "expert_choice"}, {"router": "softmax_top_p"}, {"capacity_factor": 0.5}],
    ids=["topk", "choice", "topp", "cap"],
)
def test_a_trace_holds_what_the_routers_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moe: dict[str, object]
) -> None:
    monkeypatch.setattr(trace_writer, "SHARD_BYTES", 2000)
    model, text = make_model(**moe).double(), some_text(21, 5)  # so that no rounding of a batch turns a near tie
    with TraceWriter(tmp_path / "t", num_experts=[6, 6], sources=["a", "b"], with_logits=True) as writer:
        record_text(model, text, writer, batch_size=2)
    trace = read_trace(tmp_path / "t")
    assert len(list((tmp_path / "t").glob("trace-*"))) > 1
    assert len(trace) == 52
    assert np.array_equal(trace.tokens.token_ids, text.token_ids)
    for sequence in np.unique(text.sequence_ids):
        places = np.flatnonzero(text.sequence_ids == sequence)
        with moesaic.record_routing(model.eval()) as alone:
            model(torch.from_numpy(text.token_ids[places])[None])
        for layer in range(2):
            rows, routing = trace.layer(layer), alone[layer].routings[0]
            expected = torch.zeros(len(places), 6)
            expected.index_put_(
                (routing.token_ids, routing.expert_ids), routing.weights.detach().float(), accumulate=True
            )
            found = torch.zeros(len(places), 7)
            found.scatter_add_(
                1,
                torch.from_numpy(rows.expert_ids[places].astype(np.int64)) % 7,
                torch.from_numpy(rows.weights[places]),
            )
            torch.testing.assert_close(found[:, :6], expected)
            assert rows.logits is not None
            torch.testing.assert_close(torch.from_numpy(rows.logits[places]), routing.logits.detach().float())


def test_text_is_cut_into_sequences_and_told_where_it_is_from() -> None:
    text = some_text(21, 5)
    first = text.source_ids == 0
    assert first.sum() == 26
    assert text.document_ids[first].tolist() == [0] * 21 + [1] * 5
    assert text.document_ids[~first].tolist() == [2] * 21 + [3] * 5
    assert np.bincount(text.sequence_ids).tolist() == [8, 8, 8, 2] * 2
    assert text.positions[:10].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    assert text.text_offsets[~first].tolist() == [2 * place for place in range(26)]
    limited = text_rows([[np.arange(9, dtype=np.uint32)] * 3], [1] * 50, sequence_length=4, limit=10)
    assert limited.token_ids.tolist() == [*range(9), 0]


def test_two_lines_make_a_frame(tmp_path: Path) -> None:
    ids = random_ids(40, 5, 2)
    write_trace(tmp_path / "t", [ids, ids[::-1]], 5, names=["prose"])
    trace = read_trace(tmp_path / "t")
    columns = trace.columns(layer=1)
    assert {len(column) for column in columns.values()} == {80}
    assert columns["expert"].tolist() == ids[::-1].reshape(-1).tolist()
    assert columns["token"].tolist() == np.repeat(np.arange(40), 2).tolist()
    assert set(columns["source"]) == {"prose"}
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(columns)
    assert frame.groupby("expert").size().sum() == 80
    assert frame.loc[frame["rank"] == 0, "token_id"].tolist() == trace.tokens.token_ids.tolist()
    assert trace.vocabulary[int(trace.tokens.token_ids[3])] == bytes([int(trace.tokens.token_ids[3])])


def test_padding_is_left_out(tmp_path: Path) -> None:
    mask = torch.tensor([True, False, True, True])
    routing = replace(routing_of(random_ids(4, 3, 1), 3), mask=mask)
    with TraceWriter(tmp_path / "t", num_experts=[3], sources=["a"]) as writer:
        writer.add(rows_of(np.arange(4)), [routing])
    trace = read_trace(tmp_path / "t")
    assert trace.tokens.token_ids.tolist() == [0, 2, 3]
    assert trace.layer(0).expert_ids[:, 0].tolist() == routing.expert_ids[mask].tolist()


def test_tokens_with_fewer_experts_are_filled_up() -> None:
    routing = Routing(
        token_ids=torch.tensor([2, 0, 2]), expert_ids=torch.tensor([1, 3, 0]), weights=torch.tensor([0.1, 0.2, 0.3]),
        logits=torch.zeros(3, 4), num_experts=4, top_k=None,
    )  # fmt: skip
    ids, weights = by_token(routing)
    assert ids.tolist() == [[3, -1], [-1, -1], [1, 0]]
    torch.testing.assert_close(weights, torch.tensor([[0.2, 0], [0, 0], [0.1, 0.3]]))


def test_a_failure_leaves_nothing_and_the_old_trace_stays(tmp_path: Path) -> None:
    ids = random_ids(10, 4, 1)
    before = write_trace(tmp_path / "t", [ids], 4)
    routing = routing_of(random_ids(3, 4, 1), 4)
    writer = TraceWriter(tmp_path / "t", num_experts=[4], sources=["a"]).__enter__()
    writer.add(rows_of(np.arange(3)), [routing])
    with pytest.raises(ValueError, match="2 layers of routing for a trace of 1") as caught:
        writer.add(rows_of(np.arange(3)), [routing, routing])
    writer.__exit__(ValueError, caught.value, None)
    assert len(read_trace(tmp_path / "t")) == len(before)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="is not a trace"):
        TraceWriter(tmp_path / "mine", num_experts=[4], sources=["a"])


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "head", "count", "vocabulary", "version"])
def test_damage_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    write_trace(tmp_path / "t", [random_ids(60, 4, 2)], 4)
    shard, head = tmp_path / "t" / "trace-00001.safetensors", tmp_path / "t" / "trace.json"
    data = bytearray(shard.read_bytes())
    if damage == "cut":
        shard.write_bytes(data[: np.random.randint(len(data))])
    elif damage == "flip":
        data[np.random.randint(len(data))] ^= 1 << np.random.randint(8)
        shard.write_bytes(data)
    elif damage == "missing":
        shard.unlink()
    elif damage == "head":
        head.write_text(head.read_text()[:-20])
    elif damage == "vocabulary":
        (tmp_path / "t" / "vocabulary.safetensors").write_bytes(b"")
    else:
        values = json.loads(head.read_text())
        values["num_tokens" if damage == "count" else "version"] = 61
        head.write_text(json.dumps(values))
    with pytest.raises(MoesaicError, match=r"damaged|missing|not valid JSON|record it anew") as caught:
        read_trace(tmp_path / "t")
    assert str(tmp_path / "t") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_trace_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="moesaic inspect MODEL"):
        read_trace(tmp_path)


def test_the_head_counts_what_each_expert_got_and_placement_reads_it(tmp_path: Path) -> None:
    model, text = make_model(), some_text(40, 9)
    with TraceWriter(tmp_path / "t", num_experts=[6, 6], sources=["a", "b"]) as writer:
        record_text(model, text, writer, batch_size=2)
    trace = read_trace(tmp_path / "t")
    expected = np.stack([np.bincount(trace.layer(layer).flat[1], minlength=6) for layer in range(2)])
    assert expected.sum() == 2 * 2 * len(trace)
    assert trace.head["tokens_per_expert"] == expected.tolist()
    curves = [hit_curve(trace.layer(layer).expert_ids, 6).tolist() for layer in range(2)]
    assert trace.head["cache_hits"] == curves
    record = read_record(tmp_path / "t", 2, 6)
    rows = 2 * 2 * len(trace)
    for slots in range(13):
        sizes = (slots - slots // 2, slots // 2)
        lru = sum(curve[size] for curve, size in zip(curves, sizes, strict=True)) / rows
        assert record.lru_hits(slots) == pytest.approx(lru)
        assert record.placed_hits(slots) == pytest.approx(np.sort(expected, axis=None)[::-1][:slots].sum() / rows)
    assert "the 12 experts used most take 100% of the trace, where the 12 used last would hit" in record.forecast(12)
    assert np.array_equal(read_uses(tmp_path / "t", 2, 6), expected / expected.sum(1, keepdims=True))
