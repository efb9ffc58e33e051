"""OpenTelemetry traces, for those who want them: a span for each request, with its queue, prefill, decode and tools.

    POST /v1/responses
      queue      until it had its turn
      prefill    until the engine's first token; waiting for memory included
      decode     until its last
      tool       a tool that ran here

A `traceparent` of the client's is the parent. Needs the extra `otel`; without a Tracing nothing of it is imported.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from ossia.errors import ConfigError, UnavailableError
from ossia.responses.loop import Phase

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer


class Tracing:
    """Makes the spans of a server."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("ossia")

    @classmethod
    def to_collector(cls, url: str) -> Tracing:
        """Spans go to the collector at this URL, as OTLP over HTTP. Raises ConfigError, UnavailableError."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(f"traces is {url!r}; expected the URL of a collector, such as http://127.0.0.1:4318")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise UnavailableError(f"traces need what is not installed ({error}): pip install 'ossia[otel]'") from None
        endpoint = url if parts.path.strip("/") else f"{url.rstrip('/')}/v1/traces"
        provider = TracerProvider(resource=Resource.create({"service.name": "ossia"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        return cls(provider)

    def begin(self, method: str, headers: Mapping[str, str]) -> Trace:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(headers)
        span = self._tracer.start_span(method, parent, SpanKind.SERVER, {"http.request.method": method})
        return Trace(self._tracer, span)

    def close(self) -> None:
        """Send what has not been sent. Blocks."""
        self._provider.shutdown()


class Trace:
    """The spans of one request."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer, self._span = tracer, span

    @property
    def id(self) -> str:
        return f"{self._span.get_span_context().trace_id:032x}"

    def add(self, phases: Iterable[Phase], response_id: str) -> None:
        """Tell what happened, when; also of a response that outlives its request."""
        from opentelemetry.trace import set_span_in_context

        context = set_span_in_context(self._span)
        for phase in phases:
            fields = {"ossia.response": response_id, **phase.fields}
            self._tracer.start_span(phase.name, context, attributes=fields, start_time=phase.begin_ns).end(phase.end_ns)

    def end(self, name: str, status: int, fields: Mapping[str, Any]) -> None:
        """``name`` is method and route; ``fields`` are those of the log line."""
        from opentelemetry.trace import StatusCode

        span = self._span
        span.update_name(name)
        told: dict[str, Any] = {"http.route": name.partition(" ")[2], "http.response.status_code": status}
        told |= {f"ossia.{key}": value for key, value in fields.items() if value is not None}
        span.set_attributes(told)
        if status >= 500 or not status:
            span.set_status(StatusCode.ERROR)
        span.end()


# Of the request that is being answered; tasks that answer it have it too.
current_trace: ContextVar[Trace | None] = ContextVar("current_trace", default=None)
