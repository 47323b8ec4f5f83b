"""Requests made by a program from the description of the API, right and wrong ones: none makes the server fail."""

from collections.abc import Iterator

import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from schemathesis import GenerationMode

from moesaic.config import EngineConfig
from moesaic.server.app import create_app

from .helpers import NAME, Running, serving

EXAMPLES = 15
"""For each address and mode; a thousand find no more."""


@pytest.fixture(scope="module")
def short_server(request: pytest.FixtureRequest) -> Iterator[Running]:
    torch.manual_seed(request.config.option.seed)
    with serving(config=EngineConfig(max_sequences=8, max_model_tokens=96)) as running:
        yield running


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_makes_the_server_fail(short_server: Running, mode: GenerationMode, seed: int) -> None:
    description = create_app(short_server.service, model_name=NAME).openapi()
    statuses: list[int] = []

    def ask(case: schemathesis.Case) -> None:
        response = case.call(base_url=short_server.url, timeout=60)
        statuses.append(response.status_code)
        assert response.status_code < 500 or response.status_code == 503, response.text
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    for result in schemathesis.openapi.from_dict(description).get_all_operations():
        operation = result.ok()  # type: ignore[union-attr]
        if mode == GenerationMode.NEGATIVE and not operation.body:
            continue  # there is nothing to get wrong
        limits = settings(
            max_examples=EXAMPLES, database=None, phases=[Phase.generate],
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
        )  # fmt: skip
        hypothesis_seed(seed)(limits(given(case=operation.as_strategy(mode))(ask)))()
    assert len(statuses) > EXAMPLES
    assert any(status >= 400 for status in statuses)
    server = short_server.service
    short_server.wait_until(lambda: server.statistics().kv_blocks_used == 0)
    assert server.healthy
