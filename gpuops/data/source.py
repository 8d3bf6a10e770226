"""Where the data is, and under which identity: a Zarr group in an Icechunk repository, a directory or a bucket."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import zarr
import zarr.abc.store

from gpuops.data import anemoi, ngff
from gpuops.data.icechunk_store import history, open_session
from gpuops.data.icechunk_store import local_storage as local_storage
from gpuops.data.identity import META as META
from gpuops.data.identity import array_metadata as array_metadata
from gpuops.data.identity import recorded_fingerprint, weak_fingerprint
from gpuops.data.identity import strong_fingerprint as strong_fingerprint
from gpuops.data.ngff import Spacing
from gpuops.data.place import cannot_open, is_icechunk, local_path, object_store
from gpuops.data.variable import Variable as Variable
from gpuops.data.variable import decoded, is_time, read_variable
from gpuops.errors import InputError

if TYPE_CHECKING:
    import xarray as xr

Positions = npt.NDArray[np.int64]
"""Positions along a dimension."""


@dataclass(frozen=True, slots=True)
class Source:
    """An opened group of arrays under one identity."""

    url: str
    """Where it was opened; of a joined source all names and URLs."""
    kind: str
    """"icechunk", "zarr", or "joined" of several."""
    store: zarr.abc.store.Store
    """Read-only Zarr store; `xarray.open_zarr(source.store, consolidated=False)` works on it."""
    snapshot: str | None
    """Icechunk snapshot id; None where the store has no versions. Of a joined source all that there are."""
    fingerprint: str
    """sha256 over array metadata and content: what enters the order and the version id."""
    weak: bool
    """True where the store holds no digests, so that the fingerprint rests on something less than the content."""
    variables: Mapping[str, Variable]
    """Arrays by name, coordinates included; those of groups inside have slashes in their names."""
    rests_on: str = "content"
    """What the fingerprint is made of, in words."""
    missing_chunks: str = "error"
    """What the reader does about a chunk that is not there: "error", or "fill" with the array's fill_value."""
    channels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names along axis 1, by variable, where the archive's convention gives them (anemoi, OME-NGFF)."""
    absent: Mapping[str, Positions] = field(default_factory=dict)
    """Positions that hold no data, sorted, by dimension, where the archive declares them (anemoi's missing dates)."""
    members: Mapping[str, Source] = field(default_factory=dict)
    """The stores of a joined source by name; its variables are named after them ("era5/t2m")."""
    align: str | None = None
    """Dimension that they are aligned on."""
    spacing: Mapping[str, Spacing] = field(default_factory=dict)
    """Distance of grid points and its unit ("" if none is given) by dimension, by variable of an OME-NGFF image."""

    @property
    def group(self) -> zarr.Group:
        """The root group."""
        return zarr.open_group(self.store, mode="r")

    def variable(self, name: str) -> Variable:
        """One variable; InputError lists those there are."""
        if name not in self.variables:
            known = [*sorted(self.variables), *(channel for names in self.channels.values() for channel in names)]
            raise InputError(f"{self.url} has no variable {name!r}; it has {', '.join(known)}")
        return self.variables[name]

    def resolve(self, name: str) -> tuple[Variable, int | None]:
        """The variable that a field names, and its position along axis 1 if the name is a channel's.

        Raises:
            InputError: neither a variable nor a channel; the message lists those there are.
        """
        if name not in self.variables:
            member, channel = self._member(name)
            for holder, names in self.channels.items():
                if channel in names and self._member(holder)[0] == member:
                    return self.variables[holder], names.index(channel)
        return self.variable(name), None

    def channel_names(self, variable: Variable) -> tuple[str, ...]:
        """Names along axis 1: the convention's, else the values of that dimension's coordinate; none without either."""
        if variable.name in self.channels:
            return self.channels[variable.name]
        holder = self.variables.get(variable.dims[1]) if len(variable.dims) > 1 else None
        if holder is None or holder.array.shape != variable.array.shape[1:2]:
            return ()
        return tuple(map(str, np.asarray(holder.array[:]).tolist()))

    def coordinate(self, dim: str) -> npt.NDArray[Any]:
        """Values along a dimension, times decoded to datetime64[ns].

        The variable of the dimension's own name, else the only variable on that dimension alone that holds times
        (anemoi: `dates` on `time`).

        Raises:
            InputError: there is none, or its calendar has dates that datetime64 cannot hold.
        """
        alone = [v for v in self.variables.values() if v.dims == (dim,)]
        if dim == self.align:  # every store with that dimension has the same values
            alone = [v for v in alone if self._member(v.name)[0] == self._member(alone[0].name)[0]]
        named = [v for v in alone if self._member(v.name)[1] == dim] or [v for v in alone if is_time(v)]
        if len(named) != 1:
            listed = ", ".join(sorted(v.name for v in alone)) or "none"
            raise InputError(f"{self.url} has no coordinate {dim!r}; variables on that dimension alone: {listed}")
        return decoded(named[0])

    def meta(self, kind: str, variable: str) -> zarr.Array[Any] | None:
        """What ingest recorded: `kind` is "digests", "stats" or "sketch"; None for a store we did not write."""
        if self.members:
            member, name = self._member(variable)
            return self.members[member].meta(kind, name)
        node = self.group.get(f"{META}/{kind}/{variable}")
        return node if isinstance(node, zarr.Array) else None

    def _aligned_datasets(self) -> Iterator[xr.Dataset]:
        for name, member in self.members.items():
            dataset = member.to_xarray()
            rows = [v.rows for path, v in self.variables.items() if self._member(path)[0] == name]
            if (at := next((row for row in rows if row is not None), None)) is not None:
                dataset = dataset.isel({self.align: at})
            yield dataset.rename({variable: f"{name}/{variable}" for variable in dataset.data_vars})

    @property
    def location(self) -> dict[str, Any]:
        """What `gpuops.data.join.reopen` opens this from: JSON, local paths made absolute."""
        url: Any = _absolute(self.url)
        snapshot: Any = self.snapshot
        if self.members:
            url = {name: _absolute(member.url) for name, member in self.members.items()}
            snapshot = {name: member.snapshot for name, member in self.members.items()}
        return {"url": url, "snapshot": snapshot, "missing_chunks": self.missing_chunks, "align": self.align}

    def _member(self, name: str) -> tuple[str, str]:
        """The store that a variable is in, "" where there is but one, and its name there."""
        if not self.members:
            return "", name
        member, _, own = name.partition("/")
        return member, own

    def to_xarray(self) -> xr.Dataset:
        """Physical values, missing data as NaN, and named dimensions (lazy).

        Raises:
            InputError: the stores of a joined source, or the levels of an image, lie on different grids, so that one
                data set cannot hold them.
        """
        import xarray as xr

        if self.spacing:
            raise InputError(f"{self.url} is an image in several levels: take `source.variables[NAME].array`")
        if self.members:
            try:
                return xr.merge(self._aligned_datasets(), join="exact", compat="override")
            except ValueError as error:
                raise InputError(f"{self.url} lie on different grids: take `members[NAME].to_xarray()`") from error
        # Some versions of xarray make time differences of a variable in hours or seconds, unless they are told not to.
        dataset: xr.Dataset = xr.open_zarr(self.store, consolidated=False, decode_timedelta=False)
        return dataset


def open(url: str | Path, snapshot: str | None = None, *, missing_chunks: str = "error") -> Source:
    """Open a Zarr group for reading, where it lies.

    Args:
        url: a local path, `file://`, `s3://`, `gs://`, `az://` or `http(s)://`; the settings of an object store come
            from the environment (AWS_ENDPOINT_URL, AWS_REGION, AWS_ALLOW_HTTP, credentials, ...).
        snapshot: Icechunk snapshot id, tag, branch or ISO 8601 time; the tip of `main` if None.
        missing_chunks: what the reader does about a chunk that is not there: "error", or "fill" to deliver the
            array's fill_value, which is what an archive means that leaves out chunks without data.

    Raises:
        InputError: nothing there, not Zarr, an unknown snapshot, or another word for `missing_chunks`.
    """
    url = str(url)
    if missing_chunks not in ("error", "fill"):
        raise InputError(f"missing_chunks={missing_chunks!r} is neither 'error' nor 'fill': give one of them")
    path = local_path(url)
    if path is not None and not path.exists():
        raise InputError(f"{path} does not exist: give the path of a Zarr group or an Icechunk repository")
    store: zarr.abc.store.Store
    kind = "icechunk" if is_icechunk(url) else "zarr"
    if kind == "icechunk":
        store, snapshot = open_session(url, snapshot)
    elif snapshot is not None:
        raise InputError(f"{url} is plain Zarr, which has no snapshots: leave the snapshot out")
    elif path is not None:
        store = zarr.storage.LocalStore(path, read_only=True)
    else:
        store = zarr.storage.ObjectStore(object_store(url), read_only=True)
    group = _root(url, store)
    images = ngff.read(url, store, group)
    variables = _arrays(url, group) if images is None else dict(images.variables)
    channels: dict[str, tuple[str, ...]] = {}
    absent: dict[str, Positions] = {}
    if anemoi.is_anemoi(group):
        variables[anemoi.DATA] = replace(variables[anemoi.DATA], dims=anemoi.DIMS, spatial=1)
        channels[anemoi.DATA] = anemoi.names(group)
        if len(missing := anemoi.missing_dates(group)):
            absent[anemoi.DIMS[0]] = missing
    recorded, rests_on = recorded_fingerprint(group), "content"
    fingerprint = recorded
    if fingerprint is None:
        fingerprint, rests_on = weak_fingerprint(store, snapshot, variables)
    source = Source(
        url, kind, store, snapshot, fingerprint, recorded is None, variables, rests_on, missing_chunks, channels, absent
    )
    if images is None:
        return source
    return replace(source, store=images.store, channels=images.channels, spacing=images.spacing)


def _absolute(url: str) -> str:
    return url if "://" in url else os.path.abspath(url)


def snapshots(source: Source) -> list[dict[str, Any]]:
    """Snapshots of an Icechunk repository up to the one opened, newest first; empty for plain Zarr."""
    return [] if source.snapshot is None else history(source.url, source.snapshot)


def _root(url: str, store: zarr.abc.store.Store) -> zarr.Group:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # consolidated v3 metadata: nothing that a reader must act on
            return zarr.open_group(store, mode="r")
    except (FileNotFoundError, ValueError, NotADirectoryError, KeyError) as error:
        raise InputError(
            f"{url} is not a Zarr group (no zarr.json or .zgroup): `gpuops ingest` makes one from HDF5 or NetCDF"
        ) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "obstore":
            raise
        raise cannot_open(url, error) from error


def _arrays(url: str, group: zarr.Group) -> dict[str, Variable]:
    """Every array in a group whose path has no part that begins with a dot or an underscore."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # files beside the arrays (a README)
        members = dict(group.members(max_depth=None))
    variables = {
        name: read_variable(name, node)
        for name, node in sorted(members.items())
        if isinstance(node, zarr.Array) and not any(part.startswith((".", "_")) for part in name.split("/"))
    }
    if not variables:
        raise InputError(f"{url} holds no arrays: give the path of the group that does")
    return variables
