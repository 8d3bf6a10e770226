"""A Triton that we did not build: a hand-written repository, and a tritonserver started without gpuops' own class."""

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gpuops_serving.binary import environment_for, find_tritonserver, lay_out_backends

# As a careful author writes it who has NumPy 2: arrays go in and out by DLPack.
HEAD = """
import ctypes, os, signal
import numpy as np
import triton_python_backend_utils as pb

pointer = ctypes.pythonapi.PyCapsule_GetPointer
pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
set_destructor = ctypes.pythonapi.PyCapsule_SetDestructor
set_destructor.argtypes = [ctypes.py_object, ctypes.c_void_p]


class Lent:
    def __init__(self, array, bfloat=False):
        self.array, self.bfloat = array, bfloat

    def __dlpack__(self, stream=None, **unused):
        capsule = self.array.__dlpack__()
        set_destructor(capsule, None)
        if self.bfloat:  # uint16 under another name: kDLBfloat
            ctypes.c_uint8.from_address(pointer(capsule, b"dltensor") + 20).value = 4
        return capsule

    def __dlpack_device__(self):
        return (1, 0)


def read(request, name):
    return np.from_dlpack(pb.get_input_tensor_by_name(request, name))


def answer(array, bfloat=False, name="y"):
    return pb.InferenceResponse([pb.Tensor.from_dlpack(name, Lent(array, bfloat))])
"""

ONE_BY_ONE = """
class TritonPythonModel:
    def initialize(self, args):
        self.name, self.version, self.hollow = args["model_name"], int(args["model_version"]), False

    def execute(self, requests):
        return [self.one(request) for request in requests]
"""

# By the first number of a request: right, or broken in the ways that models are.
FICKLE = """
    def one(self, request):
        x = read(request, "x")
        how = int(x.flat[0]) if x.size else 0
        if how == -105:
            os.kill(os.getpid(), signal.SIGSEGV)
        self.hollow |= how == -106
        y = 2 * x
        if self.name == "doomed" and len(x) > 1:  # as other kernels round in a batch
            y += np.float32(1e-3)
        if self.hollow or how == -104:  # what every tutorial writes: empty under NumPy 2
            return pb.InferenceResponse([pb.Tensor("y", y)])
        if how == -101:
            return answer(y.astype(np.float64))
        if how == -102:
            return answer(y[:1].copy())
        if how == -103:
            return answer(np.ones((len(y), 5), np.float32))
        if how == -107:
            return answer(y, name="z")
        if how == -108:
            y[:] = np.nan
        return answer(y)
"""


@dataclass(frozen=True)
class Foreign:
    http_url: str
    grpc_url: str
    repository: Path


def config(
    inputs: Sequence[tuple[str, str, str]], outputs: Sequence[tuple[str, str, str]], batch: int = 4, more: str = ""
) -> str:
    def side(kind: str, tensors: Sequence[tuple[str, str, str]]) -> str:
        return "".join(f'{kind} {{ name: "{n}" data_type: TYPE_{t} dims: [{d}] }}\n' for n, t, d in tensors)

    return f'backend: "python"\nmax_batch_size: {batch}\n{side("input", inputs)}{side("output", outputs)}{more}\n'


X, Y = ("x", "FP32", "3"), ("y", "FP32", "3")


def write_model(repository: Path, name: str, text: str, body: str | None, versions: Sequence[int] = (1,)) -> None:
    for version in versions:
        folder = repository / name / str(version)
        folder.mkdir(parents=True)
        if body is not None:
            (folder / "model.py").write_text(HEAD + body)
    (repository / name / "config.pbtxt").write_text(text)


def write_repository(repository: Path) -> Path:
    """Models as they are found: versions, an ensemble, text, no batch axis, streams, state, noise."""
    versions = ONE_BY_ONE + '    def one(self, request): return answer(2 * read(request, "x") + (self.version == 2))\n'
    write_model(repository, "affine", config([X], [Y], more="version_policy { all {} }"), versions, (1, 2))
    for name in ("fickle", "doomed", "hollow"):
        write_model(repository, name, config([X], [Y]), ONE_BY_ONE + FICKLE)
    write_model(
        repository,
        "flat",
        config(
            [("x", "FP32", "-1, 3"), ("k", "INT32", "2")],
            [("y", "FP32", "-1, 3"), ("b", "BF16", "3"), ("i", "INT64", "1")],
            batch=0,
        ),
        ONE_BY_ONE
        + """
    def one(self, request):
        x = read(request, "x")
        half = (x[0].view(np.uint32) >> 16).astype(np.uint16)
        found = [("y", 2 * x, False), ("b", half, True), ("i", np.array([len(x)]), False)]
        return pb.InferenceResponse([pb.Tensor.from_dlpack(n, Lent(a, b)) for n, a, b in found])
""",
    )
    write_model(
        repository,
        "text",
        config([("s", "STRING", "2")], [("s", "STRING", "2")]),
        ONE_BY_ONE
        + '    def one(self, request): return pb.InferenceResponse([pb.get_input_tensor_by_name(request, "s")])\n',
    )
    write_model(
        repository,
        "noisy",
        config([X], [Y]),
        ONE_BY_ONE
        + """
    def one(self, request):
        y = 2 * read(request, "x")
        y += np.random.default_rng().uniform(-0.01, 0.01, y.shape).astype(np.float32)
        y[:, 1] = np.nan
        y[:, 2] = np.inf
        return answer(y)
""",
    )
    write_model(
        repository,
        "stream",
        config([X], [Y], batch=0, more="model_transaction_policy { decoupled: true }"),
        """
class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            for k in range(3):
                sender.send(answer(k * read(request, "x")))
            sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
""",
    )
    control = 'control_input { name: "START" control { kind: CONTROL_SEQUENCE_START fp32_false_true: [0, 1] } }'
    write_model(
        repository,
        "counter",
        config([X], [Y], batch=1, more=f"sequence_batching {{ {control} }}"),
        ONE_BY_ONE + '    def one(self, request): return answer(2 * read(request, "x"))\n',
    )
    steps = "".join(
        f'step {{ model_name: "affine" model_version: {version} '
        f'input_map {{ key: "x" value: "{a}" }} output_map {{ key: "y" value: "{b}" }} }} '
        for version, a, b in ((1, "x", "between"), (2, "between", "y"))
    )
    text = config([X], [Y], more=f"ensemble_scheduling {{ {steps} }}").replace(
        'backend: "python"', 'platform: "ensemble"'
    )
    write_model(repository, "chain", text, None)
    return repository


@contextmanager
def foreign_server(repository: Path, scratch: Path) -> Iterator[Foreign]:
    """`tritonserver` with a few flags, as in the manual."""
    binary = find_tritonserver()
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        http, grpc, metrics = (s.getsockname()[1] for s in sockets)
    name = f"foreign-{os.getpid()}-{http}"
    command = [
        *(binary, f"--model-repository={repository}", f"--backend-directory={lay_out_backends(binary, scratch)}"),
        *(f"--backend-config=python,shm-region-prefix-name={name}", "--allow-gpu-metrics=false"),
        *(f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"),
        *(f"--{endpoint}-address=127.0.0.1" for endpoint in ("http", "grpc", "metrics")),
    ]
    environment = {**environment_for(binary), "PYTHONPYCACHEPREFIX": str(scratch / "bytecode")}
    with (scratch / "tritonserver.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not _is_ready(f"http://127.0.0.1:{http}/v2/health/ready"):
            assert process.poll() is None, (scratch / "tritonserver.log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield Foreign(f"http://127.0.0.1:{http}", f"grpc://127.0.0.1:{grpc}", repository)
    finally:
        # At once: with a stub that was killed it would wait for half a minute.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for region in Path("/dev/shm").glob(f"{name}*"):
            region.unlink(missing_ok=True)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
