"""What the metadata of OME-NGFF groups says: images, their levels and axes, and where in a plate they were taken.

Versions 0.4 (Zarr v2, https://ngff.openmicroscopy.org/0.4/) and 0.5 (Zarr v3, https://ngff.openmicroscopy.org/0.5/);
0.1 to 0.3, whose axes are fixed or names alone. Groups are read many at a time, because a plate has thousands.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import zarr
from zarr.abc.store import Store

from gpuops.data.reading.transport import read_ranges
from gpuops.errors import InputError

KINDS = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}
"""What axes are by name, where their type is not given; before 0.3 these five are the axes."""
_PROBED = 16
"""Images of a collection without a list of them that are looked for at a time."""

Document = Mapping[str, Any]
"""The attributes of a group that are OME's."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of an image."""

    name: str
    """Name, as a rule t, c, z, y or x."""
    kind: str
    """"time", "channel", "space", or another word."""
    unit: str
    """Unit of its spacing, "" if none is given."""


@dataclass(frozen=True, slots=True)
class Level:
    """One array of an image or of its labels."""

    path: str
    """Where it is below the root of the store."""
    axes: tuple[Axis, ...]
    """Its axes: time first if there is one, two or three of space last."""
    spacing: tuple[float, ...] | None
    """Distance of grid points by axis; None where the metadata gives none."""
    channels: tuple[str, ...]
    """Names of the channels (omero); empty where not all have one of their own."""

    @property
    def has_time(self) -> bool:
        """Whether the first axis is time."""
        return self.axes[0].kind == "time"


@dataclass(frozen=True, slots=True)
class Image:
    """A multiscale image with its labels."""

    path: str
    """Its group below the root of the store; "" is the root."""
    levels: Mapping[str, Level]
    """Levels by the name of the variable: "0" of the image, "labels/cells/0" of a label image."""
    well: str | None = None
    """Path of the well that it was taken of ("B/3")."""
    field: int | None = None
    """Position of the field of view in its well."""
    acquisition: int | None = None
    """Number of the acquisition."""


def read_images(url: str, store: Store, group: zarr.Group) -> tuple[Image, ...] | None:
    """The images that a group declares, those of a plate by row, column and field; None if it declares none.

    Raises:
        InputError: metadata that is not as the specification says; the message names the group.
    """
    groups = _Groups(url, store, group.metadata.zarr_format)
    root = groups.ome(group.attrs.asdict(), "")
    if _multiscale(root):
        sites = [Image("", {})]
    elif isinstance(root.get("plate"), Mapping):
        sites = list(_plate(groups, root["plate"]))
    elif isinstance(root.get("well"), Mapping):
        sites = list(_well(groups, "", root["well"]))
    elif root.get("bioformats2raw.layout") is not None:
        sites = [Image(path, {}) for path in _series(groups)]
    else:
        return None
    return _with_levels(groups, sites)


def _multiscale(ome: Document) -> bool:
    """Whether this is an OME image: other conventions have "multiscales" too, without axes and version of their own."""
    found = ome.get("multiscales")
    first = found[0] if isinstance(found, list) and found else found
    return found is not None and (not isinstance(first, Mapping) or "axes" in first or "version" in first)


class _Groups:
    """Groups of one store, and the error for what is wrong in their metadata."""

    def __init__(self, url: str, store: Store, zarr_format: int) -> None:
        self._url, self._store = url, store
        self._file = "zarr.json" if zarr_format == 3 else ".zattrs"

    def wrong(self, path: str, what: str) -> InputError:
        where = f"{self._url}/{path}" if path else self._url
        return InputError(f"{where} is not readable OME-NGFF: {what}; write it again, or correct its {self._file}")

    def found(self, paths: Sequence[str]) -> list[Document | None]:
        """The attributes of groups, None for one that has none."""
        keys = [f"{path}/{self._file}".lstrip("/") for path in paths]
        documents: list[Document | None] = []
        for path, data in zip(paths, read_ranges(self._store, [(key, None) for key in keys]), strict=True):
            if data is None:
                documents.append(None)
                continue
            try:
                document = json.loads(data.tobytes())
            except ValueError as error:
                raise self.wrong(path, f"{error}, which is not JSON") from error
            attributes = self.mapping(path, document, "the document")
            if self._file == "zarr.json":
                attributes = self.mapping(path, attributes.get("attributes", {}), "attributes")
            documents.append(self.ome(attributes, path))
        return documents

    def there(self, paths: Sequence[str]) -> list[Document]:
        """The attributes of groups that must be there."""
        documents = self.found(paths)
        return [self.mapping(path, document, "the group") for path, document in zip(paths, documents, strict=True)]

    def ome(self, attributes: Document, path: str) -> Document:
        """OME's part of the attributes: below "ome" from 0.5 on."""
        return self.mapping(path, attributes["ome"], "ome") if "ome" in attributes else attributes

    def mapping(self, path: str, value: Any, what: str) -> Document:
        if not isinstance(value, Mapping):
            raise self.wrong(path, f"{what} is {'not there' if value is None else repr(value)}")
        return value

    def listed(self, path: str, document: Document, key: str) -> list[Any]:
        value = document.get(key)
        if not isinstance(value, list) or not value:
            raise self.wrong(path, f"{key} is {value!r}, not a list with something in it")
        return value

    def children(self, path: str, document: Document, key: str) -> Iterator[tuple[str, Document]]:
        """Path and entry of the groups that a list names: [{"path": ...}, ...]."""
        for entry in self.listed(path, document, key):
            found = self.mapping(path, entry, f"an entry of {key}")
            yield self.below(path, found.get("path"), f"the path of an entry of {key}"), found

    def below(self, path: str, child: Any, what: str) -> str:
        """The path of a child below the root."""
        parts = child.strip("/").split("/") if isinstance(child, str) else [""]
        if any(part in ("", ".", "..") for part in parts):
            raise self.wrong(path, f"{what} is {child!r}")
        return "/".join([path, *parts] if path else parts)


def _plate(groups: _Groups, plate: Document) -> Iterator[Image]:
    wells = list(groups.children("", plate, "wells"))
    if all(isinstance(well.get(key), int) for _, well in wells for key in ("rowIndex", "columnIndex")):
        wells.sort(key=lambda found: (found[1]["rowIndex"], found[1]["columnIndex"]))
    paths = [path for path, _ in wells]
    for path, document in zip(paths, groups.there(paths), strict=True):
        yield from _well(groups, path, groups.mapping(path, document.get("well"), "well"))


def _well(groups: _Groups, path: str, well: Document) -> Iterator[Image]:
    for number, (image, entry) in enumerate(groups.children(path, well, "images")):
        acquisition = entry.get("acquisition")
        yield Image(image, {}, path or None, number, acquisition if isinstance(acquisition, int) else None)


def _series(groups: _Groups) -> list[str]:
    """Paths of the images of a collection: those that its OME group lists, else 0, 1, 2, ... as far as they go."""
    (about,) = groups.found(["OME"])
    if about is not None and "series" in about:
        return [groups.below("", path, "an entry of series") for path in groups.listed("OME", about, "series")]
    paths: list[str] = []
    while len(paths) % _PROBED == 0:
        probed = [str(number) for number in range(len(paths), len(paths) + _PROBED)]
        documents = groups.found(probed)
        last = documents.index(None) if None in documents else len(documents)
        if not last:
            break
        paths += probed[:last]
    if not paths:
        raise groups.wrong("", "the collection has neither a list of images nor an image 0")
    return paths


def _with_levels(groups: _Groups, sites: Sequence[Image]) -> tuple[Image, ...]:
    """Images with their levels and those of their labels."""
    documents = groups.there([site.path for site in sites])
    holders = groups.found([groups.below(site.path, "labels", "labels") for site in sites])
    names = [
        [] if holder is None or "labels" not in holder else groups.listed(f"{site.path}/labels", holder, "labels")
        for site, holder in zip(sites, holders, strict=True)
    ]
    paths = [
        {f"labels/{name}": groups.below(site.path, f"labels/{name}", "the name of a label") for name in found}
        for site, found in zip(sites, names, strict=True)
    ]
    labels = iter(groups.there([path for found in paths for path in found.values()]))
    images = []
    for site, document, below in zip(sites, documents, paths, strict=True):
        levels = _levels(groups, site.path, document, "")
        for name, path in below.items():
            levels |= _levels(groups, path, next(labels), f"{name}/")
        images.append(Image(site.path, levels, site.well, site.field, site.acquisition))
    return tuple(images)


def _levels(groups: _Groups, path: str, ome: Document, lead: str) -> dict[str, Level]:
    """Levels of a multiscale image by name, which begins with `lead`."""
    multiscale = groups.mapping(path, groups.listed(path, ome, "multiscales")[0], "the first entry of multiscales")
    axes = _axes(groups, path, multiscale, ome)
    channels = _channels(ome)
    whole = _scale(groups, path, multiscale, len(axes))
    levels = {}
    for array, dataset in groups.children(path, multiscale, "datasets"):
        own = _scale(groups, path, dataset, len(axes))
        spacing = own if own is None or whole is None else tuple(a * b for a, b in zip(own, whole, strict=True))
        levels[lead + (array[len(path) + 1 :] if path else array)] = Level(array, axes, spacing, channels)
    return levels


def _axes(groups: _Groups, path: str, multiscale: Document, ome: Document) -> tuple[Axis, ...]:
    version = str(multiscale.get("version", ome.get("version", "")))
    named: Document = {"axes": list(KINDS)} if version in ("0.1", "0.2") else multiscale
    axes = []
    for entry in groups.listed(path, named, "axes"):
        told = {"name": entry} if isinstance(entry, str) else groups.mapping(path, entry, "an entry of axes")
        name = told.get("name")
        if not isinstance(name, str) or not name:
            raise groups.wrong(path, f"the name of an axis is {name!r}")
        unit = told.get("unit")
        axes.append(Axis(name, str(told.get("type", KINDS.get(name, ""))), unit if isinstance(unit, str) else ""))
    names, kinds = [axis.name for axis in axes], [axis.kind for axis in axes]
    space = kinds.count("space")
    if len(set(names)) < len(names) or "image" in names:
        raise groups.wrong(path, f"its axes are {', '.join(names)}: two have one name, or one is called image")
    if space not in (2, 3) or kinds[-space:] != ["space"] * space or "time" in kinds[1:]:
        listed = ", ".join(f"{axis.name} ({axis.kind})" for axis in axes)
        raise groups.wrong(path, f"its axes are {listed}: time comes first, and two or three of space last")
    return tuple(axes)


def _scale(groups: _Groups, path: str, holder: Document, count: int) -> tuple[float, ...] | None:
    """Scale by axis out of coordinateTransformations; None where there is none in plain numbers."""
    transforms = holder.get("coordinateTransformations", [])
    if not isinstance(transforms, list):
        raise groups.wrong(path, f"coordinateTransformations is {transforms!r}, not a list")
    for entry in transforms:
        transform = groups.mapping(path, entry, "an entry of coordinateTransformations")
        scale = transform.get("scale")
        if transform.get("type") != "scale" or scale is None:  # translations, and scales kept in an array
            continue
        numbers = isinstance(scale, list) and all(type(s) in (int, float) and math.isfinite(s) for s in scale)
        if not numbers or len(scale) != count:
            raise groups.wrong(path, f"a scale is {scale!r}, not {count} numbers, one an axis")
        return tuple(map(float, scale))
    return None


def _channels(ome: Document) -> tuple[str, ...]:
    """Names of the channels; the specification calls this block transitional, so what does not fit is left out."""
    block = ome.get("omero")
    entries = block.get("channels") if isinstance(block, Mapping) else None
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        return ()
    names = tuple(entry.get("label") for entry in entries)
    named = all(isinstance(name, str) and name for name in names)
    return names if named and len(set(names)) == len(names) else ()
