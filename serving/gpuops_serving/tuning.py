"""How many instances, of how many threads, and which batch: measured on this machine with the bundle's own samples.

    curve       samples a second at batch sizes 1, 2, 4, ... the largest
    instances   the division of the cores (1, 2, 4, ... all) that answers the most samples a second at its best batch
    best batch  the largest batch that reaches `NEAR` of that: what the graph is given at once. The server joins as many
                requests as it has, since an execution costs it the same at any size, and the shim divides them into
                micro-batches. Triton's own backends do not, so there the batch is limited

Measured with onnxruntime in this process, every instance in a thread of its own, all of them at the same time.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from gpuops.bundle import Bundle
from gpuops.errors import InputError, UnavailableError
from gpuops.spec import Arrays
from gpuops_serving.config import BACKENDS, Options
from gpuops_serving.scheduling import Batching

NEAR = 0.97
"""Share of the best rate that is as good as the best."""
MEASURED = ("python", "python-int8", "onnxruntime")
"""Backends whose models onnxruntime runs, so that what is measured here is what they will do."""
_CELL_S = 0.15
_START_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was measured, and what it says."""

    instances: int
    """Instances to run."""
    threads: int
    """Threads of each."""
    best_batch: int
    """Batch size beyond which answers get slower."""
    rates: Mapping[str, Mapping[int, float]]
    """Samples a second by "<instances>x<threads>" and batch size."""

    def to_json(self) -> dict[str, Any]:
        """JSON form, rates in whole samples a second."""
        whole = {name: {size: round(rate) for size, rate in row.items()} for name, row in self.rates.items()}
        return {**asdict(self), "rates": whole}

    def apply(self, options: Options, max_batch: int) -> Options:
        """`options` with the measured numbers; batches are limited only where there is no shim to divide them.

        Args:
            options: How the model is to be served otherwise.
            max_batch: Largest batch of its signature.

        Raises:
            InputError: these options are for something else than was measured.
        """
        require_measured(options)
        assert isinstance(options.batching, Batching)
        made = replace(options, instances=self.instances, threads=self.threads)
        best = self.best_batch if self.best_batch < max_batch else 0
        if options.runs_shim:
            return replace(made, micro_batch=best, batching=replace(options.batching, preferred=()))
        return replace(made, batching=replace(options.batching, preferred=(best,) if best else ()))


def tune(
    bundle: Bundle,
    *,
    options: Options | None = None,
    cores: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Tuning:
    """Measure a bundle's model here, a few seconds long.

    Args:
        bundle: An open bundle.
        options: How it is to be served; decides whether its onnx or its int8 graph is measured.
        cores: Cores to divide; those that this process may use if None.
        say: Told what is being measured.

    Raises:
        InputError: it is to be served in a way that cannot be measured here, or the bundle has not that format.
        UnavailableError: onnxruntime is not installed.
    """
    options = Options() if options is None else options
    require_measured(options)
    cores = len(os.sched_getaffinity(0)) if cores is None else cores
    largest = bundle.signature.max_batch
    sizes = sorted({min(2**power, largest) for power in range(largest.bit_length() + 1)})
    golden = bundle.golden()
    batches = {size: golden.batch(size).inputs for size in sizes}
    rates: dict[str, dict[int, float]] = {}
    for instances in sorted({min(2**power, cores) for power in range(cores.bit_length() + 1)}):
        threads = cores // instances
        say(f"measuring {instances} instances of {threads} threads at batches {', '.join(map(str, sizes))}")
        runners = [_session(bundle, options, threads) for _ in range(instances)]
        rates[f"{instances}x{threads}"] = {size: _rate(runners, batches[size], size) for size in sizes}
    return choose(rates)


def require_measured(options: Options) -> None:
    """Raise InputError if a model served so would not be run by onnxruntime on this CPU."""
    if options.gpu or options.backend not in MEASURED:
        where = "on a GPU" if options.gpu else f"by backend {options.backend}"
        raise InputError(
            f"what runs {where} cannot be measured here (only {', '.join(MEASURED)} on the CPU): name instances and "
            "threads yourself"
        )


def choose(rates: Mapping[str, Mapping[int, float]]) -> Tuning:
    """The best division of the cores and its largest good batch; on a tie fewer instances, to save memory.

    Args:
        rates: Samples a second by "<instances>x<threads>" and batch size.
    """
    best = max(rate for row in rates.values() for rate in row.values())
    name = next(name for name, row in sorted(rates.items(), key=_instances) if max(row.values()) >= NEAR * best)
    row = rates[name]
    best_batch = max(size for size, rate in row.items() if rate >= NEAR * max(row.values()))
    instances, threads = map(int, name.split("x"))
    return Tuning(instances, threads, best_batch, rates)


def _instances(entry: tuple[str, object]) -> int:
    return int(entry[0].split("x")[0])


def _session(bundle: Bundle, served: Options, threads: int) -> Callable[[Arrays], object]:
    try:
        import onnxruntime
    except ImportError as error:
        raise UnavailableError(
            "onnxruntime is not installed, so nothing can be measured: pip install 'gpuops[onnx]', or leave --tune"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if served.runs_shim:  # which does so too (shim/model.py)
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    file = bundle.model_file(str(BACKENDS[served.backend].format))
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, dict(inputs))


def _rate(runners: Sequence[Callable[[Arrays], object]], batch: Arrays, size: int) -> float:
    """Samples a second that all runners answer together."""
    start = threading.Barrier(len(runners), timeout=_START_TIMEOUT_S)

    def work(run: Callable[[Arrays], object]) -> tuple[int, float, float]:
        try:
            run(batch)  # the first one allocates
            start.wait()
        except BaseException:
            start.abort()  # else the others would wait for this one
            raise
        begun = time.perf_counter()
        count = 0
        while time.perf_counter() < begun + _CELL_S:
            run(batch)
            count += 1
        return count, begun, time.perf_counter()

    with ThreadPoolExecutor(len(runners)) as pool:
        futures = [pool.submit(work, run) for run in runners]
        errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    found = [future.result() for future in futures]
    elapsed_s = max(ended for _, _, ended in found) - min(begun for _, begun, _ in found)
    return sum(count for count, _, _ in found) * size / elapsed_s
