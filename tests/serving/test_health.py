"""The health check: what is wrong is said in one line, and a restart is asked for only where it mends something."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_bundle import deployed, golden, make_bundle

from gpuops.bundle import file_sha256
from gpuops.errors import GpuopsError
from gpuops_serving.client import Client
from gpuops_serving.config import Batching, Options
from gpuops_serving.health import main
from gpuops_serving.repository import SHIM, deploy
from gpuops_serving.server import TritonServer

ROOT = Path(__file__).parents[2]
BOTH = ("readiness", "liveness")


def check(capsys: pytest.CaptureFixture[str], repository: Path, url: str, probe: str, timeout_s: float = 15) -> str:
    """Exit code and line of the check, as "0 ..." or "1 ..."."""
    code = main([str(repository), "--server", url, "--probe", probe, "--timeout", str(timeout_s)])
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    assert not printed.err
    return f"{code} {printed.out.strip()}"


@pytest.fixture
def copied(server: TritonServer, tmp_path: Path) -> Path:
    """What the session's server serves, to be changed under it."""
    return Path(shutil.copytree(server._repository, tmp_path / "copied"))


def test_a_server_that_answers_rightly_is_healthy(server: TritonServer, capsys: pytest.CaptureFixture[str]) -> None:
    for url in (server.http_url, server.grpc_url):
        for probe in BOTH:
            found = check(capsys, server._repository, url, probe)
            assert found == "0 healthy: golden requests of 1 versions answered rightly"


def test_the_command_runs_by_itself(server: TritonServer) -> None:
    command = [sys.executable, "-m", "gpuops_serving.health", server._repository, "--server", server.http_url]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'serving'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("healthy: ")


def test_a_server_that_is_not_there_is_restarted(server: TritonServer, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound and not listening: refused, and nobody else's
        for probe in BOTH:
            found = check(capsys, server._repository, f"http://127.0.0.1:{free.getsockname()[1]}", probe)
            assert found.startswith("1 unhealthy: no answer from http://127.0.0.1")


def test_a_server_that_accepts_and_says_nothing_is_restarted(
    server: TritonServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        for scheme in ("http", "grpc"):
            url = f"{scheme}://127.0.0.1:{mute.getsockname()[1]}"
            assert check(capsys, server._repository, url, "liveness", 0.5).startswith("1 unhealthy: no answer from")


def test_a_server_that_keeps_its_statistics_to_itself_is_not_restarted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = deployed(tmp_path)
    with TritonServer(repository, flags=["--http-restricted-api=statistics:key=secret"]) as server:
        assert "restricted" in check(capsys, repository, server.http_url, "readiness")
        assert check(capsys, repository, server.http_url, "liveness").startswith("0 alive, but not ready: ")


def test_a_version_that_the_server_has_not_taken_up_drains_it_and_does_not_restart_it(
    server: TritonServer, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deploy(make_bundle(tmp_path / "two", version_id="2" * 64, gain=0.25), copied)
    found = check(capsys, copied, server.http_url, "readiness")
    assert found.startswith("1 unhealthy: version 2 of 'tiny' is named in the repository and not served: start again")
    found = check(capsys, copied, server.http_url, "liveness")
    assert found.startswith("0 alive, but not ready: version 2 of 'tiny'")


def test_another_version_id_under_the_same_number_drains_it(
    server: TritonServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = deployed(tmp_path, version_id="9" * 64)
    for probe, code in (("readiness", "1 unhealthy"), ("liveness", "0 alive, but not ready")):
        found = check(capsys, other, server.http_url, probe)
        assert found == f"{code}: version 1 of 'tiny' has another version id than the repository names: start again"


def test_a_repository_that_cannot_be_read_drains_it(
    server: TritonServer, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "tiny" / "1" / "golden.npz").write_bytes(b"changed")
    for repository, says in ((copied, "differs from its manifest"), (tmp_path / "nowhere", "not a model repository")):
        assert says in check(capsys, repository, server.http_url, "readiness")
        assert check(capsys, repository, server.http_url, "liveness").startswith("0 alive, but not ready: ")


def test_answers_that_became_wrong_are_a_reason_to_start_again(
    server: TritonServer, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied / "tiny" / "1"  # the same version, by its name; the server answers otherwise than it is said to
    golden(gain=0.6).save(folder / "golden.npz")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["golden.npz"] = file_sha256(folder / "golden.npz")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for probe in BOTH:
        found = check(capsys, copied, server.http_url, probe)
        assert found.startswith("1 unhealthy: version 1 of 'tiny': ")
        assert "differs from its golden answers by" in found


HELD = """
import os, time
_execute = TritonPythonModel.execute
def _held(self, requests):
    while os.path.exists({gate!r}):
        time.sleep(0.01)
    return _execute(self, requests)
TritonPythonModel.execute = _held
"""


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """While this file is there, the model of `gated` runs nothing."""
    return tmp_path / "gate"


@pytest.fixture
def gated(tmp_path: Path, gate: Path) -> Iterator[TritonServer]:
    """A server whose model can be held, and which lets two requests wait."""
    repository = tmp_path / "repository"
    deploy(make_bundle(tmp_path / "bundle"), repository, options=Options(batching=Batching(queue_size=2)))
    with (repository / "tiny" / "1" / SHIM.name).open("a") as shim:
        shim.write(HELD.format(gate=str(gate)))
    with TritonServer(repository) as running:
        try:
            yield running
        finally:
            gate.unlink(missing_ok=True)


def test_dead_standing_and_busy_models_are_told_apart(
    gated: TritonServer, gate: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = gated._repository
    gate.touch()
    try:
        for url in (gated.http_url, gated.grpc_url):  # nothing is run: it stands still
            found = check(capsys, repository, url, "liveness", 1)
            assert found.endswith("did not answer its golden request in time and ran nothing meanwhile")
            assert found.startswith("1 unhealthy")

        threads = [threading.Thread(target=ask, args=(gated.http_url,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        turned_away = wait_for(lambda: check(capsys, repository, gated.http_url, "liveness", 5), "maximum queue size")
        assert turned_away.startswith("0 alive, but not ready: ")  # too many requests: a restart would lose them
        assert "maximum queue size" in check(capsys, repository, gated.grpc_url, "readiness", 5)
    finally:
        gate.unlink()
    for thread in threads:
        thread.join()
    assert check(capsys, repository, gated.http_url, "liveness").startswith("0 healthy")

    (stub,) = (
        int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and is_stub(entry, gated.server_id)
    )
    os.kill(stub, signal.SIGKILL)
    with Client(gated.http_url) as client:
        assert client.ready("tiny")  # says the server
    for url in (gated.http_url, gated.grpc_url):
        for probe in BOTH:
            assert "is not healthy" in (found := check(capsys, repository, url, probe))
            assert found.startswith("1 unhealthy: version 1 of 'tiny': ")
    os.kill(gated.pid, signal.SIGKILL)  # asked to end, it would wait 30 s for the dead process


@pytest.mark.slow
def test_a_model_that_is_busy_is_not_restarted(
    gated: TritonServer, gate: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpuops_serving import health

    # Between the two looks another request is answered, as under load; the golden one waits behind the next.
    def busy(*arguments: object, **options: object) -> object:
        ask(gated.http_url)
        gate.touch()
        return probe(*arguments, **options)  # type: ignore[arg-type]

    probe = health.probe
    monkeypatch.setattr(health, "probe", busy)
    found = check(capsys, gated._repository, gated.http_url, "liveness", 1)
    assert found.startswith("0 alive, but not ready: version 1 of 'tiny' did not answer its golden request in time and")
    assert found.endswith("is busy with other requests")
    gate.unlink()
    found = check(capsys, gated._repository, gated.http_url, "readiness", 1)
    assert found.startswith("1 unhealthy: ")


def ask(url: str) -> None:
    with Client(url) as client, contextlib.suppress(GpuopsError):  # it may be turned away
        client.infer("tiny", golden().batch(1).inputs)


def wait_for(found: Callable[[], str], says: str) -> str:
    deadline = time.monotonic() + 60
    while says not in (text := found()):
        assert time.monotonic() < deadline, text
    return text


def is_stub(entry: Path, server_id: str) -> bool:
    try:
        line = (entry / "cmdline").read_bytes()
    except OSError:
        return False
    return b"triton_python_backend_stub" in line and server_id.encode() in line
