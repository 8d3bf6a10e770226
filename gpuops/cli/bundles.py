"""`gpuops export` and `gpuops verify`."""

from __future__ import annotations

from typing import Any

from gpuops.cli.output import fields, print_json, say
from gpuops.lineage.ledger import Ledger, ledger_path


def export(
    run: str,
    bundle: str,
    formats: str,
    name: str | None,
    max_batch: int,
    tolerance: float | None,
    overwrite: bool,
    json: bool,
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
            overwrite=overwrite,
            say=say,
        )
        kept = ("name", "version_id", "run_id", "parity", "files", "sha256")
        ledger.append("export", {key: made.manifest[key] for key in kept})
    _show(made.path, made.version_id, made.manifest["parity"], json)


def verify(bundle: str, json: bool) -> None:
    """Prove a bundle again."""
    from gpuops.bundle import read_bundle
    from gpuops.export.verify import verify as run_verify

    opened = read_bundle(bundle)
    say(f"{opened.path}: every byte agrees with the manifest; sweeping {', '.join(opened.formats)} in fresh processes")
    _show(opened.path, opened.version_id, run_verify(bundle), json)


def _show(path: Any, version_id: str, parity: dict[str, dict[str, Any]], json: bool) -> None:
    if json:
        print_json({"bundle": str(path), "version_id": version_id, "parity": parity})
        return
    lines = {
        format: f"max abs diff {p['max_abs_diff']:.3g}, batches 1 to {p['batches']}; refused {', '.join(p['refused'])}"
        for format, p in parity.items()
    }
    fields({"bundle": path, "version_id": version_id, **lines})
