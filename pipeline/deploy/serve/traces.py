"""OpenTelemetry spans of requests, where a collector is named by the usual environment variables.

A span tells the route, the status and how long the parts took; nothing of what clients send.
Without `OTEL_EXPORTER_OTLP_ENDPOINT` every span is one that records nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from pipeline import __version__
from pipeline.core.errors import MachineError

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_NAME = "metaloom"
_SERVER_ERROR = 500


class Traces:
    """Spans to a collector; sampling, headers and names by OpenTelemetry's own variables."""

    def __init__(self) -> None:
        """Raises MachineError where a collector is named and the exporter is not installed."""
        self._provider: Any = None
        if any(os.environ.get(name) for name in _ENDPOINTS):
            self._provider = _provider()
        made = (
            self._provider.get_tracer if self._provider else trace.NoOpTracerProvider().get_tracer
        )
        self._tracer = made(_NAME, __version__)

    @contextmanager
    def request(self, scope: MutableMapping[str, Any]) -> Iterator[Span]:
        """Around a request, as a part of the client's own trace if it names one."""
        if self._provider is None:
            yield trace.INVALID_SPAN
            return
        names = {"traceparent", "tracestate"}
        sent = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        parent = propagate.extract({k: v for k, v in sent.items() if k in names})
        method = scope["method"]
        with self._tracer.start_as_current_span(method, parent, kind=SpanKind.SERVER) as span:
            yield span

    def answered(self, span: Span, method: str, route: str, status: int) -> None:
        """What became of a request."""
        span.update_name(f"{method} {route}")
        span.set_attribute("http.request.method", method)
        span.set_attribute("http.route", route)
        span.set_attribute("http.response.status_code", status)
        if status >= _SERVER_ERROR:
            span.set_status(Status(StatusCode.ERROR))

    @contextmanager
    def part(self, name: str, **numbers: int) -> Iterator[None]:
        """Around a part of the request that is in work."""
        with self._tracer.start_as_current_span(name, attributes=numbers):
            yield

    def close(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()


def _provider() -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise MachineError(
            f"{_ENDPOINTS[0]} names a collector, but the exporter is not installed. Install it: "
            "pip install 'metaloom[traces]', or unset the variable."
        ) from None
    named = os.environ.get("OTEL_SERVICE_NAME", _NAME)
    provider = TracerProvider(
        resource=Resource.create({"service.name": named, "service.version": __version__}),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
