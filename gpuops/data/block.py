"""Records cut out of a source: what one variable of a recipe will hold once it is stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.data.recipe import Tiling, VariableRecipe, open_array
from gpuops.errors import InputError


@dataclass(frozen=True, slots=True)
class Block:
    """A variable as it is stored: records cut out of its source."""

    name: str
    """Variable name."""
    recipe: VariableRecipe
    """Its part of the recipe."""
    source: Any
    """Array-like that it is read from."""
    dims: tuple[str, ...]
    """Stored dimensions; the first is the sample axis."""
    shape: tuple[int, ...]
    """Stored shape."""
    tiling: Tiling | None
    """How records are cut, if they are tiles."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Stored dtype: the source's, little-endian."""
        dtype: np.dtype[Any] = np.dtype(self.source.dtype).newbyteorder("<")
        return dtype

    @property
    def missing(self) -> int | None:
        """Stored value that means "no data"; None in float arrays, where NaN does."""
        return None if self.dtype.kind == "f" else self.recipe.missing

    @property
    def sizes(self) -> dict[str, int]:
        """Lengths of the source's dimensions."""
        return dict(zip(self.recipe.dims, self.source.shape, strict=True))

    def read(self, first: int, last: int) -> npt.NDArray[Any]:
        """Packed records [last - first, *record] as they are stored."""
        records = self._cut(first, last).astype(self.dtype, copy=False)
        if self.recipe.missing is not None and self.missing is None:
            records = np.where(records == self.recipe.missing, self.dtype.type(np.nan), records)
        return np.ascontiguousarray(records)

    def _cut(self, first: int, last: int) -> npt.NDArray[Any]:
        """Records of the source, read row by row of tiles."""
        if self.tiling is None:
            return np.asarray(self.source[first:last])
        axis = self.recipe.dims.index(self.tiling.rows)
        across, size = self.recipe.dims.index(self.tiling.columns), self.tiling.size
        columns = self.source.shape[across] // size
        parts = []
        for row in range(first // columns, -(-last // columns)):
            low, high = max(first - row * columns, 0), min(last - row * columns, columns)
            index: list[slice] = [slice(None)] * len(self.recipe.dims)
            index[axis], index[across] = slice(row * size, (row + 1) * size), slice(low * size, high * size)
            band = np.moveaxis(np.asarray(self.source[tuple(index)]), (axis, across), (-2, -1))
            tiles = band.reshape(*band.shape[:-1], high - low, size)
            parts.append(np.moveaxis(tiles, -2, 0))
        return np.concatenate(parts)


def make_block(name: str, recipe: VariableRecipe, tiling: Tiling | None) -> Block:
    """Open a variable's source and plan its records; InputError if the recipe does not fit the source."""
    source = open_array(recipe.source)
    if len(recipe.dims) != len(source.shape) or len(set(recipe.dims)) != len(recipe.dims) or not recipe.dims:
        raise InputError(f"{name}: {recipe.source} has {len(source.shape)} dimensions, the recipe names {recipe.dims}")
    if 0 in source.shape or source.dtype.kind not in "iuf":
        raise InputError(f"{name}: {recipe.source} is {source.dtype} {list(source.shape)}: give numbers, at least one")
    if source.dtype.kind != "f" and recipe.missing is not None:
        info = np.iinfo(source.dtype)
        if not info.min <= recipe.missing <= info.max:
            raise InputError(f"{name}: missing {recipe.missing} is no value of {source.dtype}: mend the recipe")
    if recipe.scale == 0 or not math.isfinite(recipe.scale) or not math.isfinite(recipe.offset):
        raise InputError(f"{name}: scale {recipe.scale} and offset {recipe.offset} make no physical values")
    if tiling is None:
        return Block(name, recipe, source, tuple(recipe.dims), tuple(source.shape), None)
    if tiling.size < 1 or tiling.region < 1 or tiling.rows == tiling.columns:
        raise InputError(f"{tiling} cuts no tiles: name two dimensions and sizes of at least 1")
    sizes = dict(zip(recipe.dims, source.shape, strict=True))
    for dim in (tiling.rows, tiling.columns):
        if dim not in sizes:
            raise InputError(f"{name}: tiling cuts dimension {dim!r}, the variable has {recipe.dims}")
        if sizes[dim] % tiling.size:
            raise InputError(f"{name}: {dim} has {sizes[dim]} points, not a multiple of tiles of {tiling.size}")
    rows, columns = sizes.pop(tiling.rows) // tiling.size, sizes.pop(tiling.columns) // tiling.size
    dims = (tiling.name, *sizes, "y", "x")
    return Block(name, recipe, source, dims, (rows * columns, *sizes.values(), tiling.size, tiling.size), tiling)


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
