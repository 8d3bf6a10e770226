"""The loader's benchmark writes the one JSON shape, and its counts, which no noise moves, hold."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "benchmarks" / "bench_loader.py"
CASE = "none-64KiB-shuffle"
PEERS = {"zarr-oindex", "zarr-getitem", "zarr-async", "torch-dataloader"}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("bench") / "results" / "loader.json"
    done = subprocess.run(
        [sys.executable, BENCH, "--quick", "--cases", CASE, "--samples", "256", "--out", out],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert CASE in done.stdout
    assert "tensorstore" in done.stdout  # its row, or the line that says why there is none
    return json.loads(out.read_text())


def test_the_document_has_the_one_shape(result: dict):
    assert set(result) == {"bench", "command", "machine", "versions", "limits", "rows"}
    assert result["bench"] == "loader"
    assert result["command"].startswith("python benchmarks/bench_loader.py --quick")
    assert {"cpu", "cores", "memory_gb", "os", "kernel"} <= set(result["machine"])
    assert {"python", "numpy", "zarr", "numcodecs", "icechunk", "torch"} <= set(result["versions"])
    assert set(result["limits"]) == {CASE}
    assert result["limits"][CASE]["unit"] == "MB/s"
    for row in result["rows"]:
        assert set(row) == {"case", "subject", "metric", "value", "unit", "of_limit", "vs", "note"}
        assert row["case"] == CASE
        assert row["value"] > 0


def test_every_subject_is_timed_and_ours_is_held_against_all(result: dict):
    speeds = {row["subject"]: row for row in result["rows"] if row["metric"] == "throughput"}
    assert {"gpuops", "limit"} | PEERS <= set(speeds)
    ours, limit = speeds["gpuops"], speeds["limit"]
    assert limit["value"] == result["limits"][CASE]["value"]
    assert ours["of_limit"] == pytest.approx(ours["value"] / limit["value"], rel=1e-3)
    assert set(ours["vs"]) == set(speeds) - {"gpuops", "limit"}
    for peer, ratio in ours["vs"].items():
        assert ratio == pytest.approx(ours["value"] / speeds[peer]["value"], rel=1e-3)


def test_the_counts_hold(result: dict):
    counts = {row["metric"]: row["value"] for row in result["rows"] if row["subject"] == "gpuops"}
    assert 1 < counts["requests_per_sample"] <= 1.1  # one a sample, and each shard's index once
    assert 1 <= counts["bytes_per_useful_byte"] <= 1.02
    assert counts["decodes_per_sample"] == 1


def test_too_few_samples_are_refused_in_one_line():
    done = subprocess.run([sys.executable, BENCH, "--samples", "8"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("bench_loader.py: error: --samples 8: at least 256")


def test_a_subject_that_delivers_other_samples_stops_the_benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCH.parent)
    bench = importlib.import_module("bench_loader")
    fields = importlib.import_module("loader_cases").smooth_fields(256, (4, 4))
    epoch = bench.epoch(256, "fingerprint", 0)
    bench.check("right", lambda epoch: (fields[ids] for ids in epoch.batches), epoch, fields)
    with pytest.raises(SystemExit, match="wrong delivered other samples"):
        bench.check("wrong", lambda epoch: (fields[ids[::-1]] for ids in epoch.batches), epoch, fields)
