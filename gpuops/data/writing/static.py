"""Fields without the sample axis (elevation, a land-sea mask): stored whole, beside the records that they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from gpuops.data.writing.block import Block
from gpuops.data.writing.inputs import parts_of
from gpuops.data.writing.recipe import Recipe
from gpuops.data.writing.shards import write_whole
from gpuops.errors import InputError, IntegrityError

_KEPT = ("scale_factor", "add_offset", "units", "long_name", "standard_name", "_FillValue", "missing_value", "dtype")
"""Attributes of the source that say what the values mean."""


@dataclass(frozen=True, slots=True, eq=False)
class StaticField:
    """A field as it is stored."""

    values: npt.NDArray[Any]
    """Stored values, little-endian."""
    dims: tuple[str, ...]
    """Its dimensions, all of them dimensions inside a record."""
    attributes: Mapping[str, Any]
    """CF attributes."""

    @property
    def report(self) -> dict[str, float]:
        """What the quality report says of it."""
        floats = self.values.dtype.kind == "f"
        absent = np.isnan(self.values) if floats else np.zeros(self.values.shape, bool)
        for key in ("_FillValue", "missing_value"):
            if key in self.attributes:
                absent = absent | (self.values == self.attributes[key])
        return {"values": self.values.size, "missing_share": float(absent.mean())}

    def same(self, stored: zarr.Array[Any]) -> bool:
        """Whether an array holds these values, and means the same by them."""
        there, meaning = np.asarray(stored[...]), stored.attrs.asdict()
        return (
            there.dtype == self.values.dtype
            and there.shape == self.values.shape
            and there.tobytes() == self.values.tobytes()
            and all(meaning.get(key) == self.attributes.get(key) for key in _KEPT)
        )


def make_static(recipe: Recipe, blocks: Sequence[Block]) -> dict[str, StaticField]:
    """Read the static fields of a recipe.

    Raises:
        InputError: dimensions that no variable has inside its records, values that are no numbers, a name that is
            taken, or files of a glob that hold different values.
    """
    if recipe.static and recipe.tiling is not None:
        raise InputError("records are tiles, so a field of the whole area is no part of each: declare it a variable")
    inner = {dim: size for block in blocks for dim, size in zip(block.dims[1:], block.shape[1:], strict=True)}
    fields = {}
    for name, declared in recipe.static.items():
        found, *others = parts_of(declared.source)
        dims = tuple(declared.dims) or found.dims
        if dims is None or len(dims) != len(found.shape):
            raise InputError(f"{name}: the source has {len(found.shape)} dimensions, give `dims` for them, not {dims}")
        if found.dtype.kind not in "iuf" or 0 in found.shape:
            raise InputError(f"{name} is {found.dtype} {list(found.shape)}: give numbers, at least one")
        sizes = dict(zip(dims, found.shape, strict=True))
        if not sizes or not sizes.items() <= inner.items():
            raise InputError(f"{name} lies on {sizes}, records on {inner}: a static field has dimensions of a record")
        if name in recipe.variables or name in inner or name == blocks[0].dims[0]:
            raise InputError(f"a static field and a variable or coordinate are both called {name!r}: rename one")
        values = np.ascontiguousarray(found[...], found.dtype.newbyteorder("<"))
        for other in others:
            if np.asarray(other[...]).tobytes() != np.asarray(found[...]).tobytes():
                raise InputError(f"{name} has no sample axis, but the files of {declared.source} differ in it")
        attributes = {key: found.attributes[key] for key in _KEPT if key in found.attributes}
        given = {"units": declared.unit, "long_name": declared.long_name, "gpuops_fill": declared.fill}
        attributes |= {key: value for key, value in given.items() if value is not None}
        fields[name] = StaticField(values, dims, attributes)
    return fields


def put(group: zarr.Group, fields: Mapping[str, StaticField]) -> None:
    """Store fields, and read them back.

    Raises:
        IntegrityError: what was read is not what was written.
    """
    for name, field in fields.items():
        array = write_whole(group, name, field.values, field.dims, field.attributes)
        if not field.same(array):
            raise IntegrityError(f"{name} did not read back as it was written: check the disk, and ingest again")


def check_same(group: zarr.Group, stored: Sequence[str], fields: Mapping[str, StaticField]) -> None:
    """What is appended brings the static fields that are there, or none.

    Raises:
        InputError: a field that the store does not have, or with other values.
    """
    for name, field in fields.items():
        array = group.get(name) if name in stored else None
        if not isinstance(array, zarr.Array):
            raise InputError(f"the store has no static field {name!r}: leave it out, or ingest into another place")
        if not field.same(array):
            raise InputError(f"static field {name!r} differs from the store's: these records lie at other places")
