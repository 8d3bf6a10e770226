"""`gpuops infer`: raw samples from a store to a served model; joins the data room to the serving client."""

from __future__ import annotations

import re
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.bundle import read_bundle
from gpuops.cli.connection import Connection
from gpuops.cli.output import fields, print_json
from gpuops.data.join import open
from gpuops.data.reading.plan import Slot
from gpuops.data.reading.reader import Reader, wire_inputs
from gpuops.data.sample import BoundSample, SampleSpec, bind
from gpuops.data.source import Source
from gpuops.energy.nvml import open_gpus
from gpuops.errors import InputError, IntegrityError
from gpuops_serving.client import Client

_NAMED = re.compile(r"(\w[\w-]*)=(.+)")


def infer(
    model: str,
    source: list[str],
    align: str | None,
    connection: Connection,
    samples: int | None,
    requests: int,
    check: str | None,
    out: str | None,
    json: bool,
) -> None:
    """Send samples, compare the answers with the truth in the store and with a bundle, and time single requests."""
    if samples is not None and check is not None:
        raise InputError("--check compares the golden samples: leave --samples out")
    if (samples is not None and samples < 1) or requests < 1:
        raise InputError("--samples and --requests must be at least 1")
    with connection.client() as client:
        declared = dict(client.sample(model))
        golden_ids = declared.pop("golden_ids")
        opened = open(_location(source), align=align)
        sample = bind(SampleSpec.from_json(declared), opened)
        ids = np.array(golden_ids if samples is None else _spread(sample, samples), np.int64)
        slot = _read(opened, sample, ids)
        raw = wire_inputs(sample, slot)
        answers = client.infer(model, raw)
        report: dict[str, Any] = {
            "model": model,
            "server": connection.server,
            "server_version": client.server_version(),
            "version_id": client.version_id(model),
            "samples": len(ids),
            "rmse": _rmse(sample, slot, answers),
            **_latency(client, model, raw, requests),
            "energy": _energy(),
        }
    if check is not None:
        report["max_abs_diff"] = _compare(check, answers, report["version_id"])
    if out is not None:
        np.savez(out, **{f"output/{name}": array for name, array in answers.items()}, id=ids)
        report["out"] = out
    if json:
        print_json(report)
    else:
        fields({key: value for key, value in report.items() if key != "energy"})


def _location(given: list[str]) -> str | dict[str, str]:
    """One URL, or several as NAME=URL."""
    named = [_NAMED.fullmatch(text) for text in given]
    if len(given) == 1 and named[0] is None:
        return given[0]
    urls = {match[1]: match[2] for match in named if match is not None}
    if len(urls) < len(given):
        raise InputError(f"--from {' --from '.join(given)}: give one URL, or each store once as NAME=URL")
    return urls


def _spread(sample: BoundSample, count: int) -> npt.NDArray[np.int64]:
    every = sample.samples(np.arange(sample.records))
    return every[np.linspace(0, len(every) - 1, min(count, len(every))).astype(np.int64)]


def _read(source: Source, sample: BoundSample, ids: npt.NDArray[np.int64]) -> Slot:
    reader = Reader(source, sample)
    try:
        return reader.read(ids)
    finally:
        reader.close()


def _rmse(sample: BoundSample, slot: Slot, answers: dict[str, npt.NDArray[Any]]) -> dict[str, float]:
    """Root mean squared error of each answer against the store's own values, physical units; missing data left out."""
    errors = {}
    for name, cuts in sample.targets.items():
        spec = cuts[0].spec
        stored = slot.targets[name]
        if answers[name].shape != stored.shape:
            raise IntegrityError(f"{name!r} was answered as {answers[name].shape}, the store holds {stored.shape}")
        difference = answers[name] - (stored.astype(np.float64) * spec.scale + spec.offset)
        if spec.missing is not None:
            difference = difference[stored != spec.missing]
        errors[name] = float(np.sqrt(np.nanmean(difference**2)))
    return errors


def _latency(client: Client, model: str, raw: dict[str, npt.NDArray[Any]], requests: int) -> dict[str, Any]:
    """Percentiles over requests of one sample each, one after another."""
    count = len(next(iter(raw.values())))
    spent = []
    for k in range(requests):
        one = {name: array[k % count : k % count + 1] for name, array in raw.items()}
        begin = time.perf_counter()
        client.infer(model, one)
        spent.append((time.perf_counter() - begin) * 1e3)
    p50, p99 = np.percentile(spent, [50, 99])
    return {"requests": requests, "p50_ms": float(p50), "p99_ms": float(p99)}


def _energy() -> dict[str, Any]:
    """Joules a request: nothing here counts those of a graph that the server runs on its CPU."""
    reason = open_gpus().reason or "the server runs this graph on its CPU, whose joules nothing counts"
    return {"joules_per_request": None, "method": "none", "reason": reason}


def _compare(path: str, answers: dict[str, npt.NDArray[Any]], served: str) -> float:
    bundle = read_bundle(path)
    if bundle.version_id != served:
        raise IntegrityError(
            f"the server serves version {served}, {path} is {bundle.version_id}: deploy it, or start again"
        )
    difference = bundle.golden().max_abs_diff(answers)
    if not difference <= bundle.tolerance:
        raise IntegrityError(f"served answers differ from the training pipeline's by {difference:g}: do not use them")
    return difference
