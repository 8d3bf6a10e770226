"""The declared steps of each field, frozen with the statistics of the training split."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from gpuops.data.runs import Runs
from gpuops.data.sample import BoundSample, Cut, Field
from gpuops.data.source import Source
from gpuops.data.statistics import mean_std, summary
from gpuops.errors import InputError
from gpuops.preprocess.geometry import Augment, Resize
from gpuops.preprocess.steps import Asinh, Clip, Fill, Log, Normalize, Part, Preprocess, Step, Unpack
from gpuops.spec import DTYPES

LOOKED_AT = 16
"""Records read to see whether targets hold missing data, where a store brings no statistics."""


def freeze(
    source: Source,
    tensors: Mapping[str, tuple[Cut, ...]],
    records: Runs,
    *,
    fill: bool,
    augment: Augment | None = None,
    resize: Resize | None = None,
) -> Preprocess:
    """Freeze the declared steps of one side of a sample.

    Args:
        source: an opened source.
        tensors: cuts by tensor.
        records: the training split, whose statistics are used.
        fill: give missing data the mean where nothing else is declared (inputs); targets keep it as NaN.
        augment: what training does to samples at random.
        resize: what is resampled after that, in evaluation as well.

    Raises:
        InputError: fields that no kernel reads or that cannot be normalised, or a crop that does not fit.
    """
    frozen = Preprocess(
        {name: tuple(_part(source, cut, records, fill) for cut in cuts) for name, cuts in tensors.items()},
        (*(() if augment is None else augment.steps()), *(() if resize is None else (resize,))),
    )
    for cuts in tensors.values():
        frozen.shape(cuts[0].shape)
    return frozen


def crop_alike(augment: Augment, bound: BoundSample) -> None:
    """Raise InputError if a crop would take other places of the inputs than of the targets."""
    sides = [cuts[0].shape[1:] for side in (bound.inputs, bound.targets) for cuts in side.values()]
    shapes = sorted({shape for shape in sides if len(shape) > 1})
    if augment.crop is not None and len(shapes) > 1:
        raise InputError(
            f"tensors of {' and '.join(map(str, shapes))} cannot be cropped alike: leave the crop out, or give the "
            "sample patches (`patch`), which know of a halo"
        )


def missing_targets(source: Source, bound: BoundSample, records: Runs) -> list[str]:
    """Target variables that hold missing data which no fill replaces, by the statistics or a look at some records."""
    found = []
    for cut in (cut for cuts in bound.targets.values() for cut in cuts):
        variable, field = cut.variable, cut.field
        if field.raw or field.fill is not None or variable.fill is not None or not cut.records:
            continue
        if variable.missing is None and variable.array.dtype.kind != "f":
            continue
        rows, seen = summary(source, cut, records, LOOKED_AT)
        whole = math.prod(variable.array.shape[1:])
        if cut.channels is not None:
            whole = whole // variable.array.shape[1] * len(cut.channels)
        if rows[:, 0].sum() < seen * whole:
            found.append(variable.name)
    return list(dict.fromkeys(found))


def uneven_windows(source: Source, bound: BoundSample) -> tuple[int, str]:
    """How many windows along the sample axis span a gap or disorder in its coordinate, and where the first of them is.

    A step is a gap from 1.5 times the median step on, so that months of 28 to 31 days are none.
    """
    if bound.length == 1:
        return 0, ""
    try:
        values = source.coordinate(bound.dim)
    except InputError:
        return 0, ""
    if values.dtype.kind not in "iufM":
        return 0, ""
    steps = np.diff(values).astype(np.float64)
    odd = (steps <= 0) | (steps >= 1.5 * np.median(steps))
    before = np.concatenate([[0], np.cumsum(odd)])
    crossing = before[bound.length - 1 :] > before[: len(before) - bound.length + 1]
    return int(crossing.sum()), str(values[int(odd.argmax())]) if odd.any() else ""


def _part(source: Source, cut: Cut, records: Runs, fill: bool) -> Part:
    field, variable = cut.field, cut.variable
    dtype = str(variable.array.dtype)
    if field.raw or (not cut.records and cut.along == "inside"):
        return Part(cut.name, cut.shape[0], dtype)
    if dtype not in DTYPES:
        raise InputError(
            f"{variable.name!r} is stored as {dtype}, which no kernel reads: store it as one of {', '.join(DTYPES)}, "
            "or declare the field raw"
        )
    if field.function is not None and not (math.isfinite(field.scale) and field.scale > 0):
        raise InputError(f"{variable.name!r}: {field.function} by scale {field.scale}: give a positive number")
    mean, std = mean_std(source, cut, records)
    steps: list[Step] = [Unpack(variable.scale, variable.offset, variable.missing)]
    declared = field.fill if field.fill is not None else variable.fill
    if declared is None and fill and (variable.missing is not None or variable.array.dtype.kind == "f"):
        declared = float(np.mean(_physical(field, mean)))
    if declared is not None:
        steps.append(Fill(declared))
    if field.clip is not None:
        steps.append(Clip(*field.clip))
    if field.function is not None:
        steps.append(Log(field.scale) if field.function == "log" else Asinh(field.scale))
    if field.normalize:
        steps.append(Normalize(mean, std))
    return Part(cut.name, cut.shape[0], dtype, tuple(steps))


def _physical(field: Field, values: tuple[float, ...]) -> npt.NDArray[np.float64]:
    """Physical values of a field's prepared ones before normalising."""
    if field.function is None:
        return np.asarray(values)
    undo = np.expm1 if field.function == "log" else np.sinh
    return np.asarray(undo(np.asarray(values)) * field.scale)
