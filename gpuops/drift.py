"""Has the data moved? Mergeable sketches of values, and three distances between two of them.

A sketch is a histogram of 256 equal bins with declared edges. It never sees its data twice: sketches of parts (chunks,
workers, served requests) merge to exactly the sketch of the whole, in any order. On uint8 with edges -0.5 and 255.5 it
is the exact distribution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.errors import InputError

BINS = 256
"""Bins of a sketch, between `lo` and `hi`."""

_BLOCK = 1 << 18  # values converted to float64 at a time, so that an array of any size needs a few MiB


@dataclass(frozen=True, slots=True, eq=False)
class Sketch:
    """Counts of values by bin."""

    lo: float
    """Lower edge of the first bin, in the unit of the values."""
    hi: float
    """Upper edge of the last bin, in the unit of the values; `hi` itself is in that bin."""
    counts: npt.NDArray[np.int64]
    """Values in each bin, [256], read-only."""
    below: int = 0
    """Values less than `lo`, -inf included."""
    above: int = 0
    """Values greater than `hi`, +inf included."""
    missing: int = 0
    """NaN, and values equal to the declared missing value."""

    def __post_init__(self) -> None:
        _scale(self.lo, self.hi)
        counts = np.array(self.counts, dtype=np.int64)
        if counts.shape != (BINS,):
            raise InputError(f"a sketch has {BINS} counts, got shape {list(counts.shape)}")
        if min(int(counts.min()), self.below, self.above, self.missing) < 0:
            raise InputError("a sketch counts values: no count is negative")
        counts.setflags(write=False)
        object.__setattr__(self, "counts", counts)

    @classmethod
    def of(cls, values: npt.ArrayLike, lo: float, hi: float, missing: float | None = None) -> Sketch:
        """Sketch of an array of any shape.

        Args:
            values: Integers or floats; each falls in a bin by itself, whatever else is in the array.
            lo: Lower edge of the first bin.
            hi: Upper edge of the last bin.
            missing: Value that means "no data", compared in the dtype of `values`. NaN always means it.

        Raises:
            InputError: edges that are not finite and ascending, or values that are not real numbers.
        """
        scale = _scale(lo, hi)
        flat = np.asarray(values).reshape(-1)
        if flat.dtype.kind not in "buif":
            raise InputError(f"values of dtype {flat.dtype} have no order: give integers or floats")
        counts = np.zeros(BINS, np.int64)
        below = above = absent = 0
        for block, times in _blocks(flat):
            gone = np.isnan(block) if missing is None else np.isnan(block) | (block == missing)
            x = block[~gone].astype(np.float64)
            weight = None if times is None else times[~gone]
            under, over = x < lo, x > hi
            inside = ~(under | over)
            # Rounding up at the upper edge would name bin 256.
            index = np.minimum(((x[inside] - lo) * scale).astype(np.intp), BINS - 1)
            # A float64 weight is exact below 2^53 values.
            counts += np.bincount(index, None if weight is None else weight[inside], BINS).astype(np.int64)
            below += _number(under, weight)
            above += _number(over, weight)
            absent += _number(gone, times)
        return cls(float(lo), float(hi), counts, below, above, absent)

    @property
    def total(self) -> int:
        """Values that are not missing."""
        return int(self.counts.sum()) + self.below + self.above

    def merge(self, other: Sketch) -> Sketch:
        """Sketch of both data sets together; associative and commutative.

        Raises:
            InputError: the edges differ.
        """
        _same_edges(self, other)
        return Sketch(
            self.lo,
            self.hi,
            self.counts + other.counts,
            self.below + other.below,
            self.above + other.above,
            self.missing + other.missing,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sketch) and self.to_json() == other.to_json()

    def to_json(self) -> dict[str, Any]:
        """JSON form; `from_json` is its inverse."""
        return {
            "lo": self.lo,
            "hi": self.hi,
            "counts": self.counts.tolist(),
            "below": self.below,
            "above": self.above,
            "missing": self.missing,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Sketch:
        """Inverse of `to_json`."""
        outside = (int(document[key]) for key in ("below", "above", "missing"))
        return cls(float(document["lo"]), float(document["hi"]), np.asarray(document["counts"], np.int64), *outside)


def _number(chosen: npt.NDArray[np.bool_], times: npt.NDArray[np.int64] | None) -> int:
    return int(chosen.sum() if times is None else times[chosen].sum())


def _blocks(flat: npt.NDArray[Any]) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.int64] | None]]:
    """Values and how often each occurs, None for once: small integers, of which there are few, are counted first."""
    if flat.dtype.kind in "iu" and flat.dtype.itemsize <= 2:
        first = int(np.iinfo(flat.dtype).min)
        tally = np.zeros(1 << (8 * flat.dtype.itemsize), np.int64)
        for start in range(0, flat.size, _BLOCK):
            tally += np.bincount(flat[start : start + _BLOCK].astype(np.int32) - first, minlength=len(tally))
        found = np.flatnonzero(tally)
        yield (found + first).astype(flat.dtype), tally[found]
        return
    for start in range(0, flat.size, _BLOCK):
        yield flat[start : start + _BLOCK], None


def psi(a: Sketch, b: Sketch) -> float:
    """Population stability index, sum of (p - q) ln(p / q) over bins and both outsides; 0 if equal, no upper bound.

    Half a count is added to every cell, so that an empty one does not make it infinite. Without any drift its mean is
    about 257 (1/n + 1/m) for samples of n and m values, so the usual thresholds of 0.1 and 0.25, made for ten
    bins, hold only well above 10,000 values; take thresholds from resampled training data.

    Source: Yurdakul and Naranjo, "Statistical properties of the population stability index", Journal of Risk Model
    Validation 14(4), 2020. It is the symmetric divergence J of Kullback and Leibler, 1951.
    """
    p, q = (cells / cells.sum() for cells in (_cells(sketch) + 0.5 for sketch in _pair(a, b)))
    return float(np.sum((p - q) * (np.log(p) - np.log(q))))


def js(a: Sketch, b: Sketch) -> float:
    """Jensen-Shannon distance: square root of the divergence in bits, from 0 (equal) to 1 (nothing in common).

    Source: Lin, "Divergence measures based on the Shannon entropy", IEEE Trans. Inf. Theory 37(1), 1991; its root is
    a metric: Endres and Schindelin, IEEE Trans. Inf. Theory 49(7), 2003.
    """
    p, q = (_cells(sketch) / sketch.total for sketch in _pair(a, b))
    middle = (p + q) / 2
    # Where a share is 0 its term is 0 (the limit of x log x); elsewhere the middle is positive.
    divergence = sum(float(np.sum(x[x > 0] * np.log2(x[x > 0] / middle[x > 0]))) for x in (p, q)) / 2
    return math.sqrt(min(max(divergence, 0.0), 1.0))


def ks(a: Sketch, b: Sketch) -> float:
    """Kolmogorov-Smirnov statistic: largest gap between the two cumulative shares, from 0 to 1.

    Seen at bin edges only, so it is at most the statistic of the values themselves, and equal to it where each bin
    holds one value. Source: Smirnov, Annals of Mathematical Statistics 19(2), 1948.
    """
    p, q = (np.cumsum(_cells(sketch)) / sketch.total for sketch in _pair(a, b))
    return float(np.max(np.abs(p - q)))


def _scale(lo: float, hi: float) -> float:
    """Bins per unit."""
    width = hi - lo
    if not (width > 0 and math.isfinite(width) and math.isfinite(BINS / width)):
        raise InputError(f"edges {lo} and {hi} bound no bins: give finite numbers, the lower first")
    return BINS / width


def _same_edges(a: Sketch, b: Sketch) -> None:
    if (a.lo, a.hi) != (b.lo, b.hi):
        raise InputError(
            f"sketches with edges [{a.lo}, {a.hi}] and [{b.lo}, {b.hi}] do not compare: sketch both with the same"
        )


def _pair(a: Sketch, b: Sketch) -> tuple[Sketch, Sketch]:
    """Both, if they can be compared."""
    _same_edges(a, b)
    if not (a.total and b.total):
        raise InputError("a sketch of no values (or of missing ones only) has no distribution: give it data first")
    return a, b


def _cells(sketch: Sketch) -> npt.NDArray[np.int64]:
    """Counts below, in each bin, and above: [258]."""
    return np.concatenate([[sketch.below], sketch.counts, [sketch.above]])
