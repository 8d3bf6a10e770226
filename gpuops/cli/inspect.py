"""`gpuops inspect`: what a store holds."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from gpuops.cli.output import fields, print_json
from gpuops.data.shard import layout
from gpuops.data.source import Source, Variable, open, snapshots
from gpuops.data.statistics import merge


def inspect(url: str, snapshot: str | None, json: bool) -> None:
    """Print identity, snapshots, variables, layout and statistics."""
    source = open(url, snapshot)
    identity = {
        "url": source.url,
        "kind": source.kind,
        "snapshot": source.snapshot,
        "fingerprint": source.fingerprint,
        "fingerprint_rests_on": "names and sizes (weak)" if source.weak else "content",
        "title": str(source.group.attrs.get("title", "")),
    }
    variables = {name: _describe(source, variable) for name, variable in sorted(source.variables.items())}
    history = snapshots(source)
    if json:
        print_json({**identity, "snapshots": history, "variables": variables})
        return
    fields(identity)
    for name, found in variables.items():
        _print_variable(name, found)
    for entry in history:
        sys.stdout.write(f"\nsnapshot {entry['id']}, {entry['written']}: {entry['message']}")
    sys.stdout.write("\n")


def _print_variable(name: str, found: dict[str, Any]) -> None:
    axes = ", ".join(f"{dim} {size}" for dim, size in zip(found["dims"], found["shape"], strict=True))
    chunk, shard = (" x ".join(map(str, found[key] or ())) for key in ("chunk", "shard"))
    sys.stdout.write(f"\n{name} ({axes})  {found['dtype']}, {found['codecs'] or 'plain'}\n")
    packing = f"stored * {found['scale']:g} + {found['offset']:g} {found['unit']}"
    if found["missing"] is not None:
        packing += f", {found['missing']} is missing"
    sys.stdout.write(f"  packing   {packing}\n")
    sys.stdout.write(f"  layout    chunks of {chunk}{f' in shards of {shard}' if shard else ', not sharded'}\n")
    if not found["checksummed"]:
        sys.stdout.write("  checksum  none: corruption cannot be seen\n")
    if (values := found["statistics"]) is not None:
        sys.stdout.write(
            f"  physical  {values['min']:.5g} to {values['max']:.5g}, mean {values['mean']:.5g}, "
            f"std {values['std']:.5g}, {values['missing_share']:.1%} missing\n"
        )


def _describe(source: Source, variable: Variable) -> dict[str, Any]:
    place = layout(variable.array)
    return {
        "dims": list(variable.dims),
        "shape": list(variable.array.shape),
        "dtype": str(variable.array.dtype),
        "unit": variable.unit,
        "scale": variable.scale,
        "offset": variable.offset,
        "missing": variable.missing,
        "chunk": list(place.chunk),
        "shard": None if place.shard is None else list(place.shard),
        "codecs": ", ".join(place.codecs),
        "checksummed": place.checksummed,
        "statistics": _statistics(source, variable),
    }


def _statistics(source: Source, variable: Variable) -> dict[str, float] | None:
    rows = source.meta("stats", variable.name)
    if rows is None:
        return None
    count, mean, m2, low, high = map(float, merge(np.asarray(rows[:]).reshape(-1, 5)))
    return {
        "mean": mean,
        "std": float(np.sqrt(m2 / max(count, 1))),
        "min": low,
        "max": high,
        "missing_share": 1 - count / variable.array.size,
    }
