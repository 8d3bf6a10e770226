"""Coordinates of a data set: taken from the sources, declared in the recipe, or made by tiling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpuops.data.writing.quality import Violation, check_axis
from gpuops.data.writing.recipe import Recipe, axis_values
from gpuops.errors import InputError

if TYPE_CHECKING:
    import xarray as xr

    from gpuops.data.writing.block import Block


@dataclass(frozen=True, slots=True, eq=False)
class Coordinate:
    """Values along one dimension."""

    values: npt.NDArray[Any]
    """[points], numbers."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """CF attributes: units, calendar, standard_name and the like."""
    dim: str = ""
    """Dimension in the store."""

    @classmethod
    def of(cls, values: npt.NDArray[Any], attributes: Mapping[str, Any]) -> Coordinate:
        """A coordinate as it lies in a container, little-endian, with the attributes that say what it means."""
        kept = ("units", "calendar", "standard_name", "long_name", "axis")
        meaning = {key: str(attributes[key]) for key in kept if key in attributes}
        return cls(np.asarray(values, values.dtype.newbyteorder("<")), meaning)


def of_xarray(variable: xr.Variable, like: Mapping[str, Any] | None = None) -> Coordinate:
    """A coordinate of xarray as numbers; times as CF says, in the units and calendar of `like` if given."""
    import xarray as xr

    plain = xr.Variable(variable.dims, variable.to_numpy(), variable.attrs)
    if like is not None:
        plain.encoding = {key: like[key] for key in ("units", "calendar") if key in like}
    encoded = xr.conventions.encode_cf_variable(plain)
    return Coordinate.of(encoded.to_numpy(), encoded.attrs)


def converted(name: str, coordinate: Coordinate, like: Mapping[str, Any]) -> Coordinate:
    """The coordinate in the units of `like`; InputError if units differ and are no times."""
    import xarray as xr

    ours, theirs = ({k: a[k] for k in ("units", "calendar") if k in a} for a in (coordinate.attributes, like))
    if ours == theirs:
        return Coordinate(coordinate.values, like, coordinate.dim)
    if " since " not in ours.get("units", "") or " since " not in theirs.get("units", ""):
        raise InputError(f"coordinate {name!r} is in {ours.get('units')!r} here and {theirs.get('units')!r} there")
    times = xr.conventions.decode_cf_variable(name, xr.Variable((name,), coordinate.values, coordinate.attributes))
    values = of_xarray(xr.Variable(times.dims, times.to_numpy()), theirs).values
    return Coordinate(values, like, coordinate.dim)


def joined(name: str, parts: list[Coordinate]) -> Coordinate:
    """Parts one after another, in the units of the first: each file of a series may count from a date of its own."""
    same = [converted(name, part, parts[0].attributes) for part in parts]
    return Coordinate(np.concatenate([part.values for part in same]), parts[0].attributes, parts[0].dim)


def make_coordinates(recipe: Recipe, blocks: list[Block]) -> dict[str, Coordinate]:
    """Every coordinate of the store, by name.

    Raises:
        InputError: a coordinate of no dimension, without values, or with the name of a variable.
    """
    sizes = {dim: size for block in blocks for dim, size in block.sizes.items()}
    tiling = recipe.tiling
    for dim in recipe.coordinates:
        if dim not in sizes:
            raise InputError(f"coordinates name dimension {dim!r}; the variables have {', '.join(sizes)}")
    along = {dim: found for dim in sizes if (found := _values(recipe, blocks, dim, sizes[dim])) is not None}
    cut = () if tiling is None else (tiling.rows, tiling.columns)
    made = {dim: Coordinate(one.values, one.attributes, dim) for dim, one in along.items() if dim not in cut}
    if tiling is not None:
        row, column = np.divmod(np.arange(blocks[0].shape[0]), sizes[tiling.columns] // tiling.size)
        for dim, position in ((tiling.rows, row), (tiling.columns, column)):
            if dim in along:
                whole = along[dim].values.astype(np.float64).reshape(-1, tiling.size)
                middle = whole[:, [0, -1]].mean(axis=1)[position]
                made[dim] = Coordinate(middle.astype(np.float32), along[dim].attributes, tiling.name)
        across = -(-sizes[tiling.columns] // (tiling.size * tiling.region))
        region = (row // tiling.region) * across + column // tiling.region
        made["region"] = Coordinate(region.astype(np.int32), {"units": "1"}, tiling.name)
    for name in made:
        if name in recipe.variables:
            raise InputError(f"a variable and a coordinate are both called {name!r}: rename the variable")
    return made


def _values(recipe: Recipe, blocks: list[Block], dim: str, size: int) -> Coordinate | None:
    """Values along a source dimension: the recipe's, else those of the first source that has them."""
    axis = recipe.coordinates.get(dim)
    if axis is not None and axis.first is not None:
        return Coordinate(axis_values(axis, size), {"units": axis.unit or "1"})
    brought = [one for block in blocks if (one := block.input.coordinates.get(block.named(dim) or "")) is not None]
    for other in brought[1:]:
        if not np.array_equal(converted(dim, other, brought[0].attributes).values, brought[0].values):
            raise InputError(
                f"the sources differ in coordinate {dim!r}: sample i is not the same place or time in each"
            )
    if not brought:
        if axis is not None:
            raise InputError(f"no source has coordinate {dim!r}: give first and step in the recipe")
        return None
    units = {} if axis is None or axis.unit is None else {"units": axis.unit}
    return Coordinate(brought[0].values, {"units": "1", **brought[0].attributes, **units})


def located(recipe: Recipe, coordinates: Mapping[str, Coordinate]) -> list[str]:
    """Names of those that locate a tile (CF's auxiliary coordinates)."""
    return [] if recipe.tiling is None else [name for name, one in coordinates.items() if name != one.dim]


def check_coordinates(
    recipe: Recipe, coordinates: Mapping[str, Coordinate], sample_axis: str
) -> tuple[dict[str, Any], list[Violation]]:
    """Findings by coordinate (those with rules, and the sample axis), and broken rules."""
    from gpuops.data.writing.quality import AxisRules

    found: dict[str, Any] = {}
    violations: list[Violation] = []
    for name, one in coordinates.items():
        declared = recipe.coordinates.get(name)
        if name != one.dim or (name != sample_axis and (declared is None or declared.quality == AxisRules())):
            continue
        found[name], broken = check_axis(name, one.values, AxisRules() if declared is None else declared.quality)
        violations += broken
    return found, violations
