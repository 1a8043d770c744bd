"""Figures of the server for Prometheus, in a registry of its own."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mpillm.infer.serve.http.request_record import RequestRecord
from mpillm.infer.serve.requests import EngineCounts

# From a cached prompt on a GPU to a long text on a few cores, in seconds.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
GAUGES = {
    "running": "Texts that the engine computes now",
    "waiting": "Texts that wait in the engine's queue",
    "pages": "Pages of the key/value cache",
    "pages_used": "Pages of the key/value cache in use",
}
COUNTERS = {
    "prompt_tokens": "Tokens of prompts that the engine has taken",
    "cached_tokens": "Tokens of prompts that were found in the cache",
    "generated_tokens": "Tokens that the engine has drawn",
    "steps": "Steps of the engine",
    "preempted": "Texts that gave up their pages to others, to be computed again",
}


class ServerMetrics:
    """Count requests as they end; ask the engine for its own counts when they are read."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, counts: Callable[[], EngineCounts]) -> None:
        """`counts`: of the engine."""
        self._registry = CollectorRegistry(auto_describe=True)
        route = ("route",)
        self._requests = Counter(
            "mpillm_http_requests",
            "Requests by route, method and status",
            ("route", "method", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "mpillm_http_request_seconds",
            "From the head of a request to the end of its answer",
            route,
            buckets=SECONDS,
            registry=self._registry,
        )
        self._first = Histogram(
            "mpillm_http_first_token_seconds",
            "From the head of a request to its first text",
            route,
            buckets=SECONDS,
            registry=self._registry,
        )
        self._prompt_tokens = Counter(
            "mpillm_http_prompt_tokens",
            "Tokens of prompts, as `usage` counts them",
            route,
            registry=self._registry,
        )
        self._completion_tokens = Counter(
            "mpillm_http_completion_tokens",
            "Tokens of texts, as `usage` counts them",
            route,
            registry=self._registry,
        )
        self._registry.register(_EngineCollector(counts))

    def count(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        route = record.route
        self._requests.labels(route, record.method, str(record.status)).inc()
        self._seconds.labels(route).observe(record.seconds)
        if record.first_token_seconds is not None:
            self._first.labels(route).observe(record.first_token_seconds)
        self._prompt_tokens.labels(route).inc(record.count("prompt_tokens"))
        self._completion_tokens.labels(route).inc(record.count("completion_tokens"))

    def text(self) -> bytes:
        """Write all figures in Prometheus' text form."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, counts: Callable[[], EngineCounts]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        counts = self._counts()
        for name, help_ in GAUGES.items():
            yield GaugeMetricFamily(f"mpillm_engine_{name}", help_, value=getattr(counts, name))
        for name, help_ in COUNTERS.items():
            yield CounterMetricFamily(f"mpillm_engine_{name}", help_, value=getattr(counts, name))
        ended = CounterMetricFamily(
            "mpillm_engine_finished", "Texts by the reason of their end", labels=("reason",)
        )
        for reason, count in counts.finished.items():
            ended.add_metric([reason], count)
        yield ended
        failed = "1 once the engine has failed"
        yield GaugeMetricFamily("mpillm_engine_failed", failed, value=float(bool(counts.failure)))
