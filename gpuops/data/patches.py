"""Patches: the parts of a record, on a regular grid, that samples are cut from, and the halo around them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gpuops.data.reading.memory import Chunk, Key
from gpuops.errors import InputError

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Patch:
    """What part of a record a sample is: a patch on a regular grid, inputs with a halo around it."""

    size: dict[str, int]
    """Grid points of a patch along each of the dimensions that are cut."""
    halo: dict[str, int] = field(default_factory=dict)
    """Grid points that inputs have beyond the patch on either side, by dimension; targets have none."""
    stride: dict[str, int] | None = None
    """Grid points from patch to patch, by dimension; a dimension that is left out, or None: the size."""
    edge: Literal["reflect", "missing"] = "reflect"
    """What a halo holds beyond the array: its mirror image (the edge itself not repeated), or missing data."""

    def __post_init__(self) -> None:
        if not self.size:
            raise InputError("a patch without dimensions cuts nothing: give `size` at least one, or leave `patch` out")
        if self.edge not in ("reflect", "missing"):
            raise InputError(f"edge {self.edge!r} of a patch is neither 'reflect' nor 'missing': give one of them")
        for what, given in (("halo", self.halo), ("stride", self.stride or {})):
            if unknown := given.keys() - self.size.keys():
                raise InputError(f"{what} of a patch names {sorted(unknown)}: `size` must name them as well")
        for dim, size in self.size.items():
            stride = (self.stride or {}).get(dim, size)
            if size < 1 or self.halo.get(dim, 0) < 0 or not 1 <= stride <= size:
                raise InputError(
                    f"patch along {dim!r}: size {size}, halo {self.halo.get(dim, 0)}, stride {stride}; give a size of "
                    "at least 1, a halo of 0 or more, and a stride from 1 to the size, so that nothing is left out"
                )


@dataclass(frozen=True, slots=True)
class PatchAxis:
    """One dimension of the grid of patches."""

    dim: str
    """Name."""
    length: int
    """Grid points of the array."""
    size: int
    """Grid points of a patch."""
    halo: int
    """Grid points beyond it on either side."""
    stride: int
    """Grid points from patch to patch."""

    @property
    def count(self) -> int:
        """Patches along it."""
        return -(-(self.length - self.size) // self.stride) + 1

    def origins(self, places: Ids) -> Ids:
        """First grid point of the patches at some places along it; the last patch ends where the array does."""
        return np.minimum(places * self.stride, self.length - self.size)


@dataclass(frozen=True, slots=True)
class PatchGrid:
    """The patches of one record, numbered with the last dimension fastest."""

    axes: tuple[PatchAxis, ...]
    """Dimensions, in declared order."""
    edge: Literal["reflect", "missing"]
    """What a halo holds beyond the array."""

    @property
    def count(self) -> int:
        """Patches of a record."""
        return math.prod(axis.count for axis in self.axes)

    def origins(self, patches: Ids) -> Ids:
        """First grid point of patches along each axis, [n, axes]."""
        columns = [axis.origins(at) for at, axis in zip(self.places(patches), self.axes, strict=True)]
        return np.stack(columns, axis=-1).astype(np.int64)

    def places(self, patches: Ids) -> tuple[Ids, ...]:
        """Place of patches along each axis, [n] each."""
        return np.unravel_index(patches, [axis.count for axis in self.axes])


@dataclass(frozen=True, slots=True)
class Boxes:
    """Where patches lie in an array, halo included, along its last axes."""

    low: Ids
    """First grid point that is inside the array, [n, axes]."""
    high: Ids
    """One past the last that is, [n, axes]."""
    before: Ids
    """Grid points of the halo before `low` that are outside, [n, axes]."""


@dataclass(frozen=True, slots=True)
class PatchCut:
    """How patches are cut from the last axes of one field."""

    axes: tuple[PatchAxis, ...]
    """Its patched axes, in the order of the array; their `halo` is 0 for a target."""
    places: tuple[int, ...]
    """Where each of them is in the grid."""
    grid: PatchGrid
    """The grid of the whole sample."""
    beyond: int | float | None
    """Stored value of what lies beyond the array; None reflects."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Grid points of a patch and its halo, along `axes`."""
        return tuple(axis.size + 2 * axis.halo for axis in self.axes)

    def boxes(self, patches: Ids) -> Boxes:
        """Where patches lie."""
        size, halo, length = (np.array([getattr(a, k) for a in self.axes]) for k in ("size", "halo", "length"))
        origins = self.grid.origins(patches)[:, list(self.places)]
        low, high = np.maximum(origins - halo, 0), np.minimum(origins + size + halo, length)
        return Boxes(low, high, np.maximum(halo - origins, 0))

    def place(self, values: npt.NDArray[Any], before: Sequence[int], out: npt.NDArray[Any]) -> None:
        """Write what lies inside the array, [..., *box], to `out`, [..., *shape], and what lies beyond it.

        An axis is completed over the whole width of the others, so that the last one puts the corners right.
        """
        shift = values.ndim - len(self.axes)
        inside = [(first, first + size) for first, size in zip(before, values.shape[shift:], strict=True)]
        index: tuple[Any, ...] = (..., *(slice(*span) for span in inside))
        out[index] = values
        for axis, (start, stop) in enumerate(inside):
            along = np.moveaxis(out, shift + axis, 0)
            after = len(along) - stop
            if self.beyond is not None:
                along[:start] = along[stop:] = self.beyond
                continue
            if start:
                along[:start] = along[2 * start : start : -1]
            if after:
                along[stop:] = along[stop - 1 - after : stop - 1][::-1]


def patch_grid(patch: Patch, lengths: Mapping[str, set[int]], fixed: Mapping[str, str]) -> PatchGrid:
    """The patches of a record.

    Args:
        patch: as declared.
        lengths: grid points along each dimension, in all variables that have it.
        fixed: dimensions that cannot be cut, and what they are.

    Raises:
        InputError: a dimension that is not there, that cannot be cut or on which the variables differ; a patch larger
            than the array; a halo that cannot be reflected.
    """
    axes = []
    for dim, size in patch.size.items():
        if dim in fixed:
            raise InputError(f"{dim!r} is {fixed[dim]}, which has no patches: leave it out of `patch`")
        if dim not in lengths:
            raise InputError(f"patch dimension {dim!r} does not exist; the variables have {', '.join(sorted(lengths))}")
        if len(lengths[dim]) > 1:
            raise InputError(f"variables differ in their length along {dim!r}, {sorted(lengths[dim])}: no common grid")
        length, halo = min(lengths[dim]), patch.halo.get(dim, 0)
        if size > length:
            raise InputError(f"a patch of {size} along {dim!r} is larger than the array's {length}: make it smaller")
        if patch.edge == "reflect" and halo >= length:
            raise InputError(
                f"a halo of {halo} along {dim!r} cannot be reflected from {length} grid points: at most {length - 1}, "
                "or declare edge='missing'"
            )
        axes.append(PatchAxis(dim, length, size, halo, (patch.stride or {}).get(dim, size)))
    return PatchGrid(tuple(axes), patch.edge)


def beyond(variable: str, dtype: np.dtype[Any], missing: int | float | None) -> int | float:
    """The stored value that stands for missing data beyond an array.

    Raises:
        InputError: the variable has none.
    """
    if missing is None and dtype.kind == "f":
        return math.nan
    if missing is None:
        raise InputError(
            f"{variable!r} ({dtype}) has no value for missing data that a halo could hold: declare edge='reflect'"
        )
    return missing


def chunks_of(boxes: Boxes, records: Ids, chunk: Sequence[int], counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Grid positions of the inner chunks that boxes intersect, some of them several times.

    Args:
        boxes: along the last axes of an array.
        records: records that each is cut from, [n, steps].
        chunk: shape of an inner chunk.
        counts: inner chunks along each axis.
    """
    cut = boxes.low.shape[1]
    first, last = boxes.low // chunk[-cut:], (boxes.high - 1) // chunk[-cut:]
    whole = [range(count) for count in counts[1:-cut]]
    for rows, low, high in zip((records // chunk[0]).tolist(), first.tolist(), last.tolist(), strict=True):
        yield from product(set(rows), *whole, *(range(a, b + 1) for a, b in zip(low, high, strict=True)))


def intersects(boxes: Boxes, position: Sequence[int], chunk: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Which boxes intersect the inner chunk at a grid position, [n]."""
    cut = boxes.low.shape[1]
    size = np.array(chunk[-cut:], np.int64)
    start = np.array(position[-cut:], np.int64) * size
    return np.asarray(((boxes.low < start + size) & (boxes.high > start)).all(axis=1))


def read_box(
    chunks: Mapping[Key, Chunk], name: str, size: Sequence[int], record: int, box: Sequence[tuple[int, int]]
) -> npt.NDArray[Any]:
    """The part [low, high) of a record along each axis out of decoded chunks: a view, unless it lies in several."""
    first, row = divmod(record, size[0])
    inner = [range(low // c, -(-high // c)) for (low, high), c in zip(box, size[1:], strict=True)]
    if all(len(places) == 1 for places in inner):
        at = [places[0] for places in inner]
        part = tuple(slice(low - i * c, high - i * c) for i, (low, high), c in zip(at, box, size[1:], strict=True))
        return np.asarray(chunks[name, (first, *at)].data[row][part])
    whole: npt.NDArray[Any] | None = None
    for position in product(*inner):
        data = chunks[name, (first, *position)].data[row]
        if whole is None:
            whole = np.empty([high - low for low, high in box], data.dtype)
        into: tuple[slice, ...] = ()
        part = ()
        for i, (low, high), c in zip(position, box, size[1:], strict=True):
            start, stop = max(low, i * c), min(high, (i + 1) * c)
            into, part = (*into, slice(start - low, stop - low)), (*part, slice(start - i * c, stop - i * c))
        whole[into] = data[part]
    assert whole is not None
    return whole
