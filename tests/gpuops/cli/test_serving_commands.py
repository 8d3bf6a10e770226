"""The commands of serving as a user types them, on one real server."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gpuops.bundle import read_bundle, write_manifest
from tests.conftest import Job, run_cli

PORTS = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")


@contextmanager
def running(*arguments: str, lines: int, code: int = 0) -> Iterator[list[str]]:
    """A command that runs until it is interrupted; yields its first lines."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gpuops.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ.copy(),
    )
    try:
        assert process.stdout is not None
        yield [process.stdout.readline().strip() for _ in range(lines)]
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=90)
    assert process.returncode == code, errors


@dataclass(frozen=True)
class Served:
    """The small job's bundle, deployed and served with a key to load models."""

    bundle: Path
    repository: Path
    control: Path
    http: str
    grpc: str

    def cli(self, *arguments: object, server: str | None = None) -> subprocess.CompletedProcess[str]:
        return run_cli(*map(str, arguments), "--server", server or self.http)

    def json(self, *arguments: object, code: int = 0, server: str | None = None) -> Any:
        done = self.cli(*arguments, "--json", server=server)
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def served(bundled: Job, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("commands")
    os.environ["GPUOPS_LEDGER"] = str(folder / "ledger.sqlite")
    try:
        done = run_cli("deploy", bundled.bundle, folder / "repository", "--tag", "team=weather")
        assert done.returncode == 0, done.stderr
        control = folder / "control.key"
        command = ("serve", str(folder / "repository"), *PORTS, "--control", str(control))
        with running(*command, lines=3) as (http, grpc, _):
            yield Served(bundled.bundle, folder / "repository", control, http, grpc)
        assert not control.exists()
    finally:
        del os.environ["GPUOPS_LEDGER"]


def second(served: Served, folder: Path) -> Path:
    """The same bundle under another version id, as a new run's would be."""
    shutil.copytree(served.bundle, folder)
    document = {k: v for k, v in read_bundle(folder).manifest.items() if k not in ("sha256", "files", "schema")}
    write_manifest(folder, {**document, "version_id": "2" * 64})
    return folder


def test_the_key_is_its_owners_alone(served: Served) -> None:
    assert served.control.stat().st_mode & 0o777 == 0o600
    done = served.cli("rollback", "forecast", served.repository, server=served.grpc)
    assert done.returncode == 2
    assert "error" in done.stderr


@pytest.mark.slow
def test_a_rollout_a_comparison_and_the_way_back(served: Served, tmp_path: Path) -> None:
    access = ("--access", served.control)
    bundle = second(served, tmp_path / "second")
    loose = ("--count", 20, "--max-p50", 1000, "--max-p99", 1000)
    made = served.json("rollout", bundle, served.repository, *access, *loose, server=served.grpc)
    assert (made["promoted"], made["serving"]) == (True, [1, 2])
    found = served.json("compare", "forecast:1", "forecast:2", *loose)
    assert found["ok"]
    assert found["distances"]["y"]["max_abs"] == 0
    done = served.cli("compare", "forecast:1", "forecast:2", "--count", 5, "--max-joules", 1.1)
    assert done.returncode == 1  # nothing counts joules here, so nothing can be held to a limit
    assert "because joules a request are unknown" in done.stdout
    back = served.json("rollback", "forecast", served.repository, *access, server=served.grpc)
    assert back["serving"] == [1]
    done = run_cli("verify", served.bundle, "--server", served.grpc)
    assert done.returncode == 0, done.stderr
    assert "requests in flight" in done.stdout


def test_golden_requests_are_recorded_and_asked_again(served: Served, tmp_path: Path) -> None:
    recorded = served.json("probe", tmp_path / "goldens", "--record", "--access", served.control)
    assert [row["model"] for row in recorded["recorded"]] == ["forecast"]
    assert served.json("probe", tmp_path / "goldens")["ok"]
    assert served.json("probe", "--repository", served.repository)["ok"]
    (file,) = (tmp_path / "goldens").glob("*/recorded.npz")
    with np.load(file) as stored:
        np.savez(file, **{key: array + ("output" in key) for key, array in stored.items()})
    done = served.cli("probe", tmp_path / "goldens")
    assert done.returncode == 1
    assert done.stdout.startswith("WRONG")


def test_the_meter_reports_null_with_its_reason_and_serves_metrics(served: Served) -> None:
    report = served.json("meter", "--seconds", 0.2, "--every", 0.1)
    assert report["method"] == "none"
    assert report["reason"]
    command = ("meter", "--server", served.http, "--port", "0", "--repository", str(served.repository))
    with running(*command, "--namespace", "test", lines=1) as (url,):
        import urllib.request

        text = urllib.request.urlopen(url, timeout=30).read().decode()
    names = {family.name for family in text_string_to_metric_families(text)}
    assert "gpuops_server_up" in names


def test_load_is_measured_and_its_answers_are_checked(served: Served, tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    loops = ("--rate", 20, "--concurrency", 2, "--seconds", 0.5, "--bundle", served.bundle, "--out", out)
    document = served.json("bench", "serve", "forecast", *loops)
    assert json.loads(out.read_text()) == document
    assert [run["kind"] for run in document["runs"]] == ["open", "closed"]
    assert all(run["answered"] == run["sent"] > 0 for run in document["runs"])


def test_the_router_answers_and_tells_what_it_did(served: Served) -> None:
    done = None
    with running("route", "forecast:1", "forecast:1", "--port", "0", "--server", served.http, lines=1) as (url,):
        done = run_cli("verify", served.bundle, "--server", url)
    assert done.returncode == 0, done.stderr


def test_lint_finds_nothing_in_our_own_and_an_error_in_a_broken_one(served: Served, tmp_path: Path) -> None:
    done = run_cli("lint", served.repository)
    assert done.returncode == 0, done.stdout
    broken = tmp_path / "models"
    (broken / "m" / "1").mkdir(parents=True)
    (broken / "m" / "config.pbtxt").write_text('name: "m"\nbackend: "python"\nmax_batch_sizes: 4\n')
    done = run_cli("lint", broken, "--json")
    assert done.returncode == 1
    assert any(finding["severity"] == "error" for finding in json.loads(done.stdout))


def test_only_what_is_signed_is_deployed_and_served(served: Served, tmp_path: Path) -> None:
    private, public = tmp_path / "release.key", tmp_path / "release.pub"
    assert run_cli("keygen", private, public).returncode == 0
    bundle = tmp_path / "bundle"
    shutil.copytree(served.bundle, bundle)
    done = run_cli("deploy", bundle, tmp_path / "repository", "--trusted", public)
    assert done.returncode == 5
    assert "not signed" in done.stderr
    assert run_cli("sign", bundle, private).returncode == 0
    assert run_cli("deploy", bundle, tmp_path / "repository", "--trusted", public).returncode == 0
    with running("serve", str(tmp_path / "repository"), *PORTS, "--trusted", str(public), lines=3) as lines:
        assert all(lines)
    (manifest,) = tmp_path.glob("repository/forecast/1/golden.npz")
    manifest.write_bytes(manifest.read_bytes() + b"0")
    assert run_cli("serve", tmp_path / "repository", *PORTS, "--trusted", public).returncode == 5


def test_a_repository_is_published_and_fetched(served: Served, tmp_path: Path) -> None:
    store = f"file://{tmp_path / 'store'}"
    assert run_cli("publish", served.repository, store).returncode == 0
    done = run_cli("fetch", store, tmp_path / "fetched")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "fetched" / "forecast" / "1" / "model.onnx").is_file()
    assert run_cli("fetch", store, tmp_path / "fetched").returncode == 2  # it is there


def test_a_container_command_is_printed(served: Served) -> None:
    done = run_cli("serve", served.repository, "--container")
    assert done.returncode == 0
    assert done.stdout.startswith("docker run")
    assert "127.0.0.1:8000:8000" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("probe",), "which ones?"),
        (("probe", "x", "--header", "nocolon"), "NAME:VALUE"),
        (("rollback", "m", "r", "--access", "gone"), "holds no key"),
        (("compare", "m", "m:2"), "MODEL:VERSION"),
        (("compare", "m:1", "m:2", "--requests", "gone.npz"), "holds no inputs"),
        (("deploy", "b", "r", "--tune", "--threads", "1"), "leave --threads out"),
        (("deploy", "b", "r", "--tag", "x"), "KEY=VALUE"),
        (("deploy", "b", "r", "--backend", "java"), "there are python"),
        (("bench", "serve", "m", "--server", "https://127.0.0.1:1"), "plain text"),
        (("meter", "--seconds", "0"), "more than 0"),
        (("lint", "gone"), "gone"),
        (("route", "m:1", "m:2", "--share", "2"), "share"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: tuple[str, ...], words: str) -> None:
    done = run_cli(*arguments)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert words in lines[0]
