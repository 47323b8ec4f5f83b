"""Prometheus metrics, under vLLM's names where it has them: what its dashboards show, they show of this server too.

Counters and gauges are read from the engine's statistics when somebody asks; only latencies are measured here.
"""

import time
from collections.abc import Iterable, Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moesaic.engine.request import Delta, EngineStatistics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_REASONS = {"cancelled": "abort"}
"""Finish reasons that vLLM calls otherwise."""
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_NEXT_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20)
_WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class Watched(Protocol):
    def statistics(self) -> EngineStatistics: ...


class Metrics:
    """Of one app; two apps in a process share nothing."""

    def __init__(self, service: Watched, model_name: str) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_EngineCollector(service, model_name))

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(name, about, ["model_name"], buckets=buckets, registry=self._registry)
            return made.labels(model_name)

        self.first_token = histogram("vllm:time_to_first_token_seconds", "Until the first token.", _FIRST_TOKEN)
        self.next_token = histogram("vllm:inter_token_latency_seconds", "Between two tokens.", _NEXT_TOKEN)
        self.mean_token = histogram(
            "vllm:request_time_per_output_token_seconds", "Between two tokens, mean of a request.", _NEXT_TOKEN
        )
        self.whole = histogram("vllm:e2e_request_latency_seconds", "Until the last token.", _WHOLE)

    def watch(self, start: float) -> "Watch":
        """For one text that was asked for at `start` of time.perf_counter."""
        return Watch(self, start)

    def render(self) -> bytes:
        return generate_latest(self._registry)


class Watch:
    """Takes the times of one text's deltas as they leave the engine."""

    def __init__(self, metrics: Metrics, start: float) -> None:
        self._metrics, self._start = metrics, start
        self._first = self._last = 0.0
        self._tokens = 0

    def saw(self, delta: Delta) -> None:
        now, new = time.perf_counter(), len(delta.tokens)
        if new and not self._tokens:
            self._first = now
            self._metrics.first_token.observe(now - self._start)
        elif new:
            for _ in range(new):
                self._metrics.next_token.observe((now - self._last) / new)
        if new:
            self._last, self._tokens = now, self._tokens + new
        if delta.finish_reason in ("stop", "length"):
            self._metrics.whole.observe(now - self._start)
            if self._tokens > 1:
                self._metrics.mean_token.observe((self._last - self._first) / (self._tokens - 1))


class _EngineCollector(Collector):
    """The engine's statistics as metrics."""

    def __init__(self, service: Watched, model_name: str) -> None:
        self._service, self._model_name = service, model_name

    def collect(self) -> Iterable[Metric]:
        statistics = self._service.statistics()
        yield from self._requests(statistics)
        yield from self._experts(statistics)

    def _requests(self, now: EngineStatistics) -> Iterator[Metric]:
        prompt_tokens = now.prompt_tokens + now.cached_tokens
        used = now.kv_blocks_used / now.kv_blocks if now.kv_blocks else 0.0
        yield self._gauge("vllm:num_requests_running", "Texts that are being computed.", now.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait for their turn.", now.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of the key-value blocks in use, 0 to 1.", used)
        yield self._counter("vllm:prompt_tokens", "Tokens of prompts, cached ones too.", prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens generated.", now.generated_tokens)
        yield self._counter("vllm:num_preemptions", "Texts that had to give way and began anew.", now.preemptions)
        yield self._counter("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.", prompt_tokens)
        yield self._counter("vllm:prefix_cache_hits", "Tokens found in the prefix cache.", now.cached_tokens)
        finished = CounterMetricFamily(
            "vllm:request_success", "Texts that ended, by reason.", labels=["model_name", "finished_reason"]
        )
        for reason in {"stop": 0, "length": 0} | now.finished:
            finished.add_metric([self._model_name, _REASONS.get(reason, reason)], now.finished.get(reason, 0))
        yield finished
        yield self._counter("moesaic:steps", "Steps of the engine.", now.steps)
        yield self._counter("moesaic:step_seconds", "Time of all steps.", now.step_seconds)
        yield self._counter("moesaic:model_seconds", "Of that, in the model.", now.model_seconds)

    def _experts(self, now: EngineStatistics) -> Iterator[Metric]:
        yield self._counter("moesaic:expert_cache_hits", "Experts that were in memory when needed.", now.hits)
        yield self._counter("moesaic:expert_cache_misses", "Experts that had to be read.", now.misses)
        yield self._counter("moesaic:expert_bytes_read", "Bytes of experts read from disk.", now.bytes_read)
        yield self._counter("moesaic:expert_stall_seconds", "Time spent waiting for experts.", now.stall_seconds)
        load = CounterMetricFamily(
            "moesaic:expert_tokens", "Tokens that each expert computed.", labels=["model_name", "layer", "expert"]
        )
        violation = GaugeMetricFamily(
            "moesaic:expert_max_violation",
            "MaxVio of a layer since the start: load of the busiest expert over the mean, less 1.",
            labels=["model_name", "layer"],
        )
        for layer, counts in enumerate(now.expert_load):
            for expert, count in enumerate(counts):
                load.add_metric([self._model_name, str(layer), str(expert)], count)
            if total := sum(counts):
                violation.add_metric([self._model_name, str(layer)], max(counts) * len(counts) / total - 1)
        yield load
        yield violation

    def _gauge(self, name: str, about: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, about, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, about: str, value: float) -> Metric:
        family = CounterMetricFamily(name, about, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family
