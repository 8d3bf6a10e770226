"""Statistics of stored data, one row a record and channel, merged exactly.

A row is (count, mean, M2, min, max) with M2 the sum of squared deviations from the mean; rows of disjoint sets merge
by the pairwise update of Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances", 1979.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpuops.data.runs import Runs
from gpuops.data.sample import Cut
from gpuops.data.source import Source, Variable
from gpuops.errors import InputError

if TYPE_CHECKING:
    import zarr

COLUMNS = ("count", "mean", "m2", "min", "max")
"""Columns of a row of statistics."""
SURVEYED = 512
"""Records read for statistics when a store brings none."""
WHOLE_BYTES = 32 << 20
"""Bytes of a record up to which all of it is read for that; of a larger one some of its chunks."""
SURVEYED_BYTES = 4 << 30
"""Bytes of all larger ones together, about."""
PARTS = 1024
"""Most chunks read of one."""
BLOCK_ROWS = 2**18
"""Most rows of recorded statistics held at one time."""

Rows = npt.NDArray[np.float64]
"""float64 [..., 5]."""


def channels_of(record_shape: tuple[int, ...]) -> int:
    """Channels of a record: its first axis, if at least two spatial axes follow."""
    return record_shape[0] if len(record_shape) >= 3 else 1


def describe(stored: npt.NDArray[Any], scale: float, offset: float, missing: int | float | None) -> Rows:
    """Physical statistics of each record and channel, [records, channels, 5].

    Args:
        stored: packed records, [records, *record].
        scale: physical units per stored step.
        offset: physical value of stored 0.
        missing: stored value left out; NaN is always left out. A row without data is (0, 0, 0, NaN, NaN).
    """
    flat = stored.reshape(len(stored), channels_of(stored.shape[1:]), -1)
    data = ~np.isnan(flat) if flat.dtype.kind == "f" else np.ones(flat.shape, bool)
    if missing is not None:
        data &= flat != missing
    if data.all():  # nothing to leave out: a third of the time
        low, high = (end(axis=2).astype(np.float64) for end in (flat.min, flat.max))
        values = flat.astype(np.float64)
    else:
        low = np.where(data, flat, np.inf).min(axis=2, initial=np.inf)
        high = np.where(data, flat, -np.inf).max(axis=2, initial=-np.inf)
        values = np.where(data, flat, 0).astype(np.float64)
    count = data.sum(axis=2, dtype=np.float64)
    with np.errstate(invalid="ignore"):  # infinities, which a quality rule reports with their place
        mean = values.sum(axis=2) / np.maximum(count, 1)
        values -= mean[..., None]
        values *= data
        m2 = np.square(values, out=values).sum(axis=2)
    some = count > 0
    bounds = np.stack([low, high]) * scale + offset
    bounds = np.where(some, np.sort(bounds, axis=0), np.nan)
    return np.stack([count, np.where(some, mean * scale + offset, 0), m2 * scale**2, *bounds], axis=-1)


def merge(rows: Rows) -> Rows:
    """One row for the union of disjoint sets: [n, ..., 5] to [..., 5]."""
    count, mean, m2, low, high = np.moveaxis(rows, -1, 0)
    total = count.sum(axis=0)
    center = (count * mean).sum(axis=0) / np.maximum(total, 1)
    spread = m2.sum(axis=0) + (count * (mean - center) ** 2).sum(axis=0)
    infinite = np.where(np.isnan(low), np.inf, low).min(axis=0), np.where(np.isnan(high), -np.inf, high).max(axis=0)
    low, high = (np.where(np.isfinite(v), v, np.nan) for v in infinite)
    return np.stack([total, center, spread, low, high], axis=-1)


def mean_std(source: Source, cut: Cut, records: Runs) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Physical mean and standard deviation of a field over the given records: one pair, or one a channel.

    Statistics of a window's dimension are merged, because a window visits all of it. A store without statistics is
    surveyed, and a field with a function, whose values no store describes: `SURVEYED` of the records, evenly spaced,
    are read.

    Raises:
        InputError: the field has no data in these records.
    """
    variable, field = cut.variable, cut.field
    curve = None if field.function is None else partial(_on_curve, cut)
    merged, _ = summary(source, cut, records, SURVEYED, curve)
    volume = variable.spatial >= variable.array.ndim - cut.records  # axis 1 is space, whose statistics are merged
    if cut.along == "inside" or (volume and len(merged) > 1) or cut.shape[0] % len(merged):
        merged = merge(merged)[None]
    elif len(merged) > 1:
        # Channels are [steps, first axis of a record, further axes]: statistics know the first axis alone.
        further = math.prod(variable.array.shape[2 : -variable.spatial])
        merged = np.tile(np.repeat(merged, further, axis=0), (cut.shape[0] // (len(merged) * further), 1))
    count, mean, m2 = merged[:, 0], merged[:, 1], merged[:, 2]
    if not count.all():
        raise InputError(f"{variable.name!r} holds no data in the training split: widen the split or drop the variable")
    return tuple(map(float, mean)), tuple(map(float, np.sqrt(m2 / count)))


def _on_curve(cut: Cut, stored: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Values of a field's function, missing ones NaN, filled and clipped as its steps do."""
    variable, field = cut.variable, cut.field
    gone = np.isnan(stored) if stored.dtype.kind == "f" else np.zeros(stored.shape, bool)
    if variable.missing is not None:
        gone |= stored == variable.missing
    values = stored * np.float64(variable.scale) + variable.offset
    declared = field.fill if field.fill is not None else variable.fill
    values[gone] = np.nan if declared is None else declared
    if field.clip is not None:
        values = np.clip(values, *field.clip)
    with np.errstate(invalid="ignore", divide="ignore"):
        curved = np.log1p(values / field.scale) if field.function == "log" else np.arcsinh(values / field.scale)
    if np.isinf(curved).any() or (np.isnan(curved) & ~np.isnan(values)).any():
        raise InputError(
            f"{variable.name!r} holds values of {np.nanmin(values):.6g}, and log(1 + value / {field.scale:g}) has none "
            "at -1 or below: give the field a `clip`, or take asinh"
        )
    return curved


def summary(
    source: Source,
    cut: Cut,
    records: Runs,
    survey: int,
    curve: Callable[[npt.NDArray[Any]], npt.NDArray[np.float64]] | None = None,
) -> tuple[Rows, int]:
    """Statistics of a field's stored data over the given records, and how many records they come from.

    What ingest recorded for all of them, a bounded number of rows at a time, or what is found by reading a few.

    Args:
        source: an opened source.
        cut: the field; the channels that it takes are looked at, where statistics know channels. A static field is
            one record.
        records: records.
        survey: most records read where nothing is recorded, evenly spaced.
        curve: statistics of what it makes of stored values, which are then read; of physical values if None.

    Returns:
        One row a channel, [channels, 5], and the number of records.
    """
    variable = cut.variable
    channels = ... if cut.channels is None else list(cut.channels)
    packing = (variable.scale, variable.offset, variable.missing) if curve is None else (1.0, 0.0, None)
    curved = curve or _as_it_is
    if cut.static:
        return describe(curved(np.asarray(variable.array[...]))[None], *packing)[0], 1
    recorded = source.meta("stats", variable.name) if curve is None else None
    if recorded is not None:
        taken = channels if recorded.shape[1] > 1 else ...
        blocks = [merge(rows)[taken] for rows in _blocks(recorded, _stored(variable, records))]
        return blocks[0] if len(blocks) == 1 else merge(np.stack(blocks)), len(records)
    chosen = records[np.unique(np.linspace(0, len(records) - 1, min(survey, len(records))).astype(np.int64))]
    most = SURVEYED_BYTES // len(chosen)
    rows = [
        merge(
            np.concatenate(
                [describe(curved(part[channels])[None], *packing) for part in _parts(variable.array, row, most)]
            )
        )
        for row in variable.stored_at(chosen).tolist()
    ]
    return merge(np.stack(rows)), len(chosen)


def _as_it_is(stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return stored


def _parts(array: zarr.Array[Any], row: int, most: int) -> Iterator[npt.NDArray[Any]]:
    """A record as it is stored; of a large image about `most` bytes of it, in whole chunks evenly spaced."""
    shape = array.shape[1:]
    if math.prod(shape) * array.dtype.itemsize <= WHOLE_BYTES or len(shape) < 2:
        yield np.asarray(array[row])
        return
    grid = [-(-size // chunk) for size, chunk in zip(shape[1:], array.chunks[2:], strict=True)]
    part_bytes = shape[0] * math.prod(array.chunks[2:]) * array.dtype.itemsize
    wanted = min(max(most // part_bytes, 1), PARTS)
    for number in np.unique(np.linspace(0, math.prod(grid) - 1, wanted).astype(np.int64)):
        at = np.unravel_index(int(number), grid)
        inner = [slice(int(i) * c, (int(i) + 1) * c) for i, c in zip(at, array.chunks[2:], strict=True)]
        box: tuple[int | slice, ...] = (row, slice(None), *inner)
        yield np.asarray(array[box])


def _stored(variable: Variable, records: Runs) -> Runs:
    """Positions of records along the stored sample axis."""
    if variable.rows is None:
        return records
    inside = np.zeros(variable.array.shape[0], bool)
    inside[variable.rows[records[:]]] = True
    return Runs.of_masks([inside])


def _blocks(recorded: zarr.Array[Any], records: Runs) -> Iterator[Rows]:
    """Recorded rows of some records, from at most `BLOCK_ROWS` of all records at a time."""
    for first in range(0, recorded.shape[0], BLOCK_ROWS):
        numbers = np.arange(first, min(first + BLOCK_ROWS, recorded.shape[0]))
        inside = records.contains(numbers)
        if inside.any():
            yield np.asarray(recorded[first : first + len(numbers)])[inside]
