"""The pictures of a report, each an SVG or PNG that the page holds inside itself."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from gpuops.bundle import Bundle
from gpuops.data.join import reopen
from gpuops.data.reading.reader import Reader, wire_inputs
from gpuops.data.runs import Runs
from gpuops.data.sample import BoundSample, Cut, SampleSpec, bind
from gpuops.data.source import Source
from gpuops.export.formats import runner

BLUE, ORANGE, GRAY = "#2563eb", "#d97706", "#9ca3af"
Field = npt.NDArray[np.float64]


def loss_curve(metrics: Path) -> str | None:
    """train_loss by step, and val_rmse and val_loss after each epoch, those of them that metrics.csv has."""
    if not metrics.is_file():
        return None
    with metrics.open() as stream:
        rows = list(csv.DictReader(stream))
    panels = []
    for column, title, color in (
        ("train_loss", "training loss, single batches", BLUE),
        ("val_rmse", "held-out RMSE, physical", ORANGE),
        ("val_loss", "held-out loss", ORANGE),
    ):
        points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
        if points:
            panels.append((points, title, color))
    if not panels:
        return None
    figure = _figure(4.75 * len(panels), 3.0)
    for axes, (points, title, color) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3)
        axes.set(xlabel="optimiser step", title=title, yscale="log" if color == BLUE else "linear")
    return _png(figure)


def skill_bars(metrics: Mapping[str, float]) -> str | None:
    """Held-out error of the model beside that of each baseline, physical units."""
    errors = {name.removesuffix("_rmse"): value for name, value in metrics.items() if name.endswith("_rmse")}
    if "val" not in errors:
        return None
    errors = {"model": errors.pop("val"), **dict(sorted(errors.items(), key=lambda item: item[1]))}
    figure = _figure(7.5, 0.5 + 0.42 * len(errors))
    axes = figure.subplots()
    bars = axes.barh(list(errors), list(errors.values()), color=[BLUE] + [GRAY] * (len(errors) - 1))
    axes.bar_label(bars, fmt="%.3f", padding=4)
    axes.invert_yaxis()
    axes.set(xlabel="held-out RMSE, physical units", xlim=(0, max(errors.values()) * 1.12))
    return _png(figure)


def latency_bars(served: Sequence[Mapping[str, Any]]) -> str | None:
    """Median and 99th percentile of single requests, by protocol."""
    if not served:
        return None
    names = [str(report["server"]).partition(":")[0] for report in served]
    figure = _figure(7.5, 0.8 + 0.6 * len(names))
    axes = figure.subplots()
    places = np.arange(len(names))
    for offset, key, color in ((-0.18, "p50_ms", BLUE), (0.18, "p99_ms", ORANGE)):
        bars = axes.barh(places + offset, [report[key] for report in served], 0.34, color=color, label=key)
        axes.bar_label(bars, fmt="%.1f", padding=4)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds, one sample a request, one request at a time")
    axes.margins(x=0.12)
    axes.legend(frameon=False)
    return _png(figure)


def held_out_map(record: Mapping[str, Any], bundle: Bundle) -> tuple[str, str] | None:
    """Truth, forecast and error over held-out records, and a caption; None for targets without two axes."""
    source = reopen(record["data"])
    sample = bind(SampleSpec.from_json(record["sample"]), source)
    name, cuts = next(iter(sample.targets.items()))
    if len(cuts[0].shape) != 3:
        return None
    records, where = _group(record, source)
    ids = (records[:, None] * sample.per_record + np.arange(sample.patches)).ravel()
    truth, forecast = (_joined(field, cuts[0], sample) for field in _answers(source, sample, bundle, ids, name))
    grid = _grid(source, records)
    pictures = [_stitch(field, grid) for field in (truth, forecast, forecast - truth)]
    low, high = np.nanpercentile(pictures[0], [1, 99])
    span = float(np.nanpercentile(np.abs(pictures[2]), 99))
    figure = _figure(11, 3.9)
    for axes, picture, title, limits, colors in zip(
        figure.subplots(1, 3),
        pictures,
        ("truth", "forecast", "forecast - truth"),
        ((low, high), (low, high), (-span, span)),
        ("viridis", "viridis", "RdBu_r"),
        strict=True,
    ):
        image = axes.imshow(picture, vmin=limits[0], vmax=limits[1], cmap=colors, interpolation="nearest")
        axes.set(title=title, xticks=[], yticks=[])
        figure.colorbar(image, ax=axes, shrink=0.8)
    error = float(np.sqrt(np.nanmean(pictures[2] ** 2)))
    variable = cuts[0].variable
    what = str(variable.array.attrs.get("long_name", name))
    unit = "dimensionless" if variable.unit == "1" else variable.unit
    return _png(figure), f"{what} ({unit}) over held-out {where}; RMSE here {error:.3f}"


def _group(record: Mapping[str, Any], source: Source) -> tuple[npt.NDArray[np.int64], str]:
    """The held-out group with the most varied target, or the first few held-out records."""
    held = Runs.from_json(record["data"]["held_out_records"] or [[0, 1]])[:]
    by = record["data"]["held_out_by"]
    target = next(iter(record["sample"]["targets"].values()))[0]["variable"]
    rows = source.meta("stats", target)
    if by is None or rows is None:
        return held[:1], f"record {held[0]}"
    labels = source.variable(by).read()[held]
    ranges = source.variable(target).taken(rows)[held]
    spread = ranges[..., 4].max(axis=1) - ranges[..., 3].min(axis=1)
    varied = {int(label): float(spread[labels == label].mean()) for label in np.unique(labels)}
    chosen = max(varied, key=lambda label: varied[label])
    records = held[labels == chosen]
    bounds = []
    for axis in ("latitude", "longitude"):
        if axis in source.variables and source.variables[axis].array.ndim == 1:
            values = np.asarray(source.variables[axis].array[:])[records]
            bounds.append(f"{axis} {values.min():.0f} to {values.max():.0f}")
    return records, f"{by} {chosen}" + (f" (tile centres at {', '.join(bounds)})" if bounds else "")


def _answers(
    source: Source, sample: BoundSample, bundle: Bundle, ids: npt.NDArray[np.int64], name: str
) -> tuple[Field, Field]:
    """Truth and the bundle's own answers for samples, each [n, y, x] in physical units."""
    infer = runner(bundle, bundle.formats[-1])
    size = bundle.signature.max_batch
    spec = sample.targets[name][0].spec
    truth, forecast = [], []
    reader = Reader(source, sample)
    try:
        for first in range(0, len(ids), size):
            slot = reader.read(ids[first : first + size])
            stored = slot.targets[name][:, 0]
            value = stored.astype(np.float64) * spec.scale + spec.offset
            truth.append(value if spec.missing is None else np.where(stored == spec.missing, np.nan, value))
            forecast.append(infer(wire_inputs(sample, slot))[name][:, 0].astype(np.float64))
    finally:
        reader.close()
    return np.concatenate(truth), np.concatenate(forecast)


def _joined(fields: Field, cut: Cut, sample: BoundSample) -> Field:
    """Records put together from all their patches, [records, y, x]; fields [records * patches, y, x]."""
    if cut.patch is None or sample.grid is None:
        return fields[:: sample.patches]
    origins = sample.grid.origins(np.arange(sample.patches))[:, list(cut.patch.places)]
    count = len(cut.patch.axes)
    shape = (*fields.shape[1 : 3 - count], *(axis.length for axis in cut.patch.axes))
    whole = np.full((len(fields) // sample.patches, *shape), np.nan)
    for patch, origin in enumerate(origins.tolist()):
        place = (slice(at, at + axis.size) for at, axis in zip(origin, cut.patch.axes, strict=True))
        index: tuple[Any, ...] = (..., *place)
        whole[index] = fields[patch :: sample.patches]
    return whole


def _grid(source: Source, records: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(row, column) of each record in the picture, [n, 2]: north up where latitudes are known, else one row."""
    places = [source.variables.get(name) for name in ("latitude", "longitude")]
    if any(place is None or place.array.ndim != 1 for place in places):
        return np.stack([np.zeros_like(records), np.arange(len(records))], axis=1)
    latitude, longitude = (np.asarray(place.array[:])[records] for place in places if place is not None)
    row = np.unique(-latitude, return_inverse=True)[1]
    column = np.unique(longitude, return_inverse=True)[1]
    return np.stack([row, column], axis=1)


def _stitch(fields: Field, grid: npt.NDArray[np.int64]) -> Field:
    height, width = fields.shape[1:]
    rows, columns = grid.max(axis=0) + 1
    picture = np.full((rows * height, columns * width), np.nan)
    for field, (row, column) in zip(fields, grid, strict=True):
        picture[row * height : (row + 1) * height, column * width : (column + 1) * width] = field
    return picture


def _figure(width: float, height: float) -> Figure:
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _png(figure: Figure) -> str:
    """A data URL."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
