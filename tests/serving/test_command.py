"""What a container runs, run here: the same command, the real server, on loopback."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tritonclient.grpc
import tritonclient.http
from tiny_bundle import deployed, golden, make_bundle
from tritonclient.utils import InferenceServerException

from gpuops import signing
from gpuops.errors import IntegrityError
from gpuops_serving.binary import environment_for, find_tritonserver, lay_out_backends
from gpuops_serving.client import Client
from gpuops_serving.command import CLOSED, container_command, container_flags
from gpuops_serving.health import main as health
from gpuops_serving.repository import deploy
from gpuops_serving.server import _choose_ports

ROOT = Path(__file__).parents[2]
NOBODY = 65534
UNPRIVILEGED = (
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs"),
    *("--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"),
)


@dataclass
class Contained:
    """The server that the container's command became."""

    pid: int
    http: str
    grpc: str
    repository: Path


@contextlib.contextmanager
def contained(repository: Path, scratch: Path, prefix: tuple[str, ...] = ()) -> Iterator[Contained]:
    """Run `python3 -m gpuops_serving.command` until the block ends; `prefix` is a command that runs it."""
    binary = find_tritonserver()
    ports = _choose_ports({"--http-port": 0, "--grpc-port": 0, "--metrics-port": 0})
    name = f"gpuops-contained-{os.getpid()}"
    environment = environment_for(binary)
    environment |= {"PATH": f"{environment['PATH']}:{binary.parent}", "PYTHONPATH": f"{ROOT}:{ROOT / 'serving'}"}
    # The container has one stub, beside its backend, and needs none of these.
    embedded = [
        f"--backend-directory={lay_out_backends(binary, scratch)}",
        f"--backend-config=python,shm-region-prefix-name={name}",
        "--allow-gpu-metrics=false",
    ]
    command = [*prefix, sys.executable, "-m", "gpuops_serving.command", str(repository), "--host=127.0.0.1"]
    log = scratch / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, *(f"{flag}={port}" for flag, port in ports.items()), *embedded],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        http = f"http://127.0.0.1:{ports['--http-port']}"
        deadline = time.monotonic() + 120
        while health([str(repository), "--server", http]):
            assert process.poll() is None, log.read_text()[-6000:]
            assert time.monotonic() < deadline, log.read_text()[-6000:]
            time.sleep(0.05)
        yield Contained(process.pid, http, f"grpc://127.0.0.1:{ports['--grpc-port']}", repository)
        os.kill(process.pid, signal.SIGTERM)
        process.wait(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for region in Path("/dev/shm").glob(f"{name}*"):
            region.unlink()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contained]:
    folder = tmp_path_factory.mktemp("contained")
    with contained(deployed(folder), folder) as running:
        yield running


def test_the_command_becomes_the_server(server: Contained) -> None:
    assert Path(f"/proc/{server.pid}/exe").resolve().name == "tritonserver"
    for url in (server.http, server.grpc):
        with Client(url) as client:
            answers = client.infer("tiny", golden().inputs)
            assert golden().max_abs_diff(answers) < 1e-3


def http_calls(server: Contained) -> dict[str, object]:
    client = tritonclient.http.InferenceServerClient(server.http.removeprefix("http://"))
    return calls(client)


def grpc_calls(server: Contained) -> dict[str, object]:
    client = tritonclient.grpc.InferenceServerClient(server.grpc.removeprefix("grpc://"))
    return calls(client)


def calls(client: object) -> dict[str, object]:
    """What happens with one call of each part of the API: "open", or what the server says."""
    wanted = {
        "health": ("is_server_live",),
        "metadata": ("get_server_metadata",),
        "model-config": ("get_model_config", "tiny"),
        "statistics": ("get_inference_statistics",),
        "model-repository": ("get_model_repository_index",),
        "load": ("load_model", "tiny"),
        "unload": ("unload_model", "tiny"),
        "trace": ("get_trace_settings",),
        "trace, set": ("update_trace_settings", None, {"trace_level": ["TIMESTAMPS"]}),
        "logging": ("get_log_settings",),
        "logging, set": ("update_log_settings", {"log_verbose_level": 1}),
        "shared-memory": ("get_system_shared_memory_status",),
        "shared-memory, set": ("register_system_shared_memory", "mine", "/gpuops-nothing", 64),
    }
    found: dict[str, object] = {}
    try:
        for part, (method, *arguments) in wanted.items():
            try:
                getattr(client, method)(*arguments)
                found[part] = "open"
            except InferenceServerException as error:
                found[part] = str(error.message())
    finally:
        client.close()  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("ask", [http_calls, grpc_calls])
def test_what_nobody_needs_is_closed_over_both_protocols(
    server: Contained, ask: Callable[[Contained], dict[str, object]]
) -> None:
    found = ask(server)
    for part in ("health", "metadata", "model-config", "statistics", "model-repository"):
        assert found.pop(part) == "open", part
    for part in ("load", "unload"):
        assert "explicit model load / unload is not allowed" in str(found.pop(part)), part
    assert {part.partition(",")[0] for part in found} == set(CLOSED)
    for part, says in found.items():
        assert "restricted" in str(says), part


def test_the_key_of_what_is_closed_is_another_one_at_each_start(tmp_path: Path) -> None:
    first, second = ([f for f in container_flags(tmp_path, "127.0.0.1") if "gpuops-closed=" in f] for _ in range(2))
    secrets = {flag.rpartition("=")[2] for flag in first}
    assert len(first) == 2  # HTTP and gRPC
    assert len(secrets) == 1
    assert len(secrets.pop()) == 32
    assert not set(first) & set(second)


def run(repository: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command where there is no tritonserver: what it says before it would become one."""
    return subprocess.run(
        [sys.executable, "-m", "gpuops_serving.command", repository],
        env={**os.environ, "PATH": "/nowhere", "PYTHONPATH": f"{ROOT}:{ROOT / 'serving'}", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_it_says_in_one_line_why_it_cannot_start(tmp_path: Path) -> None:
    done = run(tmp_path / "nowhere")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "is not a model repository" in done.stderr
    done = run(deployed(tmp_path))
    assert done.returncode == 4
    assert done.stderr.splitlines()[1].startswith("gpuops: tritonserver cannot be started")


def test_only_signed_versions_are_started_where_keys_are_trusted(tmp_path: Path) -> None:
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    signing.keygen(private, public)
    unsigned = deployed(tmp_path / "unsigned")
    done = run(unsigned, GPUOPS_TRUSTED_KEYS=str(public))
    assert done.returncode == IntegrityError.exit_code
    assert "is not signed" in done.stderr
    bundle = make_bundle(tmp_path / "bundle")
    signing.sign(bundle, private)
    deploy(bundle, tmp_path / "repository")
    done = run(tmp_path / "repository", GPUOPS_TRUSTED_KEYS=str(public))
    assert done.returncode == 4  # it would start: there is no server on PATH
    with (tmp_path / "repository" / "tiny" / "1" / "model.py").open("a") as shim:
        shim.write("# someone else's\n")
    done = run(tmp_path / "repository", GPUOPS_TRUSTED_KEYS=str(public))
    assert done.returncode == IntegrityError.exit_code
    assert "is not this gpuops' shim" in done.stderr


def test_the_command_for_a_container_is_one_line_for_loopback(tmp_path: Path) -> None:
    command = container_command(tmp_path / "a b", (18000, 18001, 18002))
    assert "\n" not in command
    assert f"-v '{tmp_path}/a b:/models:ro'" in command
    assert "-p 127.0.0.1:18000:8000 -p 127.0.0.1:18001:8001 -p 127.0.0.1:18002:8002 gpuops-serving" in command


READ_ONLY = """
mount --bind -o ro "$1" "$1" || exit 1
if [ -n "$3" ]; then  # the interpreter lies in a folder that only root may enter, such as /root
    mkdir "$4" && mount --bind "$2" "$4" && mount -t tmpfs -o mode=755 tmpfs "$3" && mkdir -p "$2" \\
        && mount --bind "$4" "$2" || exit 1
fi
shift 4
exec "$@"
"""
"""In mounts of its own: $1 read-only; $2, which $3 hides from others, seen by all ($4: new); then a command."""


def as_nobody(repository: Path, scratch: Path) -> tuple[str, ...]:
    """A command that runs another as nobody, `repository` read-only; skips, with the reason, where that cannot be."""
    if os.geteuid() != 0:
        pytest.skip("only root can become nobody")
    if missing := [name for name in ("setpriv", "unshare", "mount") if shutil.which(name) is None]:
        pytest.skip(f"{', '.join(missing)} (util-linux) is not installed")
    base = Path(sys.base_prefix)
    closed = [folder for folder in reversed(base.parents) if not folder.stat().st_mode & 0o001]
    names = (repository, base, closed[0] if closed else "", scratch / "python")
    command = ("unshare", "--mount", "sh", "-c", READ_ONLY, "sh", *map(str, names))
    tried = subprocess.run([*command, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"root may not mount here: {tried.stderr.strip()}")
    if closed:
        (scratch / "python").rmdir()
    return (*command, *UNPRIVILEGED)


@pytest.mark.slow
def test_it_serves_as_nobody_without_capabilities_from_a_read_only_file_system() -> None:
    with tempfile.TemporaryDirectory(prefix="gpuops-nobody-") as name:
        folder = Path(name)  # not pytest's: nobody may not look into that
        folder.chmod(0o755)
        repository = deployed(folder)
        deploy(make_bundle(folder / "two", version_id="2" * 64, gain=0.25), repository)
        (folder / "scratch").mkdir()
        before = sorted(repository.rglob("*"))
        with contained(repository, folder / "scratch", as_nobody(repository, folder / "scratch")) as server:
            proc = Path(f"/proc/{server.pid}")
            assert (proc / "exe").resolve().name == "tritonserver"
            state = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines())
            assert set(state["Uid"].split() + state["Gid"].split()) == {str(NOBODY)}
            assert state["Groups"].strip() == ""
            assert [int(state[kind], 16) for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")] == [0] * 5
            assert state["NoNewPrivs"] == "1"
            mounts = [line.split() for line in (proc / "mounts").read_text().splitlines()]
            assert [options.split(",")[0] for _, place, _, options, *_ in mounts if place == str(repository)] == ["ro"]
            for url in (server.http, server.grpc):
                with Client(url) as client:
                    for version, gain in (("1", 0.5), ("2", 0.25)):
                        answers = client.infer("tiny", golden().inputs, version)
                        assert golden(gain=gain).max_abs_diff(answers) < 1e-3
        assert sorted(repository.rglob("*")) == before  # no __pycache__, which the stub leaves where it may
