"""Where the data is, and under which identity: a Zarr group in an Icechunk repository, a directory or a bucket."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore.exceptions
import obstore.store
import zarr
import zarr.abc.store
from zarr.core.sync import sync

from gpuops.errors import InputError
from gpuops.lineage.version import canonical_json

if TYPE_CHECKING:
    import icechunk
    import xarray as xr

META = ".gpuops"
"""Group inside a store that ingest fills: digests, statistics and sketches, by variable."""


@dataclass(frozen=True, slots=True)
class Variable:
    """One array of a source with its CF packing: physical = stored * scale + offset."""

    name: str
    """Name in the group."""
    array: zarr.Array[Any]
    """The stored array, packed."""
    dims: tuple[str, ...]
    """Dimension names; the first is the sample axis."""
    scale: float
    """CF scale_factor."""
    offset: float
    """CF add_offset."""
    missing: int | None
    """CF _FillValue of an integer array; float arrays use NaN."""
    fill: float | None
    """Physical value that the ingest recipe declares for missing data, if any."""
    unit: str
    """CF units."""


@dataclass(frozen=True, slots=True)
class Source:
    """An opened group of arrays under one identity."""

    url: str
    """Where it was opened."""
    kind: str
    """"icechunk" or "zarr"."""
    store: zarr.abc.store.Store
    """Read-only Zarr store; `xarray.open_zarr(source.store, consolidated=False)` works on it."""
    snapshot: str | None
    """Icechunk snapshot id; None where the store has no versions."""
    fingerprint: str
    """sha256 over array metadata and content: what enters the order and the version id."""
    weak: bool
    """True where the fingerprint rests on metadata, names and sizes, because the store holds no digests."""
    variables: Mapping[str, Variable]
    """Arrays by name, coordinates included."""

    @property
    def group(self) -> zarr.Group:
        """The root group."""
        return zarr.open_group(self.store, mode="r")

    def variable(self, name: str) -> Variable:
        """One variable; InputError lists those there are."""
        if name not in self.variables:
            raise InputError(f"{self.url} has no variable {name!r}; it has {', '.join(sorted(self.variables))}")
        return self.variables[name]

    def meta(self, kind: str, variable: str) -> zarr.Array[Any] | None:
        """What ingest recorded: `kind` is "digests", "stats" or "sketch"; None for a store we did not write."""
        node = self.group.get(f"{META}/{kind}/{variable}")
        return node if isinstance(node, zarr.Array) else None

    def to_xarray(self) -> xr.Dataset:
        """Physical values, missing data as NaN, and named dimensions (lazy)."""
        import xarray as xr

        # Some versions of xarray make time differences of a variable in hours or seconds, unless they are told not to.
        dataset: xr.Dataset = xr.open_zarr(self.store, consolidated=False, decode_timedelta=False)
        return dataset


def open(url: str | Path, snapshot: str | None = None) -> Source:
    """Open a Zarr group for reading.

    Args:
        url: a local path, or a URL that obstore understands (`s3://`, `gs://`, `az://`, `file://`).
        snapshot: Icechunk snapshot id; the tip of `main` if None.

    Raises:
        InputError: nothing there, not Zarr, or an unknown snapshot.
    """
    url = str(url)
    if "://" in url:
        store, kind = _object_store(url), "zarr"
    else:
        path = Path(url)
        if not path.exists():
            raise InputError(f"{path} does not exist: give the path of a Zarr group or an Icechunk repository")
        kind = "icechunk" if (path / "snapshots").is_dir() else "zarr"
        if kind == "icechunk":
            store, snapshot = _icechunk(path, snapshot)
        else:
            store = zarr.storage.LocalStore(path, read_only=True)
    if kind == "zarr" and snapshot is not None:
        raise InputError(f"{url} is plain Zarr, which has no snapshots: leave the snapshot out")
    try:
        group = zarr.open_group(store, mode="r")
    except obstore.exceptions.BaseError as error:
        raise _not_opened(url, error) from error
    except (FileNotFoundError, ValueError, NotADirectoryError, KeyError) as error:
        raise InputError(
            f"{url} is not a Zarr group (no zarr.json or .zgroup): `gpuops ingest` makes one from HDF5 or NetCDF"
        ) from error
    variables = {name: _variable(name, array) for name, array in group.arrays()}
    if not variables:
        raise InputError(f"{url} holds no arrays at its root: give the path of the group that does")
    recorded = _recorded_fingerprint(group)
    fingerprint = recorded or _weak_fingerprint(store, variables)
    return Source(url, kind, store, snapshot, fingerprint, recorded is None, variables)


def snapshots(source: Source) -> list[dict[str, str]]:
    """Snapshots of an Icechunk repository up to the one opened, newest first; empty for plain Zarr."""
    if source.kind != "icechunk":
        return []
    import icechunk

    repository = icechunk.Repository.open(local_storage(Path(source.url)))
    return [
        {"id": info.id, "written": info.written_at.isoformat(timespec="seconds"), "message": info.message}
        for info in repository.ancestry(snapshot_id=source.snapshot)
    ]


def local_storage(path: Path) -> icechunk.Storage:
    """Icechunk storage in a local directory, without its warning about concurrent commits: an ingest commits once."""
    import icechunk

    icechunk.set_logs_filter("error")
    return icechunk.local_filesystem_storage(str(path))


def strong_fingerprint(metadata: Mapping[str, Any], digests: Mapping[str, list[str]]) -> str:
    """sha256 over {array metadata, per-shard content digests in key order}, both by variable."""
    return hashlib.sha256(canonical_json({"arrays": dict(metadata), "digests": dict(digests)})).hexdigest()


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


def _object_store(url: str) -> zarr.abc.store.Store:
    try:
        return zarr.storage.ObjectStore(obstore.store.from_url(url), read_only=True)
    except (obstore.exceptions.BaseError, ValueError) as error:
        raise _not_opened(url, error) from error


def _not_opened(url: str, error: Exception) -> InputError:
    reason = str(error).splitlines()[0]
    return InputError(f"{url} cannot be opened ({reason}): check the URL (s3://, gs://, az://, file://) and the access")


def _icechunk(path: Path, snapshot: str | None) -> tuple[zarr.abc.store.Store, str]:
    import icechunk

    try:
        repository = icechunk.Repository.open(local_storage(path))
        if snapshot is None:
            session = repository.readonly_session("main")
        else:
            session = repository.readonly_session(snapshot_id=snapshot)
    except (icechunk.IcechunkError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path} is no Icechunk repository with that snapshot ({reason}): see `gpuops inspect {path}`"
        ) from error
    return session.store, session.snapshot_id


def _variable(name: str, array: zarr.Array[Any]) -> Variable:
    attributes: dict[str, Any] = array.attrs.asdict()
    dims = getattr(array.metadata, "dimension_names", None) or attributes.get("_ARRAY_DIMENSIONS")
    names = tuple(str(d) for d in dims) if dims else tuple(f"dim_{i}" for i in range(array.ndim))
    missing = attributes.get("_FillValue")
    if missing is None and array.metadata.zarr_format == 2:
        missing = array.fill_value if "scale_factor" in attributes else None
    fill = attributes.get("gpuops_fill")
    return Variable(
        name,
        array,
        names,
        float(attributes.get("scale_factor", 1.0)),
        float(attributes.get("add_offset", 0.0)),
        int(missing) if missing is not None and array.dtype.kind in "iu" else None,
        None if fill is None else float(fill),
        str(attributes.get("units", "1")),
    )


def _recorded_fingerprint(group: zarr.Group) -> str | None:
    """The fingerprint that ingest kept in the commit, if this store is one of ours."""
    meta = group.get(META)
    value = None if meta is None else meta.attrs.get("fingerprint")
    return None if value is None else str(value)


def _weak_fingerprint(store: zarr.abc.store.Store, variables: Mapping[str, Variable]) -> str:
    """Metadata, keys and sizes: what a foreign store tells without reading its data."""

    async def listed() -> list[tuple[str, int]]:
        return [(key, await store.getsize(key)) async for key in store.list()]

    metadata = {name: array_metadata(variable.array) for name, variable in variables.items()}
    return hashlib.sha256(canonical_json({"arrays": metadata, "keys": sorted(sync(listed()))})).hexdigest()
