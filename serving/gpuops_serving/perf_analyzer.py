"""NVIDIA's own load generator, where it is installed: run against a server, its CSV read as rows of a benchmark.

It is a peer of our own (`gpuops_serving.load`), which needs no binary. Its wheel needs glibc 2.38; on older systems pip
installs an empty placeholder of that name instead, version 0.1.0.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gpuops.errors import InputError, UnavailableError
from gpuops.spec import Arrays

_HOW_TO_GET = (
    "pip install perf-analyzer on a system with glibc 2.38 or later (Ubuntu 24.04), or run it in NVIDIA's "
    "tritonserver container that ends in -py3-sdk; `gpuops bench serve` needs none of it"
)
_LAST_LINES = 5


@dataclass(frozen=True, slots=True)
class Measured:
    """One line of perf_analyzer's report."""

    concurrency: int
    """Requests under way."""
    requests_per_s: float
    """Answered requests a second; perf_analyzer counts inferences, a request of a batch being many."""
    latency_ms: dict[str, float]
    """p50_ms, p90_ms, p95_ms and p99_ms; the time in the server's queue on average as queue_ms."""

    def rows(self, case: str) -> list[dict[str, Any]]:
        """As rows of a benchmark's JSON, `case` as `<model>-<protocol>`."""
        values = {"requests_per_s": (self.requests_per_s, "1/s")}
        values |= {name: (value, "ms") for name, value in self.latency_ms.items()}
        return [
            {
                "case": f"{case}-c{self.concurrency}",
                "subject": "perf_analyzer",
                "metric": metric,
                "value": value,
                "unit": unit,
                "of_limit": None,
                "vs": {},
                "note": None,
            }
            for metric, (value, unit) in values.items()
        ]


def find_perf_analyzer() -> Path:
    """The binary on PATH.

    Raises:
        UnavailableError: there is none, or only pip's placeholder.
    """
    if found := shutil.which("perf_analyzer"):
        return Path(found)
    try:
        version = metadata.version("perf-analyzer")
    except metadata.PackageNotFoundError:
        raise UnavailableError(f"no perf_analyzer on PATH: {_HOW_TO_GET}") from None
    raise UnavailableError(f"pip's perf-analyzer {version} is an empty placeholder for this system: {_HOW_TO_GET}")


def run(
    url: str,
    model: str,
    *,
    concurrencies: Sequence[int] = (1,),
    version: str = "",
    batch: int = 1,
    seconds: float = 5.0,
    inputs: Sequence[Arrays] | None = None,
    flags: Sequence[str] = (),
) -> list[Measured]:
    """Measure a model at some concurrencies, one run each.

    Args:
        url: `http://HOST:PORT` or `grpc://HOST:PORT` of the server.
        model: Model name.
        concurrencies: Requests under way at a time.
        version: Version number; empty is the one the server chooses.
        batch: Samples a request.
        seconds: Length of one of its measurement windows, of which it takes at least three.
        inputs: Single samples by input name, [*shape] each; its random values otherwise.
        flags: More flags of perf_analyzer.

    Raises:
        InputError: the URL is none that it takes, or perf_analyzer refuses the model or its inputs.
        UnavailableError: there is no perf_analyzer, or it does not run on this system.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "grpc") or not parts.netloc:
        raise InputError(f"{url!r}: write http://HOST:PORT or grpc://HOST:PORT; for TLS give perf_analyzer its flags")
    binary = find_perf_analyzer()
    found = []
    with tempfile.TemporaryDirectory(prefix="gpuops-perf-") as folder:
        data = "random" if inputs is None else str(_write_inputs(Path(folder) / "inputs.json", inputs))
        for concurrency in concurrencies:
            report = Path(folder) / f"{concurrency}.csv"
            command = [
                *(
                    str(binary),
                    "-m",
                    model,
                    "-u",
                    parts.netloc,
                    "-i",
                    parts.scheme,
                    "-b",
                    str(batch),
                    "-f",
                    str(report),
                ),
                *(["-x", version] if version else []),
                *(f"--concurrency-range={concurrency}", f"--measurement-interval={round(seconds * 1000)}"),
                *(f"--input-data={data}", *flags),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = "; ".join([*done.stdout.splitlines(), *done.stderr.splitlines()][-_LAST_LINES:])
                if "GLIBC" in said:
                    raise UnavailableError(f"{binary} does not run on this system ({said}): {_HOW_TO_GET}")
                raise InputError(f"perf_analyzer on {url}, model {model!r}: {said}")
            found += read_report(report, batch)
    return found


def read_report(path: Path, batch: int = 1) -> list[Measured]:
    """Lines of a CSV that `perf_analyzer -f` wrote, by concurrency.

    Raises:
        InputError: it is none, or of a run by request rate.
    """
    try:
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
        measured = [_measured(line, batch) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no report by concurrency of `perf_analyzer -f` ({error})") from error
    if not measured:
        raise InputError(f"{path} holds no measurement: perf_analyzer found none stable; give it longer windows")
    return sorted(measured, key=lambda one: one.concurrency)


def _measured(line: dict[str, str], batch: int) -> Measured:
    latency = {f"p{place}_ms": float(line[f"p{place} latency"]) / 1e3 for place in (50, 90, 95, 99)}
    latency["queue_ms"] = float(line["Server Queue"]) / 1e3
    return Measured(int(line["Concurrency"]), float(line["Inferences/Second"]) / batch, latency)


def _write_inputs(path: Path, inputs: Sequence[Arrays]) -> Path:
    """Samples as perf_analyzer's JSON."""
    samples = [
        {name: {"content": array.ravel().tolist(), "shape": list(array.shape)} for name, array in sample.items()}
        for sample in inputs
    ]
    path.write_text(json.dumps({"data": samples}))
    return path
