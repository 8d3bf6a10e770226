"""int8: a quantised graph beside float32's, judged by the task and not by rounding.

8 bits are not always faster and not always good enough: size and latency are reported beside float32's, and a model
whose error on held-out samples grows by more than the declared bound is refused.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.bundle import Golden
from gpuops.data.reading.reader import wire_inputs
from gpuops.errors import InputError, IntegrityError
from gpuops.export.graph import Run, ServedGraph
from gpuops.export.quantize import quantize
from gpuops.export.samples import batches, drawn, held_out, trained_on, truth
from gpuops.spec import Arrays, Signature

BOUND = 0.02
"""Share by which the error on held-out samples may grow, unless the caller declares another."""
CALIBRATION_SAMPLES = 128
HELD_OUT_SAMPLES = 256
MARGIN = 2.0
"""The tolerance of int8 is so many times the largest difference from float32 that was seen: on another processor
float32 rounds otherwise, and what lies between two of 256 steps goes to the other one."""
_READ_SAMPLES = 8
"""Samples read and answered at a time: as many as the golden ones, which were read and answered too."""
_ROUNDS, _LATENCY_S = 20, 2.0
"""Timed runs of a graph at a batch size, and seconds after which no more are begun."""

_Infer = Callable[[Arrays], dict[str, npt.NDArray[Any]]]


def check_bound(bound: float) -> None:
    """Raise InputError unless `bound` is a share by which an error may grow."""
    if not bound >= 0:
        raise InputError(f"int8 bound {bound}: give the share by which the error may grow, as 0.02")


def write(
    run: Run,
    graph: ServedGraph,
    wire: Signature,
    float32: Path,
    destination: Path,
    *,
    golden: Golden,
    golden_ids: Iterable[int],
    patterns: Golden | None,
    bound: float = BOUND,
) -> dict[str, Any]:
    """Quantise an exported graph with training samples, and judge it by held-out ones.

    Args:
        run: the run that the graph was exported from.
        graph: its served graph, which knows the way from stored targets to the truth in physical units.
        wire: what crosses the wire.
        float32: the graph as ONNX in float32.
        destination: where the quantised graph goes.
        golden: golden samples and answers.
        golden_ids: their sample ids, none of which calibrates.
        patterns: samples with missing values and their answers.
        bound: share by which the root mean square error on held-out samples may grow, for each output.

    Returns:
        The manifest's "int8": bound, tolerances, the samples used, RMSE, bytes and latencies beside float32's.

    Raises:
        InputError: the network has no layer to quantise, or the run does not tell its training split.
        IntegrityError: the error grows by more than `bound`.
    """
    chosen = drawn(trained_on(run), CALIBRATION_SAMPLES)
    ids = chosen[~np.isin(chosen, list(golden_ids))]
    slots = batches(run, ids, min(wire.max_batch, _READ_SAMPLES))
    layers = quantize(float32, destination, (wire_inputs(run.sample, slot) for slot in slots))
    names = [spec.name for spec in wire.outputs]
    files = {"float32": float32, "int8": destination}
    infer = {kind: _session(file, names) for kind, file in files.items()}
    judged = _judged(_held_out(run, graph, wire), infer["float32"], infer["int8"])
    rmse = {}
    for spec in wire.outputs:
        full, small = judged[spec.name].rmse()
        if not small <= full * (1 + bound):
            raise IntegrityError(
                f"int8: on held-out samples the error (RMSE) of {spec.name!r} is {small:.4g}, float32's is {full:.4g}, "
                f"and the bound allows {bound:.1%} more: leave int8 out of the formats, or declare a larger bound"
            )
        rmse[spec.name] = {"unit": spec.unit, "float32": full, "int8": small}
    far = max(each.largest for each in judged.values())
    far = max(far, _furthest(golden, infer["int8"], wire.max_batch))
    far_missing = far if patterns is None else max(far, _furthest(patterns, infer["int8"], wire.max_batch))
    return {
        "bound": bound,
        "rmse": rmse,
        "held_out_samples": min(each.samples for each in judged.values()),
        "tolerance": MARGIN * far,
        "missing_tolerance": MARGIN * far_missing,
        "calibration_ids": [int(i) for i in ids],
        "layers": layers,
        "bytes": {kind: file.stat().st_size for kind, file in files.items()},
        "latency_ms": {
            str(size): _latency_ms(files, names, golden.batch(size).inputs) for size in sorted({1, wire.max_batch})
        },
        "latency_threads": 1,
        "onnxruntime": version("onnxruntime"),
    }


@dataclass(slots=True)
class _Error:
    """Errors of both graphs in one output, so far."""

    float32: float = 0.0
    """Sum of squared errors of float32."""
    int8: float = 0.0
    """Sum of squared errors of int8."""
    count: int = 0
    """Values compared with the truth."""
    samples: int = 0
    """Samples that they are from."""
    largest: float = 0.0
    """Largest absolute difference of int8 from float32."""

    def rmse(self) -> tuple[float, float]:
        """Root mean square errors of float32 and int8, physical units; NaN where there is no truth."""
        if not self.count:
            return math.nan, math.nan
        return math.sqrt(self.float32 / self.count), math.sqrt(self.int8 / self.count)


def _held_out(run: Run, graph: ServedGraph, wire: Signature) -> Iterator[tuple[Arrays, Arrays]]:
    """Stored held-out samples and the truth in physical units."""
    for slot in batches(run, drawn(held_out(run), HELD_OUT_SAMPLES), min(wire.max_batch, _READ_SAMPLES)):
        yield wire_inputs(run.sample, slot), truth(graph, slot)


def _judged(samples: Iterable[tuple[Arrays, Arrays]], float32: _Infer, int8: _Infer) -> dict[str, _Error]:
    errors: dict[str, _Error] = {}
    for inputs, right in samples:
        full, small = float32(inputs), int8(inputs)
        for name, true in right.items():
            error = errors.setdefault(name, _Error())
            known = np.isfinite(true)
            error.float32 += float((np.subtract(full[name], true, dtype=np.float64)[known] ** 2).sum())
            error.int8 += float((np.subtract(small[name], true, dtype=np.float64)[known] ** 2).sum())
            error.count += int(known.sum())
            error.samples += len(true)
            error.largest = max(error.largest, _apart(full[name], small[name]))
    return errors


def _furthest(want: Golden, infer: _Infer, size: int) -> float:
    """Largest difference from the answers in `want`, asked for in batches of `size`."""
    count = len(next(iter(want.inputs.values())))
    furthest = 0.0
    for start in range(0, count, size):
        part = want.take(np.arange(start, min(start + size, count)))
        answers = infer(part.inputs)
        furthest = max(furthest, *(_apart(right, answers[name]) for name, right in part.outputs.items()))
    return furthest


def _apart(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Largest difference where both are finite."""
    both = np.isfinite(a) & np.isfinite(b)
    return float(np.abs(np.subtract(a, b, dtype=np.float64)[both]).max(initial=0.0))


def _session(file: Path, outputs: list[str], threads: int = 0) -> _Infer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda inputs: dict(zip(outputs, session.run(outputs, dict(inputs)), strict=True))


def _latency_ms(files: Mapping[str, Path], outputs: list[str], inputs: Arrays) -> dict[str, float]:
    """Median milliseconds of a run of each graph on one thread, taken in turn."""
    infer = {kind: _session(file, outputs, threads=1) for kind, file in files.items()}
    spent: dict[str, list[float]] = {kind: [] for kind in files}
    for run in infer.values():
        run(inputs)
    begun = time.perf_counter()
    for _ in range(_ROUNDS):
        for kind, run in infer.items():
            start = time.perf_counter()
            run(inputs)
            spent[kind].append((time.perf_counter() - start) * 1e3)
        if time.perf_counter() - begun > _LATENCY_S:
            break
    return {kind: round(statistics.median(times), 4) for kind, times in spent.items()}
