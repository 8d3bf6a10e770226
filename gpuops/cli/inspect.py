"""`gpuops inspect`: what a store holds."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gpuops.cli.output import fields, print_json
from gpuops.data import anemoi
from gpuops.data.cost import cost, packed_itemsize, sampled
from gpuops.data.identity import META
from gpuops.data.reading.shard import Layout, layout
from gpuops.data.source import Source, Variable, open, snapshots
from gpuops.data.statistics import merge
from gpuops.errors import InputError

LISTED = 10
"""Missing dates that are printed; --json has them all."""


def inspect(url: str, snapshot: str | None, json: bool) -> None:
    """Print identity, snapshots, variables, layout, statistics, quality and what a re-ingest would gain."""
    source = open(url, snapshot)
    identity = {
        "url": source.url,
        "kind": source.kind,
        "snapshot": source.snapshot,
        "fingerprint": source.fingerprint,
        "fingerprint_rests_on": f"{source.rests_on} (weak)" if source.weak else source.rests_on,
        "title": str(source.group.attrs.get("title", "")),
    }
    wide = sampled(source)
    variables = {name: _describe(source, v, name in wide) for name, v in sorted(source.variables.items())}
    document = {
        **identity,
        "snapshots": snapshots(source),
        "variables": variables,
        "wells": _wells(source),
        "channels": {name: list(names) for name, names in source.channels.items()},
        "missing": {dim: _absent(source, dim) for dim in source.absent},
        "quality": _quality(source),
        "declared_statistics": anemoi.statistics(source.group),
    }
    if json:
        print_json(document)
        return
    fields(identity)
    for name, found in variables.items():
        _print_variable(name, found)
    _print_rest(document)


def _print_variable(name: str, found: dict[str, Any]) -> None:
    axes = ", ".join(f"{dim} {size}" for dim, size in zip(found["dims"], found["shape"], strict=True))
    sys.stdout.write(f"\n{name} ({axes})  {found['dtype']}, {found['codecs'] or 'plain'}\n")
    packing = f"stored * {found['scale']:g} + {found['offset']:g} {found['unit']}"
    if found["missing"] is not None:
        packing += f", {found['missing']:g} is missing"
    sys.stdout.write(f"  packing   {packing}\n")
    if found["spacing"]:
        told = (f"{dim} {size:g} {unit}".strip() for dim, (size, unit) in found["spacing"].items())
        sys.stdout.write(f"  spacing   {', '.join(told)}\n")
    if found["not_read"]:
        sys.stdout.write(f"  not read  {found['not_read']}\n")
    else:
        chunk, shard = (" x ".join(map(str, found[key] or ())) for key in ("chunk", "shard"))
        sys.stdout.write(f"  layout    chunks of {chunk}{f' in shards of {shard}' if shard else ', not sharded'}\n")
        if not found["checksummed"]:
            sys.stdout.write("  checksum  none: corruption cannot be seen\n")
    if (values := found["statistics"]) is not None:
        sys.stdout.write(
            f"  physical  {values['min']:.5g} to {values['max']:.5g}, mean {values['mean']:.5g}, "
            f"std {values['std']:.5g}, {values['missing_share']:.1%} missing\n"
        )
    if (gain := found["reingest"]) is not None:
        requests, decoded, held = (gain[key] for key in ("requests_per_sample", "decoded_per_useful_byte", "bytes"))
        if (requests["now"], decoded["now"], held["now"]) == (requests["after"], decoded["after"], held["after"]):
            sys.stdout.write("  re-ingest gains nothing: one record a chunk, packed\n")
        else:
            sys.stdout.write(
                f"  re-ingest would take {requests['now']} to {requests['after']} requests a random sample, "
                f"{decoded['now']:.3g} to {decoded['after']:g} bytes decoded per useful byte (in lanes "
                f"{decoded['in_lanes']:.3g} now), {held['now']:,} to {held['after']:,} bytes before compression\n"
            )


def _print_rest(document: Mapping[str, Any]) -> None:
    if wells := document["wells"]:
        sys.stdout.write(f"\nwells: {', '.join(f'{number} {name}' for number, name in enumerate(wells))}\n")
    for name, names in document["channels"].items():
        sys.stdout.write(f"\nchannels of {name}: {', '.join(names)}\n")
    if (declared := document["declared_statistics"]) is not None:
        first, last = declared["period"]
        sys.stdout.write(f"\nstatistics that the data set declares, {first} to {last} (not our training split)\n")
        for name, values in declared["variables"].items():
            told = ", ".join(f"{kind} {value:.5g}" for kind, value in values.items())
            sys.stdout.write(f"  {name}: {told}\n")
    for dim, missing in document["missing"].items():
        values = missing["values"]
        more = f" and {len(values) - LISTED} more" if len(values) > LISTED else ""
        sys.stdout.write(f"\nno data at {len(values)} of {dim}: {', '.join(values[:LISTED])}{more}\n")
    if document["quality"]:
        sys.stdout.write("\nquality report of the ingest\n")
        for path, value in _flat(document["quality"]):
            sys.stdout.write(f"  {path}: {value}\n")
    for entry in document["snapshots"]:
        named = [*(f"branch {name}" for name in entry["branches"]), *(f"tag {name}" for name in entry["tags"])]
        shown = f" ({', '.join(named)})" if named else ""
        sys.stdout.write(f"\nsnapshot {entry['id']}, {entry['written']}{shown}: {entry['message']}")
    sys.stdout.write("\n")


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a JSON document with their paths."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _describe(source: Source, variable: Variable, has_records: bool) -> dict[str, Any]:
    place: Layout | None
    try:
        place, refused = layout(variable.array), None
    except InputError as error:
        place, refused = None, str(error)
    return {
        "dims": list(variable.dims),
        "shape": list(variable.array.shape),
        "dtype": str(variable.array.dtype),
        "unit": variable.unit,
        "scale": variable.scale,
        "offset": variable.offset,
        "missing": variable.missing,
        "chunk": list(variable.array.chunks),
        "shard": None if variable.array.shards is None else list(variable.array.shards),
        "codecs": "" if place is None else ", ".join(place.codecs),
        "checksummed": place is not None and place.checksummed,
        "not_read": refused,
        "statistics": _statistics(source, variable),
        "spacing": {dim: list(told) for dim, told in source.spacing.get(variable.name, {}).items()},
        # Of an image it is patches that are read: what a whole one costs says nothing.
        "reingest": None if place is None or not has_records or source.spacing else _gain(variable, place),
    }


def _gain(variable: Variable, place: Layout) -> dict[str, dict[str, float]]:
    """What the layout costs now, and what one record an inner chunk, packed, would: arithmetic on the layout alone."""
    now = cost(place)
    size = variable.array.size
    return {
        "requests_per_sample": {"now": now.chunks_per_record, "after": 1},
        "decoded_per_useful_byte": {"now": now.decoded_per_useful, "in_lanes": now.decoded_in_lanes, "after": 1.0},
        "bytes": {"now": size * variable.array.dtype.itemsize, "after": size * packed_itemsize(variable)},
    }


def _wells(source: Source) -> list[str]:
    """Names of the wells of an OME-NGFF plate, by their number."""
    if not source.spacing or "well" not in source.variables:
        return []
    return list(map(str, source.variables["well"].array.attrs["names"]))  # type: ignore[arg-type]


def _absent(source: Source, dim: str) -> dict[str, list[Any]]:
    positions = source.absent[dim]
    try:
        values = source.coordinate(dim)[positions]
    except InputError:
        values = positions
    if values.dtype.kind == "M":
        values = values.astype("datetime64[s]")
    return {"positions": positions.tolist(), "values": [str(value) for value in values]}


def _quality(source: Source) -> dict[str, Any]:
    """The report that ingest wrote, as it is; empty for a store without one."""
    node = source.group.get(f"{META}/quality")
    return {} if node is None else dict(node.attrs)


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
