"""A browser and a server for all tests of a file, and a visit for each."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from playwright.sync_api import sync_playwright

from ..helpers import Running, serving
from .visits import ARGUMENTS, CHROMIUM, ENGINE, Visit, talkative_model


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    torch.manual_seed(request.config.option.seed)
    with serving(talkative_model(), config=ENGINE) as running:
        yield running


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    visit = Visit(browser)
    yield visit
    visit.close()
    # The browser itself notes refused requests; everything else would be a mistake of the page.
    assert [text for text in visit.complaints if not text.startswith("Failed to load resource")] == []
    assert len(visit.hosts) == 1
