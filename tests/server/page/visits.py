"""The page in a real browser, in front of a real server with a tiny random model."""

import json
import shutil
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from playwright.sync_api import expect

from moesaic.config import EngineConfig, MoEConfig
from moesaic.model.transformer import Transformer

from ..helpers import CONFIG, Running, make_model

expect.set_options(timeout=30_000)
CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PAGE_CONFIG = replace(
    CONFIG,
    max_position_embeddings=4096,
    num_hidden_layers=3,
    moe=MoEConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16),
)
ENGINE = EngineConfig(max_sequences=4, max_model_tokens=4096)
CHAT = "**/v1/chat/completions"


def talkative_model() -> Transformer:
    """Writes printable characters, and ends by itself hardly ever: the logits of all others are zero."""
    model = make_model(PAGE_CONFIG)
    with torch.no_grad():
        weight_VD = model.lm_head.weight
        weight_VD[:32], weight_VD[127:] = 0, 0
        weight_VD *= 20
    return model


class Visit:
    """Opens pages of a browser window; notes what they log and whom they ask."""

    def __init__(self, browser: Any) -> None:
        self._browser, self._contexts = browser, []
        self.complaints: list[str] = []
        self.hosts: set[str] = set()

    def open(self, server: Running, **window: Any) -> Any:
        """A page that has got its first event; `window` are options of the browser's context."""
        context = self._browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | window))
        self._contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        page.goto(server.url)
        return page

    def close(self) -> None:
        for context in self._contexts:
            context.close()


def opened(visit: Visit, server: Running, **window: Any) -> Any:
    page = visit.open(server, **window)
    expect(page.locator("#link")).to_have_text("live")
    return page


def set_up(page: Any, **settings: Any) -> None:
    page.click("#show-settings")
    for name, value in settings.items():
        page.fill(f"#settings [name={name}]", str(value))
    page.click("#show-settings")


def write(page: Any, text: str) -> None:
    """By keyboard alone."""
    page.focus("#prompt")
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def finished(page: Any) -> None:
    expect(page.locator(".meta")).to_be_visible()


def stubbed(page: Any, *texts: str) -> None:
    """Answers with these tokens, without experts."""
    chunks = [
        {"choices": [{"index": 0, "delta": {"content": text}, "logprobs": {"content": [{"token": text}]}}]}
        for text in texts
    ]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route(CHAT, lambda route: route.fulfill(body=body, content_type="text/event-stream"))


def picture_of(page: Any, selector: str) -> str:
    return page.eval_on_selector(selector, "canvas => canvas.toDataURL()")
