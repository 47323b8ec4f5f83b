"""The experts of each token, the map of their load, and the figures beside the chat."""

import base64
import re
import threading
from typing import Any

import numpy as np
import pytest

from ..helpers import NAME, Running, data_events
from .visits import Visit, expect, finished, needs_browser, opened, picture_of, set_up, write

pytestmark = needs_browser


def routing_of(choice: dict[str, Any], kind: str = "routed_experts") -> np.ndarray:
    dtype = "<i4" if kind == "routed_experts" else "<f4"
    return np.frombuffer(base64.b64decode(choice["sgl_ext"][kind]), dtype).reshape(choice["sgl_ext"]["routed_shape"])


def test_text_and_colours_are_those_of_the_api(visit: Visit, server: Running) -> None:
    page = opened(visit, server)
    set_up(page, temperature=0, max_tokens=60, system="be quick")
    page.fill("#layer", "2")
    write(page, "many small experts")
    finished(page)
    messages = [{"role": "system", "content": "be quick"}, {"role": "user", "content": "many small experts"}]
    fields = {"max_tokens": 60, "logprobs": True, "return_routed_experts": True}
    body = {"model": NAME, "messages": messages, "temperature": 0} | fields
    choice = server.post("/v1/chat/completions", body).json()["choices"][0]
    assert page.eval_on_selector(".answer", "answer => answer.textContent") == choice["message"]["content"]

    # Tokens that are characters of their own come one by one; the hue is that of the expert with most weight.
    texts = [entry["token"] for entry in choice["logprobs"]["content"]]
    rows_TLK, weights_TLK = routing_of(choice)[-60:], routing_of(choice, "routed_weights")[-60:]
    tops_T = [rows_TLK[t, 2, weights_TLK[t, 2].argmax()] for t in range(60)]
    expected = [(texts[t], round((tops_T[t] * 137.508 + 262) % 360)) for t in range(60) if texts[t].isascii()]
    expected = [(text, hue) for text, hue in expected if text.strip() and not text.startswith("bytes:")]
    shown = page.eval_on_selector_all(
        ".token.coloured", "all => all.map(span => [span.textContent, Number(span.style.getPropertyValue('--hue'))])"
    )
    assert [tuple(pair) for pair in shown if pair[0].isascii() and pair[0].strip()] == expected
    assert len(expected) > 5


def test_tokens_are_coloured_by_the_chosen_layer(visit: Visit, server: Running) -> None:
    page = opened(visit, server)
    set_up(page, temperature=1, max_tokens=80, seed=3)
    write(page, "colours")
    finished(page)
    hues = "all => all.map(span => span.style.getPropertyValue('--hue'))"
    seen = set()
    for layer in range(3):
        page.fill("#layer", f"{layer}")
        expect(page.locator("#layer-name")).to_have_text(f"{layer}")
        seen.add(tuple(page.eval_on_selector_all(".token", hues)))
    assert len(seen) == 3
    background = "all => new Set(all.map(span => getComputedStyle(span).backgroundColor)).size"
    assert page.eval_on_selector_all(".token", background) > 1
    page.uncheck("#colours")
    assert page.eval_on_selector_all(".token", background) == 1


def test_the_card_tells_each_layer_and_the_map_finds_the_tokens(visit: Visit, server: Running) -> None:
    page = opened(visit, server)
    set_up(page, temperature=0, max_tokens=50)
    write(page, "cards")
    finished(page)
    page.hover(".token >> nth=0")
    rows = page.locator("#card li .hidden")
    expect(rows).to_have_count(3)
    for layer in range(3):
        told = re.fullmatch(
            rf"Layer {layer}: expert (\d) (\.\d+|1\.00), expert (\d) (\.\d+)", rows.nth(layer).inner_text()
        )
        assert told is not None
        assert float(told[2]) >= float(told[4])
        assert float(told[2]) + float(told[4]) == pytest.approx(1, abs=0.02)
        assert {int(told[1]), int(told[3])} < set(range(8))
    expert = int(re.findall(r"expert (\d)", rows.nth(1).inner_text())[0])
    page.mouse.move(5, 5)
    expect(page.locator("#card")).to_be_hidden()
    box = page.locator("#map").bounding_box()
    cell = (box["width"] - 26) / 8
    page.hover("#map", position={"x": 26 + (expert + 0.5) * cell, "y": box["height"] / 2})
    expect(page.locator("#readout")).to_contain_text(f"Layer 1, expert {expert}: ")
    expect(page.locator(".token").nth(0)).to_have_class(re.compile("marked"))
    assert page.locator(".token:not(.marked)").count() > 0


def test_the_map_tells_the_last_seconds_or_all(visit: Visit, server: Running) -> None:
    page = opened(visit, server)
    set_up(page, max_tokens=40)
    write(page, "work")
    finished(page)
    expect(page.locator("#readout")).to_contain_text("its fair share")
    recent = picture_of(page, "#map canvas")
    page.check("input[value=total]", force=True)
    page.hover("#map", position={"x": 30, "y": 8})
    total = np.array(server.service.statistics().expert_load[0])
    expect(page.locator("#readout")).to_contain_text(f"Layer 0, expert 0: {100 * total[0] / total.sum():.1f} %")
    assert picture_of(page, "#map canvas") != recent


def test_two_pages_see_the_same_engine(visit: Visit, server: Running) -> None:
    watching = opened(visit, server)
    answers = [threading.Thread(target=server.chat, kwargs={"max_tokens": 600}) for _ in range(2)]
    for thread in answers:
        thread.start()
    expect(watching.locator("#running")).to_have_text("2")
    expect(watching.locator("#rate")).not_to_have_text("0")
    for thread in answers:
        thread.join()
    expect(watching.locator("#running")).to_have_text("0")
    expect(watching.locator("#rate")).to_have_text("0")


def test_the_fields_that_the_page_reads_are_there(server: Running) -> None:
    told = server.http.get("/v1/models").json()["data"][0]["moesaic"]
    assert told == {
        "layers_of_experts": 3,
        "num_experts": 8,
        "experts_per_token": 2,
        "has_chat_template": True,
        "max_model_tokens": 4096,
    }
    chunks = data_events(server.chat(stream=True, max_tokens=3, logprobs=True, return_routed_experts=True).text)
    choices = [choice for chunk in chunks[:-1] for choice in chunk["choices"]]
    parts = [choice for choice in choices if choice.get("sgl_ext")]
    assert parts
    assert all(len(routing_of(part)) >= len(part["logprobs"]["content"]) > 0 for part in parts)
