"""`gpuops rollout`, `gpuops rollback` and `gpuops compare`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.cli.connection import Connection
from gpuops.cli.output import fields, print_json, progress, say
from gpuops.cli.serving import public_keys, serving_options
from gpuops.errors import InputError
from gpuops.lineage.ledger import Ledger, ledger_path
from gpuops.spec import Arrays

_DEFAULTS = {
    "backend": "python",
    "gpu": False,
    "instances": None,
    "threads": None,
    "micro_batch": None,
    "delay_us": 0,
    "queue_size": 0,
    "tag": [],
    "server_version": "2.51.0",
}


def rollout(
    bundle: str,
    repository: str,
    connection: Connection,
    name: str | None,
    trusted: list[str],
    requests: str | None,
    count: int,
    max_errors: float,
    max_p50: float,
    max_p99: float,
    max_distance: float | None,
    max_joules: float | None,
    json: bool,
    **how: Any,
) -> None:
    """Try a bundle beside the version that serves; exit code 1 if it was rejected."""
    from gpuops_serving.compare import Limits
    from gpuops_serving.rollout import rollout as run_rollout

    with connection.client() as client, Ledger(ledger_path()) as ledger, progress("requests") as bar:
        made = run_rollout(
            bundle,
            repository,
            client,
            ledger=ledger,
            name=name,
            # Nothing said of how it is served: as the version before.
            options=None if how == _DEFAULTS else serving_options(**how),
            keys=public_keys(trusted),
            requests=None if requests is None else read_requests(Path(requests)),
            count=count,
            limits=Limits(max_errors, max_p50, max_p99, max_distance, max_joules),
            say=say,
            progress=bar,
        )
    if json:
        print_json(made.to_json())
    else:
        state = "promoted" if made.promoted else "rejected"
        told = {"model": made.model, "version": made.version, "version_id": made.version_id, "verdict": state}
        fields({**told, "serving": ", ".join(map(str, made.serving)) or "nothing"})
        _print_verdict(made.verdict)
        _print_reasons(made.reasons)
    if not made.promoted:
        raise SystemExit(1)


def rollback(model: str, repository: str, connection: Connection, json: bool) -> None:
    """Serve a model without its newest version."""
    from gpuops_serving.rollout import roll_back

    with connection.client() as client, Ledger(ledger_path()) as ledger:
        made = roll_back(repository, model, client, ledger=ledger, say=say)
    if json:
        print_json(made.to_json())
        return
    fields({"model": made.model, "without": made.version, "serving": ", ".join(map(str, made.serving))})


def compare(
    old: str,
    new: str,
    connection: Connection,
    requests: str | None,
    count: int,
    max_errors: float,
    max_p50: float,
    max_p99: float,
    max_distance: float | None,
    max_joules: float | None,
    json: bool,
) -> None:
    """Compare two versions on the same requests; exit code 1 if the new one is worse."""
    from gpuops_serving.compare import Limits

    limits = Limits(max_errors, max_p50, max_p99, max_distance, max_joules)
    asked = None if requests is None else read_requests(Path(requests))
    with connection.triton() as triton, progress("requests") as bar:
        found = triton.compare(old, new, asked, count=count, limits=limits, progress=bar)
    if json:
        print_json(found.to_json())
    else:
        fields({"old": old, "new": new, "verdict": "as good" if found.ok else "worse"})
        _print_verdict(found)
        _print_reasons(found.reasons)
    if not found.ok:
        raise SystemExit(1)


def read_requests(file: Path) -> list[Arrays]:
    """Requests of one sample each, from inputs by name in an .npz, one sample a row."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            inputs: dict[str, npt.NDArray[Any]] = {key.removeprefix("input/"): stored[key] for key in stored.files}
    except (OSError, ValueError) as error:
        raise InputError(f"{file} holds no inputs ({error}): write one with numpy.savez(FILE, name=array)") from error
    inputs = {name: array for name, array in inputs.items() if "/" not in name}  # a bundle's golden.npz has answers too
    sizes = {len(array) for array in inputs.values() if array.ndim}
    if len(sizes) != 1 or not all(array.ndim for array in inputs.values()) or sizes == {0}:
        raise InputError(f"{file}: every input needs the same number of rows, at least 1")
    return [{name: array[k : k + 1] for name, array in inputs.items()} for k in range(sizes.pop())]


def _print_verdict(verdict: Any) -> None:
    """Both sides as a table."""
    if verdict is None:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", "old", "new", "new / old (95 %)")
    old, new = verdict.old, verdict.new
    table.add_row("failed", f"{old.failed} of {old.requests}", f"{new.failed} of {new.requests}", "")
    for label, key, ratio in (("p50 ms", "p50_ms", verdict.p50), ("p99 ms", "p99_ms", verdict.p99)):
        shown = "" if ratio is None else f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        table.add_row(label, *(_number(getattr(side, key)) for side in (old, new)), shown)
    table.add_row("joules a request", *(_number(side.joules_per_request) for side in (old, new)), "")
    for name, distance in verdict.distances.items():
        table.add_row(f"{name}: largest difference", "", _number(distance.max_abs), "")
    Console().print(table)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _print_reasons(reasons: tuple[str, ...]) -> None:
    for reason in reasons:
        sys.stdout.write(f"because {reason}\n")
