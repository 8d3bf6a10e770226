"""The embedded server on a real GPU: an AOTInductor package with our kernels inside, and joules a request.

Run by `benchmarks/gpu.sh serving`; writes benchmarks/results/<GPU>/gpu-serving.json. NOT RUN ON A GPU YET.

A convolutional net with random weights (what an answer costs does not depend on them) takes 128 kB of packed int16 and
answers 64 kB of float32. Closed loops at 1, 8 and 64 over HTTP, one request a sample, raw bytes. The peer runs the same
package behind aiohttp, whose threads call it without batching; it is faster than FastAPI, which is built the same way.

`--cpu` takes the same way on a CPU, without joules, to see that it works: not to cite.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from gpu_serving_load import Loop, Shot, add_up, closed_loop
from harness import Row
from torch import Tensor, nn

from gpuops.bundle import FORMAT_FILES, GOLDEN, Bundle, Golden, read_bundle, write_manifest
from gpuops.energy.nvml import open_gpus
from gpuops.export import aoti
from gpuops.export.formats import write
from gpuops.preprocess.module import PreprocessModule
from gpuops.preprocess.steps import Clip, Fill, Normalize, Part, Preprocess, Unpack
from gpuops.spec import Signature, TensorSpec
from gpuops_serving.client import Client
from gpuops_serving.config import Batching, Options
from gpuops_serving.metrics import ServerMeter
from gpuops_serving.repository import deploy
from gpuops_serving.server import TritonServer

NAME = "field"
MAX_BATCH, SAMPLES, CHANNELS, SIDE = 64, 64, 4, 128
MISSING = -32768
TOLERANCE = 1e-3
"""Kelvin, at a standard deviation of 10: float32 roundings pass, TF32 does not."""
DELAY_US = 500
"""How long Triton waits for a request to be joined by others."""
CONCURRENCY = (1, 8, 64)
LOOK_S = 0.5
"""Between two looks of the meter."""
IDLE_S = 3.0
"""Before each run of load, so that the meter sees what the board draws with nothing to do."""
KERNEL = "transform_kernel"
"""The kernel that unpacks, fills, clips and normalises (gpuops_kernels.transform)."""


class Net(nn.Module):
    """What a recipe's model would be: model-ready tensors by name in, normalised answers out."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.enter = nn.Conv2d(16 * CHANNELS, width, 1)
        self.body = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.leave = nn.Conv2d(width, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.enter(nn.functional.pixel_unshuffle(x, 4)))
        for layer in self.body:
            hidden = hidden + torch.relu(layer(hidden))
        return nn.functional.pixel_shuffle(self.leave(hidden), 4)


class Served(nn.Module):
    """As gpuops.export.graph.ServedGraph, which needs a run's data to be made: raw samples in, physical answers out."""

    def __init__(self) -> None:
        super().__init__()
        kelvin = Unpack(scale=0.01, offset=280.0, missing=MISSING)
        ready = (kelvin, Fill(280.0), Clip(200.0, 330.0), Normalize((280.0,), (10.0,)))
        self.inputs = PreprocessModule(Preprocess({"x": (Part("x", CHANNELS, "int16", ready),)}))
        self.targets = PreprocessModule(Preprocess({"y": (Part("y", 1, "float32", (Normalize((280.0,), (10.0,)),)),)}))
        self.net = Net()

    def forward(self, *raw: Tensor) -> tuple[Tensor]:
        return (self.targets.physical("y", self.net(**self.inputs({"x": raw[0]}))),)


def main() -> None:
    parser = harness.arguments(__doc__ or "", "gpu-serving")
    parser.add_argument("--cpu", action="store_true", help="the same way on a CPU; needs --out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = "cpu" if options.cpu else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "torch sees no CUDA device: run benchmarks/gpu.sh serving on a machine with one\n")
    if options.cpu and options.out == parser.get_default("out"):
        parser.error("--cpu is no result: name another file with --out")
    seconds = 1.0 if options.cpu else 5.0 if options.quick else 20.0
    with tempfile.TemporaryDirectory(prefix="gpuops-bench-") as scratch:
        bundle = make(Path(scratch) / "bundle", device)
        rows, limit = measure(bundle, Path(scratch) / "repository", device, seconds)
    packages = ("torch", "triton", "numpy", "tritonclient", "aiohttp", "nvidia-ml-py")
    harness.report(options.out, packages=packages, limits={"the package alone": (limit, "samples/s")}, rows=rows)


def make(folder: Path, device: str) -> Bundle:
    """Export the graph for `device` and write its bundle; answers are eager torch's, in full float32."""
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    raw = draw.normal(0, 1000, (SAMPLES, CHANNELS, SIDE, SIDE)).astype(np.int16)
    raw[draw.random(raw.shape) < 0.01] = MISSING
    graph = Served().eval()
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        answers = graph(torch.from_numpy(raw))[0].numpy()
    golden = Golden({"x": raw}, {"y": answers})
    signature = Signature(
        (TensorSpec("x", "int16", raw.shape[1:], "K", 0.01, 280.0, MISSING),),
        (TensorSpec("y", "float32", answers.shape[1:], "K"),),
        MAX_BATCH,
    )
    folder.mkdir(parents=True)
    golden.take(np.arange(8)).save(folder / GOLDEN)
    began = time.perf_counter()
    write(graph, golden.batch(MAX_BATCH).inputs, ["y"], MAX_BATCH, folder, ["aoti"], device)
    file = folder / FORMAT_FILES["aoti"]
    inside = kernels_inside(file)
    size = f"{file.stat().st_size / 1e6:.1f} MB"
    print(f"compiled in {time.perf_counter() - began:.0f} s, {size}, our kernel in {inside} files")
    if device == "cuda" and not inside:
        raise SystemExit(f"the package holds no {KERNEL}: it was decomposed, and this measures something else")
    document = {
        "name": NAME,
        "version_id": "a0" * 32,
        "run_id": "0" * 64,
        "identity": {},
        "signature": signature.to_json(),
        "sample": {},
        "preprocess": {},
        "tolerance": TOLERANCE,
        "served_batches": [1, MAX_BATCH],
        "parity": {},
        "environment": {},
        "aoti": aoti.facts(file),
    }
    write_manifest(folder, document)
    return read_bundle(folder)


def kernels_inside(package: Path) -> int:
    """How many files of an AOTInductor package name our kernel: sources, machine code for the GPU."""
    with zipfile.ZipFile(package) as archive:
        return sum(KERNEL.encode() in archive.read(name) for name in archive.namelist())


def measure(bundle: Bundle, repository: Path, device: str, seconds: float) -> tuple[list[Row], float]:
    """Rows of server and peer, and the limit: samples a second of the package alone, in full batches on the device."""
    limit = alone(bundle, device, seconds / 4)
    golden = bundle.golden()
    # One thread: on a CPU that others use too, torch's own wait for each other.
    options = Options(backend="python-aoti", gpu=device == "cuda", threads=1, batching=Batching(delay_us=DELAY_US))
    deploy(bundle.path, repository, options=options)
    ours: dict[int, Measured] = {}
    with TritonServer(repository, start_timeout_s=300.0) as server, Client(server.http_url) as client:
        shots = [Shot.triton(NAME, row, answer) for row, answer in one_by_one(golden)]
        for concurrency in CONCURRENCY:
            ours[concurrency] = metered(client, server.http_url, shots, concurrency, seconds)
    theirs: dict[int, Measured] = {}
    with peer(bundle.path, device) as url:
        shots = [Shot.raw(row, answer) for row, answer in one_by_one(golden)]
        for concurrency in CONCURRENCY:
            theirs[concurrency] = counted(lambda n=concurrency: closed_loop(url, shots, n, seconds))
    rows = [row for n in CONCURRENCY for row in cell(n, ours[n], theirs[n], limit)]
    return rows, limit


def alone(bundle: Bundle, device: str, seconds: float) -> float:
    """Samples a second of the package on tensors that lie on the device, in batches of `MAX_BATCH`."""
    module = aoti.load(bundle.model_file("aoti"), bundle.manifest["aoti"], device)
    x = torch.from_numpy(bundle.golden().batch(MAX_BATCH).inputs["x"]).to(device)

    def run(times: int) -> None:
        with torch.inference_mode():
            for _ in range(times):
                module(x)
        if device == "cuda":
            torch.cuda.synchronize()

    run(3)
    count, begun = 0, time.perf_counter()
    while (spent := time.perf_counter() - begun) < seconds:
        run(10 if device == "cuda" else 1)
        count += 10 if device == "cuda" else 1
    return count * MAX_BATCH / spent


class Measured:
    """A run of load, what the GPU's counter rose by in it, and whose that was."""

    def __init__(self, loop: Loop, counted_j: float | None, attributed_j: float | None = None, note: str = "") -> None:
        self.loop, self.counted_j, self.attributed_j, self.note = loop, counted_j, attributed_j, note


def counted(load: Callable[[], Loop]) -> Measured:
    """A run of load and the rise of the counter from its begin to its end."""
    sensors = open_gpus().sensors
    before = [sensor.count().energy_mj for sensor in sensors[:1]]
    loop = load()
    after = [sensor.count().energy_mj for sensor in sensors[:1]]
    if not sensors or before[0] is None or after[0] is None:
        return Measured(loop, None)
    return Measured(loop, (after[0] - before[0]) / 1000)


def metered(client: Client, url: str, shots: list[Shot], concurrency: int, seconds: float) -> Measured:
    """A run of load under the meter; SystemExit if what it attributes does not add up to what was counted."""
    meter = ServerMeter(client, longest_s=1.0)
    with meter, ThreadPoolExecutor(1) as other:  # a client is for one thread: the meter stays in this one
        if meter.gpus:
            time.sleep(IDLE_S)  # the meter learns what the board draws with nothing to do
            meter.poll()
        load = other.submit(counted, lambda: closed_loop(url, shots, concurrency, seconds))
        while not wait([load], LOOK_S).done:
            meter.poll()
        found = load.result()
    key = (NAME, "1")
    if not meter.gpus:
        return Measured(found.loop, None, None, f"joules null: {meter.totals.unknown.get(key) or meter.method[1]}")
    said = add_up(meter.totals, key, found.loop.answered)
    return Measured(found.loop, found.counted_j, meter.totals.joules_per_request(key), said)


def cell(concurrency: int, ours: Measured, theirs: Measured, limit: float) -> Iterator[Row]:
    """Rows of one concurrency."""
    case = f"{NAME}-http-c{concurrency}"
    for subject, found, other in (("gpuops", ours, theirs), ("aiohttp", theirs, ours)):
        loop, peer_name = found.loop, "aiohttp" if subject == "gpuops" else "gpuops"
        vs = {peer_name: loop.per_s / other.loop.per_s}
        yield Row(case, subject, "throughput", loop.per_s, "requests/s", loop.per_s / limit, vs, found.note)
        for name, value in zip(("p50", "p99"), loop.quantiles_ms((0.5, 0.99)), strict=True):
            yield Row(case, subject, name, value, "ms")
        if found.counted_j is not None:
            each = found.counted_j / loop.answered
            vs = {peer_name: each / (other.counted_j / other.loop.answered)} if other.counted_j else {}
            yield Row(case, subject, "energy, whole board", each, "J a request", vs=vs, note="counter at begin and end")
        if found.attributed_j is not None:
            yield Row(case, subject, "energy, attributed", found.attributed_j, "J a request", note="without idle")


def one_by_one(golden: Golden) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Requests of one sample, with their answers."""
    for k in range(len(golden.inputs["x"])):
        yield golden.inputs["x"][k : k + 1], golden.outputs["y"][k : k + 1]


@contextmanager
def peer(bundle: Path, device: str) -> Iterator[str]:
    """The peer in a process of its own; its URL."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_serving_peer.py")), str(bundle), device]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline().strip()
            if not line.startswith("http://"):
                raise SystemExit("the peer did not start: see above")
            yield line
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
