"""`gpuops ingest`."""

from __future__ import annotations

from typing import Any

from gpuops.cli.output import bytes_progress, fields, print_json
from gpuops.data.ingest import ingest as run_ingest
from gpuops.data.recipe import load_recipe
from gpuops.data.source import Source
from gpuops.lineage.ledger import Ledger, ledger_path


def ingest(recipe: str, url: str | None, overwrite: bool, json: bool) -> None:
    """Ingest a recipe with a progress bar and print what was committed."""
    loaded = load_recipe(recipe, url)
    with Ledger(ledger_path()) as ledger, bytes_progress(f"ingest {loaded.url}") as progress:
        source = run_ingest(loaded, overwrite=overwrite, progress=progress)
        found = summary(source, list(loaded.variables))
        ledger.append("ingest", {**found, "recipe": str(recipe)})
    if json:
        print_json(found)
    else:
        fields(found)


def summary(source: Source, names: list[str]) -> dict[str, Any]:
    """What a commit holds."""
    arrays = [source.variables[name].array for name in names]
    return {
        "url": source.url,
        "snapshot": source.snapshot,
        "fingerprint": source.fingerprint,
        "records": arrays[0].shape[0],
        "packed_bytes": sum(array.nbytes for array in arrays),
        "stored_bytes": sum(int(array.nbytes_stored()) for array in arrays),
        "quality": "passed",
    }
