"""What the server tells of itself: Prometheus metrics, and one log line for each request."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from ossia.responses.schema import Json

_log = logging.getLogger("ossia.requests")

# What the log line of the request that is being answered will tell; tasks that answer it share the dict.
log_fields: ContextVar[Json] = ContextVar("log_fields")

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        # Memory, processor time and open files, as Prometheus names them.
        ProcessCollector(registry=registry)
        self.requests = Counter("ossia_requests", "Requests", ["route", "status"], registry=registry)
        self.responses = Counter("ossia_responses", "Responses made, by how they ended", ["status"], registry=registry)
        self.prompt_tokens = Counter("ossia_prompt_tokens", "Tokens read", registry=registry)
        self.cached_tokens = Counter("ossia_cached_tokens", "Tokens read that the cache had", registry=registry)
        self.output_tokens = Counter("ossia_output_tokens", "Tokens written", registry=registry)
        self.first_token_s = Histogram(
            "ossia_time_to_first_token_seconds",
            "From request to first event of text",
            buckets=_SECONDS,
            registry=registry,
        )
        self.queue_s = Histogram("ossia_queue_seconds", "From request to its turn", buckets=_SECONDS, registry=registry)
        self.inter_token_s = Histogram(
            "ossia_inter_token_seconds",
            "Mean between tokens of one response",
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self.duration_s = Histogram(
            "ossia_request_seconds", "From request to end of answer", ["route"], buckets=_SECONDS, registry=registry
        )

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A value that is read when it is asked for."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def counter(self, name: str, text: str, read: Callable[[], float]) -> None:
        """The same for a number that only grows."""

        class Read(Collector):
            def collect(self) -> Iterator[CounterMetricFamily]:
                yield CounterMetricFamily(name, text, value=read())

        self.registry.register(Read())

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self.registry)


class Watch:
    """Times one response, and counts it when it is done."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._began_s = time.perf_counter()
        self.first_s: float | None = None

    def token(self) -> None:
        if self.first_s is None:
            self.first_s = time.perf_counter() - self._began_s
            self._metrics.first_token_s.observe(self.first_s)

    def done(self, response: Json) -> None:
        usage = response["usage"] or {}
        num_output = usage.get("output_tokens", 0)
        log_fields.get({}).update(
            response=response["id"],
            ended=response["status"],
            prompt_tokens=usage.get("input_tokens", 0),
            cached=usage.get("input_tokens_details", {}).get("cached_tokens", 0),
            output_tokens=num_output,
            ttft_s=None if self.first_s is None else round(self.first_s, 4),
        )
        self._metrics.responses.labels(response["status"]).inc()
        self._metrics.prompt_tokens.inc(usage.get("input_tokens", 0))
        self._metrics.cached_tokens.inc(usage.get("input_tokens_details", {}).get("cached_tokens", 0))
        self._metrics.output_tokens.inc(num_output)
        if self.first_s is not None and num_output > 1:
            elapsed_s = time.perf_counter() - self._began_s - self.first_s
            self._metrics.inter_token_s.observe(elapsed_s / (num_output - 1))


def log_request(**fields: Any) -> None:
    """One line, `key=value`; what is None is left out."""
    _log.info(" ".join(f"{key}={value}" for key, value in fields.items() if value is not None))
