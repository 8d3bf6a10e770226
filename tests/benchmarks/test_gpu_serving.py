"""benchmarks/gpu_serving.py without a GPU: its whole way on the CPU, its load against wrong servers, its accounts."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from gpuops.errors import IntegrityError
from gpuops_serving.accounts import Totals

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu_serving_load import Shot, add_up, closed_loop  # noqa: E402

SAMPLE, ANSWER = np.arange(8, dtype=np.int16).reshape(1, 8), np.ones((1, 4), np.float32)


class Answers(BaseHTTPRequestHandler):
    """Answers the load as `server.content` says."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        content = self.server.content if body == SAMPLE.tobytes() else b"another request"  # type: ignore[attr-defined]
        self.server.asked += 1  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    content = ANSWER.tobytes()
    asked = 0


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Answers) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.fixture(autouse=True)
def no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_serving_load.WARM_UP_S", 0.05)


def test_a_loop_counts_every_request_that_the_server_answered(server: Server) -> None:
    found = closed_loop(url(server), [Shot.raw(SAMPLE, ANSWER)], 3, 0.2)
    assert found.answered == server.asked
    assert 2 <= len(found.latencies_s) <= found.answered
    assert found.per_s == len(found.latencies_s) / found.seconds
    p50, p100 = found.quantiles_ms((0.5, 0.999))
    assert 0 < p50 <= p100 <= 1e3 * max(found.latencies_s)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "with 0 bytes"),
        ((ANSWER + 1).tobytes(), "differs by 1,"),
        (np.full_like(ANSWER, np.nan).tobytes(), "differs by nan"),
    ],
)
def test_a_wrong_answer_ends_the_load(server: Server, content: bytes, says: str) -> None:
    server.content = content
    with pytest.raises(IntegrityError, match=says):
        closed_loop(url(server), [Shot.raw(SAMPLE, ANSWER)], 2, 30.0)


def test_nobody_there_ends_the_load(server: Server) -> None:
    with pytest.raises(IntegrityError, match="refused"):
        closed_loop("http://127.0.0.1:9", [Shot.raw(SAMPLE, ANSWER)], 2, 30.0)


def test_accounts_that_do_not_add_up_are_no_result() -> None:
    totals, key = Totals(), ("field", "1")
    totals.shares_uj["GPU-1", *key] = 70
    totals.idle_uj["GPU-1"], totals.unattributed_uj["GPU-1"] = 20, 10
    totals.counted_uj["GPU-1"] = 100
    totals.requests[key] = 5
    assert add_up(totals, key, 5).endswith("counted 0.0 J")
    with pytest.raises(SystemExit, match="6 requests were answered, the meter saw 5"):
        add_up(totals, key, 6)
    totals.idle_uj["GPU-1"] = 21
    with pytest.raises(SystemExit, match="do not add up"):
        add_up(totals, key, 5)


@pytest.mark.slow
def test_the_whole_way_on_a_cpu(tmp_path: Path) -> None:
    script, out = BENCHMARKS / "gpu_serving.py", tmp_path / "found.json"
    refused = subprocess.run([sys.executable, script, "--cpu"], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert "name another file with --out" in refused.stderr
    command = [sys.executable, script, "--cpu", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "our kernel in 0 files" in done.stdout  # decomposed: that is for GPUs
    found = json.loads(out.read_text())
    assert found["limits"]["the package alone"]["value"] > 0
    rows = {(row["case"], row["subject"], row["metric"]): row for row in found["rows"]}
    for concurrency in (1, 8, 64):
        for subject in ("gpuops", "aiohttp"):
            assert rows[f"field-http-c{concurrency}", subject, "throughput"]["value"] > 0
    assert not [key for key in rows if key[2].startswith("energy")]
    assert rows["field-http-c1", "gpuops", "throughput"]["note"].startswith("joules null: ")
