"""Reports, comparisons, costs, pages and calibration: what a user gets."""

import json
import random
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moesaic.plan.calibrate import Calibration, calibrate, calibrated_cluster, to_toml
from moesaic.plan.cluster import parse_cluster
from moesaic.plan.communication import all_to_all_seconds
from moesaic.plan.comparison import compare
from moesaic.plan.comparison import to_json as comparison_json
from moesaic.plan.costs import costs, dollars_per_million
from moesaic.plan.efficiency import TRAINING
from moesaic.plan.html_page import render_page
from moesaic.plan.inference import InferenceTask, Phase
from moesaic.plan.report import Plan, make_plan, to_json
from moesaic.plan.subject import Subject, find_subject
from moesaic.plan.table import duration, parameters, short
from moesaic.plan.training import TrainingTask

TRAIN = TrainingTask(tokens=1e12, batch_tokens=512 * 4096, sequence=4096)


def made(task: TrainingTask | InferenceTask, cluster: str = "8xH100", model: str = "mixtral-8x7b") -> Plan:
    return make_plan(find_subject(model), parse_cluster(cluster), task)


@pytest.mark.parametrize("task", [TRAIN, InferenceTask(phase="decode"), InferenceTask(phase="prefill")])
def test_a_report_survives_json(task: TrainingTask | InferenceTask) -> None:
    report = json.loads(json.dumps(to_json(made(task, "64xH100")), allow_nan=False))
    assert report["parameters"]["total"] == 46_702_792_704
    assert report["bytes"]["weights"] == 2 * report["parameters"]["total"]
    assert report["bytes"]["kv_per_token"] == 2 * 2 * 32 * 8 * 128
    for option in report["options"]:
        low, high = option["tokens_per_second_range"]
        assert low < option["tokens_per_second"] < high
        assert sum(option["memory"]["parts"].values()) == pytest.approx(option["memory"]["total"])
        assert option["bound"]


def test_costs_are_hours_times_price_and_power() -> None:
    cluster = parse_cluster("8xH100")
    one = costs(cluster, 3600 * 10, 0.0)
    assert one.dollars == pytest.approx((80 * 1.9, 80 * 6.9))
    assert one.kilowatt_hours == pytest.approx((56 * 0.6 * 1.1, 56 * 1.5))
    low, high = dollars_per_million(cluster, 1e6 / 3600, 0.0)
    assert (low, high) == pytest.approx((8 * 1.9, 8 * 6.9))
    assert costs(parse_cluster("laptop"), 3600, 0.1).dollars is None
    wide, narrow = costs(cluster, 3600, 0.5), costs(cluster, 3600, 0.1)
    assert wide.kilowatt_hours[0] < narrow.kilowatt_hours[0] < narrow.kilowatt_hours[1] < wide.kilowatt_hours[1]


def test_the_energy_of_gpt_3_lies_in_the_range() -> None:
    """1,287 MWh (arXiv 2104.10350, table 4) in 14.8 days of 10,000 V100."""
    low, high = costs(parse_cluster("10000xV100"), 14.8 * 86400, 0.0).kilowatt_hours
    assert low < 1_287_000 < high


def test_a_comparison_tells_the_ratios() -> None:
    tasks = [InferenceTask(phase="prefill"), InferenceTask(phase="decode"), TRAIN]
    found = compare(find_subject("mixtral-8x7b"), find_subject("llama-2-70b"), parse_cluster("64xH100"), tasks)
    lines = {line["name"]: line for line in comparison_json(found)["lines"]}
    assert lines["parameters of a token"]["ratio"] == pytest.approx(12.88 / 68.98, rel=1e-3)
    assert lines["training speed"]["ratio"] > 2
    assert lines["decode, 1 at a time"]["ratio"] > 1
    for line in lines.values():
        assert line["ratio"] == pytest.approx(line["left"] / line["right"])
    assert not found.unfit
    tight = compare(find_subject("mixtral-8x7b"), find_subject("gpt-3-175b"), parse_cluster("2xH100"), tasks[:1])
    assert any("gpt-3-175b does not fit" in words for words in tight.unfit)


class Page(HTMLParser):
    """Tags that are open, and what they refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


@pytest.mark.parametrize(
    ("task", "cluster"),
    [(TRAIN, "64xH100"), (InferenceTask(phase="decode", precision="int4"), "laptop:16GiB:ddr5"),
     (InferenceTask(phase="prefill"), "8xH100")],
)  # fmt: skip
def test_a_page_reads_nothing_from_elsewhere(task: TrainingTask | InferenceTask, cluster: str) -> None:
    text = render_page(made(task, cluster))
    page = Page()
    page.feed(text)
    assert page.links == []
    assert "@import" not in text
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text
    assert page.tags.count("svg") == 3
    assert "NaN" not in text
    assert "nan" not in text.replace("finance", "")


def test_names_in_a_page_are_text() -> None:
    known = find_subject("mixtral-8x7b")
    subject = Subject(name="<script>alert(1)</script>", config=known.config)
    text = render_page(make_plan(subject, parse_cluster("8xH100"), InferenceTask(phase="decode")))
    assert "<script" not in text


def test_this_machine_is_measured_and_written_as_a_cluster(tmp_path: Path) -> None:
    found = calibrate(tmp_path)
    assert 1e8 < found.bandwidth < 1e13
    assert 1e8 < found.disk < 1e12
    assert 1e8 < found.flops_bfloat16 < 1e16
    assert (found.link, found.latency, found.ranks) == (None, None, 1)
    assert 1e8 < found.flops_int8 < 1e16
    path = tmp_path / "machine.toml"
    path.write_text(to_toml(found))
    read, own = parse_cluster(str(path)), calibrated_cluster(found)
    assert read.device.kind == own.device.kind == "calibrated"
    assert read.device.bandwidth == pytest.approx(own.device.bandwidth, rel=1e-3)
    assert read.device.memory == own.device.memory
    assert read.disk == pytest.approx(own.disk, rel=1e-3)


@pytest.mark.parametrize(
    ("num_layers", "phase", "recorded"),
    [(1, "prefill", 16_730.0), (2, "prefill", 3_340.0), (1, "decode", 427.0), (2, "decode", 212.0)],
)
def test_recorded_speeds_are_predicted_from_limits_measured_beside_them(
    num_layers: int, phase: Phase, recorded: float
) -> None:
    """Of int4 on a quiet machine (benchmarks/results/plan.md): tokens per second of OLMoE-1B-7B's layers,
    the best of seven rounds, as limits are the best of several."""
    config = replace(find_subject("olmoe-1b-7b").config, num_hidden_layers=num_layers, vocab_size=16384)
    limits = Calibration(
        "recorded", bandwidth=34.4e9, flops_float32=196e9, flops_bfloat16=431e9, flops_int8=680e9, disk=2.4e9,
        link=None, latency=None, ranks=1, memory=2**35,
    )  # fmt: skip
    # Our int4 keeps in 8 bits what is small.
    context = 512 if phase == "prefill" else 44
    task = InferenceTask(phase=phase, context=context, precision="int4", dense_precision="int8")
    found = make_plan(Subject(name="bench", config=config), calibrated_cluster(limits), task).options[0].estimate
    assert found.tokens_per_second == pytest.approx(recorded, rel=0.2)


def test_links_that_were_measured_are_written_and_predict_an_exchange(tmp_path: Path) -> None:
    link, latency = 10 ** random.uniform(7, 10), 10 ** random.uniform(-4, -2)
    limits = Calibration("made up", 1e10, 1e11, 1e11, 1e11, 1e9, link, latency, ranks=2, memory=2**33)
    path = tmp_path / "machine.toml"
    path.write_text(to_toml(limits))
    size = 10 ** random.uniform(5, 8)
    for cluster in (calibrated_cluster(limits), parse_cluster(str(path))):
        # With 8 of 64 experts all but 1 token in 256 have one on the other of two ranks.
        expected = size * (1 - 2**-8) / link + latency
        assert all_to_all_seconds(size, 8, 8, cluster, 2, TRAINING) == pytest.approx(expected, rel=0.02)


def test_figures_are_short() -> None:
    assert short(1.234e12) == "1.23 T"
    assert short(45_600) == "45.6 k"
    assert parameters(6.74e9) == "6.74 B"
    assert duration(random.uniform(1.5, 50)).endswith(" s")
    assert duration(3 * 86400) == "3 days"
