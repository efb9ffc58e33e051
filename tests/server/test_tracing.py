"""Where the time of a request goes, told to OpenTelemetry; nothing of it without being asked."""

from __future__ import annotations

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tests.responses.scripts import FINAL, REASONED, model
from tests.responses.test_loop import INTERPRETER, PYTHON_CALL, Python
from tests.server.conftest import Served

from ossia.errors import ConfigError, UnavailableError
from ossia.server.store import Store
from ossia.server.tracing import Tracing


@pytest.fixture
def traced():
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    made = model(REASONED + PYTHON_CALL, FINAL, toolbox=Python)
    served = Served(made, Store("sqlite://"), tracing=Tracing(provider))
    yield served, exporter
    served.stop()


def spans_of(served, exporter, num: int) -> dict[str, list]:
    served.until_idle()
    for _ in range(200):
        if len(exporter.get_finished_spans()) >= num:
            break
        threading.Event().wait(0.01)
    spans: dict[str, list] = {}
    for span in exporter.get_finished_spans():
        spans.setdefault(span.name, []).append(span)
    exporter.clear()
    return spans


def test_a_request_has_a_span_and_under_it_queue_prefill_decode_and_tool(traced):
    served, exporter = traced
    trace_id, parent_id = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    headers = {"traceparent": f"00-{trace_id}-{parent_id}-01"}
    made = served.http.post("/v1/responses", json={"input": "?", "tools": [INTERPRETER]}, headers=headers)
    spans = spans_of(served, exporter, 7)
    assert {name: len(found) for name, found in spans.items()} == {
        "POST /v1/responses": 1, "queue": 1, "prefill": 2, "decode": 2, "tool": 1,
    }  # fmt: skip
    (request,) = spans.pop("POST /v1/responses")
    assert f"{request.context.trace_id:032x}" == trace_id and f"{request.parent.span_id:016x}" == parent_id
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["ossia.request"] == made.headers["x-request-id"]
    assert request.attributes["ossia.output_tokens"] == made.json()["usage"]["output_tokens"]
    assert request.attributes["http.route"] == "/v1/responses"
    children = [span for found in spans.values() for span in found]
    for child in children:
        assert child.parent.span_id == request.context.span_id
        assert child.attributes["ossia.response"] == made.json()["id"]
        assert request.start_time <= child.start_time <= child.end_time <= request.end_time
    assert spans["tool"][0].attributes["tool"] == "python"
    assert spans["prefill"][0].attributes["cached_tokens"] == 7
    in_order = sorted(children, key=lambda span: (span.start_time, span.end_time))
    assert [span.name for span in in_order] == ["queue", "prefill", "decode", "tool", "prefill", "decode"]


def test_a_background_response_belongs_to_the_request_that_asked_for_it(traced):
    served, exporter = traced
    made = served.http.post("/v1/responses", json={"input": "?", "background": True}).json()
    spans = spans_of(served, exporter, 4)
    assert spans["decode"][0].parent.span_id == spans["POST /v1/responses"][0].context.span_id
    assert spans["queue"][0].attributes["ossia.response"] == made["id"]


def test_raw_completions_and_chats_are_traced_and_faults_are_marked(traced):
    served, exporter = traced
    served.http.post("/v1/completions", json={"prompt": "Hi"})
    assert set(spans_of(served, exporter, 4)) == {"POST /v1/completions", "queue", "prefill", "decode"}
    served.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "?"}], "n": 2})
    assert len(spans_of(served, exporter, 7)["decode"]) >= 2
    served.service.history = None
    broken = served.http.post("/v1/responses", json={"input": "?"})
    assert broken.status_code == 500 and broken.json()["error"]["type"] == "server_error"
    assert broken.headers["x-request-id"]
    (failed,) = spans_of(served, exporter, 1)["POST /v1/responses"]
    assert not failed.status.is_ok
    del served.service.history
    served.http.get("/v1/models/none")
    assert spans_of(served, exporter, 1)["GET /v1/models/{name:path}"][0].status.is_ok


def test_spans_reach_a_collector():
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    tracing = Tracing.to_collector(f"http://127.0.0.1:{collector.server_port}")
    trace = tracing.begin("GET", {})
    trace.end("GET /health", 200, {})
    tracing.close()
    collector.shutdown()
    assert received[0][0] == "/v1/traces" and b"GET /health" in received[0][1]


@pytest.mark.parametrize("url", ["collector", "ftp://x", "http://"])
def test_a_collector_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match="traces"):
        Tracing.to_collector(url)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with pytest.raises(UnavailableError, match=r"ossia\[otel\]"):
        Tracing.to_collector("http://127.0.0.1:4318")


_UNTRACED = """
import sys, threading, time, httpx
from tests.server.conftest import Served
from tests.responses.scripts import FINAL, model
from ossia.server.store import Store
served = Served(model(FINAL), Store("sqlite://"))
assert served.http.post("/v1/responses", json={"input": "?"}).status_code == 200
served.stop()
# FastAPI itself imports the API where it is installed; what makes and sends spans is ours to leave out.
print([name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))])
"""


def test_without_traces_nothing_of_it_is_imported():
    root = Path(__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", _UNTRACED], cwd=root, capture_output=True, text=True, timeout=60)
    assert ran.stdout.strip() == "[]", ran.stderr
