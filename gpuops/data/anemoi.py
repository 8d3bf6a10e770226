"""Anemoi data sets: one array of [dates, variables, ensembles, cells], with names, missing dates and statistics.

As anemoi-datasets 0.5 writes them (https://anemoi.readthedocs.io/projects/datasets): array `data`, dates in `dates`,
grid in `latitudes` and `longitudes`, one value a variable in `mean`, `stdev`, `minimum` and `maximum`; the group's
attributes hold `variables` (names in order) and `missing_dates` (ISO times that `data` has no values for).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpuops.errors import InputError

if TYPE_CHECKING:
    import zarr

DATA, DATES = "data", "dates"
"""Names of the array of fields and of its dates."""
DIMS = ("time", "variable", "ensemble", "cell")
"""Dimensions of the array of fields."""
STATISTICS = ("mean", "stdev", "minimum", "maximum")
"""Arrays of one value a variable."""


def is_anemoi(group: zarr.Group) -> bool:
    """Whether a group is an anemoi data set of fields."""
    data = group.get(DATA)
    return "variables" in group.attrs and getattr(data, "ndim", 0) == len(DIMS) and group.get(DATES) is not None


def names(group: zarr.Group) -> tuple[str, ...]:
    """Names along the variable axis."""
    return tuple(map(str, group.attrs["variables"]))  # type: ignore[arg-type]


def missing_dates(group: zarr.Group) -> npt.NDArray[np.int64]:
    """Positions along the dates that hold no values.

    Raises:
        InputError: dates and data differ in length: early versions left missing dates out of `data` alone.
    """
    dates = np.asarray(group[DATES][:]).astype("datetime64[s]")  # type: ignore[index]
    length = group[DATA].shape[0]  # type: ignore[union-attr]
    if len(dates) != length:
        raise InputError(
            f"`dates` has {len(dates)} dates and `data` {length}: an early anemoi-datasets left the missing dates out "
            "of `data`; create the data set again with a newer one"
        )
    declared = np.array([np.datetime64(str(date), "s") for date in group.attrs.get("missing_dates", [])], "M8[s]")  # type: ignore[union-attr]
    return np.flatnonzero(np.isin(dates, declared)).astype(np.int64)


def statistics(group: zarr.Group) -> dict[str, Any] | None:
    """What the data set says of itself: {"period": [first, last], variable: {mean, stdev, minimum, maximum}}.

    These are over the data set's own statistics period, not over anybody's training split: they are for reading, and
    normalisation takes none of them.
    """
    if not is_anemoi(group):
        return None
    columns = {kind: np.asarray(group[kind][:]) for kind in STATISTICS if kind in group}  # type: ignore[index]
    period = [str(group.attrs.get(f"statistics_{end}_date", "")) for end in ("start", "end")]
    values = {
        name: {kind: float(column[place]) for kind, column in columns.items()}
        for place, name in enumerate(names(group))
    }
    return {"period": period, "variables": values}
