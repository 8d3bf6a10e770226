"""Version ids in the spans that the real server sends to a collector (an OTLP/HTTP sink in the test)."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny_bundle import deployed, golden

from gpuops.errors import InputError
from gpuops_serving.client import Client
from gpuops_serving.otel import opentelemetry_flags, resource_attributes, span_attributes
from gpuops_serving.server import TritonServer

URL = "http://127.0.0.1:4318/v1/traces"


def test_one_version_is_named_shortly_too() -> None:
    one = {("tiny", "1"): "abc"}
    assert resource_attributes(one, server_version="2.51.0", namespace="lab") == {
        "service.name": "triton",
        "service.version": "2.51.0",
        "service.namespace": "lab",
        "gpuops.version_id.tiny.1": "abc",
        "gpuops.version_id": "abc",
    }
    two = resource_attributes({**one, ("tiny", "2"): "def"}, service="mine")
    assert two == {"service.name": "mine", "gpuops.version_id.tiny.1": "abc", "gpuops.version_id.tiny.2": "def"}


def test_an_unknown_version_id_is_absent_from_a_span() -> None:
    assert "gpuops.version_id" not in span_attributes("tiny", "1", None)
    assert span_attributes("tiny", "1", "abc") == {
        "gpuops.model.name": "tiny",
        "gpuops.model.version": "1",
        "gpuops.version_id": "abc",
    }


@pytest.mark.parametrize(
    ("url", "attributes", "rate"), [("grpc://127.0.0.1:4317", {}, 1), (URL, {"a=b": "c"}, 1), (URL, {}, 0)]
)
def test_what_triton_would_misread_is_refused(url: str, attributes: dict[str, str], rate: int) -> None:
    with pytest.raises(InputError):
        opentelemetry_flags(url, attributes, rate=rate)


class Sink(ThreadingHTTPServer):
    """Keeps what is posted to it."""

    posts: list[dict[str, Any]]


class Handler(BaseHTTPRequestHandler):
    server: Sink

    def do_POST(self) -> None:
        self.server.posts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.slow
def test_the_real_servers_spans_carry_the_version_id_and_the_clients_trace(tmp_path: Path) -> None:
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    attributes = resource_attributes({("tiny", "1"): "1" * 64}, server_version="2.51.0", namespace="a=b, c")
    with Sink(("127.0.0.1", 0), Handler) as sink:
        sink.posts = []
        thread = threading.Thread(target=sink.serve_forever)
        thread.start()
        flags = opentelemetry_flags(f"http://127.0.0.1:{sink.server_port}/v1/traces", attributes)
        with TritonServer(deployed(tmp_path), flags=flags) as server:
            headers = {"traceparent": f"00-{trace_id}-{parent}-01"}
            with Client(server.http_url, headers=headers) as client:
                client.infer("tiny", {name: array[:1] for name, array in golden().inputs.items()})
            deadline = time.monotonic() + 60
            while trace_id not in json.dumps(sink.posts):
                assert time.monotonic() < deadline
                time.sleep(0.05)
        sink.shutdown()
        thread.join()
    resources = [part for post in sink.posts for part in post["resourceSpans"]]
    for resource in resources:
        told = {entry["key"]: entry["value"]["stringValue"] for entry in resource["resource"]["attributes"]}
        assert attributes.items() <= told.items()
    spans = [span for part in resources for scope in part["scopeSpans"] for span in scope["spans"]]
    ours = {span["name"]: span for span in spans if span["traceId"] == trace_id}
    assert ours["InferRequest"]["parentSpanId"] == parent
    named = {entry["key"]: entry["value"] for entry in ours["tiny"]["attributes"]}
    assert named["triton.model_name"] == {"stringValue": "tiny"}
    assert int(named["triton.model_version"]["intValue"]) == 1
