"""Packing by tolerance: physical numbers as the smallest integers that keep them, with the error measured.

The CF conventions (section 8.1) say what is stored: physical = stored * scale_factor + add_offset, `_FillValue` for
missing data. Equal steps of twice the tolerance put every value at most one tolerance away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.data.writing.quality import Violation
from gpuops.errors import InputError

DTYPES = ("int8", "uint8", "int16", "uint16", "int32")
_TRIED = ("uint8", "int16", "int32")
"""From small to large. Of two dtypes of one size, the one that every tensor library computes with."""
_STEP = 2 - 1e-3
"""Steps in tolerances: a little below 2, so that rounding in float64 cannot pass the tolerance."""


@dataclass(frozen=True, slots=True)
class Pack:
    """Store a variable as integers."""

    tolerance: float
    """Largest absolute error allowed, in physical units."""
    minimum: float | None = None
    """Smallest physical value; valid_min of the rules, else the data is read once more to find it."""
    maximum: float | None = None
    """Largest physical value; valid_max of the rules, else the data is read once more to find it."""
    dtype: str | None = None
    """int8, uint8, int16, uint16 or int32; the smallest of uint8, int16 and int32 that fits if None."""

    def __post_init__(self) -> None:
        if not (self.tolerance > 0 and math.isfinite(self.tolerance)):
            raise InputError(f"tolerance {self.tolerance} keeps nothing: give a positive number of physical units")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise InputError(f"pack dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")


@dataclass(frozen=True, slots=True)
class Packing:
    """How physical values become stored integers."""

    dtype: np.dtype[Any]
    """Stored dtype, little-endian."""
    scale: float
    """Physical units per stored step."""
    offset: float
    """Physical value of stored 0."""
    missing: int
    """Stored value that means "no data"; never a value of the data."""
    tolerance: float
    """Largest absolute error allowed, in physical units."""

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest stored value that is data."""
        info = np.iinfo(self.dtype)
        return (info.min + (self.missing == info.min), info.max - (self.missing == info.max))


def choose(name: str, pack: Pack, low: float, high: float) -> Packing:
    """The smallest packing that holds low to high within the tolerance.

    Args:
        name: variable, for the message.
        pack: what is asked for.
        low: smallest physical value.
        high: largest physical value.

    Raises:
        InputError: no allowed dtype has enough steps, and the message says how many are needed; or the tolerance is
            as large as the range, so that nothing would be left of the data.
    """
    if not (math.isfinite(low) and math.isfinite(high)) or high < low:
        raise InputError(
            f"{name}: {low:g} to {high:g} is no range to pack: declare minimum and maximum, or mend the data"
        )
    if 0 < high - low <= pack.tolerance:
        raise InputError(
            f"{name}: {low:g} to {high:g} within {pack.tolerance:g} would all be one number: give a tolerance well "
            "below the range"
        )
    scale = pack.tolerance * _STEP
    # A step below what float64 tells apart at this magnitude would be lost when values are unpacked.
    steps = math.ceil((high - low) / scale) + 1 if scale > 4 * np.spacing(max(abs(low), abs(high))) else math.inf
    for candidate in (pack.dtype,) if pack.dtype else _TRIED:
        info = np.iinfo(candidate)
        if steps <= info.max - info.min:  # one value is kept for missing data
            unsigned = info.min == 0
            lowest = 0 if unsigned else int(info.min) + 1
            missing = int(info.max) if unsigned else int(info.min)
            dtype: np.dtype[Any] = np.dtype(candidate).newbyteorder("<")
            # In the middle of what the dtype holds, so that what is appended may lie on either side.
            first = lowest + (int(info.max) - int(info.min) - steps) // 2
            return Packing(dtype, scale, low - first * scale, missing, pack.tolerance)
    raise InputError(
        f"{name}: {low:g} to {high:g} within {pack.tolerance:g} needs {steps:,} steps, more than "
        f"{pack.dtype or _TRIED[-1]} has: raise the tolerance, or leave pack out and store floats"
    )


def apply(
    name: str, physical: npt.NDArray[np.float64], first_record: int, packing: Packing
) -> tuple[npt.NDArray[Any], float, list[Violation]]:
    """Pack physical values; NaN becomes missing.

    Args:
        name: variable, for the message.
        physical: values [records, *record]; NaN is missing.
        first_record: index of the first record in the stored array.
        packing: how.

    Returns:
        Stored values, the largest absolute error (0 where there is no data), and what cannot be held.
    """
    data = ~np.isnan(physical)
    low, high = packing.bounds
    with np.errstate(invalid="ignore"):
        steps = np.rint((physical - packing.offset) / packing.scale)
        kept = data & (steps >= low) & (steps <= high)
        stored = np.where(kept, steps, packing.missing).astype(packing.dtype)
        error = np.abs(stored.astype(np.float64) * packing.scale + packing.offset - physical)
    broken = data & ~kept | (kept & (error > packing.tolerance))
    found = []
    if broken.any():
        index = np.unravel_index(int(broken.argmax()), broken.shape)
        place = (int(index[0]) + first_record, *map(int, index[1:]))
        bounds = sorted(v * packing.scale + packing.offset for v in (low, high))
        rule = (
            f"pack within {packing.tolerance:g} ({packing.dtype.name} holds {bounds[0]:g} to {bounds[1]:g}; "
            "pack: {minimum, maximum} in a recipe makes room for what will be appended)"
        )
        found.append(Violation(name, place, float(physical[index]), rule, int(broken.sum())))
    return stored, float(error[kept].max(initial=0.0)), found
