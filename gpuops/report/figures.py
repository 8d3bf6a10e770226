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


def _rows(files: Sequence[Path]) -> list[dict[str, str]]:
    rows = []
    for file in files:
        with file.open() as stream:
            rows += list(csv.DictReader(stream))
    return rows


def logged(run: Path) -> list[dict[str, str]]:
    """Rows of a run's metrics, those of its attempts before (`metrics.0.csv`, ...) first."""
    before = sorted(run.glob("metrics.*.csv"), key=lambda file: int(file.stem.partition(".")[2]))
    return _rows([file for file in (*before, run / "metrics.csv") if file.is_file()])


def loss_curve(run: Path) -> str | None:
    """train_loss by step, and val_rmse and val_loss after each epoch, those of them that were logged."""
    rows = logged(run)
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


STEP_PARTS = {"compute": BLUE, "data": ORANGE, "optimizer": "#059669", "other": GRAY}
"""What a training step's time is told apart into (gpuops.training.steps), and its colours."""


def step_shares(run: Path, epochs: Sequence[Mapping[str, Any]]) -> str | None:
    """Shares of the step time, by step where they were logged and else by epoch, and the step time itself."""
    rows = [row for row in logged(run) if row.get("step_ms")]
    places, what = [int(row["step"]) for row in rows], "optimiser step"
    table: Sequence[Mapping[str, Any]] = rows
    if len(rows) < 2:
        table, places, what = epochs, [row["epoch"] for row in epochs], "epoch"
    if not table:
        return None
    figure = _figure(9.5, 3.0)
    shares, times = figure.subplots(1, 2)
    parts = [[100 * float(row[f"{part}_share"]) for row in table] for part in STEP_PARTS]
    if len(table) == 1:
        floor = 0.0
        for part, values in zip(STEP_PARTS, parts, strict=True):
            shares.bar(places, values, 0.5, bottom=floor, color=STEP_PARTS[part], label=part)
            floor += values[0]
        shares.set_xticks(places)
    else:
        shares.stackplot(places, *parts, labels=list(STEP_PARTS), colors=list(STEP_PARTS.values()))
    shares.set(xlabel=what, ylabel="% of the step time", title="where a step's time goes", ylim=(0, 100))
    shares.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=4)
    times.plot(places, [float(row["step_ms"]) for row in table], color=BLUE, marker="o", markersize=3)
    times.set(xlabel=what, ylabel="ms", title="step time", ylim=(0, None))
    return _png(figure)


def power_curves(run: Path) -> str | None:
    """Power and time busy of each GPU over the run, as its board told it twice a second."""
    by_gpu: dict[str, list[dict[str, str]]] = {}
    for row in _rows(sorted(run.glob("power-rank*.csv"))):
        by_gpu.setdefault(row["gpu"], []).append(row)
    panels = [("power_w", "power, W"), ("busy_percent", "time busy, %")]
    if not any(row[column] for rows in by_gpu.values() for row in rows for column, _ in panels):
        return None
    figure = _figure(9.5, 2.8)
    for axes, (column, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for gpu, rows in by_gpu.items():
            points = [(float(row["time_s"]), float(row[column])) for row in rows if row[column]]
            if points:
                axes.plot(*zip(*points, strict=True), label=gpu[:12], linewidth=1)
        axes.set(xlabel="seconds of the run", title=title, ylim=(0, None))
        if axes.lines:
            axes.legend(frameon=False)
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
    infer = runner(bundle)
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
