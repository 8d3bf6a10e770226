"""Which records train, which validate and which test: whole groups or periods, with a gap, so that nothing leaks."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.data.runs import Runs
from gpuops.data.sample import BoundSample
from gpuops.data.source import Source
from gpuops.errors import InputError

BLOCK = 1 << 20
"""Labels read at one time."""

_SPAN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(W|D|d|h|min|s|ms)?\s*")
_MILLISECONDS = {"W": 604_800_000, "D": 86_400_000, "d": 86_400_000, "h": 3_600_000, "min": 60_000, "s": 1000, "ms": 1}


@dataclass(frozen=True)  # no slots: jsonargparse reads a default instance through vars()
class Holdout:
    """Which records are kept out of training: whole groups that share a value, so that no neighbour leaks."""

    by: str
    """A one-dimensional variable on the sample axis (region, year, patient)."""
    share: float = 0.25
    """Share of its distinct values that are held out, chosen by the seed."""
    values: tuple[int, ...] | None = None
    """The held-out values themselves, in place of a share."""

    def choose(self, distinct: npt.NDArray[Any], seed: int, taken: tuple[Any, ...] = ()) -> tuple[Any, ...]:
        """Held-out values out of the distinct ones, none of those that another split has `taken`."""
        if self.values is not None:
            return tuple(self.values)
        count = max(1, round(self.share * len(distinct)))
        ranked = sorted(distinct.tolist(), key=lambda value: hashlib.sha256(f"{seed}:{value}".encode()).digest())
        return tuple([value for value in ranked if value not in taken][:count])


@dataclass(frozen=True)
class Period:
    """Records whose coordinate lies in [start, stop): a time never trained on."""

    start: str | float | None = None
    """First value: a date such as "2020" or "2020-07-01T06", or a number; None is the beginning."""
    stop: str | float | None = None
    """One past the last value, so that "2021" ends with 2020; None is the end."""
    by: str | None = None
    """The coordinate; that of the sample axis if None."""


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Records of the three splits; no two share one, and the gap lies between any two."""

    train: Runs
    """Records trained on."""
    val: Runs
    """Records validated on."""
    test: Runs
    """Records kept for the last test."""


def make_split(
    source: Source,
    bound: BoundSample,
    *,
    val: Holdout | Period | None = None,
    test: Holdout | Period | None = None,
    train: Period | None = None,
    gap: int | str = 0,
    seed: int = 0,
) -> Split:
    """Divide the records of a source.

    What lies within `gap` of a test record belongs to no other split, and what lies within `gap` of a validation record
    is not trained on. A record that both name is the test's.

    Args:
        source: an opened source.
        bound: the sample bound to it.
        val: records to validate on.
        test: records to test on.
        train: records that may be trained on; all that are not held out if None.
        gap: records left out between two splits, or a span of the sample axis' coordinate ("10D", "6h", "0.5").
        seed: chooses the groups of a share.

    Raises:
        InputError: a split is left without a record, or the two name the same values or overlapping periods.
    """
    everything = Runs.up_to(bound.records)
    taken: tuple[Any, ...] = ()
    held: dict[str, Runs] = {}
    for name, declared in (("val", val), ("test", test)):
        if isinstance(declared, Holdout):
            same = isinstance(val, Holdout) and declared.by == val.by
            values, held[name] = _groups(source, bound, declared, seed, taken if same else ())
            taken = values
        elif isinstance(declared, Period):
            held[name] = _period(source, bound, declared)
        else:
            held[name] = Runs.up_to(0)
    both = held["val"] & held["test"]
    if len(both) and type(val) is type(test) and getattr(val, "by", None) == getattr(test, "by", None):
        raise InputError(f"validation ({val}) and test ({test}) both claim record {both[0]}: make them disjoint")
    near_test = _near(source, bound, held["test"], gap)
    val_records = held["val"] - near_test
    rest = everything if train is None else _period(source, bound, train)
    trained = rest - near_test - _near(source, bound, held["val"], gap)
    if (val is not None and not len(val_records)) or (test is not None and not len(held["test"])) or not len(trained):
        wanted = ", ".join(str(declared) for declared in (val, test, train) if declared is not None)
        tests = f", {len(held['test'])} to test" if test is not None else ""
        raise InputError(
            f"the split {wanted} with a gap of {gap} leaves {len(trained)} to train on, {len(val_records)} to validate"
            f"{tests}, of {bound.records} records: hold out something else"
        )
    return Split(trained, val_records, held["test"])


def sample_runs(bound: BoundSample, records: Runs) -> Runs:
    """Ids of the samples that lie wholly inside a set of records and read no absent one (`BoundSample.samples`)."""
    first = records.windows(bound.length)
    for step in bound.steps if len(bound.absent) else ():
        first = first - Runs.of(bound.absent - step, bound.absent - step + 1)
    return first.scaled(bound.per_record)


def _groups(
    source: Source, bound: BoundSample, declared: Holdout, seed: int, taken: tuple[Any, ...]
) -> tuple[tuple[Any, ...], Runs]:
    labels = source.variable(declared.by)
    if labels.array.ndim != 1 or labels.records != bound.records:
        raise InputError(f"holdout by {declared.by!r}: it must have one value a record, it has {labels.dims}")

    def read() -> Iterator[npt.NDArray[Any]]:
        return (labels.read(low, low + BLOCK) for low in range(0, bound.records, BLOCK))

    distinct = np.unique(np.concatenate([np.unique(block) for block in read()]))
    values = declared.choose(distinct, seed, taken)
    return values, Runs.of_masks(np.isin(block, values) for block in read())


def _period(source: Source, bound: BoundSample, declared: Period) -> Runs:
    values = _coordinate(source, bound, declared.by)
    inside = np.ones(len(values), bool)
    if declared.start is not None:
        inside &= values >= _moment(declared.start, values)
    if declared.stop is not None:
        inside &= values < _moment(declared.stop, values)
    return Runs.of_masks([inside])


def _coordinate(source: Source, bound: BoundSample, by: str | None) -> npt.NDArray[Any]:
    """One value a record: datetime64 or a number."""
    name = by or bound.dim
    values = np.asarray(source.coordinate(name))
    if values.shape != (bound.records,):
        raise InputError(f"{name!r} has {values.shape} values, a period needs one a record ({bound.records})")
    if values.dtype.kind not in "Miuf" or (np.isnat(values) if values.dtype.kind == "M" else np.isnan(values)).any():
        raise InputError(f"{name!r} has values that are no time and no number: split by a group (`by`) instead")
    return values if values.dtype.kind in "Mf" else values.astype(np.int64)  # differences of unsigned numbers wrap


def _moment(value: str | float, values: npt.NDArray[Any]) -> Any:
    try:
        # A year in YAML is a number.
        return np.datetime64(str(value)) if values.dtype.kind == "M" else float(value)
    except ValueError:
        kind = "a date such as 2020-07-01" if values.dtype.kind == "M" else "a number"
        raise InputError(f"period bound {value!r}: the coordinate needs {kind}") from None


def _near(source: Source, bound: BoundSample, held: Runs, gap: int | str) -> Runs:
    """A set of held records and all that lies closer than the gap."""
    if not len(held):
        return held
    if isinstance(gap, int):
        if gap < 0:
            raise InputError(f"a gap of {gap} records is none: give 0 or more")
        return held.widened(gap, bound.records)
    values = _coordinate(source, bound, None)
    span = _span(gap, values)
    ordered = np.sort(values[held[:]])
    after = np.searchsorted(ordered, values)
    close = (after < len(ordered)) & (ordered[np.minimum(after, len(ordered) - 1)] - values < span)
    close |= (after > 0) & (values - ordered[np.maximum(after - 1, 0)] < span)
    return held | Runs.of_masks([close])


def _span(gap: str, values: npt.NDArray[Any]) -> Any:
    found = _SPAN.fullmatch(str(gap))
    if found is None or (values.dtype.kind == "M") != (found[2] is not None):
        raise InputError(f"gap {gap!r}: give records as an int, a time as '10D', '6h' or '30min', or units as '0.5'")
    if found[2] is None:
        return float(found[1])
    return np.timedelta64(round(float(found[1]) * _MILLISECONDS[found[2]]), "ms")
