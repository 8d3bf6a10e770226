"""Which samples contain foreground: by what ingest recorded of a variable, and by reading where that leaves doubt."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from gpuops.data.patches import PatchAxis, PatchGrid
from gpuops.data.sample import BoundSample, Ids
from gpuops.data.source import Source, Variable
from gpuops.data.statistics import describe
from gpuops.errors import InputError

Found = npt.NDArray[np.bool_]


def foreground(source: Source, bound: BoundSample, name: str, above: float, at: int) -> Callable[[Ids], Found]:
    """What tells of sample ids [n] whether they contain foreground, [n].

    A sample does if a value of the variable exceeds `above` in its patch (the halo does not count); in its record, if
    samples are no patches or the variable has none of their dimensions. A record whose recorded largest value does not
    exceed it has none; the others are read.

    Args:
        source: an opened source.
        bound: the sample bound to it.
        name: variable on the sample axis.
        above: physical value.
        at: step of a window along the sample axis whose record counts.

    Raises:
        InputError: the variable is not on the sample axis, or has other patches.
    """
    variable = source.variable(name)
    if variable.records != bound.records:
        raise InputError(
            f"foreground {name!r} has {variable.records} records, samples have {bound.records}: name a variable on the "
            "sample axis"
        )
    step = at if bound.length > 1 else 0
    axes = [] if bound.grid is None else [axis for axis in bound.grid.axes if axis.dim in variable.dims[1:]]

    def in_record(ids: Ids) -> Found:
        record = bound.split_id(ids)[0] + step
        low = int(record.min())
        return np.asarray(_largest(source, variable, low, int(record.max()) + 1)[record - low] > above)

    if bound.grid is None or not axes:
        return in_record
    grid = bound.grid
    for axis in axes:
        if (size := variable.array.shape[variable.dims.index(axis.dim)]) != axis.length:
            raise InputError(f"foreground {name!r} has {size} points along {axis.dim!r}, patches have {axis.length}")
    recorded = source.meta("stats", name) is not None

    def in_patch(ids: Ids) -> Found:
        record, patch = bound.split_id(ids)[0] + step, bound.patch_of(ids)
        wanted = np.ones(len(ids), bool)
        if recorded:
            wanted = in_record(ids)
        records, which = np.unique(record[wanted], return_inverse=True)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "gpuops-foreground") as pool:
            rows = list(pool.map(lambda r: _patches_with(variable, int(r), axes, grid, above), records.tolist()))
        found = np.zeros(len(ids), bool)
        if rows:
            found[wanted] = np.stack(rows)[which, patch[wanted]]
        return found

    return in_patch


def _largest(source: Source, variable: Variable, low: int, high: int) -> npt.NDArray[np.float64]:
    """Largest physical value of each record, -inf where there is no data: recorded, or read a chunk at a time."""
    recorded = source.meta("stats", variable.name)
    if recorded is not None:
        return _highest(variable.taken(recorded, low, high))
    step = max(1, (variable.array.shards or variable.array.chunks)[0])
    found = np.empty(high - low)
    for first in range(low, high, step):
        last = min(first + step, high)
        stored = variable.read(first, last).reshape(last - first, -1, 1)
        found[first - low : last - low] = _highest(describe(stored, variable.scale, variable.offset, variable.missing))
    return found


def _highest(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The largest value over channels, from statistics [records, channels, 5]."""
    return np.asarray(np.where(np.isnan(rows[..., 4]), -np.inf, rows[..., 4]).max(axis=1))


def _patches_with(variable: Variable, record: int, axes: list[PatchAxis], grid: PatchGrid, above: float) -> Found:
    """Which patches of a record contain foreground, [patches]."""
    stored = variable.read(record, record + 1)[0]
    found = stored * variable.scale + variable.offset > above  # NaN is not
    if variable.missing is not None:
        found &= stored != variable.missing
    places = [variable.dims.index(axis.dim) - 1 for axis in axes]
    counts = np.moveaxis(found, places, range(len(places))).astype(np.int64)
    counts = counts.reshape(*counts.shape[: len(places)], -1).sum(axis=-1)
    for place, axis in enumerate(axes):  # sums over patches, an axis at a time, from sums up to each grid point
        low = axis.origins(np.arange(axis.count))
        upto = np.insert(np.cumsum(counts, axis=place), 0, 0, axis=place)
        counts = np.take(upto, low + axis.size, axis=place) - np.take(upto, low, axis=place)
    at = grid.places(np.arange(grid.count))
    return np.asarray(counts[tuple(at[grid.axes.index(axis)] for axis in axes)] > 0)
