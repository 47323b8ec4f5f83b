"""The page of an inspection in a real browser: it says what was planted, and everybody can use it."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import expect, sync_playwright

from moesaic.analysis.inspection import Inspection, inspect_trace
from moesaic.analysis.inspection_page import headline, lede, render_page, write_page
from moesaic.analysis.inspection_plots import write_plots

from .traces import random_ids, write_trace

expect.set_options(timeout=10_000)
CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
EXPERTS = 8
TEXT = [b"def read(path):\n    return 17\n", b"It rains, and <b>nobody</b> </script><script>asks() & knows.\n"]


def planted(directory: Path, *, against: bool = False) -> Inspection:
    """Layer 0 at random; in layer 1 expert 3 gets all digits of the code, and expert 6 nothing."""
    texts = [np.frombuffer(text * 40, np.uint8)[:1000].astype(np.int64) for text in TEXT]
    token_ids, sources = np.concatenate(texts), np.repeat([0, 1], 1000)
    ids = np.array([np.random.permutation([0, 1, 2, 4, 5, 7])[:2] for _ in range(2000)])
    ids[np.isin(token_ids, list(b"0123456789")), 0] = 3
    weights = np.tile(np.array([0.9, 0.1], np.float32), (2000, 1))
    layers = [random_ids(2000, EXPERTS, 2), ids]
    trace = write_trace(
        directory / "one", layers, EXPERTS, token_ids=token_ids, sources=sources, names=["code", "a <b>bold</b> name"],
        weights=[weights, weights],
    )  # fmt: skip
    if not against:
        return inspect_trace(trace)
    moved = [layers[0], np.where(np.random.rand(2000, 1) < 0.25, ids[:, ::-1] * 0 + [[0, 1]], ids)]
    other = write_trace(directory / "other", moved, EXPERTS, token_ids=token_ids, sources=sources, names=["a", "b"])
    return inspect_trace(trace, against=other)


def data_of(page: str) -> dict[str, Any]:
    return json.loads(re.search(r'id="report-data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]


def test_the_page_holds_all_and_no_text_breaks_it(tmp_path: Path) -> None:
    inspection = planted(tmp_path)
    page = render_page(inspection)
    assert page.count("<script") == 2
    assert "{{" not in page
    assert not re.search(r"""(src|href)=["'](?!#)""", page)
    assert "https:" not in page
    data = data_of(page)
    assert data["sources"] == ["code", "a <b>bold</b> name"]
    assert data["layers"][1]["dead"] == [6]
    assert [len(text["tokens"]) for text in data["texts"]] == [400, 400]
    assert {token["text"] for token in data["layers"][1]["typical"][3]} == {"1", "7"}
    assert "1 expert was never used" in lede(inspection)[-1]
    assert headline(inspection).startswith("These experts sort tokens by type")


def test_what_chance_would_tell_too_is_no_headline(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t", [np.zeros((500, 1), np.int64)], 2)
    inspection = inspect_trace(trace)
    assert headline(inspection) == "These experts tell nothing of the text that chance would not"
    render_page(inspection)


def test_pictures_are_written(tmp_path: Path) -> None:
    paths = write_plots(tmp_path / "deep" / "png", planted(tmp_path, against=True))
    assert [path.stem for path in paths] == ["cache", "domains", "information", "load", "moved", "pairs"]
    for path in paths:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 5000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("page")
    write_page(place / "page.html", planted(place, against=True))
    return (place / "page.html").as_uri()


@pytest.fixture
def page(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    context = browser.new_context(**getattr(request, "param", {"viewport": {"width": 1280, "height": 900}}))
    page = context.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    context.close()
    assert complaints == []
    assert {url.partition("#")[0] for url in asked} == {address}


@needs_browser
def test_a_choice_is_shown_everywhere(page: Any) -> None:
    page.click("#text-choice label >> nth=0")
    page.click('.tile[data-layer="1"][data-expert="3"]')
    expect(page.locator("#layer-title")).to_have_text("Layer 1")
    expect(page.locator("#expert-title")).to_have_text("Expert 1.3")
    expect(page.locator("#pick-expert")).to_have_value("3")
    expect(page.locator("#favourites .chip")).to_have_count(2)
    expect(page.locator("#map .tile.chosen")).to_have_attribute("data-expert", "3")
    expect(page.locator("#label-matrix thead .chosen")).to_have_text("3")
    expect(page.locator("#reading .token.chosen")).not_to_have_count(0)
    assert set(page.eval_on_selector_all("#reading .token.chosen", "all => all.map(one => one.textContent)")) == {
        "1",
        "7",
    }
    page.check("#only")
    pale = page.locator("#reading .token:not(.pale)")
    assert set(pale.evaluate_all("all => all.map(one => one.textContent)")) == {"1", "7"}
    page.reload()
    expect(page.locator("#expert-title")).to_have_text("Expert 1.3")
    page.click("#after")
    expect(page.locator("#expert-title")).to_have_text("Expert 1.4")
    page.select_option("#pick-expert", "6")
    expect(page.locator("#expert-facts")).to_contain_text("Never used")
    expect(page.locator("#favourites")).to_contain_text("None")


@needs_browser
def test_search_finds_tokens_and_experts(page: Any) -> None:
    page.fill("#search", "7")
    expect(page.locator("#found button").first).to_contain_text("1.3")
    page.fill("#search", "0.5")
    page.press("#search", "Enter")
    expect(page.locator("#expert-title")).to_have_text("Expert 0.5")
    page.fill("#search", "(")
    expect(page.locator("#found button").first).to_be_visible()
    page.fill("#search", "zebra")
    expect(page.locator("#found")).to_contain_text("Nobody's favourite")
    page.press("#search", "Escape")
    expect(page.locator("#found")).to_have_text("")


@needs_browser
def test_numbers_on_the_page_are_those_of_the_data(page: Any) -> None:
    page.click('.tile[data-layer="1"][data-expert="3"]')
    layer = page.evaluate("report.layers[1]")
    share = layer["load"][3] / sum(layer["load"])
    expect(page.locator("#expert-facts")).to_contain_text(f"{100 * share:.2f}")
    expect(page.locator("#layer-facts")).to_contain_text(f"{layer['max_vio']:.2f}")
    code = layer["counts"]["domain"]
    relative = code[0][3] / sum(code[0]) / share
    expect(page.locator("#label-matrix td.chosen").first).to_have_text(f"{relative:.1f}")
    expect(page.locator("#moved-table tbody tr").nth(1)).to_contain_text(f"{100 * layer['movement']['changed']:.1f}")
    expect(page.locator("#moved-table tbody tr").nth(0)).to_contain_text("0.0")
    expect(page.locator("#cache-readout")).to_contain_text(f"{100 * layer['hits'][4] / sum(layer['load']):.1f}")


@needs_browser
def test_everything_is_done_by_keyboard(page: Any) -> None:
    page.focus("#map")
    for key in ("Home", "ArrowUp", "ArrowUp", *["ArrowLeft"] * EXPERTS, "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    expect(page.locator("#map-readout")).to_contain_text("Layer 1, expert 1")
    page.keyboard.press("Enter")
    expect(page.locator("#expert-title")).to_have_text("Expert 1.1")
    page.focus("#pairs")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#pair-readout")).to_contain_text("Experts 2 and")
    page.focus("#cache")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#cache-readout")).to_contain_text("5 of 8 experts")
    page.click("#text-choice label >> nth=0")
    page.focus("#reading")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    first = page.evaluate("report.texts[0].experts[1][1][0]")
    expect(page.locator("#expert-title")).to_have_text(f"Expert 1.{first}")
    page.focus("#measures input")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#measure-says")).to_contain_text("token type")


CONTRAST = """
() => {
  const canvas = document.createElement("canvas"), brush = canvas.getContext("2d", { willReadFrequently: true });
  const light = (colour) => {
    brush.clearRect(0, 0, 1, 1); brush.fillStyle = colour; brush.fillRect(0, 0, 1, 1);
    const linear = (part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = [...brush.getImageData(0, 0, 1, 1).data].map((part) => linear(part / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (node) => {
    const colour = getComputedStyle(node).backgroundColor;
    return /, 0\\)$|\\/ 0\\)$|transparent/.test(colour) && node.parentElement ? ground(node.parentElement) : colour;
  };
  const told = {};
  const read = "h1, h2, h3, h4, p, dt, dd, small, button, label, .chip, .token, mark, code, td span, th, .soft";
  for (const node of document.querySelectorAll(read))
    if (node.checkVisibility() && node.textContent.trim()) {
      const pair = [light(getComputedStyle(node).color), light(ground(node))];
      const name = `${node.tagName} ${node.className} ${node.textContent.slice(0, 20)}`;
      told[name] = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    }
  return told;
}
"""


@needs_browser
@pytest.mark.parametrize(
    "page",
    [{"color_scheme": scheme, "viewport": {"width": 1280, "height": 900}} for scheme in ("light", "dark")],
    indirect=True,
)
def test_text_stands_out(page: Any) -> None:
    page.click('.tile[data-layer="1"][data-expert="3"]')
    contrast = page.evaluate(CONTRAST)
    assert len(contrast) > 100
    assert {name: value for name, value in contrast.items() if value < 4.5} == {}


@needs_browser
@pytest.mark.parametrize("page", [{"viewport": {"width": 360, "height": 700}, "has_touch": True}], indirect=True)
def test_a_phone_needs_no_sideways_scrolling(page: Any) -> None:
    page.tap('.tile[data-layer="0"][data-expert="2"]')
    expect(page.locator("#expert-title")).to_have_text("Expert 0.2")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for element in page.locator("button:visible, select:visible, input[type=search]").all():
        if not element.evaluate("node => Boolean(node.closest('.scroll'))"):
            box = element.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 360
