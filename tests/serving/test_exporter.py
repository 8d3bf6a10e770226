"""The real exporter over the real server and the scripted driver, scraped over HTTP by Prometheus' own parser."""

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from tiny_bundle import deployed, golden

from gpuops.energy.sensor import Count, Found, Vitals
from gpuops.errors import InputError, UnavailableError
from gpuops_serving.client import Client
from gpuops_serving.exporter import Exporter, Probed
from gpuops_serving.metrics import ServerMeter
from gpuops_serving.server import TritonServer
from gpuops_serving.trace import trace_flags
from tests.gpuops.energy.conftest import library  # noqa: F401  the scripted driver

ROOT = Path(__file__).parents[2]
ONE = {name: array[:1] for name, array in golden().inputs.items()}
LINES = ("energy", "idle", "loading", "unattributed", "lost")

Samples = dict[str, float]
"""By name and labels, as in the text."""


def scrape(port: int) -> Samples:
    """What an exporter says; proves on the way that Prometheus can read it."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return flat(text_string_to_metric_families(text))


def flat(families: Iterable[Metric]) -> Samples:
    found = {}
    for family in families:
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
            if family.type == "counter":
                assert sample.name.endswith("_total")
    return found


def total(samples: Samples, name: str) -> float:
    """Sum over the labels of a metric."""
    return sum(value for key, value in samples.items() if key.startswith(f"{name}{{"))


def until(port: int, holds: Callable[[Samples], bool]) -> Samples:
    deadline = time.monotonic() + 60
    while not holds(found := scrape(port)):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


@contextmanager
def exporting(server_url: str, trace: Path, repository: Path, library: Path, folder: Path) -> Iterator[int]:  # noqa: F811
    """Port of an exporter in a process that has the scripted driver: one GPU, 250 W."""
    (folder / "script").write_text("gpu GPU-a H100 step_ms=20\npower 0 0 250000\n")
    environ = {key: value for key, value in os.environ.items() if not key.startswith("CUDA_")} | {
        "LD_LIBRARY_PATH": str(library.parent),
        "FAKE_NVML": str(folder / "script"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "serving")]),
    }
    script = str(Path(__file__).with_name("energy_exporter.py"))
    command = [sys.executable, "-W", "error", script, server_url, str(trace), str(repository)]
    with subprocess.Popen(
        command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield int(line)
        process.stdin.close()
        assert process.wait(timeout=60) == 0, process.stderr.read()
        assert process.stderr.read() == ""


def on_gpu(folder: Path) -> Path:
    """A repository whose model may be anywhere: a server without a GPU takes that, and the meter counts GPUs."""
    repository = deployed(folder)
    config = repository / "tiny" / "config.pbtxt"
    config.write_text(config.read_text().replace("KIND_CPU", "KIND_MODEL"))
    return repository


OWNER = 'model="tiny",namespace="test",version="1"'


def test_joules_are_conserved_from_the_driver_to_the_scrape(tmp_path: Path, library: Path) -> None:  # noqa: F811
    repository, trace = on_gpu(tmp_path), tmp_path / "trace.json"
    server = TritonServer(repository, flags=trace_flags(trace, log_frequency=1))
    with server, exporting(server.grpc_url, trace, repository, library, tmp_path) as port:
        begin = until(port, lambda s: s['gpuops_server_up{namespace="test"}'] == 1)
        stopped, history = threading.Event(), [begin]

        def scrape_all_the_time() -> None:
            while not stopped.is_set():
                history.append(scrape(port))

        scraper = threading.Thread(target=scrape_all_the_time)
        scraper.start()
        by_trace = 'gpuops_attributed_joules_total{gpu="GPU-a",method="trace",namespace="test"}'
        with Client(server.grpc_url) as client:

            def ready(samples: Samples) -> bool:
                client.infer("tiny", ONE)
                metered = samples.get(f"gpuops_metered_requests_total{{{OWNER}}}", 0)
                return metered >= 20 and by_trace in samples and samples.get(f"gpuops_probe_ok{{{OWNER}}}") == 1

            found = until(port, ready)
        stopped.set()
        scraper.join()
    counted = total(found, "gpuops_counted_joules_total")
    assert sum(total(found, f"gpuops_{line}_joules_total") for line in LINES) == pytest.approx(counted, abs=1e-6)
    energy = found[f'gpuops_energy_joules_total{{gpu="GPU-a",{OWNER}}}']
    assert 0 < energy < counted
    metered = found[f"gpuops_metered_requests_total{{{OWNER}}}"]
    assert found[f"gpuops_joules_per_request{{{OWNER}}}"] == pytest.approx(energy / metered)
    assert found[f"gpuops_requests_total{{{OWNER}}}"] >= metered
    assert found[by_trace] > 0
    assert found[f'gpuops_version_info{{{OWNER},version_id="{"1" * 64}"}}'] == 1
    assert found['gpuops_meter_up{method="nvml-counter",namespace="test",reason=""}'] == 1
    assert not [key for key in found if key.startswith("gpuops_joules_unknown")]
    assert len(history) > 3
    for earlier, later in pairwise(history):
        falls = [key for key, value in earlier.items() if "_total{" in key and later[key] < value]
        assert falls == []


@pytest.mark.slow
def test_a_server_that_goes_away_and_comes_back_is_metered_on(tmp_path: Path, library: Path) -> None:  # noqa: F811
    repository, trace = on_gpu(tmp_path), tmp_path / "trace.json"
    flags = trace_flags(trace, log_frequency=1)
    first = TritonServer(repository, flags=flags)
    first.start()
    url, up = first.grpc_url, 'gpuops_server_up{namespace="test"}'
    with exporting(url, trace, repository, library, tmp_path) as port:
        before = until(port, lambda s: s[up] == 1 and s.get(f"gpuops_probe_ok{{{OWNER}}}") == 1)
        first.stop()
        away = until(port, lambda s: s[up] == 0 and total(s, "gpuops_unattributed_joules_total") > 0)
        assert away[f"gpuops_probe_ok{{{OWNER}}}"] == 0
        assert total(away, "gpuops_requests_total") >= total(before, "gpuops_requests_total")
        second = TritonServer(repository, flags=flags, grpc_port=int(url.rpartition(":")[2]))
        with second:
            requests = f"gpuops_requests_total{{{OWNER}}}"
            seen = until(port, lambda s: s[up] == 1 and s[f"gpuops_probe_ok{{{OWNER}}}"] == 1 and requests in s)
            with Client(second.http_url) as client:
                for _ in range(20):
                    client.infer("tiny", ONE)
            back = until(port, lambda s: s[requests] >= seen[requests] + 20)
            counted = total(back, "gpuops_counted_joules_total")
            lines = sum(total(back, f"gpuops_{line}_joules_total") for line in LINES)
            assert lines == pytest.approx(counted, abs=1e-6)


CPU = 'model="tiny",namespace="",version="1"'


def sample(exporter: Exporter, name: str, labels: str) -> float:
    return flat(exporter.collect())[f"{name}{{{labels}}}"]


def test_what_is_unknown_is_absent_and_the_reason_is_told(server: TritonServer) -> None:
    probed = [Probed("tiny", "1", True, 2.5), Probed("dead", "3", False, None)]
    asked = 0

    def probe() -> list[Probed]:
        nonlocal asked
        asked += 1
        if asked > 1:
            raise UnavailableError("no answer")
        return probed

    with Client(server.grpc_url) as client:
        meter = ServerMeter(client, found=Found((), "no driver"), longest_s=0)
        exporter = Exporter(meter, probe=probe)
        port = exporter.serve(0)
        try:
            assert scrape(port)['gpuops_server_up{namespace=""}'] == 0, "it was not asked yet"
            exporter.look()
            exporter.look()
            exporter.probe()
            found = scrape(port)
            assert found['gpuops_meter_up{method="none",namespace="",reason="no driver"}'] == 0
            assert found[f'gpuops_joules_unknown{{{CPU[:12]},namespace="",{REASON},version="1"}}'] == 1
            absent = ("energy_joules", "counted_joules", "idle_joules", "joules_per_request", "metered_requests")
            assert [key for key in found if any(key.startswith(f"gpuops_{name}") for name in absent)] == []
            assert found[f"gpuops_requests_total{{{CPU}}}"] == 0
            assert (found[f"gpuops_probe_ok{{{CPU}}}"], found[f"gpuops_probe_seconds{{{CPU}}}"]) == (1, 0.0025)
            assert found['gpuops_probe_ok{model="dead",namespace="",version="3"}'] == 0
            assert 'gpuops_probe_seconds{model="dead",namespace="",version="3"}' not in found
            scrape(port)
            assert asked == 1, "a scrape asks nothing"
            exporter.probe()
            assert scrape(port)[f"gpuops_probe_ok{{{CPU}}}"] == 0
        finally:
            exporter.shutdown()
            meter.close()


REASON = 'reason="computes on the CPU, which no counter here covers"'


def test_a_scrape_does_not_wait_for_a_server_that_hangs() -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    with Client(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=60) as client:
        meter = ServerMeter(client, found=Found((), "no driver"))
        exporter = Exporter(meter, probe=lambda: [Probed("tiny", "1", True, 1.0)])
        exporter.probe()
        port = exporter.serve(0)
        looking = threading.Thread(target=exporter.look)
        looking.start()
        with silent.accept()[0]:  # it was asked, and answers nothing
            assert scrape(port)['gpuops_server_up{namespace=""}'] == 0
            assert looking.is_alive()
        silent.close()
        looking.join()
        exporter.shutdown()
        exporter.look()
        assert sample(exporter, "gpuops_probe_ok", CPU) == 0, "whatever the last probe found"
    assert meter.last_error is not None
    assert "no answer from" in meter.last_error


class Partitioned:
    """A GPU under MIG, as gpuops.energy.nvml has it."""

    id, name, method, scope, step_ms = "GPU-m", "H100", "nvml-counter", "gpu-board", 100.0

    def count(self) -> Count:
        return Count(None, reason="MIG is on")

    def vitals(self) -> Vitals:
        return Vitals()


def test_a_gpu_that_does_not_count_has_a_reason_and_no_series(server: TritonServer) -> None:
    with Client(server.grpc_url) as client, ServerMeter(client, found=Found([Partitioned()]), longest_s=0) as meter:
        exporter = Exporter(meter)
        exporter.look()
        exporter.look()
    assert sample(exporter, "gpuops_gpu_unknown", 'gpu="GPU-m",namespace="",reason="MIG is on"') == 1
    assert [key for key in flat(exporter.collect()) if "GPU-m" in key and "joules" in key] == []


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, Client("http://127.0.0.1:1") as client:
        meter = ServerMeter(client, found=Found((), "no driver"))
        with pytest.raises(UnavailableError, match=f"port {taken.getsockname()[1]} .* name another"):
            Exporter(meter).serve(taken.getsockname()[1])
        for port in (-1, 65536):
            with pytest.raises(InputError, match="name one of 1 to 65535"):
                Exporter(meter).serve(port)
