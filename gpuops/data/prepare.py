"""The declared steps of each field, frozen with the statistics of the training split."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from gpuops.data.runs import Runs
from gpuops.data.sample import BoundSample, Cut
from gpuops.data.source import Source
from gpuops.data.statistics import mean_std, summary
from gpuops.errors import InputError
from gpuops.preprocess.steps import Clip, Fill, Normalize, Part, Preprocess, Step, Unpack
from gpuops.spec import DTYPES

LOOKED_AT = 16
"""Records read to see whether targets hold missing data, where a store brings no statistics."""


def freeze(source: Source, tensors: Mapping[str, tuple[Cut, ...]], records: Runs, *, fill: bool) -> Preprocess:
    """Freeze the declared steps of one side of a sample.

    Args:
        source: an opened source.
        tensors: cuts by tensor.
        records: the training split, whose statistics are used.
        fill: give missing data the mean where nothing else is declared (inputs); targets keep it as NaN.
    """
    return Preprocess(
        {name: tuple(_part(source, cut, records, fill) for cut in cuts) for name, cuts in tensors.items()}
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
    mean, std = mean_std(source, cut, records)
    steps: list[Step] = [Unpack(variable.scale, variable.offset, variable.missing)]
    declared = field.fill if field.fill is not None else variable.fill
    if declared is None and fill and (variable.missing is not None or variable.array.dtype.kind == "f"):
        declared = float(np.mean(mean))
    if declared is not None:
        steps.append(Fill(declared))
    if field.clip is not None:
        steps.append(Clip(*field.clip))
    if field.normalize:
        steps.append(Normalize(mean, std))
    return Part(cut.name, cut.shape[0], dtype, tuple(steps))
