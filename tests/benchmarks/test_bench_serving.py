"""The serving benchmark's document, and the counters it takes from the kernel."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_serving

    return bench_serving


def test_processor_time_is_that_of_a_process_and_of_all_below_it(bench: object) -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    tree = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", tree], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        spent = bench.processor_seconds(process.pid)  # type: ignore[attr-defined]
        process.communicate("\n")
    assert spent >= 0.25
    before = time.process_time()
    assert bench.processor_seconds(os.getpid()) >= before - 0.1  # type: ignore[attr-defined]


@pytest.mark.slow
def test_every_subject_answers_rightly_and_the_document_has_the_one_shape(tmp_path: Path) -> None:
    out = tmp_path / "serving.json"
    command = [sys.executable, str(BENCHMARKS / "bench_serving.py"), "--quick", "--models", "small"]
    environment = {key: value for key, value in os.environ.items() if key != "GPUOPS_PEERS"}
    done = subprocess.run(
        [*command, "--concurrency", "8", "--out", str(out)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert "fastapi is left out" in done.stdout
    document = json.loads(out.read_text())
    assert document["bench"] == "serving"
    rows = document["rows"]
    found = {(row["case"], row["subject"]) for row in rows if row["metric"] == "requests"}
    for protocol in ("http", "grpc"):
        case = f"small-{protocol}-c8"
        assert {(case, name) for name in ("limit", "gpuops", "handwritten", "bare", "null")} <= found
        ours = next(r for r in rows if r["case"] == case and r["subject"] == "gpuops" and r["metric"] == "requests")
        assert set(ours["vs"]) == {"handwritten", "bare", "null"}
    assert [row["note"] for row in rows if "failed" in row["note"]] == []
    assert {"small-lifecycle", "small-http-client"} <= {row["case"] for row in rows}
