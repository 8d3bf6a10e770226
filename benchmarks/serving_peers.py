"""What bench_serving compares with, each started as its own documentation says and tuned: one process tree, one URL.

A peer that is not installed is left out, with the reason. `$GPUOPS_PEERS` is a folder with one virtual environment a
peer (`fastapi`, `pytriton`, `bentoml`), each of which holds the peer and onnxruntime.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpuops.bundle import Bundle
from gpuops_serving.binary import environment_for, find_tritonserver, lay_out_backends
from gpuops_serving.load_wire import Arrays, Endpoint, GrpcEndpoint, HttpEndpoint, Shot, compared, http_request, shots

TRITON_DTYPES = {"uint8": "TYPE_UINT8", "int32": "TYPE_INT32", "float32": "TYPE_FP32"}
START_S = 120.0
APPS = Path(__file__).with_name("serving_apps")


@dataclass(frozen=True, slots=True)
class Subject:
    """A server under load."""

    name: str
    """As in the table."""
    targets: Mapping[str, tuple[Endpoint, Sequence[Shot]]]
    """Where requests go and what they are, by protocol."""
    root: int
    """Process id of what started everything that it runs."""


class Missing(Exception):
    """A peer that is not here."""


def triton_targets(http: str, grpc: str, model: str, bundle: Bundle) -> dict[str, tuple[Endpoint, Sequence[Shot]]]:
    """HTTP and gRPC of a Triton server."""
    made = {url: shots(url, model, bundle.golden(), bundle.tolerance) for url in (http, grpc)}
    return {"http": (HttpEndpoint(http), made[http]), "grpc": (GrpcEndpoint(grpc), made[grpc])}


@contextmanager
def handwritten(
    name: str, bundle: Bundle, instances: int, threads: int, preferred: int = 0, delay_us: int = 0, null: bool = False
) -> Iterator[Subject]:
    """The same graph in a repository written by hand (serving_apps/triton_model.py).

    Args:
        name: As in the table.
        bundle: The graph.
        instances: Copies that run at the same time.
        threads: Threads of each.
        preferred: Batch size that is enough; 0 is the largest.
        delay_us: Longest wait for more requests.
        null: Answers zeros instead.
    """
    with _folder("triton_model.py", bundle, threads=threads, null=null) as folder:
        signature = bundle.signature
        version = folder / "repository" / bundle.name / "1"
        version.mkdir(parents=True)
        (folder / "app.py").rename(version / "model.py")
        for file in ("raw.py", "peer.json"):
            (folder / file).rename(version / file)
        tensors = [
            f"{side} [{', '.join(_tensor(s.name, s.dtype, s.shape) for s in specs)}]"
            for side, specs in (("input", signature.inputs), ("output", signature.outputs))
        ]
        wanted = f"preferred_batch_size: [{preferred}] " if preferred else ""
        config = [
            f'name: "{bundle.name}"\nbackend: "python"\nmax_batch_size: {signature.max_batch}',
            *tensors,
            f"instance_group [{{ kind: KIND_CPU count: {instances} }}]",
            f"dynamic_batching {{ {wanted}max_queue_delay_microseconds: {delay_us} }}",
        ]
        (version.parent / "config.pbtxt").write_text("\n".join(config) + "\n")
        binary = find_tritonserver()
        http, grpc, metrics = free_ports(3)
        command = [
            str(binary),
            f"--model-repository={folder / 'repository'}",
            f"--backend-directory={lay_out_backends(binary, folder)}",
            f"--backend-config=python,shm-region-prefix-name={folder.name}",
            "--disable-auto-complete-config",
            "--allow-gpu-metrics=false",
            *(f"--{key}-port={port}" for key, port in (("http", http), ("grpc", grpc), ("metrics", metrics))),
            *(f"--{key}-address=127.0.0.1" for key in ("http", "grpc", "metrics")),
        ]
        try:
            with running(command, environment_for(binary), http, folder) as root:
                targets = triton_targets(f"http://127.0.0.1:{http}", f"grpc://127.0.0.1:{grpc}", bundle.name, bundle)
                if null:  # its answers are zeros, and right to be
                    targets = {
                        key: (end, [Shot(s.content, _any) for s in made]) for key, (end, made) in targets.items()
                    }
                wait_for_answer(targets["http"])
                yield Subject(name, targets, root)
        finally:
            for region in Path("/dev/shm").glob(f"{folder.name}*"):
                region.unlink(missing_ok=True)


@contextmanager
def fastapi(bundle: Bundle) -> Iterator[Subject]:
    """FastAPI on two uvicorn workers with uvloop and httptools."""
    python = _interpreter("fastapi")
    with _folder("fastapi_app.py", bundle) as folder:
        (port,) = free_ports(1)
        options = ["--workers=2", f"--port={port}", "--log-level=error", "--no-access-log"]
        with running([python, "-m", "uvicorn", "app:app", *options], os.environ, port, folder) as root:
            yield _raw_bytes("fastapi", f"http://127.0.0.1:{port}", "/infer", bundle, root)


@contextmanager
def bentoml(bundle: Bundle) -> Iterator[Subject]:
    """BentoML, two workers."""
    python = _interpreter("bentoml")
    with _folder("bentoml_app.py", bundle) as folder:
        (port,) = free_ports(1)
        command = [python, "-m", "bentoml", "serve", "app:Service", f"--port={port}", "--host=127.0.0.1"]
        environment = {**os.environ, "BENTOML_DO_NOT_TRACK": "true", "BENTOML_HOME": str(folder / "home")}
        with running(command, environment, port, folder) as root:
            yield _raw_bytes("bentoml", f"http://127.0.0.1:{port}", "/raw/infer", bundle, root)


@contextmanager
def pytriton(bundle: Bundle) -> Iterator[Subject]:
    """PyTriton, two instances, with the NumPy below 2 that it needs."""
    python = _interpreter("pytriton")
    with _folder("pytriton_app.py", bundle) as folder:
        http, grpc, metrics = free_ports(3)
        # Else its stub takes the system's libpython, which is another patch level than the interpreter.
        environment = {**os.environ, "LD_LIBRARY_PATH": str(sysconfig.get_config_var("LIBDIR"))}
        with running([python, "app.py", str(http), str(grpc), str(metrics)], environment, http, folder) as root:
            targets = triton_targets(f"http://127.0.0.1:{http}", f"grpc://127.0.0.1:{grpc}", bundle.name, bundle)
            wait_for_answer(targets["http"])
            yield Subject("pytriton", targets, root)
        for region in Path("/dev/shm").glob(f"pytrtion{root}-*"):  # as it spells itself
            region.unlink(missing_ok=True)


def _interpreter(peer: str) -> str:
    peers = os.environ.get("GPUOPS_PEERS")
    python = Path(peers or ".") / peer / "bin" / "python"
    if peers is None or not python.exists():
        raise Missing(f"{peer} is left out: no {peer}/bin/python in $GPUOPS_PEERS")
    return str(python.absolute())


@contextmanager
def _folder(program: str, bundle: Bundle, threads: int = 1, null: bool = False) -> Iterator[Path]:
    """A temporary folder with the program as app.py and what it reads."""
    folder = Path(tempfile.mkdtemp(prefix="gpuops-peer-"))
    signature = bundle.signature
    peer = {
        "name": bundle.name,
        "model": str(bundle.model_file("onnx").absolute()),
        "inputs": [(spec.name, spec.dtype, spec.shape) for spec in signature.inputs],
        "output": signature.outputs[0].shape,
        "max_batch": signature.max_batch,
        "threads": threads,
        "null": null,
    }
    try:
        shutil.copyfile(APPS / program, folder / "app.py")
        shutil.copyfile(APPS / "raw.py", folder / "raw.py")
        (folder / "peer.json").write_text(json.dumps(peer))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _raw_bytes(name: str, url: str, path: str, bundle: Bundle, root: int) -> Subject:
    golden = bundle.golden()
    shape = golden.outputs["y"].shape[1:]
    made = []
    for place in range(len(golden.outputs["y"])):
        part = golden.take(np.array([place]))
        body = b"".join(part.inputs[spec.name].tobytes() for spec in bundle.signature.inputs)

        def decode(headers: bytes, answer: bytes) -> Arrays:
            return {"y": np.frombuffer(answer, np.float32).reshape(1, *shape)}

        check = compared(part, bundle.tolerance, decode)
        made.append(Shot(http_request(url, path, body, ["Content-Type: application/octet-stream"]), check))
    subject = Subject(name, {"http": (HttpEndpoint(url), made)}, root)
    wait_for_answer(subject.targets["http"])
    return subject


def wait_for_answer(target: tuple[Endpoint, Sequence[Shot]]) -> None:
    """Return once a request is answered rightly."""
    from gpuops.errors import UnavailableError
    from gpuops_serving.load import closed_loop

    endpoint, made = target
    deadline = time.monotonic() + START_S
    found = None
    while time.monotonic() < deadline:
        try:
            found = closed_loop(endpoint, made, concurrency=1, seconds=0.05, warm_up_s=0)
        except UnavailableError:
            time.sleep(0.1)
            continue
        if found.answered and not found.failed:
            return
        time.sleep(0.1)
    raise RuntimeError(f"no right answer within {START_S:g} s: {None if found is None else found.failed}")


def _any(headers: bytes, body: bytes) -> str | None:
    return None


def _tensor(name: str, dtype: str, shape: Sequence[int]) -> str:
    dims = ", ".join(map(str, shape))
    return f'{{ name: "{name}" data_type: {TRITON_DTYPES[dtype]} dims: [{dims}] }}'


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody has."""
    holders = [socket.socket() for _ in range(count)]
    try:
        for holder in holders:
            holder.bind(("127.0.0.1", 0))
        return [holder.getsockname()[1] for holder in holders]
    finally:
        for holder in holders:
            holder.close()


@contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], port: int, folder: Path) -> Iterator[int]:
    """A process group that listens on `port`; yields its id, and ends it."""
    log = folder / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, env=dict(environment), cwd=folder, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.stderr.write(log.read_text(errors="replace")[-3000:])
                    raise Missing(f"{Path(command[0]).name} did not start") from None
                time.sleep(0.05)
        yield process.pid
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with suppress(ProcessLookupError):  # what is left of the group
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
