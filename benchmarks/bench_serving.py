"""A served model against the same graph served otherwise, on this machine: requests a second, latency, processor time.

Subjects, each with a server of its own that stands by while the others are measured; in every round each is under the
same closed loop (gpuops_serving.load) in turn:

    gpuops        `gpuops deploy --tune`, the embedded tritonserver
    handwritten   a python-backend repository written by hand for the same graph and server, without any check; the best
                  of several divisions of the cores and batching delays, chosen on this machine before the rounds
    bare          the same by hand, with the division of the cores that gpuops chose: what the shim adds
    null          as `bare`, but answers zeros: the floor of server, protocol and load
    fastapi, bentoml, pytriton    where $GPUOPS_PEERS has them (serving_peers.py); two workers each
    limit         onnxruntime alone in as many processes as there are cores, no server: the ceiling

Every answer is compared with the golden one. Cases are <model>-<protocol>-c<concurrency>; `small` is 25 MFLOP on 25 kB,
`demo` the demo's network (serving_models.py). Further rows: from start to the first golden answer, a rollback, what
our client adds to tritonclient's, and the highest rate with p99 <= 2x unloaded (open loop).
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import harness
import serving_models
import serving_peers
import tritonclient.grpc
import tritonclient.http
from harness import Row
from rich.progress import Progress
from serving_peers import Missing, Subject, handwritten, triton_targets

from gpuops.bundle import Bundle, read_bundle, write_manifest
from gpuops.lineage.ledger import Ledger
from gpuops_serving.client import Client
from gpuops_serving.load import Load, closed_loop, open_loop
from gpuops_serving.repository import deploy
from gpuops_serving.rollout import roll_back, rollout
from gpuops_serving.server import TritonServer
from gpuops_serving.tuning import tune

CONCURRENCY = (1, 8, 32, 64)
DIVISIONS = ((1, 1, 0, 0), (1, 2, 0, 0), (2, 1, 0, 0), (1, 2, 8, 500), (2, 1, 8, 500), (1, 1, 16, 1000))
"""(instances, threads, preferred batch, delay in us) that the hand-written repository is tuned over."""
WARM_UP_S = 0.3
UNLOADED = 0.05
"""Share of a subject's own best closed-loop rate at which its latency counts as unloaded."""
RATES = (0.1, 0.2, 0.3, 0.45, 0.6, 0.75)
"""Shares of a subject's own best closed-loop rate that the open loop tries."""
BOUND_ROUNDS = 3
HELD = (
    f"open loop, Poisson, median p99 of {BOUND_ROUNDS} rounds; shares of its own best rate: {UNLOADED} unloaded, then "
    f"{', '.join(map(str, RATES))}; 0: none held"
)
PACKAGES = ("gpuops", "onnxruntime", "tritonclient", "numpy", "torch")


def main() -> None:
    parser = harness.arguments(__doc__ or "", "serving")
    parser.add_argument("--models", nargs="*", default=["small", "demo"], choices=["small", "demo"])
    parser.add_argument("--concurrency", nargs="*", type=int, default=list(CONCURRENCY), help="requests under way")
    options = parser.parse_args()
    rounds, seconds = (3, 0.6) if options.quick else (5, 0.8)
    rows: list[Row] = []
    limits: dict[str, tuple[float, str]] = {}
    with tempfile.TemporaryDirectory(prefix="gpuops-bench-") as scratch, Progress() as progress:
        for model in options.models:
            bundle = serving_models.make(model, Path(scratch) / model)
            bench = _Bench(bundle, Path(scratch), rounds, seconds, options.concurrency, progress)
            rows += bench.throughput(limits)
            rows += bench.latency_bound(0.3 if options.quick else 1.5)
            rows += bench.client_overhead(200 if options.quick else 1000)
            rows += bench.lifecycle()
    harness.report(options.out, packages=PACKAGES, limits=limits, rows=rows)


class _Bench:
    """Every measurement on one model."""

    def __init__(
        self,
        bundle: Bundle,
        scratch: Path,
        rounds: int,
        seconds: float,
        concurrencies: Sequence[int],
        progress: Progress,
    ) -> None:
        self.bundle, self.scratch, self.progress = bundle, scratch, progress
        self.rounds, self.seconds, self.concurrencies = rounds, seconds, concurrencies
        self.tuning = tune(bundle, say=progress.console.print)
        self.best: dict[tuple[str, str], float] = {}

    def throughput(self, limits: dict[str, tuple[float, str]]) -> list[Row]:
        """Rows of every case and subject."""
        found: dict[tuple[str, int, str], list[tuple[Load, float]]] = {}
        ceiling: list[float] = []
        with ExitStack() as stack:
            subjects = [self._gpuops(stack), *self._peers(stack)]
            cases = [(p, c) for p in ("http", "grpc") for c in self.concurrencies]
            jobs = [(case, s) for case in cases for s in subjects if case[0] in s.targets]
            task = self.progress.add_task(f"{self.bundle.name}: load", total=self.rounds * len(jobs))
            for number in range(self.rounds):
                ceiling.append(onnxruntime_rate(self.bundle, self.seconds))
                turn = number % len(jobs)
                for (protocol, concurrency), subject in jobs[turn:] + jobs[:turn]:
                    endpoint, shots = subject.targets[protocol]
                    before = processor_seconds(subject.root)
                    load = closed_loop(
                        endpoint, shots, concurrency=concurrency, seconds=self.seconds, warm_up_s=WARM_UP_S
                    )
                    spent = processor_seconds(subject.root) - before
                    found.setdefault((protocol, concurrency, subject.name), []).append((load, spent))
                    self.progress.advance(task)
            limits[f"{self.bundle.name}: onnxruntime in {harness.cores()} processes"] = (
                statistics.median(ceiling),
                "requests/s",
            )
            return [row for case in cases for row in self._case(case, [s.name for s in subjects], found, ceiling)]

    def _case(
        self,
        case: tuple[str, int],
        names: Sequence[str],
        found: Mapping[tuple[str, int, str], list[tuple[Load, float]]],
        ceiling: Sequence[float],
    ) -> list[Row]:
        protocol, concurrency = case
        label = f"{self.bundle.name}-{protocol}-c{concurrency}"
        here = [name for name in names if (protocol, concurrency, name) in found]
        loads = {name: [load for load, _ in found[protocol, concurrency, name]] for name in here}
        rates = {name: statistics.median(load.answered_per_s for load in loads[name]) for name in here}
        limit = statistics.median(ceiling)
        rows = [Row(label, "limit", "requests", limit, "1/s")]
        for name in here:
            self.best[protocol, name] = max(self.best.get((protocol, name), 0.0), rates[name])
            # Ratios are made within each round, as the machine's speed changes between them.
            peers = {
                peer: statistics.median(
                    a.answered_per_s / b.answered_per_s for a, b in zip(loads[name], loads[peer], strict=True)
                )
                for peer in here
                if name == "gpuops" and peer != name and rates[peer]
            }
            failures = sum(sum(load.failed.values()) for load in loads[name])
            note = harness.spread(load.answered_per_s for load in loads[name])
            rows.append(
                Row(
                    label,
                    name,
                    "requests",
                    rates[name],
                    "1/s",
                    rates[name] / limit,
                    peers,
                    note if not failures else f"{note}; {failures} requests failed",
                )
            )
        for metric in ("p50_ms", "p99_ms"):
            values = {n: statistics.median(load.latency_ms[metric] or float("nan") for load in loads[n]) for n in here}
            for name in here:
                peers = {p: values[name] / values[p] for p in here if name == "gpuops" and p != name and values[p]}
                rows.append(Row(label, name, metric.removesuffix("_ms"), values[name], "ms", None, peers))
        for name in here:
            counted = self.seconds / (self.seconds + WARM_UP_S)
            spent = [1e6 * cpu * counted / load.sent for load, cpu in found[protocol, concurrency, name] if load.sent]
            rows.append(
                Row(label, name, "processor time a request", statistics.median(spent), "us", note="server's processes")
            )
        return rows

    def latency_bound(self, seconds: float) -> list[Row]:
        """Highest rate at which p99 is at most twice the unloaded p99, ours and the hand-written one's."""
        rows = []
        with ExitStack() as stack:
            subjects = [self._gpuops(stack), self._handwritten(stack)]
            for protocol in ("http", "grpc"):
                p99_ms: dict[tuple[str, float], list[float]] = {}
                for _, share, subject in itertools.product(range(BOUND_ROUNDS), (UNLOADED, *RATES), subjects):
                    endpoint, shots = subject.targets[protocol]
                    rate = share * self.best[protocol, subject.name]
                    load = open_loop(endpoint, shots, rate_per_s=rate, seconds=seconds)
                    found = load.latency_ms["p99_ms"]
                    p99_ms.setdefault((subject.name, share), []).append(
                        math.inf if found is None or load.failed else found
                    )
                held: dict[str, float] = {}
                for subject in subjects:
                    most = 2 * statistics.median(p99_ms[subject.name, UNLOADED])
                    shares = [share for share in RATES if statistics.median(p99_ms[subject.name, share]) <= most]
                    held[subject.name] = max(shares, default=0.0) * self.best[protocol, subject.name]
                for name, value in held.items():
                    other = held["handwritten"]
                    vs = {"handwritten": value / other} if name == "gpuops" and other else {}
                    case = f"{self.bundle.name}-{protocol}-p99-within-2x"
                    rows.append(Row(case, name, "requests", value, "1/s", None, vs, HELD))
        return rows

    def client_overhead(self, count: int) -> list[Row]:
        """Our client against tritonclient's own, one request after another."""
        rows = []
        with ExitStack() as stack:
            http, grpc = self._gpuops_urls(stack)
            inputs = self.bundle.golden().take(_first()).inputs
            for protocol, url in (("http", http), ("grpc", grpc)):
                library: Any = tritonclient.http if protocol == "http" else tritonclient.grpc
                raw = library.InferenceServerClient(url.split("://")[1])
                stack.callback(raw.close)
                ours = stack.enter_context(Client(url))

                def by_hand(_: int, library: Any = library, raw: Any = raw) -> None:
                    tensors = []
                    for spec in self.bundle.signature.inputs:
                        array = inputs[spec.name]
                        tensors.append(library.InferInput(spec.name, list(array.shape), _kind(spec.dtype)))
                        tensors[-1].set_data_from_numpy(array)
                    raw.infer(self.bundle.name, tensors).as_numpy("y")

                def by_us(_: int, ours: Client = ours) -> None:
                    ours.infer(self.bundle.name, inputs)

                timings = harness.interleave({"gpuops": by_us, "tritonclient": by_hand}, count)
                for metric, unit, pick in (("latency", "us", "wall_s"), ("processor time", "us", "cpu_s")):
                    values = {name: 1e6 * statistics.median(getattr(t, pick)) for name, t in timings.items()}
                    case = f"{self.bundle.name}-{protocol}-client"
                    for name, value in values.items():
                        vs = {"tritonclient": value / values["tritonclient"]} if name == "gpuops" else {}
                        rows.append(Row(case, name, metric, value, unit, None, vs, "one request after another"))
        return rows

    def lifecycle(self) -> list[Row]:
        """From start to the first golden answers, and from the word to the old version's answer."""
        folder = self.scratch / f"{self.bundle.name}-lifecycle"
        deploy(self.bundle.path, folder)
        begin = time.perf_counter()
        with TritonServer(folder, control=True) as server:
            started = time.perf_counter() - begin
            other = self._second_version()
            with Client(server.grpc_url, access=server.access) as client, Ledger(self.scratch / "l.sqlite") as ledger:
                rollout(other, folder, client, ledger=ledger, count=20)
                begin = time.perf_counter()
                roll_back(folder, self.bundle.name, client, ledger=ledger)
                rolled = time.perf_counter() - begin
        case = f"{self.bundle.name}-lifecycle"
        return [
            Row(case, "gpuops", "start to golden answers", started, "s", note="every version, HTTP and gRPC"),
            Row(case, "gpuops", "rollback to golden answer", rolled, "s", note="the old version answers throughout"),
        ]

    def _second_version(self) -> Path:
        path = self.scratch / f"{self.bundle.name}-2"
        if not path.exists():
            import shutil

            shutil.copytree(self.bundle.path, path)
            document = {k: v for k, v in self.bundle.manifest.items() if k not in ("sha256", "files", "schema")}
            write_manifest(path, {**document, "version_id": "2" * 64})
        return path

    def _gpuops_urls(self, stack: ExitStack) -> tuple[str, str]:
        folder = self.scratch / f"{self.bundle.name}-repository"
        from gpuops_serving.config import Options

        options = self.tuning.apply(Options(), self.bundle.signature.max_batch)
        deploy(self.bundle.path, folder, options=options, tuning=self.tuning)
        self.server = stack.enter_context(TritonServer(folder))
        return self.server.http_url, self.server.grpc_url

    def _gpuops(self, stack: ExitStack) -> Subject:
        urls = self._gpuops_urls(stack)
        return Subject("gpuops", triton_targets(*urls, self.bundle.name, self.bundle), self.server.pid)

    def _handwritten(self, stack: ExitStack) -> Subject:
        """The best of `DIVISIONS` at 32 requests under way."""
        if not hasattr(self, "division"):
            rates = {}
            for division in DIVISIONS:
                with handwritten("handwritten", self.bundle, *division) as subject:
                    endpoint, shots = subject.targets["http"]
                    serving_peers.wait_for_answer(subject.targets["http"])
                    rates[division] = closed_loop(endpoint, shots, concurrency=32, seconds=1.5).answered_per_s
            self.division = max(rates, key=lambda division: rates[division])
            self.progress.console.print(f"handwritten: {self.division} of {rates}")
        subject = stack.enter_context(handwritten("handwritten", self.bundle, *self.division))
        serving_peers.wait_for_answer(subject.targets["http"])
        return subject

    def _peers(self, stack: ExitStack) -> list[Subject]:
        made = [self._handwritten(stack)]
        as_ours = (self.tuning.instances, self.tuning.threads)
        starts: list[Callable[[], Any]] = [
            lambda: handwritten("bare", self.bundle, *as_ours),
            lambda: handwritten("null", self.bundle, *as_ours, null=True),
            lambda: serving_peers.fastapi(self.bundle),
            lambda: serving_peers.bentoml(self.bundle),
            lambda: serving_peers.pytriton(self.bundle),
        ]
        for start in starts:
            try:
                subject = stack.enter_context(start())
                serving_peers.wait_for_answer(subject.targets["http"])
                made.append(subject)
            except Missing as missing:
                self.progress.console.print(str(missing))
        return made


def onnxruntime_rate(bundle: Bundle, seconds: float) -> float:
    """Single samples a second of one process a core, without any server."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(harness.cores()) as pool:
        return sum(pool.starmap(_run_onnx, [(str(bundle.path), seconds)] * harness.cores()))


def _run_onnx(path: str, seconds: float) -> float:
    import onnxruntime

    bundle = read_bundle(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(bundle.model_file("onnx")), options, providers=["CPUExecutionProvider"])
    rows = [dict(row) for row in bundle.golden().rows()]
    session.run(None, rows[0])
    count, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds:
        session.run(None, rows[count % len(rows)])
        count += 1
    return count / spent


def processor_seconds(root: int) -> float:
    """User and system time so far of a process and of all below it that live."""
    parents, ticks = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
            ticks[int(entry.name)] = int(fields[11]) + int(fields[12])
    tree = {root}
    while more := {child for child, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return sum(ticks.get(process, 0) for process in tree) / os.sysconf("SC_CLK_TCK")


def _first() -> Any:
    import numpy as np

    return np.zeros(1, np.int64)


def _kind(dtype: str) -> str:
    return {"uint8": "UINT8", "int32": "INT32"}[dtype]


if __name__ == "__main__":
    main()
