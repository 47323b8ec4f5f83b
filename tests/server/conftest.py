"""A server that the tests of a file share."""

from collections.abc import Iterator

import pytest
import torch

from .helpers import Running, serving


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    torch.manual_seed(request.config.option.seed)
    with serving() as running:
        yield running
