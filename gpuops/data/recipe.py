"""The ingest recipe: what a data set is made of, as a YAML file says it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.data.quality import Rules
from gpuops.errors import InputError

CODECS = ("zstd", "none")


@dataclass(frozen=True, slots=True)
class VariableRecipe:
    """One variable: where it comes from and what its stored values mean."""

    source: str
    """`FILE#DATASET` (HDF5, NetCDF-4) or a Zarr array's path; `package://NAME/PATH` is a file of a package."""
    dims: list[str]
    """Names of the source's dimensions, in its order."""
    scale: float = 1.0
    """Physical units per stored step."""
    offset: float = 0.0
    """Physical value of stored 0."""
    missing: int | None = None
    """Stored value that means "no data"; in float sources it is stored as NaN."""
    fill: float | None = None
    """Physical value that training and serving put in the place of missing data."""
    unit: str = "1"
    """Unit of the physical values."""
    long_name: str = ""
    """What it is, in words."""
    quality: Rules = field(default_factory=Rules)
    """Rules that block the commit when broken."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Coordinate values of a source dimension: first, first + step, ..."""

    first: float
    """First value."""
    step: float
    """Difference between neighbours."""
    unit: str = "1"
    """Unit."""


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
    """Where the store is written."""
    variables: dict[str, VariableRecipe]
    """By name in the store."""
    coordinates: dict[str, Axis] = field(default_factory=dict)
    """By source dimension; dimensions left out have none."""
    tiling: Tiling | None = None
    """None keeps the sources' own axes: the first dimension is the sample axis."""
    codec: str = "zstd"
    """"zstd" (with checksums, level 1) or "none" (with crc32c)."""
    title: str = ""
    """Title of the data set."""

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise InputError(f"codec {self.codec!r} is not one of {', '.join(CODECS)}")
        if not self.variables:
            raise InputError("the recipe declares no variables")


def load_recipe(path: str | Path, url: str | None = None) -> Recipe:
    """Read a recipe, with `url` in place of its own; InputError names an unknown key or a wrong type."""
    import jsonargparse

    file = Path(path)
    if not file.is_file():
        raise InputError(f"recipe {file} does not exist: `gpuops demo --recipe DIR` writes one to start from")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe)
    try:
        config = parser.parse_path(str(file))
        recipe = parser.instantiate(config)
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise InputError(f"recipe {file}: {' '.join(str(error).split())}") from error
    return Recipe(**{**vars(recipe), "url": url or recipe.url})


def open_array(url: str) -> Any:
    """An array-like (shape, dtype, slicing) for a recipe's `source`.

    Raises:
        InputError: a missing package or file, a truncated file, or no such dataset; the message lists what there is.
    """
    location, _, dataset = url.partition("#")
    path = _package_file(location) if location.startswith("package://") else Path(location)
    if not path.exists():
        raise InputError(f"source {path} does not exist: mend `source: {url}` in the recipe")
    if path.is_dir():
        import zarr

        try:
            return zarr.open_array(path / dataset, mode="r")
        except (FileNotFoundError, ValueError) as error:
            raise InputError(f"{path / dataset} is not a Zarr array: mend `source: {url}` in the recipe") from error
    import h5py

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path} is truncated or not HDF5 ({error}): fetch it again") from error
    dataset = dataset.strip("/")
    names: list[str] = []
    file.visititems(lambda name, node: names.append(name) if isinstance(node, h5py.Dataset) else None)
    if dataset not in names:
        file.close()
        raise InputError(
            f"{path} has no dataset {dataset!r}; it has {', '.join(names) or 'none'}: mend the recipe (FILE#DATASET)"
        )
    return file[dataset]


def _package_file(url: str) -> Path:
    """The file behind `package://NAME/PATH`, found without importing the package."""
    name, _, inside = url.removeprefix("package://").partition("/")
    try:
        spec = importlib.util.find_spec(name)
    except (ModuleNotFoundError, ValueError):  # the parent of a dotted name, or no name
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"package {name!r} is not installed: pip install {name}")
    return Path(spec.submodule_search_locations[0]) / inside


def axis_values(axis: Axis, count: int) -> npt.NDArray[Any]:
    """Coordinate values of `count` points; int32 where they are whole numbers, else float64."""
    values = axis.first + axis.step * np.arange(count)
    whole = float(axis.first).is_integer() and float(axis.step).is_integer()
    return values.astype(np.int32) if whole else values
