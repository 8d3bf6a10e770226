"""Records cut out of a source: what one variable of a recipe will hold once it is stored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.data.writing.inputs import Input, open_input
from gpuops.data.writing.packing import Packing, apply
from gpuops.data.writing.quality import Rules, Violation
from gpuops.data.writing.recipe import Tiling, VariableRecipe
from gpuops.errors import InputError

_PIECE = 2**21
"""Values computed with at a time: in float64, with masks, they take some ten times the memory that is stored."""


def pieces(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of records [records, *record] that together are all of them."""
    step = max(1, _PIECE // max(1, math.prod(shape[1:])))
    for first in range(0, shape[0], step):
        yield slice(first, min(first + step, shape[0]))


@dataclass(frozen=True, slots=True)
class Records:
    """Records read from a source, and what was seen on the way."""

    stored: npt.NDArray[Any]
    """Packed records as they are stored, [records, *record]."""
    nan: int = 0
    """NaN in the source."""
    infinite: int = 0
    """Infinities in the source."""
    max_error: float | None = None
    """Largest absolute error of packing, physical units; None where nothing was packed."""
    violations: list[Violation] = field(default_factory=list)
    """Values that packing cannot hold."""


@dataclass(frozen=True, slots=True)
class Block:
    """A variable as it is stored: records cut out of its source."""

    name: str
    """Variable name."""
    input: Input
    """What it is read from."""
    source_dims: tuple[str, ...]
    """The source's dimensions under the names of the store, in its order."""
    dims: tuple[str, ...]
    """Stored dimensions; the first is the sample axis."""
    shape: tuple[int, ...]
    """Stored shape, of the source's records alone."""
    tiling: Tiling | None
    """How records are cut, if they are tiles."""
    source_scale: float
    """Physical units per step of the source."""
    source_offset: float
    """Physical value of the source's 0."""
    source_missing: tuple[float, ...]
    """Values of the source that mean "no data"; the first one is stored for all of them."""
    fill: float | None
    """Physical value that training and serving put in the place of missing data."""
    unit: str
    """Unit of the physical values."""
    long_name: str
    """What it is, in words."""
    rules: Rules
    """Rules that block the commit when broken."""
    packing: Packing | None = None
    """None stores what the source stores."""
    before: int = 0
    """Records that the store held before these were appended."""
    old: Input | None = None
    """Those records, in the version of the store that they are appended to."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Stored dtype: the packing's, else the source's, little-endian."""
        dtype: np.dtype[Any] = self.input.dtype if self.packing is None else self.packing.dtype
        return dtype.newbyteorder("<")

    @property
    def scale(self) -> float:
        """Physical units per stored step."""
        return self.source_scale if self.packing is None else self.packing.scale

    @property
    def offset(self) -> float:
        """Physical value of stored 0."""
        return self.source_offset if self.packing is None else self.packing.offset

    @property
    def missing(self) -> int | None:
        """Stored value that means "no data"; None in float arrays, where NaN does."""
        if self.packing is not None:
            return self.packing.missing
        return None if self.dtype.kind == "f" or not self.source_missing else int(self.source_missing[0])

    @property
    def records(self) -> int:
        """Records of the stored array, appended ones included."""
        return self.before + self.shape[0]

    @property
    def sizes(self) -> dict[str, int]:
        """Lengths of the source's dimensions."""
        return dict(zip(self.source_dims, self.input.shape, strict=True))

    def named(self, dim: str) -> str | None:
        """The source's own name of a dimension."""
        if dim not in self.source_dims or self.input.dims is None:
            return None
        return self.input.dims[self.source_dims.index(dim)]

    def kept(self, first: int, last: int) -> npt.NDArray[Any]:
        """Records of the stored array from before an append."""
        assert self.old is not None
        return self.old[first:last]

    def read(self, first: int, last: int) -> Records:
        """Records `first` to `last` of the stored array, which lie in the source `before` records earlier."""
        values = self._cut(first - self.before, last - self.before)
        floats = values.dtype.kind == "f"
        nan = int(np.isnan(values).sum()) if floats else 0
        infinite = int(np.isinf(values).sum()) if floats else 0
        absent = [values == np.asarray(one).astype(values.dtype) for one in self.source_missing]
        if self.packing is None:
            stored = values.astype(self.dtype, copy=not self.input.dtype.isnative or bool(absent))
            for where in absent:
                stored[where] = np.nan if floats else self.source_missing[0]
            return Records(np.ascontiguousarray(stored), nan, infinite)
        stored, largest = np.empty(values.shape, self.dtype), 0.0
        found: list[Violation] = []
        for part in pieces(values.shape):
            physical = values[part].astype(np.float64) * self.source_scale + self.source_offset
            for where in absent:
                physical[where[part]] = np.nan
            stored[part], error, broken = apply(self.name, physical, first + part.start, self.packing)
            largest, found = max(largest, error), found + broken
        return Records(stored, nan, infinite, largest, found)

    def range(self, first: int, last: int) -> tuple[float, float]:
        """Smallest and largest finite physical value of source records; (inf, -inf) if there is none."""
        values = self._cut(first, last).astype(np.float64)
        data = np.isfinite(values)
        for one in self.source_missing:
            data &= values != np.float64(np.asarray(one).astype(self.input.dtype))
        if not data.any():
            return math.inf, -math.inf
        ends = sorted(
            float(v) * self.source_scale + self.source_offset for v in (values[data].min(), values[data].max())
        )
        return ends[0], ends[1]

    def _cut(self, first: int, last: int) -> npt.NDArray[Any]:
        """Records of the source, read row by row of tiles."""
        if self.tiling is None:
            return self.input[first:last]
        axis = self.source_dims.index(self.tiling.rows)
        across, size = self.source_dims.index(self.tiling.columns), self.tiling.size
        columns = self.input.shape[across] // size
        parts = []
        for row in range(first // columns, -(-last // columns)):
            low, high = max(first - row * columns, 0), min(last - row * columns, columns)
            index: list[slice] = [slice(None)] * len(self.source_dims)
            index[axis], index[across] = slice(row * size, (row + 1) * size), slice(low * size, high * size)
            band = np.moveaxis(self.input[tuple(index)], (axis, across), (-2, -1))
            tiles = band.reshape(*band.shape[:-1], high - low, size)
            parts.append(np.moveaxis(tiles, -2, 0))
        return np.concatenate(parts)


def make_block(name: str, recipe: VariableRecipe, tiling: Tiling | None) -> Block:
    """Open a variable's source and plan its records; InputError if the recipe does not fit the source."""
    found = open_input(recipe.source)
    shown = recipe.source if isinstance(recipe.source, str) else "the array"
    known = found.attributes
    dims = tuple(recipe.dims) or found.dims
    if dims is None:
        dims = ("sample", *(f"dim_{i}" for i in range(1, len(found.shape))))
        if tiling is not None:
            raise InputError(f"{name}: {shown} names no dimensions: give dims in the recipe")
    if len(dims) != len(found.shape) or len(set(dims)) != len(dims) or not dims:
        raise InputError(f"{name}: {shown} has {len(found.shape)} dimensions, the recipe names {list(dims)}")
    if 0 in found.shape or found.dtype.kind not in "iuf":
        raise InputError(f"{name}: {shown} is {found.dtype} {list(found.shape)}: give numbers, at least one")
    missing = tuple(
        dict.fromkeys(v for v in (known.get("_FillValue"), known.get("missing_value")) if v is not None and v == v)
    )
    if recipe.missing is not None:
        missing = (recipe.missing,)
    if found.dtype.kind != "f":
        info = np.iinfo(found.dtype)
        for one in missing:
            if not info.min <= one <= info.max or int(one) != one:
                raise InputError(f"{name}: missing {one} is no value of {found.dtype}: mend the recipe")
    scale = float(known.get("scale_factor", 1.0) if recipe.scale is None else recipe.scale)
    offset = float(known.get("add_offset", 0.0) if recipe.offset is None else recipe.offset)
    if scale == 0 or not math.isfinite(scale) or not math.isfinite(offset):
        raise InputError(f"{name}: scale {scale} and offset {offset} make no physical values")
    stored_dims, shape = _stored(name, dims, found.shape, tiling)
    return Block(
        name=name,
        input=found,
        source_dims=dims,
        dims=stored_dims,
        shape=shape,
        tiling=tiling,
        source_scale=scale,
        source_offset=offset,
        source_missing=missing,
        fill=recipe.fill,
        unit=str(known.get("units", "1") if recipe.unit is None else recipe.unit),
        long_name=str(known.get("long_name", "") if recipe.long_name is None else recipe.long_name),
        rules=recipe.quality,
    )


def _stored(
    name: str, dims: tuple[str, ...], shape: tuple[int, ...], tiling: Tiling | None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Stored dimensions and shape; InputError if tiles cannot be cut."""
    if tiling is None:
        return dims, tuple(shape)
    if tiling.size < 1 or tiling.region < 1 or tiling.rows == tiling.columns:
        raise InputError(f"{tiling} cuts no tiles: name two dimensions and sizes of at least 1")
    sizes = dict(zip(dims, shape, strict=True))
    for dim in (tiling.rows, tiling.columns):
        if dim not in sizes:
            raise InputError(f"{name}: tiling cuts dimension {dim!r}, the variable has {list(dims)}")
        if sizes[dim] % tiling.size:
            raise InputError(f"{name}: {dim} has {sizes[dim]} points, not a multiple of tiles of {tiling.size}")
    rows, columns = sizes.pop(tiling.rows) // tiling.size, sizes.pop(tiling.columns) // tiling.size
    return (tiling.name, *sizes, "y", "x"), (rows * columns, *sizes.values(), tiling.size, tiling.size)


def check_aligned(blocks: list[Block]) -> None:
    """Raise InputError unless record i is the same place, or time, in every variable."""
    counts = {block.name: block.shape[0] for block in blocks}
    if len(set(counts.values())) != 1:
        raise InputError(f"variables differ in their number of samples: {counts}")
    axes = {block.name: block.dims[0] for block in blocks}
    if len(set(axes.values())) != 1:
        raise InputError(f"variables differ in their sample axis: {axes}")
    for first in blocks:
        for other in blocks:
            # The same number of tiles out of 40 x 60 and 60 x 40 points would pair tiles of different places.
            if different := [dim for dim in first.sizes if other.sizes.get(dim, first.sizes[dim]) != first.sizes[dim]]:
                sizes = {block.name: block.sizes[different[0]] for block in (first, other)}
                raise InputError(f"variables differ in their length along {different[0]!r}: {sizes}")
