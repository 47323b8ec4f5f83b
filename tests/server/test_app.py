"""The app as a whole: health, metrics, failures inside, and what its description says."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moesaic.config import EngineConfig
from moesaic.engine.request import Delta, Request
from moesaic.engine.service import Deltas, Observe
from moesaic.errors import MoesaicError
from moesaic.server import app as app_module
from moesaic.server.app import create_app

from .helpers import NAME, Running, data_events, error_of, serving


def samples(server: Running) -> dict[tuple[str, ...], float]:
    """By name and the values of the labels but the model's name, in the order of their names."""
    found = {}
    for family in text_string_to_metric_families(server.http.get("/metrics").text):
        for sample in family.samples:
            assert sample.labels.pop("model_name") == NAME
            found[(sample.name, *(value for _, value in sorted(sample.labels.items())))] = sample.value
    return found


def test_metrics_count_what_was_done() -> None:
    with serving() as server:
        for _ in range(2):
            assert server.complete("many small experts " * 5, max_tokens=10, ignore_eos=True).status_code == 200
        told, loads = samples(server), server.service.statistics().expert_load
        assert told["vllm:prompt_tokens_total",] == 2 * 95
        assert told["vllm:prefix_cache_hits_total",] > 50
        assert told["vllm:generation_tokens_total",] == 20
        assert told["vllm:request_success_total", "length"] == 2
        assert told["vllm:time_to_first_token_seconds_count",] == 2
        assert (
            9 < told["vllm:inter_token_latency_seconds_count",] <= 18
        )  # tokens that come together have no time between
        assert told["vllm:e2e_request_latency_seconds_count",] == 2
        assert told["vllm:e2e_request_latency_seconds_sum",] > told["vllm:time_to_first_token_seconds_sum",] > 0
        assert told["vllm:num_requests_running",] == told["vllm:kv_cache_usage_perc",] == 0
        for layer, load in enumerate(loads):
            assert [told["moesaic:expert_tokens_total", str(e), str(layer)] for e in range(4)] == load
            violation = told["moesaic:expert_max_violation", str(layer)]
            assert violation == pytest.approx(max(load) / (sum(load) / 4) - 1)


def test_two_servers_in_one_process_share_nothing() -> None:
    with serving() as first, serving() as second:
        first.complete(max_tokens=3)
        assert samples(first)["vllm:generation_tokens_total",] == 3
        assert samples(second)["vllm:generation_tokens_total",] == 0


def test_wrong_addresses_and_methods_have_errors_of_the_same_shape(server: Running) -> None:
    assert error_of(server.http.get("/v1/nothing"), 404)["type"] == "not_found_error"
    misspelt = error_of(server.post("/v1/completions", {"promt": "a"}), 400)
    assert misspelt["message"].endswith("leave it out, or send prompt")
    for method, path in (("GET", "/v1/completions"), ("DELETE", "/v1/models"), ("POST", "/health")):
        assert error_of(server.http.request(method, path), 405)["code"] == "method_not_allowed"
    assert error_of(server.chat(model="another"), 404)["code"] == "model_not_found"


def test_what_nobody_expects_is_told_to_the_log_alone(monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr(
        app_module, "POSTS", [(p, fail, m) if p == "/tokenize" else (p, e, m) for p, e, m in app_module.POSTS]
    )
    with serving() as server:
        response = server.post("/tokenize", {"prompt": "a"})
        assert error_of(response, 500)["code"] == "internal_error"
        assert "secret" not in response.text
        assert "a secret of the inside" in caplog.text
        assert server.complete(max_tokens=1).status_code == 200


def test_health_and_readiness(server: Running) -> None:
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.http.head("/health").status_code == server.http.head("/ready").status_code == 200
    server.service.ready = False
    try:
        assert error_of(server.http.get("/ready"), 503)["code"] == "overloaded"
        refused = server.complete()
        assert error_of(refused, 503)["type"] == "overloaded_error"
        assert "retry-after" in refused.headers
        assert server.http.get("/health").status_code == 200
    finally:
        server.service.ready = True
    assert server.http.get("/ready").status_code == 200


def test_the_description_names_every_body(server: Running) -> None:
    description = server.http.get("/openapi.json").json()
    assert description == create_app(server.service, model_name=NAME).openapi()
    for path, _, model in app_module.POSTS:
        body = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": f"#/components/schemas/{model.__name__}"}
        assert description["components"]["schemas"][model.__name__]["additionalProperties"] is False


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_that_fails_in_the_middle_fails_alone(stream: bool) -> None:
    with serving() as server:
        submit_all = server.service.submit_all

        def failing(requests: Sequence[Request], observe: Observe = lambda number, delta: None) -> Deltas:
            deltas = submit_all(requests, observe)
            if requests[0].sampling.seed == 666:
                push = deltas.push
                first_tokens = iter([True])

                def push_two(number: int, delta: Delta) -> None:
                    if next(first_tokens, False):
                        push(number, replace(delta, finish_reason=None))
                    else:
                        push(number, Delta(finish_reason="error", error=MoesaicError("expert 3 is broken")))

                deltas.push = push_two
            return deltas

        server.service.submit_all = failing
        response = server.complete(max_tokens=20, seed=666, stream=stream)
        if stream and response.status_code == 200:
            *_, failure, done = data_events(response.text)
            assert done == "[DONE]"
        else:
            failure = {"error": error_of(response, 500)}
        assert failure["error"]["message"] == "expert 3 is broken"
        assert failure["error"]["type"] == "server_error"
        assert server.complete(max_tokens=20).status_code == 200
        server.wait_until(lambda: server.service.statistics().kv_blocks_used == 0)


def test_an_engine_that_has_died_is_told_by_health(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:

        def step() -> None:
            raise RuntimeError("no more")

        monkeypatch.setattr(server.service.engine, "step", step)
        assert server.complete(max_tokens=5).status_code == 500
        server.wait_until(lambda: not server.service.healthy)
        for path in ("/health", "/ready"):
            assert error_of(server.http.get(path), 503)["type"] == "overloaded_error"
        assert server.complete().status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_closing_the_engine_ends_what_clients_still_read(stream: bool) -> None:
    with serving() as server:
        loop = server.service._loop
        assert loop is not None
        body = {"prompt": ["ab", "cd"], "max_tokens": 500, "ignore_eos": True, "stream": stream}
        closing = threading.Timer(0, lambda: asyncio.run_coroutine_threadsafe(server.service.close(), loop).result())
        if stream:
            with server.http.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                closing.start()
                *_, failure, done = data_events("\n".join(lines))
            assert done == "[DONE]"
        else:
            asking = threading.Thread(target=lambda: (server.wait_until(lambda: running(server)), closing.run()))
            asking.start()
            failure = {"error": error_of(server.post("/v1/completions", body), 503)}
            asking.join()
        assert "stopped before the text was finished" in failure["error"]["message"]
        assert server.complete().status_code == 503


def running(server: Running) -> bool:
    return server.service.statistics().running == 2


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_of_one_request_are_taken_together_or_not_at_all(stream: bool) -> None:
    with serving(config=EngineConfig(max_sequences=2, max_waiting=3, max_model_tokens=512)) as server:
        asked = {"max_tokens": 400, "ignore_eos": True, "stream": stream}
        too_many = error_of(server.complete(["a", "b", "c"], n=2, **asked), 400)
        assert "6 texts are asked for at once, and 5 fit" in too_many["message"]
        gate, step = threading.Event(), server.service.engine.step
        server.service.engine.step = lambda: (gate.wait(), step())[1]
        try:
            waiting = threading.Thread(
                target=server.complete, args=(["a", "b"],), kwargs={"max_tokens": 3, "ignore_eos": True}
            )
            waiting.start()
            server.wait_until(lambda: server.service.statistics().waiting >= 2)
            refused = server.complete(["a", "b", "c", "d"], **asked)
            assert error_of(refused, 503)["code"] == "overloaded"
            assert "retry-after" in refused.headers
            assert server.service.statistics().waiting == 2
        finally:
            gate.set()
            waiting.join()
        server.wait_until(lambda: not server.service.engine.has_work)
        assert server.service.statistics().finished == {"length": 2}
