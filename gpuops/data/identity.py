"""Identity of data: what the order, checkpoints and version ids are keyed by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gpuops.data.place import entries
from gpuops.lineage.version import canonical_json

if TYPE_CHECKING:
    import zarr
    import zarr.abc.store

    from gpuops.data.variable import Variable

META = ".gpuops"
"""Group inside a store that ingest fills: digests, statistics, sketches and the quality report, by variable."""


def strong_fingerprint(metadata: Mapping[str, Any], digests: Mapping[str, list[str]]) -> str:
    """sha256 over {array metadata, per-shard content digests in key order}, both by variable."""
    return hashlib.sha256(canonical_json({"arrays": dict(metadata), "digests": dict(digests)})).hexdigest()


def recorded_fingerprint(group: zarr.Group) -> str | None:
    """The fingerprint that ingest kept in the commit, if the store is one of ours."""
    meta = group.get(META)
    value = None if meta is None else meta.attrs.get("fingerprint")
    return None if value is None else str(value)


def weak_fingerprint(
    store: zarr.abc.store.Store, snapshot: str | None, variables: Mapping[str, Variable]
) -> tuple[str, str]:
    """(fingerprint, what it rests on) of a store without digests, from what it tells without reading its data.

    An Icechunk snapshot id names bytes that never change. A directory tells keys and sizes, an object store their
    etags as well (where it has them), a plain web server nothing but the metadata.
    """
    document: dict[str, Any] = {"arrays": {name: array_metadata(v.array) for name, v in variables.items()}}
    if snapshot is not None:
        document["snapshot"] = snapshot
        rests_on = "snapshot id"
    elif (listed := entries(store)) is not None:
        keys = sorted(listed)
        tagged = any(entry.etag is not None for entry in keys)
        document["keys"] = [list(entry) if tagged else [entry.key, entry.size] for entry in keys]
        rests_on = "names, sizes and etags" if tagged else "names and sizes"
    else:
        rests_on = "metadata alone"
    return hashlib.sha256(canonical_json(document)).hexdigest(), rests_on


def array_metadata(array: zarr.Array[Any]) -> dict[str, Any]:
    """What of an array's metadata makes its identity: all that changes the meaning of its bytes."""
    document = array.metadata.to_dict()
    kept = (
        "shape",
        "data_type",
        "dtype",
        "chunk_grid",
        "chunks",
        "codecs",
        "compressor",
        "filters",
        "order",
        "attributes",
    )
    return {key: _plain(document[key]) for key in kept if key in document}


def _plain(value: Any) -> Any:
    """JSON types only; what JSON cannot hold becomes its text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | bool | None) else repr(value)
