"""A million samples at mixed batch sizes through one server: every answer compared, memory watched, nothing left.

Five clients at a time ask the model whose compute is small: two over HTTP, two over gRPC, one through shared memory
that is given back and taken anew all the while. Batches are of 1 to 80 samples (the largest that is served is 32, so
some go in parts), each of samples drawn at random, so that an answer given to the wrong request is seen. Memory is
that of the server and of its stubs, looked at once a second. Ends with 1 if an answer is wrong, a request fails,
memory grows, or a process or a region of shared memory is left (in the server too).
"""

from __future__ import annotations

import os
import queue
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import harness
import numpy as np
from harness import Row
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from serving_models import MAX_BATCH, TOLERANCE, make

from gpuops.bundle import Golden
from gpuops.errors import GpuopsError
from gpuops.spec import Arrays
from gpuops_serving.client import Client
from gpuops_serving.repository import deploy
from gpuops_serving.server import TritonServer
from gpuops_serving.shared_memory import PREFIX, SharedMemory

MODEL = "small"
LARGEST = 80
SHARED = "shared memory"
REOPENED = 20
"""Requests after which shared memory is closed and opened anew."""
GROWTH_MB = 16.0
"""Most that memory may grow from the second quarter to the last, which allocators' own unrest does not reach."""
LOOK_S = 1.0
SHARES = Path("/dev/shm")

Ask = Callable[[Arrays], Arrays]


@dataclass
class Soak:
    """What is under way, and what was found."""

    server: TritonServer
    golden: Golden
    sizes: queue.SimpleQueue[int]
    done: Callable[[int], None]
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    asked: list[tuple[str, int]] = field(default_factory=list)
    """(kind, requests) of each client."""
    memory_mb: list[tuple[float, float]] = field(default_factory=list)
    """(server, all stubs) at each look."""
    over: threading.Event = field(default_factory=threading.Event)

    def client(self, name: str, url: str, seed: int) -> None:
        """Ask batches until there are no more; whatever ends it early is a fault."""
        requests, draw = 0, np.random.default_rng(seed)
        try:
            with Client(url) as client, ExitStack() as opened, suppress(queue.Empty):
                ask: Ask = partial(client.infer, MODEL)
                while True:
                    size = self.sizes.get_nowait()
                    if name == SHARED and requests % REOPENED == 0:
                        opened.close()
                        ask = opened.enter_context(SharedMemory(client, MODEL)).infer
                    most = MAX_BATCH if name == SHARED else size  # it does not split batches itself
                    for start in range(0, size, most):
                        self.ask(ask, min(most, size - start), draw, name)
                    requests += 1
        except Exception as error:
            self.failed.append(f"{name} ended: {error!r}")
        self.asked.append((name, requests))

    def ask(self, infer: Ask, size: int, draw: np.random.Generator, name: str) -> None:
        """One request, and whether its answer is that to these very samples."""
        one = self.golden.take(draw.integers(0, len(self.golden.outputs["y"]), size))
        try:
            found = one.max_abs_diff(infer(one.inputs))
            if not found <= TOLERANCE:
                self.wrong.append(f"{name}: {size} samples, differs by {found:g}")
        except GpuopsError as error:
            self.failed.append(f"{name}: {error}")
        self.done(size)

    def watch(self) -> None:
        """Look at the memory at once, until all is over, and then."""
        self.look()
        while not self.over.wait(LOOK_S):
            self.look()
        self.look()

    def look(self) -> None:
        """Memory of the server and of its stubs."""
        stubs = _stubs(self.server.pid)
        self.memory_mb.append((_rss_mb(self.server.pid), sum(map(_rss_mb, stubs))))


def main() -> int:
    parser = harness.arguments(__doc__ or "", "soak_serving")
    parser.add_argument("--samples", type=int, default=None, help="samples (default 1000000; 20000 with --quick)")
    options = parser.parse_args()
    samples = options.samples or (20_000 if options.quick else 1_000_000)
    before = {path.name for path in SHARES.iterdir()}
    with tempfile.TemporaryDirectory() as folder:
        bundle = make(MODEL, Path(folder) / "bundle")
        deploy(bundle.path, Path(folder) / "repository")
        server = TritonServer(Path(folder) / "repository", shared_memory=True)
        with server, _progress() as progress:
            task = progress.add_task("samples", total=samples)
            soak = Soak(server, bundle.golden(), _sizes(samples), lambda size: progress.advance(task, size))
            version = server.version
            seconds = run(soak)
            left = _mapped(server.pid)
    ours = (PREFIX, server.server_id)
    left += [path.name for path in SHARES.iterdir() if path.name.startswith(ours) and path.name not in before]
    left += [line for line in _commands() if server.server_id in line]
    rows, faults = judge(soak, samples, seconds, left, version)
    harness.report(options.out, packages=("numpy", "onnxruntime", "tritonclient"), limits={}, rows=rows)
    for fault in faults:
        print(fault)
    return 1 if faults else 0


def run(soak: Soak) -> float:
    """All clients until the last sample; the seconds that took."""
    urls = {"http": soak.server.http_url, "grpc": soak.server.grpc_url, SHARED: soak.server.grpc_url}
    names = ["http", "grpc", SHARED, "http", "grpc"]
    clients = [threading.Thread(target=soak.client, args=(name, urls[name], seed)) for seed, name in enumerate(names)]
    watching = threading.Thread(target=soak.watch)
    begun = time.perf_counter()
    for thread in (watching, *clients):
        thread.start()
    for thread in clients:
        thread.join()
    seconds = time.perf_counter() - begun
    soak.over.set()
    watching.join()
    return seconds


def judge(soak: Soak, samples: int, seconds: float, left: list[str], version: str) -> tuple[list[Row], list[str]]:
    """Rows for the report, and what is wrong."""
    case = f"{MODEL}, batches of 1 to {LARGEST}"
    requests = ", ".join(f"{name} {count}" for name, count in sorted(soak.asked))
    note = f"Triton {version}; requests: {requests}"
    rows = [Row(case, "gpuops", "samples", samples, "samples", note=note)]
    rows.append(Row(case, "gpuops", "samples a second", samples / seconds, "1/s", note="answers compared as they come"))
    counts = (("wrong answers", soak.wrong), ("failed requests", soak.failed), ("left behind", left))
    rows += [Row(case, "gpuops", name, len(found), "1", note="; ".join(found[:3])) for name, found in counts]
    faults = [f"{name}: {len(found)}, such as {found[0]}" for name, found in counts if found]
    for place, name in enumerate(("server", "stubs")):
        course = [look[place] for look in soak.memory_mb]
        quarter = max(len(course) // 4, 1)
        early, late = statistics.median(course[quarter : 2 * quarter] or course), statistics.median(course[-quarter:])
        rise = statistics.linear_regression(range(len(course)), course).slope * len(course) if len(course) > 1 else 0.0
        note = f"{early:.1f} MB in the second quarter, {late:.1f} MB in the last, of {len(course)} looks; slope "
        note += f"{rise / samples * 1e6:.2f} MB a million samples"
        rows.append(Row(case, "gpuops", f"growth of the {name}", late - early, "MB", note=note))
        if late - early > GROWTH_MB:
            faults.append(f"memory of the {name} grew from {early:.1f} to {late:.1f} MB")
    return rows, faults


def _sizes(samples: int) -> queue.SimpleQueue[int]:
    """Batch sizes that add up to `samples`."""
    sizes: queue.SimpleQueue[int] = queue.SimpleQueue()
    draw = np.random.default_rng(0)
    while samples > 0:
        size = min(int(draw.integers(1, LARGEST + 1)) if draw.random() < 0.1 else int(draw.integers(1, 33)), samples)
        sizes.put(size)
        samples -= size
    return sizes


def _progress() -> Progress:
    return Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), disable=not sys.stderr.isatty())


def _stubs(server: int) -> list[int]:
    """Processes of a server's group but itself."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != server:
            with suppress(OSError):
                if os.getpgid(int(entry.name)) == server:
                    found.append(int(entry.name))
    return found


def _rss_mb(pid: int) -> float:
    with suppress(OSError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    return 0.0  # it ended meanwhile


def _mapped(server: int) -> list[str]:
    """Clients' regions that the server still holds: their names are gone, their memory is not."""
    maps = Path(f"/proc/{server}/maps").read_text()
    return [f"mapped by the server: {line.rpartition('/')[2]}" for line in maps.splitlines() if PREFIX in line]


def _commands() -> list[str]:
    """Command lines of all living processes."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found


if __name__ == "__main__":
    sys.exit(main())
