"""The page for everybody: by keyboard, in light and dark, on narrow screens, with enough contrast."""

import re

import pytest

from ..helpers import Running
from .visits import Visit, expect, finished, needs_browser, opened, set_up, write

pytestmark = needs_browser


FOCUSED = """
() => {
  const { activeElement: at } = document, beside = at.parentElement.querySelector("span");
  if (at === document.body) return null;
  const outline = (node) => getComputedStyle(node).outlineStyle;
  return [at.id || at.className || at.textContent, outline(at), beside && outline(beside)];
}
"""


def test_everything_is_reached_by_keyboard(visit: Visit, server: Running) -> None:
    page = opened(visit, server)
    set_up(page, max_tokens=30)
    write(page, "keys")
    finished(page)
    page.focus(".skip")
    reached = []
    for _ in range(40):
        focused = page.evaluate(FOCUSED)
        if not focused or focused in reached:
            break
        reached.append(focused)
        page.keyboard.press("Tab")
    names = [name for name, _, _ in reached]
    expected = [
        "skip",
        "new-chat",
        "show-settings",
        "theme",
        "log",
        "answer",
        "plain",
        "prompt",
        "send",
        "map",
        "layer",
    ]
    positions = [names.index(name) for name in expected]
    assert positions == sorted(positions)
    assert [name for name, own, beside in reached if own == "none" and beside in (None, "none")] == []

    page.focus(".answer")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#card")).to_be_visible()
    expect(page.locator(".token").nth(2)).to_have_class(re.compile("current"))
    page.keyboard.press("Enter")
    expect(page.locator("#card ol")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#card")).to_be_hidden()
    expect(page.locator(".answer")).to_be_focused()
    page.focus("#map")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#readout")).to_contain_text("Layer 2, expert 0:")
    page.keyboard.press("Enter")
    expect(page.locator("#layer-name")).to_have_text("2")


LUMINANCE = """
colour => {
  const canvas = document.createElement("canvas");
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  const linear = (part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((part) => linear(part / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_on_every_colour(visit: Visit, server: Running, scheme: str) -> None:
    page = opened(visit, server, color_scheme=scheme, reduced_motion="reduce")
    pairs = page.evaluate(
        """async luminance => {
          const { paint } = await import("/page/colour.js"), of = eval(luminance), pairs = {};
          const ink = of(getComputedStyle(document.body).color);
          for (let expert = 0; expert < 512; expert += 1) {
            const span = document.createElement("span");
            span.className = "token coloured";
            paint(span, expert);
            document.body.append(span);
            pairs[`expert ${expert}`] = [ink, of(getComputedStyle(span).backgroundColor)];
            span.remove();
          }
          const back = (node) => { const colour = getComputedStyle(node).backgroundColor;
            return colour === "rgba(0, 0, 0, 0)" && node.parentElement ? back(node.parentElement) : colour; };
          for (const node of document.querySelectorAll("h2, h3, p, dt, dd, button, label, legend span, .soft"))
            if (node.checkVisibility())
              pairs[node.id || node.textContent] = [of(getComputedStyle(node).color), of(back(node))];
          return pairs;
        }""".replace("eval(luminance)", f"({LUMINANCE})"),
        "",
    )
    contrast = {name: (max(pair) + 0.05) / (min(pair) + 0.05) for name, pair in pairs.items()}
    assert len(contrast) > 530
    assert {name: value for name, value in contrast.items() if value < 4.5} == {}


def test_the_theme_follows_the_system_until_it_is_chosen(visit: Visit, server: Running) -> None:
    page = opened(visit, server, color_scheme="dark")
    ground = "document.body.checkVisibility() && getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    assert dark != light
    page.click("#theme")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(ground) == light
    page.click("#theme")
    page.reload()
    page.emulate_media(color_scheme="light")
    assert page.evaluate(ground) == dark
    expect(page.locator("#theme")).to_have_text("Theme: dark")


@pytest.mark.parametrize("width", [360, 800])
def test_a_narrow_window_needs_no_sideways_scrolling(visit: Visit, server: Running, width: int) -> None:
    page = opened(visit, server, viewport={"width": width, "height": 740}, has_touch=True)
    set_up(page, max_tokens=60)
    write(page, "a" * 200)
    finished(page)
    page.click("#show-settings")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    chat, picture = (page.locator(name).bounding_box() for name in ("#chat", "#picture"))
    assert chat["y"] + chat["height"] <= picture["y"] + 1
    for element in page.locator("button:visible, input:visible, textarea:visible, canvas").all():
        box = element.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    page.tap(".token >> nth=0")
    card = page.locator("#card").bounding_box()
    assert card["x"] >= 0
    assert card["x"] + card["width"] <= width
    page.tap("#card button")
    expect(page.locator("#card")).to_be_hidden()
