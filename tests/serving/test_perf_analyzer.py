"""The adapter of perf_analyzer. The binary needs glibc 2.38; where it is not there, a script stands in for it."""

import json
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from gpuops.errors import InputError, UnavailableError
from gpuops_serving.perf_analyzer import find_perf_analyzer, read_report, run

# From NVIDIA's documentation of `-f`; rows are sorted by throughput.
HEAD = (
    "Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,Server Compute Input,"
    "Server Compute Infer,Server Compute Output,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency\n"
)
REPORT = HEAD + (
    "1,69.2,225,2148,64,206,11781,19,0,13891,18795,19753,21018\n"
    "4,84.2,279,1604,33669,233,11731,18,1,47045,56545,59225,64886\n"
    "2,87.2,235,1973,9151,190,11346,17,0,21874,28557,29768,34766\n"
)

STAND_IN = f"""#!{sys.executable}
import json, pathlib, sys
arguments = sys.argv[1:]
place = pathlib.Path(__file__).parent
with (place / "asked.json").open("a") as file:
    file.write(json.dumps(arguments) + chr(10))
data = next(a for a in arguments if a.startswith("--input-data=")).partition("=")[2]
if data != "random":
    (place / "data.json").write_text(pathlib.Path(data).read_text())
if (place / "says").exists():
    sys.exit((place / "says").read_text())
concurrency = next(a for a in arguments if a.startswith("--concurrency-range=")).partition("=")[2]
report = {HEAD!r} + concurrency + ",100,1,1,2000,1,1,1,1,1000,2000,3000,4000" + chr(10)
pathlib.Path(arguments[arguments.index("-f") + 1]).write_text(report)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH, empty."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


@pytest.fixture
def stand_in(folder: Path) -> Path:
    (folder / "perf_analyzer").write_text(STAND_IN)
    (folder / "perf_analyzer").chmod(0o755)
    return folder


def test_a_report_is_read_in_milliseconds_and_by_concurrency(tmp_path: Path) -> None:
    (tmp_path / "perf.csv").write_text(REPORT)
    found = read_report(tmp_path / "perf.csv")
    assert [(one.concurrency, one.requests_per_s) for one in found] == [(1, 69.2), (2, 87.2), (4, 84.2)]
    assert found[0].latency_ms == {
        "p50_ms": 13.891,
        "p90_ms": 18.795,
        "p95_ms": 19.753,
        "p99_ms": 21.018,
        "queue_ms": 0.064,
    }
    assert read_report(tmp_path / "perf.csv", batch=4)[0].requests_per_s == pytest.approx(17.3)
    (row,) = [row for row in found[2].rows("demo-http") if row["metric"] == "p99_ms"]
    assert (row["case"], row["subject"], row["value"], row["unit"]) == ("demo-http-c4", "perf_analyzer", 64.886, "ms")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (HEAD, "found none stable"),
        ("", "found none stable"),
        (REPORT.replace("Concurrency", "Request Rate"), "no report by concurrency"),
        (REPORT.replace("p99 latency", "p99"), "no report by concurrency"),
        (REPORT.replace("69.2", "many"), "no report by concurrency"),
        (HEAD + "1,69.2\n", "no report by concurrency"),
    ],
)
def test_what_is_no_report_is_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "perf.csv").write_text(text)
    with pytest.raises(InputError, match=says):
        read_report(tmp_path / "perf.csv")
    with pytest.raises(InputError, match="no report"):
        read_report(tmp_path / "gone.csv")


def test_it_is_run_once_a_concurrency_with_real_samples(stand_in: Path) -> None:
    samples = [{"x": np.arange(6, dtype=np.uint8).reshape(2, 3)}, {"x": np.ones((2, 3), np.uint8)}]
    found = run(
        "grpc://h:1", "m", concurrencies=[8, 1], version="3", batch=2, seconds=0.5, inputs=samples, flags=["-a"]
    )
    assert [(one.concurrency, one.requests_per_s) for one in found] == [(8, 50.0), (1, 50.0)]
    first, second = (json.loads(line) for line in (stand_in / "asked.json").read_text().splitlines())
    report = first[first.index("-f") + 1]
    assert first[:8] == ["-m", "m", "-u", "h:1", "-i", "grpc", "-b", "2"]
    assert first[8:12] == ["-f", report, "-x", "3"]
    assert first[12:14] == ["--concurrency-range=8", "--measurement-interval=500"]
    assert first[-1] == "-a"
    assert "--concurrency-range=1" in second
    assert not Path(report).exists()
    assert json.loads((stand_in / "data.json").read_text()) == {
        "data": [
            {"x": {"content": [0, 1, 2, 3, 4, 5], "shape": [2, 3]}},
            {"x": {"content": [1] * 6, "shape": [2, 3]}},
        ]
    }
    run("http://h:1", "m")
    third = json.loads((stand_in / "asked.json").read_text().splitlines()[2])
    assert "--input-data=random" in third
    assert "-x" not in third


def test_what_it_refuses_is_said_in_its_own_words(stand_in: Path) -> None:
    (stand_in / "says").write_text("error: failed to get model metadata")
    with pytest.raises(InputError, match="model 'm': error: failed to get model metadata"):
        run("http://h:1", "m")
    (stand_in / "says").write_text("perf_analyzer: /lib/libc.so.6: version `GLIBC_2.38' not found")
    with pytest.raises(UnavailableError, match=r"does not run on this system.*glibc 2\.38"):
        run("http://h:1", "m")
    for url in ("https://h:1", "h:1", "http://"):
        with pytest.raises(InputError, match="HOST:PORT"):
            run(url, "m")


def test_no_perf_analyzer_and_pips_placeholder_are_told_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", gone)
    with pytest.raises(UnavailableError, match="no perf_analyzer on PATH: pip install"):
        find_perf_analyzer()
    monkeypatch.setattr(metadata, "version", lambda name: "0.1.0")
    with pytest.raises(UnavailableError, match=r"perf-analyzer 0\.1\.0 is an empty placeholder.*glibc 2\.38"):
        run("http://h:1", "m")
