"""`gpuops export` and `gpuops verify`."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from gpuops.bundle import Bundle, Golden, read_bundle
from gpuops.cli.output import fields, print_json, say
from gpuops.errors import InputError, IntegrityError
from gpuops.lineage.ledger import Ledger, ledger_path

_THREADS = 8
_REQUESTS = 64
"""Requests of one sample, from `_THREADS` threads at once, for the server to join into batches of its own."""


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
            overwrite=overwrite,
            say=say,
        )
        kept = ("name", "version_id", "run_id", "parity", "files", "sha256")
        ledger.append("export", {key: made.manifest[key] for key in kept})
    _show(made, made.manifest["parity"], json)


def verify(bundle: str, json: bool, server: str | None = None, model: str | None = None) -> None:
    """Prove a bundle again: each format in a fresh process, or the model that a server serves from it.

    Raises:
        InputError: no bundle there, or `model` without a server.
        IntegrityError: bytes, identity or answers differ from what was recorded.
        UnavailableError: the server cannot be reached.
    """
    from gpuops.export.verify import check_identity
    from gpuops.export.verify import verify as run_verify

    opened = read_bundle(bundle)
    intact = f"{opened.path}: every byte agrees with the manifest"
    if server is not None:
        check_identity(opened)
        say(f"{intact}; sweeping {model or opened.name} at {server}")
        _show(opened, {server: verify_served(opened, server, model or opened.name)}, json)
        return
    if model is not None:
        raise InputError("--model names a served model: give --server too")
    say(f"{intact}; sweeping {', '.join(opened.formats)} in fresh processes")
    _show(opened, run_verify(bundle), json)


def verify_served(bundle: Bundle, server: str, model: str) -> dict[str, Any]:
    """Parity of a served model: the sweep of `gpuops verify` as a client, and single samples asked for at once.

    Args:
        bundle: what it was deployed from.
        server: `http://HOST:PORT` or `grpc://HOST:PORT`.
        model: its name there.

    Returns:
        JSON of the parity, with "concurrent": {"requests", "threads", "max_abs_diff"}.

    Raises:
        InputError: the server does not serve the model.
        IntegrityError: it serves another version, answers differently, or answers bad inputs.
        UnavailableError: the server cannot be reached.
    """
    from gpuops.export.parity import sweep
    from gpuops_serving.client import Client

    golden = bundle.golden()
    with Client(server) as client:
        served = client.version_id(model)
        if served != bundle.version_id:
            raise IntegrityError(
                f"{server} serves version {served} of {model!r}, {bundle.path} is {bundle.version_id}: deploy it, or "
                "verify the bundle that is served"
            )
        parity = sweep(
            lambda inputs: client.infer(model, inputs),
            golden,
            bundle.signature,
            bundle.tolerance,
            patterns=bundle.patterns(),
            splits=True,
        )
    return {**parity.to_json(), "concurrent": _concurrent(golden, bundle.tolerance, server, model)}


def _concurrent(golden: Golden, tolerance: float, server: str, model: str) -> dict[str, Any]:
    """Ask for one sample at a time from several threads, and compare every answer with its own sample's."""
    from gpuops.export.parity import checked
    from gpuops_serving.client import Client

    start = threading.Barrier(_THREADS)
    count = len(next(iter(golden.inputs.values())))

    def ask(thread: int) -> float:
        worst = 0.0
        with Client(server) as client:
            start.wait()
            for request in range(_REQUESTS // _THREADS):
                # At any time the threads ask for different samples: an answer given to the wrong one is seen.
                one = golden.take(np.array([(thread + request) % count]))
                found = checked("in flight together", one, lambda inputs: client.infer(model, inputs), tolerance)
                worst = max(worst, found)
        return worst

    with ThreadPoolExecutor(_THREADS) as pool:
        return {"requests": _REQUESTS, "threads": _THREADS, "max_abs_diff": max(pool.map(ask, range(_THREADS)))}


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
    if "concurrent" in found:
        line += f"; {found['concurrent']['requests']} requests in flight from {found['concurrent']['threads']} threads"
    return f"{line}; refused {', '.join(found['refused'])}"
