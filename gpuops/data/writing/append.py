"""Appending: what is there says how the new records are stored, and they must fit it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import zarr

from gpuops.data.source import META
from gpuops.data.writing.block import Block
from gpuops.data.writing.coordinates import Coordinate, converted
from gpuops.data.writing.inputs import open_input
from gpuops.data.writing.packing import Packing
from gpuops.data.writing.recipe import Recipe
from gpuops.data.writing.shards import packing_attributes
from gpuops.errors import InputError


def array_of(group: zarr.Group, name: str, place: str) -> zarr.Array[Any]:
    """The store's array of a variable; InputError if there is none."""
    node = group.get(name)
    if not isinstance(node, zarr.Array):
        raise InputError(f"{place} has no variable {name!r}: append the same variables, or ingest into another place")
    return node


def check_same_variables(group: zarr.Group, given: Mapping[str, Any], place: str) -> None:
    """Raise InputError unless the store is ours and has no variable beyond those given."""
    stats = group.get(f"{META}/stats")
    if not isinstance(stats, zarr.Group):
        raise InputError(f"{place} was not written by gpuops, so nothing can be appended: ingest it into another place")
    if absent := sorted(set(stats.array_keys()) - set(given)):
        raise InputError(f"{place} also has {', '.join(absent)}: append every variable, or ingest into another place")


def fitted(recipe: Recipe, block: Block, array: zarr.Array[Any], said: Mapping[str, Any], place: str) -> Block:
    """The block as the store's array goes on, packed as that is; InputError names what differs."""
    attributes = array.attrs.asdict()
    pack, recorded = recipe.pack_of(block.name, block.input.dtype), said["pack"]
    if pack is not None and recorded is None:
        raise InputError(f"{block.name} is stored as {array.dtype}, not packed: append it without pack")
    if pack is not None and pack.tolerance != recorded["tolerance"]:
        raise InputError(
            f"{block.name} is packed within {recorded['tolerance']:g} in the store, not {pack.tolerance:g}: leave the "
            "tolerance out to go on in the store's"
        )
    if recorded is not None:
        scale, offset, missing = (attributes[key] for key in ("scale_factor", "add_offset", "_FillValue"))
        kept = Packing(array.dtype, float(scale), float(offset), int(missing), recorded["tolerance"])  # type: ignore[arg-type]
        block = replace(block, packing=kept)
    dims = tuple(getattr(array.metadata, "dimension_names", None) or ())
    want: dict[str, Any] = {"dtype": array.dtype.name, "record": list(array.shape[1:]), "dims": list(dims)}
    got: dict[str, Any] = {"dtype": block.dtype.name, "record": list(block.shape[1:]), "dims": list(block.dims)}
    keys = ("scale_factor", "add_offset", "units", "_FillValue")
    want |= {key: attributes.get(key) for key in keys}
    ours = packing_attributes(block)
    got |= {key: ours.get(key) for key in keys}
    if different := [key for key in want if want[key] != got[key]]:
        first = different[0]
        raise InputError(
            f"{block.name} differs from the store's in {', '.join(different)} ({first} {got[first]}, there "
            f"{want[first]}): nothing was appended; mend the recipe or ingest into another place"
        )
    return replace(block, before=array.shape[0], old=open_input(f"{place}#{block.name}"))


def grown_coordinates(
    group: zarr.Group, coordinates: Mapping[str, Coordinate], block: Block, variables: set[str]
) -> dict[str, Coordinate]:
    """The store's coordinates with those of the appended records behind them."""
    there = {name: array for name, array in group.arrays() if name not in variables}
    if set(there) != set(coordinates):
        raise InputError(f"the store has coordinates {sorted(there)}, these records bring {sorted(coordinates)}")
    grown = {}
    for name, array in there.items():
        attributes, old = array.attrs.asdict(), np.asarray(array[:])
        new = converted(name, coordinates[name], attributes)
        values = new.values
        if new.dim == block.dims[0]:
            if name == new.dim and (again := np.isin(values, old)).any():
                first = values[again.argmax()]
                raise InputError(f"{name} {first} is in the store already: nothing was appended")
            values = np.concatenate([old, values.astype(np.promote_types(old.dtype, values.dtype))])
        elif not np.array_equal(old, values):
            raise InputError(f"coordinate {name!r} differs from the store's: these records lie at other places")
        grown[name] = Coordinate(values, attributes, new.dim)
    return grown
