"""Opening one store, or several whose records are aligned on a coordinate."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from gpuops.data import source as one
from gpuops.data.source import Positions, Source, Variable
from gpuops.data.variable import is_time
from gpuops.data.view import View
from gpuops.errors import InputError
from gpuops.lineage.version import canonical_json


def open(
    url: str | Path | Mapping[str, str],
    snapshot: str | Mapping[str, str | None] | None = None,
    *,
    missing_chunks: str = "error",
    align: str | None = None,
) -> Source:
    """Open a Zarr group for reading, where it lies; or several as one, aligned on a coordinate.

    Of several stores, a variable is named after its store, as in "era5/t2m". Records are the values of the coordinate
    that all stores with that dimension have, ascending; each must hold a value once, and equal means equal to the last
    bit. A store without the dimension brings static fields.

    Args:
        url: a local path, `file://`, `s3://`, `gs://`, `az://` or `http(s)://`; the settings of an object store come
            from the environment (AWS_ENDPOINT_URL, AWS_REGION, AWS_ALLOW_HTTP, credentials, ...). Several by name.
        snapshot: Icechunk snapshot id, tag, branch or ISO 8601 time; the tip of `main` if None. Of several by name.
        missing_chunks: what the reader does about a chunk that is not there: "error", or "fill" to deliver the
            array's fill_value, which is what an archive means that leaves out chunks without data.
        align: dimension whose coordinate aligns several stores; the one that they share if None.

    Raises:
        InputError: nothing there, not Zarr, an unknown snapshot, another word for `missing_chunks`, or stores that
            cannot be aligned.
    """
    if isinstance(url, Mapping):
        return _several(url, snapshot, missing_chunks, align)
    if align is not None or isinstance(snapshot, Mapping):
        raise InputError("`align` and snapshots by name are for several stores: give `url` as names and URLs")
    return one.open(url, snapshot, missing_chunks=missing_chunks)


def reopen(document: Mapping[str, Any]) -> Source:
    """Open what `Source.location` describes, at its snapshots."""
    return open(
        document["url"],
        document["snapshot"],
        missing_chunks=document.get("missing_chunks", "error"),
        align=document.get("align"),
    )


def _several(
    urls: Mapping[str, str], snapshot: str | Mapping[str, str | None] | None, missing_chunks: str, align: str | None
) -> Source:
    if not urls:
        raise InputError("no store to open: give at least one name and URL")
    if isinstance(snapshot, str) or (snapshot is not None and snapshot.keys() - urls.keys()):
        raise InputError(f"snapshots of several stores are given by name, one of {', '.join(urls)}, not {snapshot!r}")
    if wrong := [name for name in urls if not name or "/" in name or name.startswith((".", "_"))]:
        raise InputError(f"{wrong[0]!r} is no name for a store: give one without slashes, dots or underscores in front")
    stores = {
        name: one.open(url, (snapshot or {}).get(name), missing_chunks=missing_chunks) for name, url in urls.items()
    }
    align = align or _shared(stores)
    rows = _rows(stores, align)
    view = View({name: store.store for name, store in stores.items()})
    variables: dict[str, Variable] = {}
    absent: dict[str, Positions] = {}
    for name, store in stores.items():
        for variable in store.variables.values():
            path = f"{name}/{variable.name}"
            array = zarr.open_array(view, path=path, mode="r")
            variables[path] = replace(variable, name=path, array=array)
            if variable.dims[:1] == (align,) and not np.array_equal(rows[name], np.arange(array.shape[0])):
                variables[path] = replace(variables[path], rows=rows[name])
        for dim, positions in store.absent.items():
            places = np.flatnonzero(np.isin(rows[name], positions)) if dim == align else positions
            absent[dim] = np.union1d(absent.get(dim, places), places).astype(np.int64)
    identity = {"align": align, "stores": {name: store.fingerprint for name, store in stores.items()}}
    return Source(
        url=_listed({name: store.url for name, store in stores.items()}),
        kind="joined",
        store=view,
        snapshot=_listed({name: store.snapshot for name, store in stores.items() if store.snapshot}) or None,
        fingerprint=hashlib.sha256(canonical_json(identity)).hexdigest(),
        weak=any(store.weak for store in stores.values()),
        variables=variables,
        rests_on=_listed({name: store.rests_on for name, store in stores.items()}),
        missing_chunks=missing_chunks,
        channels={f"{name}/{v}": given for name, store in stores.items() for v, given in store.channels.items()},
        absent=absent,
        members=stores,
        align=align,
    )


def _listed(named: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={text}" for name, text in named.items())


def _shared(stores: Mapping[str, Source]) -> str:
    """The dimension to align on: the one that is a sample axis with a coordinate in several stores, times first."""
    axes = {name: _axes(store) for name, store in stores.items()}
    if len(axes) == 1:
        found = dict(next(iter(axes.values())))
    else:
        every = [dim for dims in axes.values() for dim in dims]
        found = {dim: any(dims.get(dim, False) for dims in axes.values()) for dim in every if every.count(dim) > 1}
    chosen = [dim for dim, time in found.items() if time] or list(found)
    if len(chosen) == 1:
        return chosen[0]
    listed = "; ".join(f"{name}: {', '.join(dims) or 'none'}" for name, dims in axes.items())
    what = f"share {', '.join(chosen)}" if chosen else "share no dimension that comes first and has a coordinate"
    raise InputError(f"these stores {what} ({listed}): name the one to align on with `align`")


def _axes(store: Source) -> dict[str, bool]:
    """Dimensions that come first in an array of two or more and have a coordinate, and whether that holds times."""
    found = {}
    for dim in dict.fromkeys(v.dims[0] for v in store.variables.values() if len(v.dims) > 1):
        alone = [v for v in store.variables.values() if v.dims == (dim,)]
        if any(v.name == dim or is_time(v) for v in alone):
            found[dim] = any(is_time(v) for v in alone)
    return found


def _rows(stores: Mapping[str, Source], align: str) -> dict[str, Positions]:
    """Stored position of each common record, by store; stores without the dimension are left out."""
    values: dict[str, npt.NDArray[Any]] = {}
    for name, store in stores.items():
        if any(v.dims[:1] == (align,) for v in store.variables.values()):
            values[name] = store.coordinate(align)
    if not values:
        raise InputError(f"no store has a sample axis {align!r}: name another one with `align`")
    if len({array.dtype.kind == "M" for array in values.values()}) > 1:
        kinds = ", ".join(f"{name}: {array.dtype}" for name, array in values.items())
        raise InputError(f"{align!r} is time in some stores and numbers in others ({kinds}): give them the same units")
    common: npt.NDArray[Any] | None = None
    for name, array in values.items():
        distinct, counts = np.unique(array, return_counts=True)
        if (counts > 1).any():
            twice = distinct[counts > 1][0]
            raise InputError(f"{name}: {align!r} has {twice} more than once: which record is meant cannot be known")
        common = distinct if common is None else np.intersect1d(common, distinct, assume_unique=True)
    assert common is not None
    if not len(common):
        spans = ", ".join(f"{name} {min(array)} to {max(array)}" for name, array in values.items())
        raise InputError(f"the stores have no common value of {align!r} ({spans}): check their units and spacing")
    order = {name: np.argsort(array, kind="stable") for name, array in values.items()}
    return {
        name: order[name][np.searchsorted(array, common, sorter=order[name])].astype(np.int64)
        for name, array in values.items()
    }
