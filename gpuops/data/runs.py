"""Sets of records and samples as runs of consecutive numbers, so that 10^9 of them cost as much as their gaps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """A sequence of int64 numbers in runs; place p of it is found by one binary search.

    Sets (of `of`, `of_masks` and the operations) are ascending, disjoint and never touch; `aligned` reorders.
    """

    starts: Ids
    """First number of each run, int64 [runs]."""
    before: Ids
    """Numbers in the runs before each run, and in all of them: int64 [runs + 1]."""

    @classmethod
    def joined(cls, starts: Ids, stops: Ids) -> Runs:
        """Runs [start, stop) in the given order; empty ones are left out."""
        full = stops > starts
        lengths = (stops - starts)[full]
        return cls(np.asarray(starts, np.int64)[full], np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    @classmethod
    def of(cls, starts: Ids, stops: Ids) -> Runs:
        """The union of runs [start, stop) in any order."""
        full = stops > starts
        order = np.argsort(starts[full], kind="stable")
        starts, stops = starts[full][order], stops[full][order]
        reach = np.maximum.accumulate(stops) if len(stops) else stops
        first = np.ones(len(starts), bool)
        first[1:] = starts[1:] > reach[:-1]
        last = np.append(first[1:], True)[: len(first)]
        return cls.joined(starts[first], reach[last])

    @classmethod
    def of_masks(cls, masks: Iterable[npt.NDArray[np.bool_]]) -> Runs:
        """Places where the concatenation of some masks is true."""
        starts, stops, done = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
        for mask in masks:
            edges = np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8))
            starts.append(np.flatnonzero(edges == 1) + done)
            stops.append(np.flatnonzero(edges == -1) + done)
            done += len(mask)
        return cls.of(np.concatenate(starts), np.concatenate(stops))

    @classmethod
    def up_to(cls, size: int) -> Runs:
        """[0, size)."""
        return cls.joined(np.array([0]), np.array([size]))

    @property
    def stops(self) -> Ids:
        """One past the last number of each run, int64 [runs]."""
        return self.starts + np.diff(self.before)

    def __len__(self) -> int:
        return int(self.before[-1])

    @overload
    def __getitem__(self, places: int) -> int: ...
    @overload
    def __getitem__(self, places: slice | Ids) -> Ids: ...
    def __getitem__(self, places: int | slice | Ids) -> int | Ids:
        """Numbers at the given places."""
        if isinstance(places, slice):
            return self._at(np.arange(*places.indices(len(self)), dtype=np.int64))
        if isinstance(places, np.ndarray):
            return self._at(places)
        return int(self._at(np.array([places]))[0])

    def _at(self, places: Ids) -> Ids:
        places = np.where(places < 0, places + len(self), places)
        if len(places) and (places.min() < 0 or places.max() >= len(self)):
            raise IndexError(f"places reach outside {len(self)} numbers")
        run = np.searchsorted(self.before, places, side="right") - 1
        return self.starts[run] + places - self.before[run]

    def __iter__(self) -> Iterator[int]:
        for start, stop in zip(self.starts.tolist(), self.stops.tolist(), strict=True):
            yield from range(start, stop)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self[:].astype(dtype or np.int64, copy=False)

    def to_json(self) -> list[list[int]]:
        """[start, stop] of each run."""
        return [list(run) for run in zip(self.starts.tolist(), self.stops.tolist(), strict=True)]

    @classmethod
    def from_json(cls, document: list[list[int]]) -> Runs:
        """Inverse of `to_json`."""
        edges = np.array(document, np.int64).reshape(-1, 2)
        return cls.joined(edges[:, 0], edges[:, 1])

    def tolist(self) -> list[int]:
        """All numbers as a list."""
        return list(self)

    def contains(self, numbers: Ids) -> npt.NDArray[np.bool_]:
        """Which numbers are in a set."""
        if not len(self.starts):
            return np.zeros(len(numbers), bool)
        run = np.searchsorted(self.starts, numbers, side="right") - 1
        return (run >= 0) & (numbers < self.stops[run])

    def __or__(self, other: Runs) -> Runs:
        return Runs.of(np.concatenate([self.starts, other.starts]), np.concatenate([self.stops, other.stops]))

    def __and__(self, other: Runs) -> Runs:
        return self._combine(other, np.logical_and)

    def __sub__(self, other: Runs) -> Runs:
        return self._combine(other, lambda mine, theirs: mine & ~theirs)

    def _combine(self, other: Runs, keep: Callable[..., Any]) -> Runs:
        edges = np.unique(np.concatenate([self.starts, self.stops, other.starts, other.stops]))
        kept = keep(self.contains(edges[:-1]), other.contains(edges[:-1]))
        return Runs.of(edges[:-1][kept], edges[1:][kept])

    def widened(self, steps: int, size: int) -> Runs:
        """A set with `steps` more numbers on either side of each run, inside [0, size)."""
        return Runs.of(np.maximum(self.starts - steps, 0), np.minimum(self.stops + steps, size))

    def windows(self, length: int) -> Runs:
        """Numbers of a set at which a window of `length` begins that lies wholly inside the set."""
        return Runs.of(self.starts, self.stops - (length - 1))

    def scaled(self, factor: int) -> Runs:
        """Each number n of a set as the `factor` numbers from n * factor."""
        return Runs.of(self.starts * factor, self.stops * factor)

    def aligned(self, block: int) -> Runs:
        """The same numbers: first whole blocks that begin at a multiple of `block`, then what fills no block."""
        low = -(-self.starts // block) * block
        high = np.maximum(self.stops // block * block, low)
        none = low >= self.stops  # a run inside one block
        low, high = np.where(none, self.stops, low), np.where(none, self.stops, high)
        return Runs.joined(np.concatenate([low, self.starts, high]), np.concatenate([high, low, self.stops]))
