"""OME-NGFF images as variables with a sample axis: levels, labels, plates, wells, collections and movies.

An image has no sample axis, unless it is a movie. Images are therefore stacked along a new axis "image": one alone, the
fields of a well or a plate, or the series of a collection (bioformats2raw). A time axis of one step is dropped for it.
The time axis of a movie that stands alone is the sample axis; of several movies it lies inside a record, where a window
finds it. What the metadata says is read by `gpuops.data.ngff_metadata`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import Store

from gpuops.data.ngff_metadata import Image, Level, read_images
from gpuops.data.variable import Variable, read_variable
from gpuops.data.view import Stack, View
from gpuops.errors import InputError

Spacing = Mapping[str, tuple[float, str]]
"""Distance of grid points and its unit, by dimension."""
IMAGE = "image"
"""The axis that images are stacked along."""


@dataclass(frozen=True, slots=True)
class Images:
    """Images as a source shows them."""

    store: View
    """The stacked arrays, and small ones that say where their records come from."""
    variables: Mapping[str, Variable]
    """Levels by name ("0", "labels/cells/0"); "image", "well", "field" and "acquisition", or a movie's times."""
    channels: Mapping[str, tuple[str, ...]]
    """Names along axis 1, by variable."""
    spacing: Mapping[str, Spacing]
    """Distance of grid points and its unit by dimension, by variable."""


@dataclass(frozen=True, slots=True)
class _Form:
    """How the arrays of a level become one with a sample axis."""

    dims: tuple[str, ...]
    """Dimensions of that array."""
    spatial: int
    """Trailing axes that are space; of a single plane the two that it extends in."""
    stack: Stack | None
    """The stack; None for an array that is read as it is."""


def read(url: str, store: Store, group: zarr.Group) -> Images | None:
    """The images that a group declares; None if it declares none.

    Raises:
        InputError: metadata that is not OME-NGFF, arrays that are not there, or images that cannot be stacked.
    """
    images = read_images(url, store, group)
    if images is None:
        return None
    first = images[0]
    common = [name for name in first.levels if all(name in image.levels for image in images)]
    if all(name.startswith("labels/") for name in common):
        raise InputError(f"{url}: its images have no level in common: open one, as {url}/{first.path}")
    arrays = {name: _array(url, store, first.levels[name]) for name in common}
    movie = len(images) == 1 and any(_is_movie(first.levels[name], arrays[name]) for name in common)
    forms = {name: _form([image.levels[name] for image in images], arrays[name], movie) for name in common}
    rows = _times(first, arrays) if movie else _origins(images)
    beside = {name: row for name, row in rows.items() if name not in forms}
    stacks = {name: form.stack for name, form in forms.items() if form.stack is not None}
    try:
        view = View({"": store}, stacks, dict(pair for name, row in beside.items() for pair in row.values_by_key(name)))
    except InputError as error:
        raise InputError(f"{url}: {error}, as {url}/{first.path}") from error
    variables = {name: read_variable(name, zarr.open_array(view, path=name, mode="r")) for name in (*forms, *beside)}
    variables |= {name: replace(variables[name], dims=form.dims, spatial=form.spatial) for name, form in forms.items()}
    channels = {
        name: first.levels[name].channels for name in common if _names_channels(first.levels[name], variables[name])
    }
    _check_channels(url, images, channels)
    spacing = {name: _spacing(first.levels[name], variables[name]) for name in common}
    return Images(view, variables, channels, spacing)


def _array(url: str, store: Store, level: Level) -> zarr.Array[Any]:
    """An array of the first image, of which there must be one, with as many axes as declared."""
    try:
        array = zarr.open_array(store, path=level.path, mode="r")
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{url} declares a level {level.path!r}, but there is no such array: copy it anew, or correct its metadata"
        ) from error
    if array.ndim != len(level.axes):
        names = ", ".join(axis.name for axis in level.axes)
        raise InputError(
            f"{url}/{level.path} has {array.ndim} axes, its metadata declares {len(level.axes)} ({names}): correct one"
        )
    return array


def _is_movie(level: Level, array: zarr.Array[Any]) -> bool:
    return level.has_time and array.shape[0] > 1


def _form(levels: Sequence[Level], array: zarr.Array[Any], movie: bool) -> _Form:
    axes = levels[0].axes
    names = tuple(axis.name for axis in axes)
    space = sum(axis.kind == "space" for axis in axes)
    spatial = 2 if array.shape[-space] == 1 else space
    if movie:  # labels without time are static fields
        return _Form(names, spatial, None)
    moment = levels[0].has_time and array.shape[0] == (array.shards or array.chunks)[0] == 1
    stack = Stack(tuple(level.path for level in levels), IMAGE, instead=moment)
    return _Form((IMAGE, *names[moment:]), spatial, stack)


def _names_channels(level: Level, variable: Variable) -> bool:
    """Whether a level's names of channels fit axis 1 of its variable."""
    kinds = {axis.name: axis.kind for axis in level.axes}
    return bool(kinds.get(variable.dims[1]) == "channel" and len(level.channels) == variable.array.shape[1])


def _check_channels(url: str, images: Sequence[Image], channels: Mapping[str, tuple[str, ...]]) -> None:
    """Images that name their channels otherwise than the first cannot be read as one."""
    for image in images[1:]:
        for name, ours in channels.items():
            if image.levels[name].channels != ours:
                theirs = ", ".join(image.levels[name].channels) or "no names"
                raise InputError(
                    f"{url}: {images[0].path} has the channels {', '.join(ours)} and {image.path} has {theirs}: open "
                    f"one, as {url}/{images[0].path}"
                )


def _spacing(level: Level, variable: Variable) -> Spacing:
    placed = zip(level.axes, level.spacing or (), strict=False)
    return {
        axis.name: (size, axis.unit)
        for axis, size in placed
        if axis.name in variable.dims and axis.kind in ("space", "time")
    }


@dataclass(frozen=True, slots=True)
class _Row:
    """A small array along the sample axis."""

    values: npt.NDArray[Any]
    """One value a record."""
    dim: str
    """The sample axis."""
    attributes: Mapping[str, Any]
    """Attributes of the array."""

    def values_by_key(self, name: str) -> Iterator[tuple[str, bytes]]:
        """It as a Zarr v3 array of one chunk."""
        length = list(self.values.shape)
        document = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": length,
            "data_type": self.values.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": length}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "dimension_names": [self.dim],
            "attributes": dict(self.attributes),
        }
        yield f"{name}/zarr.json", json.dumps(document).encode()
        yield f"{name}/c/0", self.values.astype(self.values.dtype.newbyteorder("<")).tobytes()


def _times(movie: Image, arrays: Mapping[str, zarr.Array[Any]]) -> dict[str, _Row]:
    """When the frames of a movie were taken, in its unit of time; frame numbers where it gives no spacing."""
    name = next(name for name, array in arrays.items() if _is_movie(movie.levels[name], array))
    level = movie.levels[name]
    axis, step = level.axes[0], level.spacing[0] if level.spacing else 1.0
    return {axis.name: _Row(np.arange(arrays[name].shape[0]) * step, axis.name, {"units": axis.unit or "1"})}


def _origins(images: Sequence[Image]) -> dict[str, _Row]:
    """Where the images of a stack come from: their number, and what a plate says of them."""
    rows = {IMAGE: _Row(np.arange(len(images), dtype=np.int32), IMAGE, {"paths": [image.path for image in images]})}
    if wells := list(dict.fromkeys(image.well for image in images if image.well is not None)):
        numbers = {well: number for number, well in enumerate(wells)}
        well = np.array([-1 if image.well is None else numbers[image.well] for image in images], np.int32)
        rows["well"] = _Row(well, IMAGE, {"names": wells})
    for what in ("field", "acquisition"):
        found = [getattr(image, what) for image in images]
        if None not in found:
            rows[what] = _Row(np.array(found, np.int32), IMAGE, {})
    return rows
