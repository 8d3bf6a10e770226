"""How many instances, of how many threads, and which batch: measured on this machine with the bundle's own samples.

    curve       samples a second at batch sizes 1, 2, 4, ... the largest
    instances   the division of the cores that answers the most samples a second at its best batch
    preferred   the smallest batch that reaches `KNEE` of that: waiting for more brings latency and nothing else

Measured with onnxruntime in this process, every instance in a thread of its own, all of them at the same time.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from gpuops.bundle import Bundle
from gpuops.errors import UnavailableError
from gpuops.spec import Arrays
from gpuops_serving.config import Batching, Options

KNEE = 0.95
"""Share of the best rate from which on a larger batch is not worth waiting for."""
_CELL_S = 0.15


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was measured, and what it says."""

    instances: int
    """Instances to run."""
    threads: int
    """Threads of each."""
    preferred: int
    """Batch size that is enough."""
    rates: dict[str, dict[int, float]]
    """Samples a second by "<instances>x<threads>" and batch size."""

    def to_json(self) -> dict[str, Any]:
        """JSON form, rates in whole samples a second."""
        whole = {name: {size: round(rate) for size, rate in row.items()} for name, row in self.rates.items()}
        return {**asdict(self), "rates": whole}

    def apply(self, options: Options, max_batch: int) -> Options:
        """`options` with the measured numbers; batches are limited only where that is below the largest."""
        preferred = (self.preferred,) if self.preferred < max_batch else ()
        return replace(
            options,
            instances=self.instances,
            threads=self.threads,
            batching=Batching(
                preferred, options.batching.delay_us, options.batching.queue_size, options.batching.timeout_us
            ),
        )


def tune(bundle: Bundle, *, cores: int | None = None, say: Callable[[str], None] = lambda _: None) -> Tuning:
    """Measure a bundle's ONNX model here, a few seconds long.

    Args:
        bundle: An open bundle.
        cores: Cores to divide; those that this process may use if None.
        say: Told what is being measured.

    Raises:
        UnavailableError: onnxruntime is not installed.
    """
    cores = len(os.sched_getaffinity(0)) if cores is None else cores
    sizes = sorted(
        {min(2**power, bundle.signature.max_batch) for power in range(bundle.signature.max_batch.bit_length() + 1)}
    )
    golden = bundle.golden()
    batches = {size: golden.batch(size).inputs for size in sizes}
    rates: dict[str, dict[int, float]] = {}
    for instances in sorted({1, cores}):
        threads = cores // instances
        say(f"measuring {instances} instances of {threads} threads at batches {', '.join(map(str, sizes))}")
        runners = [_session(bundle, threads) for _ in range(instances)]
        rates[f"{instances}x{threads}"] = {size: _rate(runners, batches[size], size) for size in sizes}
    return choose(rates)


def choose(rates: dict[str, dict[int, float]]) -> Tuning:
    """The best division of the cores and its knee; on a tie (5 %) fewer instances, which need less memory."""
    best = max(rate for row in rates.values() for rate in row.values())
    name = next(name for name, row in sorted(rates.items(), key=_instances) if max(row.values()) >= KNEE * best)
    row = rates[name]
    preferred = next(size for size in sorted(row) if row[size] >= KNEE * max(row.values()))
    instances, threads = map(int, name.split("x"))
    return Tuning(instances, threads, preferred, rates)


def _instances(entry: tuple[str, object]) -> int:
    return int(entry[0].split("x")[0])


def _session(bundle: Bundle, threads: int) -> Callable[[Arrays], object]:
    try:
        import onnxruntime
    except ImportError as error:
        raise UnavailableError(
            "onnxruntime is not installed, so nothing can be measured: pip install 'gpuops[onnx]', or leave --tune"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(bundle.model_file("onnx")), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, dict(inputs))


def _rate(runners: Sequence[Callable[[Arrays], object]], batch: Arrays, size: int) -> float:
    """Samples a second that all runners answer together."""
    counts = [0] * len(runners)
    start = threading.Barrier(len(runners) + 1)
    ended: list[float] = []

    def work(place: int) -> None:
        runners[place](batch)  # the first one allocates
        start.wait()
        until = time.perf_counter() + _CELL_S
        while time.perf_counter() < until:
            runners[place](batch)
            counts[place] += 1
        ended.append(time.perf_counter())

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(runners))]
    for thread in threads:
        thread.start()
    start.wait()
    begun = time.perf_counter()
    for thread in threads:
        thread.join()
    return sum(counts) * size / (max(ended) - begun)
