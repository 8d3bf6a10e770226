"""`gpuops bench serve`: load on a served model."""

from __future__ import annotations

import json as json_module
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from gpuops.bundle import Golden, read_bundle
from gpuops.cli.connection import Connection
from gpuops.cli.output import print_json, progress
from gpuops.cli.rollouts import read_requests
from gpuops.errors import InputError

_TOLERANCE = 1e-4
"""Share of the largest first answer that later answers to the same inputs may differ by."""


def bench(
    what: str,
    model: str,
    connection: Connection,
    version: str,
    rate: list[float],
    concurrency: list[int],
    seconds: float,
    size: int,
    arrivals: str,
    bundle: str | None,
    requests: str | None,
    out: str | None,
    json: bool,
) -> None:
    """Run every rate and concurrency that was asked for; each answer is checked."""
    from gpuops_serving.load import ARRIVALS, closed_loop, measured, open_loop
    from gpuops_serving.load_wire import GrpcEndpoint, HttpEndpoint, shots

    if out is not None and not Path(out).resolve().parent.is_dir():
        raise InputError(f"{Path(out).parent} is not a directory: make it first, so that no measurement is lost")
    if arrivals not in ARRIVALS:
        raise InputError(f"--arrivals {arrivals}: {' or '.join(ARRIVALS)}")
    if not rate and not concurrency:
        concurrency = [1, 8, 64]
    runs: list[dict[str, Any]] = []
    grpc = connection.server.startswith("grpc")
    endpoint = (GrpcEndpoint if grpc else HttpEndpoint)(connection.server)
    with connection.client() as client:
        largest = client.config(model, version)["max_batch_size"] or 1
        if not 1 <= size <= largest:
            raise InputError(f"--size {size}: {model} takes 1 to {largest} samples a request")
        golden, tolerance = _golden(client, model, version, bundle, requests)
        made = shots(connection.server, model, golden, tolerance, version, size)
        loops = {f"rate {r:g}": partial(open_loop, rate_per_s=r, arrivals=arrivals) for r in rate}
        loops |= {f"concurrency {c}": partial(closed_loop, concurrency=c) for c in concurrency}
        for title, loop in loops.items():
            with progress(title) as bar:
                run = partial(loop, endpoint, made, seconds=seconds, progress=bar)
                found = measured(client, model, run, version)
            runs.append({"case": title, **found.to_json()})
        document = {"model": model, "server": connection.server, "server_version": client.server_version()}
    document |= {"samples_a_request": size, "runs": runs}
    if out is not None:
        Path(out).write_text(json_module.dumps(document, indent=1) + "\n")
    if json:
        print_json(document)
    else:
        _print(runs)
    if not all(run["answered"] for run in runs):
        raise SystemExit(1)


def _golden(client: Any, model: str, version: str, bundle: str | None, requests: str | None) -> tuple[Golden, float]:
    """Requests and what they must be answered: a bundle's golden samples, or first answers to given or random ones."""
    from gpuops_serving.recorded import example_inputs

    if bundle is not None:
        if requests is not None:
            raise InputError("--bundle and --requests both say what is sent: give one")
        opened = read_bundle(bundle)
        return opened.golden(), opened.tolerance
    if requests is not None:
        rows = read_requests(Path(requests))
        inputs = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    else:
        inputs = example_inputs(client.config(model, version), 8)
    golden = Golden(inputs, client.infer(model, inputs, version))
    largest = max(float(np.abs(answer).max(initial=0.0)) for answer in golden.outputs.values())
    return golden, _TOLERANCE * max(largest, 1.0)


def _print(runs: list[dict[str, Any]]) -> None:
    table = Table("case", "answers/s", "p50 ms", "p95", "p99", "p99.9", "failed", "batch", "J each", box=box.SIMPLE)
    for run in runs:
        latency = [_number(run["latency_ms"][name]) for name in ("p50_ms", "p95_ms", "p99_ms", "p999_ms")]
        batches = run["batches"] or {}
        executions = sum(batches.values())
        mean = sum(size * count for size, count in batches.items()) / executions if executions else None
        failed, joules = sum(run["failed"].values()), run["joules_per_request"]
        table.add_row(
            run["case"],
            _number(run["answered_per_s"]),
            *latency,
            str(failed),
            _number(mean),
            "null" if joules is None else _number(joules),
        )
    console = Console()
    console.print(table)
    for run in runs:
        for reason, count in run["failed"].items():
            console.print(f"{run['case']}: {count} requests: {reason}", highlight=False)
    if runs and runs[-1]["energy_reason"]:
        console.print(f"joules are unknown: {runs[-1]['energy_reason']}", highlight=False)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
