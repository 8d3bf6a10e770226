"""OME-NGFF images as others write them, small: 0.4 in Zarr v2, 0.5 in Zarr v3, written by zarr itself."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import zarr

TYPES = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}
UNITS = {"t": "second", "z": "micrometer", "y": "micrometer", "x": "micrometer"}
Array = npt.NDArray[Any]


def group(path: Path, version: str, ome: Mapping[str, Any]) -> None:
    """A group with OME's attributes."""
    zarr_format: Any = 3 if version == "0.5" else 2
    made = zarr.open_group(path, mode="a", zarr_format=zarr_format)
    made.attrs.update({"ome": {"version": version, **ome}} if zarr_format == 3 else dict(ome))


def multiscales(axes: str, levels: int, spacing: Mapping[str, float]) -> dict[str, Any]:
    """The block of an image whose levels halve y and x."""

    def scale(level: int) -> list[float]:
        return [spacing.get(axis, 1.0) * (2**level if axis in "yx" else 1) for axis in axes]

    return {
        "version": "0.4",
        "axes": [
            {"name": axis, "type": TYPES[axis], **({"unit": UNITS[axis]} if axis != "c" else {})} for axis in axes
        ],
        "datasets": [
            {"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale(level)}]}
            for level in range(levels)
        ],
    }


def image(
    path: Path,
    values: Array,
    axes: str,
    *,
    version: str = "0.4",
    levels: int = 2,
    channels: Sequence[str] = (),
    labels: Mapping[str, tuple[Array, str]] | None = None,
    spacing: Mapping[str, float] | None = None,
    chunks: Mapping[str, int] | None = None,
    shard: bool = False,
) -> None:
    """Write an image, its levels (every second value) and its labels."""
    ome: dict[str, Any] = {"multiscales": [multiscales(axes, levels, spacing or {})]}
    if channels:
        ome["omero"] = {"channels": [{"label": name, "color": "FFFFFF"} for name in channels]}
    group(path, version, ome)
    sizes = {"t": 1, "c": 1, "z": 2, "y": 8, "x": 8, **(chunks or {})}
    for level in range(levels):
        shown = values[tuple(slice(None, None, 2**level if axis in "yx" else 1) for axis in axes)]
        chunk = tuple(min(sizes[axis], size) for axis, size in zip(axes, shown.shape, strict=True))
        shards = tuple(c * 2 for c in chunk) if shard else None
        if shards is not None and "t" in axes:
            shards = (chunk[0], *shards[1:])
        zarr_format: Any = 3 if version == "0.5" else 2
        zarr.create_array(
            path,
            name=str(level),
            data=shown,
            chunks=chunk,
            shards=shards,
            zarr_format=zarr_format,
            dimension_names=list(axes) if zarr_format == 3 else None,
            chunk_key_encoding={"name": "default" if zarr_format == 3 else "v2", "separator": "/"},
            config={"write_empty_chunks": True},
            overwrite=True,
        )
    if labels:
        group(path / "labels", version, {"labels": list(labels)})
        for name, (label, label_axes) in labels.items():
            image(path / "labels" / name, label, label_axes, version=version, levels=levels, spacing=spacing)


def plate(
    path: Path, fields: Mapping[str, Sequence[Array]], axes: str, *, version: str = "0.4", **options: Any
) -> None:
    """Write a plate: images by well ("B/3"), wells declared in the order given."""
    rows = sorted({well.split("/")[0] for well in fields})
    columns = sorted({well.split("/")[1] for well in fields}, key=int)
    wells = [
        {"path": well, "rowIndex": rows.index(well.split("/")[0]), "columnIndex": columns.index(well.split("/")[1])}
        for well in fields
    ]
    named = {"rows": [{"name": row} for row in rows], "columns": [{"name": column} for column in columns]}
    group(path, version, {"plate": {**named, "wells": wells}})
    for well, images in fields.items():
        group(path / well, version, {"well": {"images": [{"path": str(i)} for i in range(len(images))]}})
        for i, values in enumerate(images):
            image(path / well / str(i), values, axes, version=version, **options)
