"""The real tritonserver: found, started, proved, refused and stopped without a trace."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
from tiny_bundle import deployed, golden, make_bundle

from gpuops.bundle import read_bundle
from gpuops.errors import InputError, IntegrityError, UnavailableError
from gpuops_serving import binary as binary_room
from gpuops_serving import server as server_room
from gpuops_serving.binary import PIP_COMMAND, environment_for, find_tritonserver, lay_out_backends
from gpuops_serving.client import Client
from gpuops_serving.config import Options
from gpuops_serving.repository import SHIM, deploy, served_versions
from gpuops_serving.server import TritonServer

ROOT = Path(__file__).parents[2]

NAIVE_SHIM = """
import triton_python_backend_utils as triton, numpy as np
class TritonPythonModel:
    def execute(self, requests):
        n = [triton.get_input_tensor_by_name(r, "m").as_numpy().shape[0] for r in requests]
        return [triton.InferenceResponse([triton.Tensor("y", np.ones((k, 1, 8, 8), np.float32))]) for k in n]
"""
"""As in every tutorial. Under NumPy 2 it answers with no bytes at all, and with success."""

RECORDING = """

class _Recording(TritonPythonModel):
    def initialize(self, args):
        super().initialize(args)
        graph = self.graph

        def recorded(inputs):
            with open({file!r}, "a") as file:
                print(len(inputs["m"]), file=file)
            return graph(inputs)

        self.graph = recorded


TritonPythonModel = _Recording
"""
"""Appended to our shim: the graph notes how many samples it is given."""


def processes(text: str) -> list[str]:
    """Command lines of living processes that hold `text`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found += [line] if text in line else []
    return found


def leftovers(server_id: str) -> list[str]:
    """Processes, shared memory and temporary folders of a server."""
    paths = [*Path("/dev/shm").glob(f"{server_id}*"), *Path(tempfile.gettempdir()).glob(f"{server_id}*")]
    return processes(server_id) + [str(path) for path in paths]


def assert_refused(server: TritonServer, kind: type[Exception], says: str) -> None:
    """Starting `server` must fail so, and leave nothing."""
    try:
        with pytest.raises(kind, match=says):
            server.start()
        assert leftovers(server.server_id) == []
    finally:
        server.stop()


def test_a_server_starts_quickly_and_stops_without_a_trace(tmp_path: Path) -> None:
    server = TritonServer(deployed(tmp_path), log=tmp_path / "log")
    began = time.monotonic()
    with server:
        started = time.monotonic()
        assert os.getpgid(server.pid) == server.pid
        stubs = [line for line in processes(server.server_id) if "triton_python_backend_stub" in line]
        assert stubs
        assert list(Path("/dev/shm").glob(f"{server.server_id}*"))
        with urllib.request.urlopen(server.metrics_url) as metrics:
            assert (
                b'nv_inference_request_success{model="tiny",version="1"} 4' in metrics.read()
            )  # 8 samples twice, by 5
        stopping = time.monotonic()
    assert leftovers(server.server_id) == []
    assert "Traceback" not in (tmp_path / "log").read_text()  # NumPy's capsule destructor would print one a request
    assert started - began < 30
    assert time.monotonic() - stopping < 20


@pytest.mark.slow
def test_a_client_left_open_delays_the_end_but_does_not_prevent_it(tmp_path: Path) -> None:
    server = TritonServer(deployed(tmp_path))
    with server:
        client = Client(server.http_url)
        client.models()
        stopping = time.monotonic()
    assert time.monotonic() - stopping < 45
    assert leftovers(server.server_id) == []
    client.close()


def test_only_loopback_is_bound(server: TritonServer) -> None:
    inodes = set()
    for entry in Path(f"/proc/{server.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            inodes.add(os.readlink(entry).removeprefix("socket:[").removesuffix("]"))
    listening = []
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/{server.pid}/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening.append(fields[1].split(":")[0])
    assert len(listening) >= 3
    assert {address[-8:] for address in listening} == {"0100007F"}  # 127.0.0.1, also as ::ffff:127.0.0.1
    assert all(set(address[:-8]) <= {"0", "F"} for address in listening)


def test_the_installed_server_is_left_as_it_was(server: TritonServer) -> None:
    backend = find_tritonserver().resolve().parents[1] / "backends" / "python"
    assert not (backend / "triton_python_backend_stub").exists()
    assert any(
        str(Path(tempfile.gettempdir()) / server.server_id) in line for line in processes("triton_python_backend_stub")
    )


def test_the_second_version_is_served_after_a_restart(tmp_path: Path) -> None:
    repository = deployed(tmp_path)
    deploy(make_bundle(tmp_path / "two", version_id="2" * 64, gain=0.25), repository)
    with TritonServer(repository) as server, Client(server.http_url) as client:
        assert [(m.version, m.state) for m in client.models()] == [("1", "READY"), ("2", "READY")]
        assert client.version_id("tiny") == "2" * 64
        assert [client.answer("tiny", golden().inputs, version).version for version in ("", "1")] == ["2", "1"]


@pytest.mark.parametrize("flag", ["http", "grpc", "metrics"])
def test_a_taken_port_is_named_before_anything_starts(server: TritonServer, tmp_path: Path, flag: str) -> None:
    urls = {"http": server.http_url, "grpc": server.grpc_url, "metrics": server.metrics_url.removesuffix("/metrics")}
    port = int(urls[flag].rsplit(":", 1)[1])
    other = TritonServer(deployed(tmp_path), **{f"{flag}_port": port})  # type: ignore[arg-type]
    assert_refused(other, InputError, f"--{flag}-port {port} is taken")


def test_another_server_that_took_the_ports_is_not_taken_for_ours(
    server: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_room, "_choose_ports", lambda wanted: dict(server._ports))
    other = TritonServer(deployed(tmp_path))  # the same bundle, so only its name tells it from ours
    assert_refused(other, UnavailableError, "another server took .* first")
    with Client(server.http_url) as client:
        assert client.server_id() == server.server_id


def test_a_repository_that_changed_while_the_server_started_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [dataclasses.replace(model, version_id="9" * 64) for model in served_versions(deployed(tmp_path))]
    monkeypatch.setattr(server_room, "served_versions", lambda repository, keys: found)
    assert_refused(TritonServer(tmp_path / "repository"), IntegrityError, "serves another version id of 'tiny'")


def test_requested_ports_are_used_and_may_not_be_the_same(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    repository = deployed(tmp_path)
    assert_refused(TritonServer(repository, http_port=port, grpc_port=port), InputError, f"--http-port {port}")
    with TritonServer(repository, http_port=port) as server:
        assert server.http_url == f"http://127.0.0.1:{port}"


def test_nothing_to_serve_is_an_input_error(tmp_path: Path) -> None:
    assert_refused(TritonServer(tmp_path / "nowhere"), InputError, "gpuops deploy")


def test_a_golden_answer_of_another_model_keeps_the_server_from_starting(tmp_path: Path) -> None:
    repository = deployed(tmp_path, golden_gain=0.6)
    assert_refused(
        TritonServer(repository),
        IntegrityError,
        "output y differs from its golden answer by .* tolerance 0.001: deploy the bundle again$",
    )


@pytest.mark.parametrize("file", ["model.onnx", "golden.npz"])
def test_a_changed_byte_in_the_repository_keeps_the_server_from_starting(tmp_path: Path, file: str) -> None:
    repository = deployed(tmp_path)
    path = repository / "tiny" / "1" / file
    content = bytearray(path.read_bytes())
    content[40 if file == "model.onnx" else 200] ^= 1
    path.write_bytes(content)
    assert_refused(TritonServer(repository), IntegrityError, f"{file} differs from its manifest")


def test_another_version_id_in_the_manifest_keeps_the_server_from_starting(tmp_path: Path) -> None:
    repository = deployed(tmp_path)
    path = repository / "tiny" / "1" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version_id": "9" * 64}))
    assert_refused(TritonServer(repository), IntegrityError, "another version id")


def test_the_empty_answers_of_a_naive_shim_under_numpy_2_are_found(tmp_path: Path) -> None:
    repository = deployed(tmp_path)
    (repository / "tiny" / "1" / "model.py").write_text(NAIVE_SHIM)
    assert_refused(TritonServer(repository), IntegrityError, "too few bytes for its shape")


def test_our_shim_refuses_a_backend_whose_tensors_are_wrong(tmp_path: Path) -> None:
    repository = deployed(tmp_path)
    broken = SHIM.read_text().replace(
        "triton.Tensor.from_dlpack(name, capsule)", "triton.Tensor(name, array.ravel()[:1].repeat(array.size))"
    )
    (repository / "tiny" / "1" / "model.py").write_text(broken)
    assert_refused(TritonServer(repository), IntegrityError, "the DLPack round trip of uint8 is broken")


@pytest.mark.parametrize(("micro_batch", "sizes"), [(2, [2, 2, 1]), (3, [3, 2]), (4, [4, 1]), (9, [5])])
def test_a_batch_goes_to_the_graph_in_micro_batches_and_its_answer_is_whole(
    tmp_path: Path, micro_batch: int, sizes: list[int]
) -> None:
    deploy(make_bundle(tmp_path / "bundle"), tmp_path / "repository", options=Options(micro_batch=micro_batch))
    shim = tmp_path / "repository" / "tiny" / "1" / "model.py"
    shim.write_text(shim.read_text() + RECORDING.format(file=str(tmp_path / "sizes")))
    golden = read_bundle(tmp_path / "bundle").golden().batch(5)
    with TritonServer(tmp_path / "repository") as server, Client(server.http_url) as client:
        (tmp_path / "sizes").unlink()  # those of the start
        assert golden.max_abs_diff(client.infer("tiny", golden.inputs)) <= 1e-3
    assert [int(line) for line in (tmp_path / "sizes").read_text().split()] == sizes


def test_a_server_that_ends_at_once_is_reported_with_its_last_words(tmp_path: Path) -> None:
    repository = deployed(tmp_path)
    (repository / "tiny" / "1" / "model.py").write_text("import nothing_of_that_name\n")
    assert_refused(TritonServer(repository), UnavailableError, "(?s)ended with code 1.*nothing_of_that_name")


def slow_to_start(tmp_path: Path) -> Path:
    repository = deployed(tmp_path)
    shim = repository / "tiny" / "1" / "model.py"
    shim.write_text("import time\ntime.sleep(60)\n" + shim.read_text())
    return repository


def test_a_server_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    server = TritonServer(slow_to_start(tmp_path), log=tmp_path / "log", start_timeout_s=1.0)
    began = time.monotonic()
    assert_refused(server, UnavailableError, "no answer within 1 s")
    assert time.monotonic() - began < 30
    assert (tmp_path / "log").stat().st_size > 0  # a log that was asked for stays


def test_a_server_that_dies_is_noticed_and_its_stubs_and_memory_are_removed(tmp_path: Path) -> None:
    server = TritonServer(deployed(tmp_path))
    with server:
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(UnavailableError, match="ended with code -9"):
            server.wait()
    assert leftovers(server.server_id) == []


SERVE = """
import sys
from gpuops_serving.server import TritonServer, serve
server = TritonServer(sys.argv[1])
print(server.server_id, flush=True)
serve(server, lambda running: print(running.http_url, flush=True))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("when", ["starting", "ready"])
def test_serve_ends_cleanly_on_a_signal(tmp_path: Path, number: signal.Signals, when: str) -> None:
    repository = slow_to_start(tmp_path) if when == "starting" else deployed(tmp_path)
    command = [sys.executable, "-c", SERVE, str(repository)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'serving'}"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        server_id = process.stdout.readline().strip()
        if when == "ready":
            url = process.stdout.readline().strip()
            with Client(url) as client:
                assert client.server_id() == server_id
        else:
            deadline = time.monotonic() + 30
            while not any("triton_python_backend_stub" in line for line in processes(server_id)):
                assert time.monotonic() < deadline
                time.sleep(0.05)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "", "")
    assert leftovers(server_id) == []


def test_a_killed_process_leaves_no_server_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SERVE, str(deployed(tmp_path))]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'serving'}"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        server_id = process.stdout.readline().strip()
        assert process.stdout.readline().startswith("http://")
        process.kill()
    deadline = time.monotonic() + 60
    while leftovers(server_id) or processes(server_id):
        assert time.monotonic() < deadline, (leftovers(server_id), processes(server_id))
        time.sleep(0.1)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Every place that is searched, empty, in order of precedence."""
    for folder in ("bin", "cwd", "cache", "source/a/b"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GPUOPS_TRITONSERVER", raising=False)
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(binary_room, "__file__", str(tmp_path / "source" / "a" / "b" / "binary.py"))
    wheel = "pytriton/tritonserver/bin/tritonserver"
    return {
        "PATH": tmp_path / "bin" / "tritonserver",
        "current folder": tmp_path / "cwd" / ".triton" / wheel,
        "source checkout": tmp_path / "source" / ".triton" / wheel,
        "user cache": tmp_path / "cache" / "gpuops" / "triton" / wheel,
    }


def fake(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    path.chmod(0o755)
    return path


def test_the_places_of_tritonserver_in_order(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for path in reversed(list(places.values())):
        fake(path)
        assert find_tritonserver() == path
    elsewhere = fake(places["user cache"].parents[4] / "env" / "pytriton/tritonserver/bin/tritonserver")
    monkeypatch.setenv("GPUOPS_TRITONSERVER", str(elsewhere.parents[3]))  # the folder that pip was pointed at
    assert find_tritonserver() == elsewhere
    assert find_tritonserver(places["PATH"]) == places["PATH"]


def test_no_tritonserver_names_the_places_and_the_command(places: dict[str, Path]) -> None:
    with pytest.raises(UnavailableError) as caught:
        find_tritonserver()
    folders = [str(path.parents[3]) for name, path in places.items() if name != "PATH"]
    for needed in ["--tritonserver", "$GPUOPS_TRITONSERVER", "PATH", *folders, PIP_COMMAND.format(folders[-1])]:
        assert needed in str(caught.value)


def test_a_given_tritonserver_that_is_none_is_not_replaced_by_another(
    server: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnavailableError, match=f"--tritonserver is {tmp_path}"):
        find_tritonserver(tmp_path)
    monkeypatch.setenv("GPUOPS_TRITONSERVER", str(tmp_path / "gone"))
    with pytest.raises(UnavailableError, match=r"\$GPUOPS_TRITONSERVER is .*gone"):
        find_tritonserver()


def test_an_interpreter_without_shared_libpython_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: str(tmp_path))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"no shared libpython3\.\d+\.so\.1\.0.*--enable-shared"):
        environment_for(find_tritonserver())


def test_an_interpreter_without_a_stub_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", type("V", (), {"major": 3, "minor": 99})())
    with pytest.raises(UnavailableError, match=r"no stub for Python 3\.99.*3\.11"):
        lay_out_backends(find_tritonserver(), tmp_path)


def test_the_package_imports_nothing_and_names_everything() -> None:
    code = """
import sys, gpuops_serving
assert not [m for m in sys.modules if m.startswith(("numpy", "tritonclient", "gpuops_serving."))]
from gpuops_serving import AsyncClient, Client, Triton, TritonServer, deploy
assert {"AsyncClient", "Client", "Triton", "TritonServer", "deploy"} == set(dir(gpuops_serving))
import gpuops_serving.server, gpuops_serving.probe, gpuops_serving.repository
assert callable(gpuops_serving.deploy)
assert not [m for m in sys.modules if m.split(".")[0] in ("torch", "zarr", "lightning", "onnxruntime")]
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'serving'}"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
