"""Spans reach a collector, in the client's trace, and hold nothing of what clients send."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import MachineError
from pipeline.deploy.serve.traces import Traces
from tests.serve.asking import http, queries, support
from tests.serve.service_process import ServiceProcess
from tests.unit.tiny_learner import tiny_bundle

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """Its address, and what is sent to it."""
    received: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        server.server_close()


def spans_of(received: list[bytes]) -> list[Any]:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    told = [ExportTraceServiceRequest.FromString(content) for content in received]
    return [
        span
        for request in told
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def test_a_request_is_a_part_of_its_clients_trace(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra `traces`")
    with collector() as (address, received):
        service = ServiceProcess(tmp_path, str(tiny_bundle(tmp_path).folder))
        service.start(environment={"OTEL_EXPORTER_OTLP_ENDPOINT": address})
        key = service.key()
        parent = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        with http(service, key) as web:
            body = {"support": support(), "queries": queries(3)}
            assert web.post("/v1/predict", json=body, headers=parent).status_code == 200
            assert web.get("/v1/learners/nobody").status_code == 422
        service.stop()
    ours = [span for span in spans_of(received) if span.trace_id.hex() == TRACE]
    (request,) = [span for span in ours if span.parent_span_id.hex() == PARENT]
    assert request.name == "POST /v1/predict"
    told = {one.key: one.value.int_value or one.value.string_value for one in request.attributes}
    assert told["http.response.status_code"] == 200
    parts = {span.name: span for span in ours if span.parent_span_id == request.span_id}
    assert set(parts) == {"decode", "model"}
    (pictures,) = [one.value.int_value for one in parts["model"].attributes]
    assert pictures == 7
    assert request.start_time_unix_nano <= parts["model"].start_time_unix_nano
    assert parts["model"].end_time_unix_nano <= request.end_time_unix_nano
    everything = b"".join(received)
    assert b"class 0" not in everything and key.encode() not in everything


def test_without_a_collector_spans_record_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    traces = Traces()
    with traces.request({"headers": [], "method": "GET"}) as span, traces.part("model"):
        assert not span.is_recording()
    traces.close()


def test_a_collector_without_the_exporter_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(
        __import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None
    )
    with pytest.raises(MachineError, match="metaloom.traces"):
        Traces()
