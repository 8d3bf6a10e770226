"""Run the real tritonserver on loopback, for development and tests, and know that it serves what was deployed."""

from __future__ import annotations

import os
import random
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any, Self

from gpuops.errors import GpuopsError, InputError, IntegrityError, UnavailableError
from gpuops_serving.binary import environment_for, find_tritonserver, lay_out_backends
from gpuops_serving.client import Client
from gpuops_serving.command import HOST, ServerTls, control_flags
from gpuops_serving.probe import probe
from gpuops_serving.repository import ServedVersion, served_versions

STOP_TIMEOUT_S = 40.0
"""Longest wait for a server to end by itself; it may itself wait 30 s for open connections."""
REFUSAL = "gpuops refuses to serve"
"""How the shim's refusals begin (shim/model.py)."""

# What Triton says before the Python stack (in whose place its log has a literal \\n); the one about CUDA is normal.
_LOG_ERROR = re.compile(r"(?:E\d{4} (?!.*CudaDriverHelper)|error:).*?(?=\\n|$)")
_LOG_REFUSAL = re.compile(rf"{REFUSAL}.*?(?=\\n|$)")
_LOG_LINES, _LOG_WIDTH = 8, 400
# Waits for a line, which says that all is well; the end of its input without one says that we died: then it ends the
# server's process group and removes what that leaves.
_WATCH = """
read -r line && exit
kill -s TERM -- "-$1"
for _ in 1 2 3 4 5 6 7 8 9 10; do kill -s 0 -- "-$1" || break; sleep 1; done
kill -s KILL -- "-$1"
rm -rf -- "$2" /dev/shm/"$3"*
"""
_FLAGS = ("--http-port", "--grpc-port", "--metrics-port")


class TritonServer:
    """A tritonserver of our own on loopback, serving one repository.

    As a context manager it is started, proved and stopped. `start` returns only when every model's golden request has
    been answered rightly over HTTP and gRPC by this very process, once a version.

    Args:
        repository: Model repository that `deploy` wrote.
        http_port: Port for HTTP; 0 picks a free one.
        grpc_port: Port for gRPC; 0 picks a free one.
        metrics_port: Port for metrics; 0 picks a free one.
        tritonserver: Binary, or folder the wheel was unpacked in; see `find_tritonserver`.
        log: File for the server's log; by default a temporary one, shown where an error needs it.
        start_timeout_s: Longest wait for the golden answers, in seconds.
        control: Let who has `access` load and unload models while it runs, as a rollout needs; that is running code.
        tls: TLS on the gRPC port.
        client: What a client needs besides the URL to reach it, such as its own `tls`; for the proof at start.
        keys: Public keys of which one must have signed each version; by default those of $GPUOPS_TRUSTED_KEYS.
        shared_memory: Let clients of this host attach shared memory (gpuops_serving.shared_memory).
        flags: More flags of tritonserver, such as a trace configuration.
    """

    def __init__(
        self,
        repository: str | Path,
        *,
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        tritonserver: Path | None = None,
        log: Path | None = None,
        start_timeout_s: float = 120.0,
        control: bool = False,
        tls: ServerTls | None = None,
        client: Mapping[str, Any] | None = None,
        keys: Sequence[Path] | None = None,
        shared_memory: bool = False,
        flags: Sequence[str] = (),
    ) -> None:
        self._repository = Path(repository).absolute()
        self._wanted_ports = dict(zip(_FLAGS, (http_port, grpc_port, metrics_port), strict=True))
        self._ports: dict[str, int] = {}
        self._tritonserver = tritonserver
        self._log = log
        self._start_timeout_s = start_timeout_s
        self._access = ("gpuops-control", secrets.token_hex(16)) if control else None
        self._tls = tls
        self._client = dict(client or {})
        self._keys = keys
        self._shared_memory = shared_memory
        self._flags = list(flags)
        self._id = f"gpuops-{secrets.token_hex(6)}"
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        self._scratch: Path | None = None
        self._version = ""
        self._cancelled = False  # not an Event: its lock is not reentrant, and `cancel` runs in a signal handler

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def http_url(self) -> str:
        """For `Client`, and for any KServe v2 client."""
        return f"http://{HOST}:{self._port('--http-port')}"

    @property
    def grpc_url(self) -> str:
        """For `Client`."""
        scheme = "grpc" if self._tls is None else "grpcs"
        return f"{scheme}://{HOST}:{self._port('--grpc-port')}"

    @property
    def metrics_url(self) -> str:
        """For Prometheus."""
        return f"http://{HOST}:{self._port('--metrics-port')}/metrics"

    @property
    def access(self) -> tuple[str, str] | None:
        """(name, secret) of the key to load and unload models, for `Client(access=...)`; None without `control`."""
        return self._access

    @property
    def version(self) -> str:
        """Version that the live server answered with when it was started."""
        return self._version

    @property
    def server_id(self) -> str:
        """Name of this very server: it answers with it, and its shared memory and temporary folder begin with it."""
        return self._id

    @property
    def pid(self) -> int:
        """Process id, which is its process group's too."""
        return self._running().pid

    def start(self) -> None:
        """Start the server and wait until it has answered every golden request; on any failure leave nothing behind.

        Raises:
            InputError: no such repository, nothing in it, a path that Triton would give to a shell, or a requested port
                is taken.
            UnavailableError: no server, no shared libpython, or the server ended or was too slow; with its last words.
            IntegrityError: bytes, version ids or golden answers differ from what was deployed.
        """
        if self._process is not None:
            raise InputError("this server is running: make another TritonServer for another one")
        _require_plain(self._repository)
        wanted = served_versions(self._repository, keys=self._keys)
        binary = find_tritonserver(self._tritonserver)
        environment = environment_for(binary)
        self._ports = _choose_ports(self._wanted_ports)
        self._scratch = Path(tempfile.mkdtemp(prefix=f"{self._id}-"))
        try:
            self._launch(binary, environment, sorted({model.name for model in wanted}))
            self._prove(wanted)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server's processes and remove its shared memory; close clients first, or it waits for them."""
        process, self._process = self._process, None
        try:
            if process is not None:
                _end(process)
        finally:
            if self._watcher is not None:
                with suppress(OSError):  # it was ended by someone else
                    self._watcher.communicate(b"done\n")
                self._watcher = None
            for region in Path("/dev/shm").glob(f"{self._id}*"):
                region.unlink(missing_ok=True)
            if self._scratch is not None:
                shutil.rmtree(self._scratch, ignore_errors=True)
                self._scratch = None

    def cancel(self) -> None:
        """Make `start` give up and `wait` return; safe in a signal handler."""
        self._cancelled = True

    def wait(self) -> None:
        """Return after `cancel`; UnavailableError if the server ends by itself."""
        while not self._cancelled:
            time.sleep(0.1)
            self._check_alive()

    def _launch(self, binary: Path, environment: dict[str, str], models: Sequence[str]) -> None:
        assert self._scratch is not None
        command = [
            str(binary),
            f"--id={self._id}",
            f"--model-repository={self._repository}",
            f"--backend-directory={lay_out_backends(binary, self._scratch)}",
            f"--backend-config=python,shm-region-prefix-name={self._id}",
            *control_flags(models, self._access, shared_memory=self._shared_memory),
            "--disable-auto-complete-config",  # `deploy` writes all of it
            *(f"{flag}={port}" for flag, port in self._ports.items()),
            *(f"--{endpoint}-address={HOST}" for endpoint in ("http", "grpc", "metrics")),
            f"--allow-gpu-metrics={str(Path('/dev/nvidiactl').exists()).lower()}",
            *([] if self._tls is None else self._tls.flags()),
            *self._flags,
        ]
        with self._open_log() as log:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._watcher = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH, "sh", str(self._process.pid), str(self._scratch), self._id],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us
        )

    def _open_log(self) -> IO[bytes]:
        path = self._log_path()
        try:
            return path.open("wb")
        except OSError as error:
            raise InputError(f"the log {path} cannot be written ({error.strerror}): name another") from error

    def _prove(self, wanted: list[ServedVersion]) -> None:
        """Wait until the server answers, then hold its answers against the repository."""
        deadline = time.monotonic() + self._start_timeout_s
        for url in (self.http_url, self.grpc_url):
            while not self._prove_over(url, wanted):
                if time.monotonic() > deadline:
                    raise UnavailableError(self._with_log(f"no answer within {self._start_timeout_s:g} s"))
                time.sleep(0.05)

    def _prove_over(self, url: str, wanted: list[ServedVersion]) -> bool:
        """Whether the server answers rightly at `url`; False if it does not answer yet."""
        self._check_alive()
        if self._cancelled:
            raise _Cancelled("tritonserver was asked to stop before it was ready")
        if not all(_accepts(port) for port in self._ports.values()):
            return False
        tls = {} if url.startswith("http:") else self._client
        with Client(url, timeout_s=max(1.0, self._start_timeout_s / 4), **tls) as client:
            try:
                if client.server_id() != self._id:
                    raise UnavailableError(f"another server took {url} first: start again, or name another port")
                for model in wanted:
                    version = str(model.version)
                    if client.version_id(model.name, version) != model.version_id:
                        raise IntegrityError(
                            f"{url} serves another version id of {model.name!r} than {self._repository} holds"
                        )
                    found = probe(client, model.name, model.golden, model.tolerance, version=version)
                    if found.version != version:
                        raise IntegrityError(
                            f"{url} answers {model.name!r} with version {found.version}, not {model.version}"
                        )
                self._version = client.server_version()
            except GpuopsError as error:
                raise type(error)(self._with_log(str(error))) from error
        return True

    def _check_alive(self) -> None:
        code = _exit_code(self._running())
        if code is None:
            return
        if refusals := [found[0] for line in self._log_lines() if (found := _LOG_REFUSAL.search(line))]:
            raise IntegrityError(f"{refusals[0]}: deploy the bundle again")
        raise UnavailableError(self._with_log(f"tritonserver ended with code {code}"))

    def _with_log(self, message: str) -> str:
        lines = [line for line in self._log_lines() if line and line[0] not in "+|"]  # Triton prints wide tables
        errors = [found[0] for line in lines if (found := _LOG_ERROR.match(line))]
        words = [line[:_LOG_WIDTH] for line in (errors or lines)[-_LOG_LINES:]]
        kept = f" (all of them in {self._log})" if self._log else ""
        return "\n  ".join([f"{message}; the server's last words{kept}:", *words])

    def _log_lines(self) -> list[str]:
        path = self._log_path()
        return path.read_text(errors="replace").splitlines() if path.is_file() else []

    def _log_path(self) -> Path:
        if self._log is not None:
            return self._log
        assert self._scratch is not None
        return self._scratch / "tritonserver.log"

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise UnavailableError("the server is not running: use `with TritonServer(...) as server`")
        return self._process

    def _port(self, flag: str) -> int:
        self._running()
        return self._ports[flag]


class _Cancelled(UnavailableError):
    """`start` gave up because `cancel` was called."""


def serve(server: TritonServer, ready: Callable[[TritonServer], None]) -> None:
    """Run a server until SIGINT or SIGTERM, also one that comes while it starts; call from the main thread.

    Args:
        server: Not started yet.
        ready: Called once it has answered its golden requests.

    Raises:
        GpuopsError: as `TritonServer.start`, and UnavailableError if the server ends by itself.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        # Only a flag: an exception could arrive between a process's birth and our knowing of it.
        server.cancel()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with server:
            ready(server)
            server.wait()
    except _Cancelled:
        pass
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _require_plain(repository: Path) -> None:
    """Triton starts its stubs by a shell command that the path is put in as it is."""
    if shlex.quote(str(repository)) != str(repository):
        raise InputError(
            f"{repository} means something to a shell, to which Triton gives this path as it is: use letters, "
            "digits, '/', '.', '_' and '-'"
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a server to end, wait, and end whatever is left of its process group."""
    try:
        os.kill(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while _exit_code(process) is None and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:  # also on a second Ctrl-C
        # The server is not reaped yet, so its group's id cannot be anyone else's.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    """Exit code (negative for a signal) of a process that is left unreaped, so that its id stays its own."""
    found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def _choose_ports(wanted: dict[str, int]) -> dict[str, int]:
    """Keep the requested ports that are free and choose the others, by flag; InputError names a taken one."""
    given = {flag: port for flag, port in wanted.items() if port}
    for flag, port in given.items():
        if list(given.values()).count(port) > 1 or not _is_free(port):
            raise InputError(f"{flag} {port} is taken or no port: name another, or 0 for a free one")
    ports = dict(given)
    while len(ports) < len(wanted):
        # Below the range that the system gives to outgoing connections, which could take it before the server does.
        port = random.randrange(16_000, 32_000)
        if port not in ports.values() and _is_free(port):
            ports[next(flag for flag in wanted if flag not in ports)] = port
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe_socket:
        probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections do not matter
        try:
            probe_socket.bind((HOST, port))
        except (OSError, OverflowError):
            return False
    return True


def _accepts(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1.0).close()
    except OSError:
        return False
    return True
