"""`gpuops ingest`."""

from __future__ import annotations

from typing import Any

from gpuops.cli.output import bytes_progress, fields, print_json
from gpuops.data.source import META, Source
from gpuops.data.writing.commit import QUALITY
from gpuops.data.writing.ingest import as_recipe
from gpuops.data.writing.ingest import ingest as run_ingest
from gpuops.lineage.ledger import Ledger, ledger_path


def ingest(
    recipe: str,
    url: str | None,
    overwrite: bool,
    append: bool,
    scheduler: str,
    tolerance: float | None,
    codec: str | None,
    format: str | None,
    json: bool,
) -> None:
    """Ingest a recipe, a file or a store with a progress bar and print what was committed."""
    options = {key: value for key, value in (("codec", codec), ("format", format)) if value is not None}
    loaded = as_recipe(recipe, url, tolerance, options)
    with Ledger(ledger_path()) as ledger, bytes_progress(f"ingest {loaded.url}") as progress:
        source = run_ingest(loaded, overwrite=overwrite, append=append, scheduler=scheduler, progress=progress)
        found = summary(source, list(loaded.variables), list(loaded.static))
        ledger.append("ingest", {**found, "recipe": str(recipe)})
    if json:
        print_json(found)
    else:
        fields(found)


def summary(source: Source, names: list[str], static: list[str]) -> dict[str, Any]:
    """What a commit holds."""
    arrays = [source.variables[name].array for name in names]
    report = source.group[f"{META}/{QUALITY}"].attrs
    variables = report["variables"]
    assert isinstance(variables, dict)
    errors = {name: variables[name]["pack"]["max_abs_error"] for name in names if variables[name]["pack"]}
    coordinates = report["coordinates"]
    assert isinstance(coordinates, dict)
    faults = ("repeated", "disordered", "gaps")
    breaks = {
        name: {fault: found[fault] for fault in faults if found[fault]}
        for name, found in coordinates.items()
        if any(found[fault] for fault in faults)
    }
    return {
        "url": source.url,
        "snapshot": source.snapshot,
        "fingerprint": source.fingerprint,
        **({"static": ", ".join(static)} if static else {}),
        "records": arrays[0].shape[0],
        "packed_bytes": sum(array.nbytes for array in arrays),
        "stored_bytes": sum(int(array.nbytes_stored()) for array in arrays),
        "quality": "passed",
        **({"max_abs_error": errors} if errors else {}),
        **({"breaks": breaks} if breaks else {}),
    }
