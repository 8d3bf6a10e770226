"""What an ingest reads: datasets of HDF5 and NetCDF files, Zarr arrays, globs of files, and arrays in memory.

Every input says what its container knows (dimensions, CF attributes, coordinates) and reads packed values by index. It
travels to other processes as the way to open it, never as an open file.
"""

from __future__ import annotations

import glob as globbing
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.data.writing.choice import chosen
from gpuops.data.writing.coordinates import Coordinate, joined, of_xarray
from gpuops.errors import InputError, UnavailableError

HDF5_MAGIC = b"\x89HDF"
NETCDF3_MAGIC = b"CDF"


@dataclass(eq=False)
class Input:
    """An array that can be read by index, and what its container says about it."""

    shape: tuple[int, ...]
    """Shape."""
    dtype: np.dtype[Any]
    """Stored dtype; what `read` returns."""
    opened: Callable[[], Any]
    """Opens the array-like that is read; must be picklable."""
    dims: tuple[str, ...] | None = None
    """Names of the dimensions, if the container has them."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """CF attributes as plain Python values."""
    coordinates: Mapping[str, Coordinate] = field(default_factory=dict)
    """Coordinates by dimension."""
    identity: Any = None
    """What tells this input from another one, JSON-able: sizes and times of files, a hash of arrays."""
    zarr: Callable[[], Any] | None = None
    """Opens the Zarr array behind it, if it is one: its chunks can be missing."""
    _handle: Any = field(default=None, repr=False)

    def __getitem__(self, index: Any) -> npt.NDArray[Any]:
        if self._handle is None:
            self._handle = self.opened()
        values = np.asarray(_computed(self._handle[index]))
        if values.dtype.kind == "b":
            values = values.view(np.uint8)
        if values.dtype.kind in "iu" and values.dtype.kind != self.dtype.kind:  # NetCDF's attribute _Unsigned
            values = values.view(values.dtype.str.replace(values.dtype.kind, self.dtype.kind))
        return values

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def close(self) -> None:
        """Let go of the file; the next read opens it again."""
        self._handle = None


def open_input(source: Any) -> Input:
    """An input for a recipe's `source`; booleans are read as 0 and 1, and say so as xarray does (`dtype: bool`).

    Raises:
        InputError: a missing package or file, a truncated file, or no such dataset; the message lists what there is.
    """
    if isinstance(source, Input):
        return source
    return _as_integers(_opened(source))


def _as_integers(found: Input) -> Input:
    """Booleans as 0 and 1."""
    if found.dtype.kind == "b":
        found.dtype, found.attributes = np.dtype("uint8"), {**found.attributes, "dtype": "bool"}
    return found


def _opened(source: Any) -> Input:
    if not isinstance(source, str | Path):
        return _of_array(source)
    url = str(source)
    location, _, dataset = url.partition("#")
    if location.startswith("package://"):
        return _of_path(_package_file(location), dataset, url)
    if "://" in location:
        return _of_store(location, dataset)
    if globbing.has_magic(location) and not Path(location).exists():
        return _concatenated(location, parts_of(url))
    return _of_path(Path(location), dataset, url)


def parts_of(source: Any) -> list[Input]:
    """An input for each file of a glob; of any other source the one that there is.

    Raises:
        InputError: as `open_input`.
    """
    location, _, dataset = str(source).partition("#") if isinstance(source, str | Path) else ("", "", "")
    if "://" in location or not globbing.has_magic(location) or Path(location).exists():
        return [open_input(source)]
    found = sorted(globbing.glob(location))
    if not found:
        raise InputError(f"no file matches {location}: mend `source: {source}` in the recipe")
    return [_as_integers(_of_path(Path(path), dataset, str(source))) for path in found]


def variables_of(location: str) -> tuple[dict[str, str], dict[str, str]]:
    """Sources of the variables of a file or store, by name: those with the sample axis of the largest, and static ones.

    What is neither, or holds no numbers, is named in a warning.

    Raises:
        InputError: nothing there, or nothing that can be ingested without a recipe.
    """
    import xarray as xr

    from gpuops.data.source import open as open_source

    path = Path(location)
    if globbing.has_magic(location) and "://" not in location:
        matches = sorted(globbing.glob(location))
        if not matches:
            raise InputError(f"no file matches {location}: check the path, and quote it so that the shell leaves it")
        path = Path(matches[0])
    if "://" in location or path.is_dir():
        arrays = {name: (v.dims, v.array.shape, v.array.dtype) for name, v in open_source(location).variables.items()}
    else:
        _check_file(path, location)
        with xr.open_dataset(path, engine=_engine(path), decode_cf=False, **_phony(path)) as dataset:
            arrays = {str(n): (tuple(map(str, v.dims)), v.shape, v.dtype) for n, v in dataset.variables.items()}
    moving, static = chosen(location, arrays)
    return {name: f"{location}#{name}" for name in moving}, {name: f"{location}#{name}" for name in static}


def _of_path(path: Path, dataset: str, url: str) -> Input:
    if not path.exists():
        raise InputError(f"source {path} does not exist: mend `source: {url}` in the recipe")
    if path.is_dir():
        return _of_directory(path, dataset, url)
    return _of_netcdf3(path, dataset) if _engine(path) == "scipy" else _of_hdf5(path, dataset)


def _check_file(path: Path, url: str) -> None:
    if not path.exists():
        raise InputError(f"source {path} does not exist: mend `source: {url}` in the recipe")
    if _engine(path) == "h5netcdf":
        _hdf5_file(path).close()


def _engine(path: Path) -> str:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic[:3] == NETCDF3_MAGIC and magic[3:] == b"\x05":
        raise InputError(f"{path} is NetCDF-3 CDF5, which is not read: convert it with `nccopy -k nc4`")
    return "scipy" if magic[:3] == NETCDF3_MAGIC else "h5netcdf"


def _phony(path: Path) -> dict[str, Any]:
    """h5netcdf must be told to name the dimensions of plain HDF5."""
    return {"phony_dims": "sort"} if _engine(path) == "h5netcdf" else {}


def _identity(path: Path) -> list[Any]:
    """Sizes and times of a file, or of all files below a directory."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [str(path), *([str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns] for p in files)]


# HDF5 and NetCDF


def _hdf5_file(path: Path) -> Any:
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path} is truncated or not HDF5 ({error}): fetch it again") from error


def _open_hdf5(path: Path, dataset: str) -> Any:
    return _hdf5_file(path)[dataset]


def _of_hdf5(path: Path, dataset: str) -> Input:
    import h5py

    file = _hdf5_file(path)
    dataset = dataset.strip("/")
    names: list[str] = []
    file.visititems(lambda name, node: names.append(name) if isinstance(node, h5py.Dataset) else None)
    with file:
        if dataset not in names:
            listed = ", ".join(names) or "none"
            raise InputError(f"{path} has no dataset {dataset!r}; it has {listed}: mend the recipe (FILE#DATASET)")
        node = file[dataset]
        found = Input(tuple(node.shape or ()), node.dtype, partial(_open_hdf5, path, dataset), identity=_identity(path))
        scaled = any(len(dimension) for dimension in node.dims)  # NetCDF-4 attaches a scale to each dimension
        attributes = {key: _plain(node.attrs[key]) for key in CF_ATTRIBUTES if key in node.attrs}
    if not scaled:
        return _with_attributes(found, attributes)
    group, _, name = dataset.rpartition("/")
    described = _described(found, path, name, group or None)
    if attributes.get("dtype") == "bool":  # xarray keeps this one to itself
        described.attributes = {**described.attributes, "dtype": "bool"}
    return described


def _of_netcdf3(path: Path, dataset: str) -> Input:
    name = dataset.strip("/")
    variable = _open_netcdf3(path, name)
    found = Input(variable.shape, variable.dtype, partial(_open_netcdf3, path, name), identity=_identity(path))
    return _described(found, path, name, None)


def _open_netcdf3(path: Path, name: str) -> Any:
    import xarray as xr

    if importlib.util.find_spec("scipy") is None:
        raise UnavailableError(f"{path} is NetCDF-3, which needs scipy: pip install scipy")
    try:
        dataset = xr.open_dataset(path, engine="scipy", decode_cf=False)
    except (TypeError, ValueError, OSError) as error:
        raise InputError(f"{path} is truncated or not NetCDF ({error}): fetch it again") from error
    if name not in dataset.variables:
        listed = ", ".join(map(str, dataset.variables)) or "none"
        dataset.close()
        raise InputError(f"{path} has no dataset {name!r}; it has {listed}: mend the recipe (FILE#DATASET)")
    return dataset.variables[name]


def _described(found: Input, path: Path, name: str, group: str | None) -> Input:
    """With the dimensions, attributes and coordinates that xarray finds in a NetCDF file."""
    import xarray as xr

    options = {**_phony(path), **({} if group is None else {"group": group})}
    with xr.open_dataset(path, engine=_engine(path), decode_cf=False, **options) as dataset:
        variable = dataset[name]
        dims = tuple(map(str, variable.dims))
        found.dims = dims
        found.coordinates = {
            dim: Coordinate.of(dataset[dim].to_numpy(), dataset[dim].attrs)
            for dim in dims
            if dim in dataset.variables and dataset[dim].dims == (dim,) and dataset[dim].dtype.kind in "iuf"
        }
        attributes = {key: _plain(value) for key, value in variable.attrs.items()}
    return _with_attributes(found, attributes)


CF_ATTRIBUTES = (
    "units",
    "long_name",
    "scale_factor",
    "add_offset",
    "_FillValue",
    "missing_value",
    "_Unsigned",
    "dtype",
)
"""Attributes of a source that a recipe may leave out."""


def _with_attributes(found: Input, attributes: Mapping[str, Any]) -> Input:
    known = {key: attributes.get(key) for key in CF_ATTRIBUTES}
    found.attributes = {
        key: value for key, value in known.items() if value is not None and value == value
    }  # NaN is not
    if str(found.attributes.get("_Unsigned", "")).lower() == "true" and found.dtype.kind == "i":
        found.dtype = np.dtype(found.dtype.str.replace("i", "u"))
        info = np.iinfo(found.dtype)
        found.attributes = {
            key: value % (info.max + 1) if key in ("_FillValue", "missing_value") else value
            for key, value in found.attributes.items()
        }
    return found


def _plain(value: Any) -> Any:
    """An attribute as a Python number or text; None for one of any other kind."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(())[()]
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, str | int | float) else None


# Zarr


def _of_directory(path: Path, dataset: str, url: str) -> Input:
    if (path / "snapshots").is_dir() or (path / "repo").is_file():
        return _of_store(str(path), dataset)
    found = _of_zarr(partial(_open_zarr, path / dataset, url), _identity(path))
    siblings = (path / dataset).parent
    group = (siblings / "zarr.json").is_file() or (siblings / ".zgroup").is_file()
    if group and dataset:
        found.coordinates = _sibling_coordinates(found, lambda dim: _open_zarr(siblings / dim, url))
    return found


def _open_zarr(path: Path, url: str) -> Any:
    import zarr

    try:
        return zarr.open_array(path, mode="r")
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"{path} is not a Zarr array: mend `source: {url}` in the recipe") from error


def _of_store(location: str, dataset: str) -> Input:
    from gpuops.data.source import open as open_source

    source = open_source(location)
    name = dataset.strip("/")
    source.variable(name)
    opened = partial(_open_in_store, location, source.snapshot, name)
    found = _of_zarr(opened, [location, source.fingerprint])
    found.coordinates = _sibling_coordinates(found, lambda dim: source.variable(dim).array)
    return found


def _open_in_store(location: str, snapshot: str | None, name: str) -> Any:
    from gpuops.data.source import open as open_source

    return open_source(location, snapshot).variable(name).array


def _of_zarr(opened: Callable[[], Any], identity: Any) -> Input:
    array = opened()
    attributes: dict[str, Any] = {key: _plain(value) for key, value in array.attrs.asdict().items()}
    dims = getattr(array.metadata, "dimension_names", None) or array.attrs.asdict().get("_ARRAY_DIMENSIONS")
    if isinstance(attributes.get("_FillValue"), str):  # xarray writes floats as base64 in Zarr v3
        from xarray.backends.zarr import FillValueCoder

        attributes["_FillValue"] = _plain(FillValueCoder.decode(attributes["_FillValue"], array.dtype))
    if array.metadata.zarr_format == 2 and array.fill_value is not None and "scale_factor" in attributes:
        attributes.setdefault("_FillValue", _plain(array.fill_value))
    names = tuple(map(str, dims)) if dims and all(dims) else None
    found = Input(array.shape, array.dtype, opened, names, identity=identity, zarr=opened)
    return _with_attributes(found, attributes)


def _sibling_coordinates(found: Input, opened: Callable[[str], Any]) -> dict[str, Coordinate]:
    """Coordinates that lie beside an array, named like its dimensions."""
    coordinates = {}
    for dim, size in zip(found.dims or (), found.shape, strict=False):
        try:
            array = opened(dim)
        except InputError:
            continue
        if array.shape == (size,) and array.dtype.kind in "iuf":
            coordinates[dim] = Coordinate.of(np.asarray(array[:]), array.attrs.asdict())
    return coordinates


# several files, and arrays in memory


@dataclass(frozen=True, slots=True)
class _Parts:
    """Inputs that follow one another on their first axis."""

    inputs: tuple[Input, ...]
    """In order."""

    def __getitem__(self, index: Any) -> npt.NDArray[Any]:
        first, *others = index if isinstance(index, tuple) else (index,)
        start, stop, step = first.indices(sum(part.shape[0] for part in self.inputs))
        assert step == 1
        pieces = [part[(slice(low, high), *others)] for part, low, high in self._pieces(start, stop)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[Input, int, int]]:
        begin = 0
        for part in self.inputs:
            low, high = max(start - begin, 0), min(stop - begin, part.shape[0])
            if low < high:
                yield part, low, high
            begin += part.shape[0]


def _concatenated(pattern: str, parts: list[Input]) -> Input:
    """Several inputs as one; InputError if they are not parts of one array."""
    first = parts[0]
    for part in parts:
        same = (part.shape[1:], part.dtype, part.dims, dict(part.attributes))
        if same != (first.shape[1:], first.dtype, first.dims, dict(first.attributes)):
            raise InputError(
                f"{part.identity[0]} and {first.identity[0]} differ in shape, dtype, dimensions or packing: they are "
                f"no parts of one array, so {pattern} cannot be one source"
            )
    length = sum(part.shape[0] for part in parts)
    coordinates = dict(first.coordinates)
    if first.dims is not None:
        for dim in first.dims:
            those = [part.coordinates.get(dim) for part in parts]
            known = [one for one in those if one is not None]
            if dim == first.dims[0] and len(known) == len(parts):
                coordinates[dim] = joined(dim, known)
            elif dim == first.dims[0]:
                coordinates.pop(dim, None)
            elif any(not np.array_equal(one.values, known[0].values) for one in known):
                raise InputError(f"the files of {pattern} differ in coordinate {dim!r}: they are no parts of one array")
    return Input(
        (length, *first.shape[1:]),
        first.dtype,
        partial(_Parts, tuple(parts)),
        first.dims,
        first.attributes,
        coordinates,
        [part.identity for part in parts],
    )


def _of_array(array: Any) -> Input:
    """An array of NumPy, Dask or xarray (or any other with shape, dtype and slicing)."""
    import xarray as xr
    from dask.base import tokenize

    if isinstance(array, xr.DataArray):
        attributes = {key: _plain(value) for key, value in array.attrs.items()}
        opened = partial(_same, array.variable)
        found = Input(array.shape, array.dtype, opened, tuple(map(str, array.dims)), identity=tokenize(array))
        found.coordinates = {
            dim: of_xarray(array.coords[dim].variable)
            for dim in found.dims or ()
            if dim in array.coords and array.coords[dim].dims == (dim,) and array.coords[dim].dtype.kind in "iufMm"
        }
        return _with_attributes(found, attributes)
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise InputError(f"{type(array).__name__} is no source: give a URL or an array of NumPy, Dask or xarray")
    return Input(tuple(array.shape), np.dtype(array.dtype), partial(_same, array), identity=tokenize(array))


def _same(array: Any) -> Any:
    return array


def _computed(values: Any) -> Any:
    """Values of a lazy array, computed in this thread: the pool that we run in is all the parallelism there is."""
    import xarray as xr

    if isinstance(values, xr.Variable):
        values = values.data
    return values.compute(scheduler="synchronous") if hasattr(values, "compute") else values


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
