"""The ingest recipe: what a data set is made of, as a YAML file or a caller says it.

What a recipe leaves out is taken from the source where the source names it (CF attributes, dimensions, coordinates).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt

from gpuops.data.writing.packing import Pack
from gpuops.data.writing.quality import AxisRules, Rules
from gpuops.errors import InputError

CODECS = ("zstd", "blosc-lz4", "blosc-zstd", "none")
FORMATS = ("icechunk", "zarr")


@dataclass(frozen=True, slots=True)
class VariableRecipe:
    """One variable: where it comes from and what its stored values mean."""

    source: Any = None
    """`FILE#DATASET` (HDF5, NetCDF), `STORE#ARRAY` (Zarr, Icechunk; paths and URLs), a glob of files that follow
    one another on the sample axis, `package://NAME/PATH#DATASET`, or in Python an array of NumPy, Dask or xarray."""
    dims: list[str] = field(default_factory=list)
    """Names of the source's dimensions, in its order; may be left out where the source names them."""
    scale: float | None = None
    """Physical units per stored step; the source's scale_factor, else 1."""
    offset: float | None = None
    """Physical value of stored 0; the source's add_offset, else 0."""
    missing: int | float | None = None
    """Stored value that means "no data"; in float sources it is stored as NaN. The source's _FillValue."""
    fill: float | None = None
    """Physical value that training and serving put in the place of missing data."""
    unit: str | None = None
    """Unit of the physical values; the source's units, else 1."""
    long_name: str | None = None
    """What it is, in words."""
    pack: Pack | None = None
    """Store physical values as integers that keep a tolerance."""
    quality: Rules = field(default_factory=Rules)
    """Rules that block the commit when broken."""


@dataclass(frozen=True, slots=True)
class StaticRecipe:
    """A field without the sample axis, which belongs to every record (elevation, a land-sea mask)."""

    source: Any = None
    """As that of a variable; of a glob all files must hold the same values."""
    dims: list[str] = field(default_factory=list)
    """Names of the source's dimensions, in its order; may be left out where the source names them."""
    fill: float | None = None
    """Physical value that training and serving put in the place of missing data."""
    unit: str | None = None
    """Unit of the physical values; the source's units, else 1."""
    long_name: str | None = None
    """What it is, in words."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Coordinate values of a source dimension: first, first + step, ...; or the source's own, with rules."""

    first: float | None = None
    """First value; None takes the coordinate that the source brings."""
    step: float | None = None
    """Difference between neighbours."""
    unit: str | None = None
    """Unit; the source's, else 1."""
    quality: AxisRules = field(default_factory=AxisRules)
    """Rules that block the commit when broken."""

    def __post_init__(self) -> None:
        if (self.first is None) != (self.step is None):
            raise InputError("a coordinate needs first and step, or neither")


@dataclass(frozen=True, slots=True)
class Tiling:
    """Cuts two source dimensions into tiles, which become the sample axis."""

    rows: str
    """Source dimension cut into rows of tiles."""
    columns: str
    """Source dimension cut into columns of tiles."""
    size: int
    """Points along each side of a tile."""
    region: int = 1
    """Tiles along each side of a region: neighbours that a split never separates."""
    name: str = "tile"
    """Name of the sample axis."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A data set: its variables, coordinates and layout."""

    url: str
    """Where the store is written: a local directory, or `s3://bucket/prefix` for Icechunk."""
    variables: dict[str, VariableRecipe]
    """By name in the store."""
    coordinates: dict[str, Axis] = field(default_factory=dict)
    """By source dimension; dimensions left out have what the source brings, if it does."""
    tiling: Tiling | None = None
    """None keeps the sources' own axes: the first dimension is the sample axis."""
    codec: str = "zstd"
    """"zstd" (level 1, with checksums), "blosc-lz4", "blosc-zstd" (bitshuffle) or "none" (these with crc32c)."""
    title: str = ""
    """Title of the data set."""
    format: str = "icechunk"
    """"icechunk" (versions, atomic commits) or "zarr" (a plain Zarr v3 directory, renamed into place)."""
    chunk_records: int = 1
    """Records an inner chunk: what a reader decodes at once."""
    shard_records: int | None = None
    """Records a shard, made a multiple of chunk_records; chosen by size if None."""
    tolerance: float | None = None
    """Pack float variables that have no `pack` of their own within this absolute error, physical units."""
    static: dict[str, StaticRecipe] = field(default_factory=dict)
    """Fields that belong to every record, by name in the store; stored whole, as they are."""

    def __post_init__(self) -> None:
        if self.tolerance is not None:
            Pack(self.tolerance)
        if self.codec not in CODECS:
            raise InputError(f"codec {self.codec!r} is not one of {', '.join(CODECS)}")
        if self.format not in FORMATS:
            raise InputError(f"format {self.format!r} is not one of {', '.join(FORMATS)}")
        if not self.variables:
            raise InputError("the recipe declares no variables")
        for name in (*self.variables, *self.static):
            if any(part.startswith((".", "_")) or not part for part in str(name).split("/")):
                raise InputError(f"{name!r} is no name: readers pass over parts that begin with a dot or an underscore")
        if self.chunk_records < 1 or (self.shard_records is not None and self.shard_records < 1):
            raise InputError("chunk_records and shard_records count records: give at least 1")

    def pack_of(self, name: str, dtype: np.dtype[Any]) -> Pack | None:
        """How a variable of a source's dtype is to be packed: as it says itself, floats as the whole recipe says."""
        own = self.variables[name].pack
        if own is not None or self.tolerance is None or dtype.kind != "f":
            return own
        return Pack(self.tolerance)


def load_recipe(path: str | Path, url: str | None = None) -> Recipe:
    """Read a recipe, with `url` in place of its own; InputError names an unknown key or a wrong type."""
    import jsonargparse

    file = Path(path)
    if not file.is_file():
        raise InputError(f"recipe {file} does not exist: `gpuops demo --recipe DIR` writes one to start from")
    check_keys(_document(file), Recipe, f"recipe {file}")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe)
    try:
        config = parser.parse_path(str(file))
        recipe = parser.instantiate(config)
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise InputError(f"recipe {file}: {' '.join(str(error).split())}") from error
    for name, variable in recipe.variables.items():
        if not isinstance(variable.source, str):
            raise InputError(f"recipe {file}: {name} has no source: name a file or a store")
    return Recipe(**{**vars_of(recipe), "url": url or recipe.url})


def _document(file: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {file} is not YAML: {' '.join(str(error).split())}") from error


def known_keys(wrong: str, known: Iterable[str]) -> str:
    """The keys that there are, and first the one that is most like a wrong one."""
    listed = list(known)
    near = difflib.get_close_matches(wrong, listed, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}There are {', '.join(listed)}"


def check_keys(document: Any, kind: Any, where: str) -> None:
    """Find a key in a document that the dataclass `kind`, or one inside it, does not have.

    Raises:
        InputError: the key, where it is, and the one that is most like it; values are looked at by nobody here.
    """
    if is_dataclass(kind) and isinstance(document, Mapping):
        hints = get_type_hints(kind)
        for key, value in document.items():
            if key not in hints:
                raise InputError(f"{where} has no key {key!r}: {known_keys(str(key), hints)}")
            check_keys(value, hints[key], f"{where}: {key}")
    elif get_origin(kind) is dict and isinstance(document, Mapping):
        for key, value in document.items():
            check_keys(value, get_args(kind)[1], f"{where}: {key}")
    elif get_origin(kind) in (Union, UnionType):
        for choice in filter(is_dataclass, get_args(kind)):
            check_keys(document, choice, where)


def vars_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe's keys and values, one level deep."""
    return {name: getattr(recipe, name) for name in Recipe.__dataclass_fields__}


def axis_values(axis: Axis, count: int) -> npt.NDArray[Any]:
    """Coordinate values of `count` points; int32 where they are whole numbers, else float64."""
    assert axis.first is not None
    assert axis.step is not None
    values = axis.first + axis.step * np.arange(count)
    whole = float(axis.first).is_integer() and float(axis.step).is_integer()
    small = whole and math.fabs(values[-1]) < 2**31
    return values.astype(np.int32) if small else values
