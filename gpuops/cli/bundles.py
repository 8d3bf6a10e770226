"""`gpuops export` and `gpuops verify`."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuops.bundle import Bundle, Golden, read_bundle
from gpuops.cli.output import fields, print_json, say
from gpuops.errors import GpuopsError, InputError, IntegrityError
from gpuops.lineage.ledger import Ledger, ledger_path

if TYPE_CHECKING:
    from gpuops_serving.client import Client

_THREADS = 8
_REQUESTS = 128
"""Requests of one to three samples, from `_THREADS` threads at once, for the server to join to batches of its own."""
_STILL_S, _COUNTED_S = 0.1, 5.0
"""For how long the server's counts must not change, and the longest wait for that."""


def export(
    run: str,
    bundle: str,
    formats: str,
    name: str | None,
    max_batch: int,
    tolerance: float | None,
    overwrite: bool,
    json: bool,
    device: str = "cpu",
    int8_bound: float = 0.02,
) -> None:
    """Export a run and tell the ledger."""
    from gpuops.export.bundling import export as run_export

    with Ledger(ledger_path()) as ledger:
        made = run_export(
            run,
            bundle,
            formats=[part.strip() for part in formats.split(",") if part.strip()],
            name=name,
            max_batch=max_batch,
            tolerance=tolerance,
            device=device,
            int8_bound=int8_bound,
            overwrite=overwrite,
            say=say,
        )
        kept = ("name", "version_id", "run_id", "parity", "files", "sha256")
        ledger.append("export", {key: made.manifest[key] for key in kept})
    _show(made, made.manifest["parity"], json)


def verify(bundle: str, json: bool, server: str | Sequence[str] | None = None, model: str | None = None) -> None:
    """Prove a bundle again: each format in a fresh process, or the model that servers answer for.

    Args:
        bundle: bundle directory.
        json: print JSON.
        server: `http://HOST:PORT` or `grpc://HOST:PORT`, one or several.
        model: name that it is served under; the bundle's if None.

    Raises:
        InputError: no bundle there, or `model` without a server.
        IntegrityError: bytes, identity or answers differ from what was recorded.
        UnavailableError: a server cannot be reached, or a format cannot run here.
    """
    from gpuops.export.verify import check_identity
    from gpuops.export.verify import verify as run_verify
    from gpuops_serving.client import Client

    opened = read_bundle(bundle)
    intact = f"{opened.path}: every byte agrees with the manifest"
    if not server:
        if model is not None:
            raise InputError("--model names a served model: give --server too")
        say(f"{intact}; sweeping {', '.join(opened.formats)} in fresh processes")
        _show(opened, run_verify(bundle), json)
        return
    check_identity(opened)
    name = model or opened.name
    parity = {}
    for url in [server] if isinstance(server, str) else server:
        say(f"{intact}; sweeping {name} at {url}")
        with Client(url) as client:
            parity[url] = verify_served(opened, client, name)
    _show(opened, parity, json)


def verify_served(bundle: Bundle, client: Client, model: str) -> dict[str, Any]:
    """Parity of a served model: the sweep of `gpuops verify` through a client, and requests that the server may join.

    Args:
        bundle: what it was deployed from.
        client: a connection to the server.
        model: its name there.

    Returns:
        JSON of the parity, with "concurrent": requests sent and the threads they came from; executions that the server
        answered them with (None where it does not tell, or answers others too); max_abs_diff.

    Raises:
        InputError: the server does not serve the model.
        IntegrityError: it serves another version, answers differently, gives answers to the wrong request, or answers
            bad inputs.
        UnavailableError: the server cannot be reached.
    """
    from gpuops.export.parity import sweep
    from gpuops_serving.config import FORMAT

    served = client.version_id(model)
    if served != bundle.version_id:
        raise IntegrityError(
            f"{client.url} serves version {served} of {model!r}, {bundle.path} is {bundle.version_id}: deploy it, or "
            "verify the bundle that is served"
        )
    format = client.config(model)["parameters"].get(FORMAT, "onnx")
    golden, tolerance = bundle.golden(), bundle.tolerance_of(format)
    parity = sweep(
        lambda inputs: client.infer(model, inputs),
        golden,
        bundle.signature,
        tolerance,
        patterns=bundle.patterns(),
        missing_tolerance=bundle.manifest.get(format, {}).get("missing_tolerance"),
        splits=True,
    ).to_json()
    concurrent = _concurrent(golden, bundle.signature.max_batch, tolerance, client, model)
    if concurrent["executions"] == concurrent["requests"]:
        parity["warnings"].append("the server joined no requests to a batch, so this proves nothing about batches")
    return {**parity, "concurrent": concurrent}


def _concurrent(golden: Golden, max_batch: int, tolerance: float, client: Client, model: str) -> dict[str, Any]:
    """Requests of several threads at once, every answer compared with its own samples'."""
    from gpuops.export.parity import checked

    start = threading.Barrier(_THREADS)
    count = len(next(iter(golden.inputs.values())))

    def ask(thread: int) -> float:
        # Each thread has samples and a size of its own, so that an answer given to another's request is seen.
        size = 1 + thread % min(3, max_batch)
        mine = golden.take((thread + np.arange(size)) % count)
        start.wait()
        with client.again() as own:
            found = [
                checked("in flight together", mine, lambda inputs: own.infer(model, inputs), tolerance)
                for _ in range(_REQUESTS // _THREADS)
            ]
        return max(found)

    before = _settled(client, model)
    with ThreadPoolExecutor(_THREADS) as pool:
        worst = max(pool.map(ask, range(_THREADS)))
    after = _settled(client, model)
    executions = None
    if before is not None and after is not None and after[0] - before[0] == _REQUESTS:
        executions = after[1] - before[1]
    return {"requests": _REQUESTS, "threads": _THREADS, "executions": executions, "max_abs_diff": worst}


def _settled(client: Client, model: str) -> tuple[int, int] | None:
    """`_counts` once they stand still: the server counts a request after it has answered it."""
    deadline = time.monotonic() + _COUNTED_S
    last, now = None, _counts(client, model)
    while now != last and time.monotonic() < deadline:
        time.sleep(_STILL_S)
        last, now = now, _counts(client, model)
    return now


def _counts(client: Client, model: str) -> tuple[int, int] | None:
    """Requests that the server has answered for a model, and executions it did so with; None where it does not tell."""
    try:
        stats = client.statistics(model)
    except GpuopsError:  # the API may be restricted
        return None
    requests = sum(entry["inference_stats"]["success"]["count"] for entry in stats)
    return requests, sum(entry["execution_count"] for entry in stats)


def _show(bundle: Bundle, parity: dict[str, dict[str, Any]], json: bool) -> None:
    if json:
        print_json({"bundle": str(bundle.path), "version_id": bundle.version_id, "parity": parity})
        return
    lines = {where: _line(found) for where, found in parity.items()}
    warnings = {f"{where} warning": "; ".join(p["warnings"]) for where, p in parity.items() if p.get("warnings")}
    fields({"bundle": bundle.path, "version_id": bundle.version_id, **lines, **warnings})


def _line(found: dict[str, Any]) -> str:
    line = f"max abs diff {found['max_abs_diff']:.3g}, batches 1 to {found['batches']}"
    noise = [decibels for decibels in found.get("sqnr_db", {}).values() if decibels is not None]
    if noise:
        line += f", {min(noise):.0f} dB above the noise"
    if isinstance(found.get("missing"), dict):
        line += f"; {len(found['missing'])} patterns of missing values"
    if "rmse" in found:
        worse = max(each["int8"] / each["float32"] - 1 if each["float32"] else 0.0 for each in found["rmse"].values())
        line += f"; error on held-out samples {worse:+.2%} of float32's, bound {found['bound']:.1%}"
    if "concurrent" in found:
        concurrent = found["concurrent"]
        line += f"; {concurrent['requests']} requests in flight from {concurrent['threads']} threads"
        if concurrent["executions"] is not None:
            line += f" in {concurrent['executions']} batches"
    return f"{line}; refused {', '.join(found['refused'])}"


def keygen(private: str, public: str) -> None:
    """Make a key pair."""
    from gpuops.signing import keygen as make

    fields({"key_id": make(private, public), "private": private, "public": public})


def sign(bundle: str, key: str) -> None:
    """Sign a bundle and tell the ledger."""
    from gpuops.signing import key_id_of
    from gpuops.signing import sign as make

    with Ledger(ledger_path()) as ledger:
        file = make(bundle, key)
        made = {"version_id": read_bundle(bundle).version_id, "key_id": key_id_of(file)}
        ledger.append("sign", made)
    fields({"signature": file, **made})
