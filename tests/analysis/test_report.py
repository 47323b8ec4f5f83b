"""The report: every number of the verdict, whoever wins, and a page that no text can break."""

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from moesaic.analysis.comparison import Comparison, RunCurve, relative_load
from moesaic.analysis.report import headline, lede, load_history, render_page, write_report
from moesaic.errors import MoesaicError

DOMAINS = ["modules", "tests", "documentation", "data tables"]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{css}} & <!-- \x00 \ud800"


def run_curve(
    name: str, final_loss: float, *, steps: int = 600, evaluations: int = 12, seconds: float = 180.0, layers: int = 0,
    experts: int = 16,
) -> RunCurve:  # fmt: skip
    """A run that falls as 1/sqrt(step) and then decays to `final_loss`, with loads that even out."""
    rng = random.Random(name)
    popularity = [[rng.lognormvariate(0, 0.9) for _ in range(experts)] for _ in range(layers)]
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        part = step / steps
        loss = final_loss + 3.2 / (1 + 60 * part) - 3.2 / 61 + 0.5 * min(1.0, 2 - 2 * part)
        place = {"step": step, "tokens": step * 8192, "seconds": round(part * seconds, 3)}
        load = [_shares([p ** (0.9 * math.exp(-4 * part)) * rng.gauss(1, 0.07) for p in layer]) for layer in popularity]
        balance = {"max_vio": max(max(s) * experts - 1 for s in load), "load": load} if load else {}
        rows.append({
            "kind": "train", **place, "loss": round(loss + rng.gauss(0, 0.05), 4), "lr": 3e-3, "grad_norm": 0.5,
            "tokens_per_second": steps * 8192 / seconds, "mfu": 0.3, "aux_loss": 1.0, "z_loss": 0.1,
            "dead_experts": 0 if load else None, "skipped": False, **balance,
        })  # fmt: skip
        if step % max(1, steps // evaluations) == 0 or step == steps:
            rows.append({"kind": "eval", **place, "flops": 8192 * step * 2.4e7, "val_loss": round(loss, 4),
                         "bits_per_byte": round(loss / 2.3, 4), **balance})  # fmt: skip
    return RunCurve(
        name=name, rows=rows, parameters_total=12_400_000 if layers else 3_900_000,
        parameters_active=3_910_000 if layers else 3_900_000, flops_per_token=2.41e7 if layers else 2.4e7,
    )  # fmt: skip


def _shares(weights: list[float]) -> list[float]:
    positive = [max(0.0, weight) for weight in weights]
    return [round(weight / sum(positive), 4) for weight in positive]


def comparison(
    *, gain: float = 0.0447, experts: int = 16, layers: int = 4, sparse_seconds: float = 221.0, **curve: Any
) -> Comparison:
    rng = random.Random(experts)
    sizes = [4000.0, 2500.0, 2200.0, 900.0]
    domain_load = [
        [[size * rng.lognormvariate(0, 0.55) for _ in range(experts)] for size in sizes] for _ in range(layers)
    ]
    return Comparison(
        sparse=run_curve("sparse", 2.8092 - gain, seconds=sparse_seconds, layers=layers, experts=experts, **curve),
        dense=run_curve("dense", 2.8092, **curve),
        domains=DOMAINS,
        domain_load=domain_load,
        samples=[
            ("def ", "read_config(path: str) -> dict:\n    with open(path) as f:\n        return parse(f.read())\n"),
            ("The ", "values of the *mode* are used as the default encoding of the\n   :class:`Message` " + HOSTILE),
        ],
        config={"sparse": {"model": {"hidden_size": 128, "moe": {"num_experts": experts}}, "seed": 0}},
        hardware={"processor": "x86_64", "cores": 2, "torch": "2.13.0"},
    )  # fmt: skip


VARIANTS = {
    "wins": comparison(),
    "wins on the clock": comparison(sparse_seconds=150.0),
    "loses": comparison(gain=-0.041),
    "level": comparison(gain=0.001),
    "one evaluation": comparison(steps=3, evaluations=1),
    "many experts": comparison(experts=64, layers=12),
}


class Page(HTMLParser):
    """The parts of a page that the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[dict[str, str]] = []
        self.texts: dict[str, str] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open[-1]] = self.texts.get(self._open[-1], "") + data

    def data(self) -> dict[str, Any]:
        index = [tag for tag, _ in self.tags].index("script")
        assert self.tags[index][1]["type"] == "application/json"
        return json.loads(self.texts["script"].split('"use strict"')[0])


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_page_is_whole_and_reads_nothing_from_a_network(variant: Comparison):
    text = render_page(variant)
    page = Page(text)
    assert not re.search(r"https?://|//cdn|@import|url\((?!#)", text)
    assert not [attrs for _, attrs in page.tags if {"src", "href"} & set(attrs) and attrs.get("href") != "#numbers"]
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert not re.search(r"\bNaN\b|\bInfinity\b(?!;)|\bNone\b|nan\b", page.texts["td"] + page.texts["dd"])
    assert f"{variant.sparse.val_loss:.4f}" in page.texts["h1"]
    data = page.data()
    assert data["target"] == variant.dense.val_loss
    assert data["runs"][0]["eval"]["loss"][-1] == variant.sparse.val_loss
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert len(text) < 2_000_000


def test_generated_text_cannot_leave_its_place():
    text = render_page(VARIANTS["wins"])
    assert "alert(1)</script>" not in text
    assert "<img" not in text
    assert "{{css}}" in text  # a placeholder inside a sample stays what it was
    assert "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "\x00" not in text


def test_hostile_names_are_escaped_everywhere():
    base = VARIANTS["wins"]
    names = ["</script><b>x", "$a_b$ & <!--", "c", "d"]
    hostile = Comparison(
        sparse=base.sparse, dense=base.dense, domains=names, domain_load=base.domain_load,
        config={"</pre><script>": "</script>"}, hardware={"<b>cpu": "<i>fast"},
    )  # fmt: skip
    text = render_page(hostile)
    page = Page(text)
    assert page.data()["domains"]["names"] == names
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert "<b>cpu" not in text
    assert "<i>fast" not in text


def test_verdict_says_who_won_and_who_lost():
    assert headline(VARIANTS["wins"]) == "Sparse wins: 2.7645 against 2.8092 nats per token"
    assert headline(VARIANTS["loses"]) == "Sparse loses: 2.8502 against 2.8092 nats per token"
    assert headline(VARIANTS["level"]).startswith("Level: sparse 2.8082, dense 2.8092")
    assert "0.0447 nats per token below" in lede(VARIANTS["wins"])[0]
    assert "0.0410 nats per token above" in lede(VARIANTS["loses"])[0]
    assert "never reaches" in lede(VARIANTS["loses"])[1]


def test_a_win_in_tokens_that_loses_on_the_clock_says_so():
    slow, quick = comparison(sparse_seconds=400.0), comparison(sparse_seconds=150.0)
    assert "By the clock the dense model is ahead" in lede(slow)[1]
    assert "By the clock" not in lede(quick)[1]
    assert slow.ratio("tokens") == quick.ratio("tokens")


def test_a_first_evaluation_below_the_target_is_called_a_bound():
    assert "at most 1.00 × the tokens" in lede(VARIANTS["one evaluation"])[1]
    assert "at most" not in lede(VARIANTS["wins"])[1]


def test_crossing_lies_where_straight_lines_between_evaluations_meet_the_target():
    rows = [{"kind": "eval", "step": step, "tokens": 10 * step, "seconds": 2.0 * step, "val_loss": loss}
            for step, loss in ((10, 4.0), (20, 3.0), (30, 2.0), (40, 2.5))]  # fmt: skip
    run = RunCurve(name="run", rows=rows, parameters_total=1, parameters_active=1, flops_per_token=7.0)
    point = run.reached(2.25)
    assert point is not None
    assert (point.step, point.tokens, point.seconds) == pytest.approx((27.5, 275, 55))
    assert point.flops == pytest.approx(275 * 7)
    assert run.reached(1.9) is None
    first = run.reached(5.0)
    assert first is not None
    assert first.step == 10


def test_summary_holds_the_keys_that_scripts_read():
    summary = VARIANTS["wins"].summary()
    keys = {"val_loss", "bits_per_byte", "tokens_per_second", "seconds", "parameters_total", "parameters_active",
            "seconds_to_dense_loss", "max_vio"}  # fmt: skip
    assert keys <= set(summary["sparse"])
    assert keys <= set(summary["dense"])
    assert summary["sample"].startswith("def read_config")
    assert summary["sparse"]["seconds_to_dense_loss"] < summary["sparse"]["seconds"]
    assert summary["dense"]["seconds_to_dense_loss"] == pytest.approx(180)
    assert VARIANTS["loses"].summary()["sparse"]["seconds_to_dense_loss"] is None
    json.dumps(VARIANTS["loses"].summary(), allow_nan=False)


def test_rows_that_are_not_finite_are_left_out():
    base = VARIANTS["wins"].sparse
    broken = [dict(row) for row in base.rows]
    for row in broken:
        if row["kind"] == "train" and row["step"] % 5 == 0:
            row |= {"loss": math.nan, "grad_norm": math.inf, "skipped": True}
    broken.insert(0, {"kind": "eval", "step": 0, "tokens": 0, "seconds": 0.0, "val_loss": math.nan})
    sparse = RunCurve(name="sparse", rows=broken, parameters_total=2, parameters_active=1, flops_per_token=1.0)
    data = Page(render_page(Comparison(sparse=sparse, dense=VARIANTS["wins"].dense))).data()
    assert all(math.isfinite(loss) for loss in data["runs"][0]["train"]["loss"])
    assert data["runs"][0]["eval"]["step"][0] > 0


def test_a_run_without_a_finite_evaluation_is_refused():
    with pytest.raises(MoesaicError, match="no evaluation with a finite val_loss"):
        RunCurve(name="run", rows=[{"kind": "eval", "step": 1, "val_loss": math.inf}], parameters_total=1,
                 parameters_active=1, flops_per_token=1.0)  # fmt: skip


def test_load_history_keeps_the_mean_and_says_one_for_a_balanced_layer():
    rows = [{"kind": "train", "step": s, "tokens": s, "seconds": s, "loss": 1.0, "load": [[0.25] * 4, [1.0, 0, 0, 0]]}
            for s in range(1, 1001)]  # fmt: skip
    rows.append({"kind": "eval", "step": 1000, "tokens": 1000, "seconds": 1000, "val_loss": 1.0})
    run = RunCurve(name="run", rows=rows, parameters_total=1, parameters_active=1, flops_per_token=1.0)
    history = load_history(run)
    assert history is not None
    assert history["steps"][-1] == 1000
    assert len(history["steps"]) == 120
    assert {value for expert in history["layers"][0] for value in expert} == {1.0}
    assert [set(expert) for expert in history["layers"][1]] == [{4.0}, {0.0}, {0.0}, {0.0}]


def test_relative_load_against_a_plain_loop():
    counts = [[random.randint(1, 50) for _ in range(7)] for _ in range(3)]
    relative = relative_load(counts)
    for d, row in enumerate(counts):
        for e, count in enumerate(row):
            share = count / sum(row)
            overall = sum(r[e] for r in counts) / sum(map(sum, counts))
            assert relative[d][e] == pytest.approx(share / overall)
    assert relative_load([[1, 0], [0, 0]]) == [[1.0, None], [None, None]]


def test_dense_runs_and_missing_parts_hide_their_sections():
    dense = run_curve("dense", 2.8, steps=20)
    page = Page(render_page(Comparison(sparse=dense, dense=dense)))
    hidden = {attrs["id"] for tag, attrs in page.tags if tag == "section" and "hidden" in attrs}
    assert hidden == {"load", "domains", "samples"}
    assert page.data()["load"] is None


@pytest.mark.parametrize("name", ["wins", "loses", "one evaluation"])
def test_files_are_written(tmp_path: Path, name: str):
    path = write_report(tmp_path / "deep" / "demo", VARIANTS[name])
    assert path == tmp_path / "deep" / "demo" / "report.html"
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    for stem in ("loss_tokens", "loss_flops", "loss_seconds", "expert_load", "domain_experts"):
        assert (path.parent / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
