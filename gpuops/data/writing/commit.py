"""What goes into the commit beside the arrays: digests, statistics, sketches, and what the quality checks found."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from gpuops.data.source import META, array_metadata, strong_fingerprint
from gpuops.data.statistics import COLUMNS
from gpuops.data.writing.block import Block
from gpuops.data.writing.quality import Violation, duplicates, gate
from gpuops.data.writing.shards import FOUND, Written
from gpuops.errors import InputError

QUALITY = "quality"
"""Group below META: the report as attributes, and by variable what was found in the source of each shard."""
RECORDS = "records"
"""Group below META: digests of the records, by variable."""


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What is known of shards of a variable; before an append, of those that stay."""

    digests: list[str]
    """sha256 of each shard."""
    rows: npt.NDArray[np.float64]
    """Statistics of their records, [records, channels, 5]."""
    counts: npt.NDArray[np.int64]
    """Histogram of each, [shards, bins]."""
    edges: tuple[float, float]
    """Edges of the histograms."""
    records: npt.NDArray[np.uint8]
    """Digests of their records."""
    found: npt.NDArray[np.float64]
    """What was found in the source of each shard, [shards, FOUND]; one row more if an append rewrites the last one."""


def kept_of(root: zarr.Group, name: str, shards: int, records: int) -> Kept:
    """What a store holds of the first `shards` shards of a variable, `records` records.

    Raises:
        InputError: the store was written without it.
    """
    parts = {}
    for kind in ("digests", "stats", "sketch", RECORDS, QUALITY):
        node = root.get(f"{META}/{kind}/{name}")
        if not isinstance(node, zarr.Array):
            raise InputError(f"the store keeps no {kind} of {name!r}, so nothing can be appended: ingest it again")
        parts[kind] = node
    digests = [bytes(row).hex() for row in np.asarray(parts["digests"][:shards])]
    attributes = parts["sketch"].attrs
    return Kept(
        digests,
        np.asarray(parts["stats"][:records]),
        np.asarray(parts["sketch"][:shards]),
        (float(attributes["lo"]), float(attributes["hi"])),  # type: ignore[arg-type]
        np.asarray(parts[RECORDS][:records]),
        np.asarray(parts[QUALITY][:]),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Whole(Kept):
    """Everything known of one variable, old shards and new ones together."""

    violations: list[Violation]
    """Broken rules in the shards written now."""


def joined(block: Block, written: Sequence[Written], kept: Kept | None) -> Whole:
    """A variable's shards in order; InputError if an append sketches with other edges."""
    parts = sorted(written, key=lambda part: part.shard)
    found = np.stack([part.found for part in parts])
    edges = (parts[0].sketch.lo, parts[0].sketch.hi)
    old_digests: list[str] = []
    rows, counts, records = ([getattr(part, key) for part in parts] for key in ("rows", "sketch", "records"))
    counts = [part.counts[None] for part in counts]
    if kept is not None:
        if kept.edges != edges:
            raise InputError(
                f"{block.name}: valid_min and valid_max differ from the store's: append under the same rules"
            )
        stays = len(kept.digests)
        if len(kept.found) > stays:  # the rewritten shard holds old records too
            found[0, :3] += kept.found[stays, :3]
            found[0, 3] = np.fmax(found[0, 3], kept.found[stays, 3])
        old_digests = kept.digests
        rows, counts, records = [kept.rows, *rows], [kept.counts, *counts], [kept.records, *records]
        found = np.concatenate([kept.found[:stays], found])
    return Whole(
        [*old_digests, *(part.digest for part in parts)],
        np.concatenate(rows),
        np.concatenate(counts),
        edges,
        np.concatenate(records),
        found,
        [violation for part in parts for violation in part.violations],
    )


def judge(
    blocks: Sequence[Block],
    wholes: Mapping[str, Whole],
    axes: tuple[Mapping[str, Any], Sequence[Violation]],
    chunks: Mapping[str, Mapping[str, int] | None],
) -> dict[str, Any]:
    """Hold everything found against the rules; the report, if all are kept.

    Args:
        blocks: the variables.
        wholes: what is known of each.
        axes: findings and broken rules of the coordinates.
        chunks: chunks of Zarr sources, `{"expected", "absent"}`, None for a source of another kind.

    Returns:
        `{"passed": true, "variables": {name: {...}}, "coordinates": {name: {...}}}`, see docs/ingest.md.

    Raises:
        QualityError: a rule is broken.
    """
    report: dict[str, Any] = {"passed": True, "variables": {}, "coordinates": dict(axes[0])}
    violations = [violation for whole in wholes.values() for violation in whole.violations] + list(axes[1])
    missing, nan = {}, {}
    for block in blocks:
        whole = wholes[block.name]
        values = block.records * math.prod(block.shape[1:])
        missing[block.name] = 1 - float(whole.rows[..., 0].sum()) / values
        nans, infinite, constants = (int(v) for v in whole.found[:, :3].sum(axis=0))
        nan[block.name] = nans / values
        repeated = duplicates(whole.records)
        if not block.rules.allow_duplicates and len(repeated):
            place = int(repeated[0])
            first = int((whole.records == whole.records[place]).all(axis=1).argmax())
            value = float(whole.rows[place, 0, 1])
            rule = f"allow_duplicates false: equal to record {first}, mean"
            violations.append(Violation(block.name, (place,), value, rule, len(repeated)))
        errors = whole.found[:, 3]
        report["variables"][block.name] = {
            "values": values,
            "missing_share": missing[block.name],
            "nan_share": nan[block.name],
            "inf_share": infinite / values,
            "constant_records": constants,
            "duplicate_records": len(repeated),
            "source_chunks": None if chunks.get(block.name) is None else dict(chunks[block.name] or {}),
            "pack": _packed(block, errors),
            "rules": {key: value for key, value in asdict(block.rules).items() if value is not None},
        }
    gate(violations, missing, {block.name: block.rules for block in blocks}, nan_share=nan)
    return report


def _packed(block: Block, errors: npt.NDArray[np.float64]) -> dict[str, Any] | None:
    if block.packing is None or np.isnan(errors).all():
        return None
    return {"tolerance": block.packing.tolerance, "max_abs_error": float(np.nanmax(errors)), "dtype": block.dtype.name}


def fingerprint_of(
    arrays: Mapping[str, zarr.Array[Any]], coordinates: Mapping[str, zarr.Array[Any]], wholes: Mapping[str, Whole]
) -> tuple[str, dict[str, list[str]]]:
    """The identity of what is to be committed, and the digests it rests on."""
    digests = {name: wholes[name].digests for name in arrays}
    for name, array in coordinates.items():
        digests[name] = [hashlib.sha256(np.ascontiguousarray(array[:]).tobytes()).hexdigest()]
    metadata = {name: array_metadata(array) for name, array in {**arrays, **coordinates}.items()}
    return strong_fingerprint(metadata, digests), digests


def write_meta(
    root: zarr.Group,
    wholes: Mapping[str, Whole],
    digests: Mapping[str, list[str]],
    fingerprint: str,
    report: Mapping[str, Any],
) -> None:
    """Write the group META, in place of the one that is there."""
    if META in root:
        del root[META]
    meta = root.create_group(META, attributes={"fingerprint": fingerprint, "columns": list(COLUMNS)})
    meta.create_group(QUALITY, attributes={**report, "columns": list(FOUND)})
    for name, values in digests.items():
        raw = np.frombuffer(bytes.fromhex("".join(values)), np.uint8).reshape(len(values), 32)
        meta.create_array(f"digests/{name}", data=raw)
    for name, whole in wholes.items():
        meta.create_array(f"stats/{name}", data=whole.rows)
        edges: dict[str, Any] = {"lo": whole.edges[0], "hi": whole.edges[1]}
        meta.create_array(f"sketch/{name}", data=whole.counts, attributes=edges)
        meta.create_array(f"{RECORDS}/{name}", data=whole.records)
        meta.create_array(f"{QUALITY}/{name}", data=whole.found)
