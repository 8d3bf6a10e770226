"""How far two versions' answers to the same samples lie apart, gathered pair by pair in little memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.spec import Arrays


@dataclass(frozen=True, slots=True)
class Distance:
    """How far the answers of one output lie apart."""

    max_abs: float | None
    """Largest absolute difference, physical units; None if it is not finite, or text that differs."""
    rmse: float | None
    """Root mean square difference, physical units; None as above."""
    of_spread: float | None
    """`rmse` by the standard deviation of the old answers; None where those do not vary."""
    lost: int
    """Values that are finite in the old answers alone."""
    other: str | None = None
    """What the new answers are that the old ones are not, of shape or dtype; None if they are alike."""


class Distances:
    """Distances by output over all pairs of answers seen so far."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sum] = {}

    def see(self, old: Arrays, new: Arrays) -> None:
        """One pair of answers to the same request. Outputs that only the new version has do not count."""
        for name, was in old.items():
            self._sums.setdefault(name, _Sum()).see(was, new.get(name))

    def found(self) -> dict[str, Distance]:
        """By output name."""
        return {name: total.distance() for name, total in sorted(self._sums.items())}


class _Sum:
    """Sums over the pairs of one output."""

    def __init__(self) -> None:
        self.other: str | None = None
        self.largest = self.squares = 0.0
        self.pairs = self.lost = 0
        # Of the old values, less the first one: sums of squares of 280.1 K and the like would cancel.
        self.origin: float | None = None
        self.values, self.sum, self.sum_squares = 0, 0.0, 0.0

    def see(self, was: npt.NDArray[Any], now: npt.NDArray[Any] | None) -> None:
        if now is None:
            self.other = "missing"
        elif (was.shape, was.dtype) != (now.shape, now.dtype):
            self.other = f"{now.dtype} {list(now.shape)} for {was.dtype} {list(was.shape)}"
        elif was.dtype.kind not in "biuf":
            if not np.array_equal(was, now):
                self.largest = self.squares = math.inf
            self.pairs += was.size
        else:
            self._numbers(was.astype(np.float64).ravel(), now.astype(np.float64).ravel())

    def _numbers(self, was: npt.NDArray[np.float64], now: npt.NDArray[np.float64]) -> None:
        known = np.isfinite(was)
        both = known & np.isfinite(now)
        self.lost += int(np.count_nonzero(known & ~both))
        old = was[known]
        if old.size and self.origin is None:
            self.origin = float(old[0])
        with np.errstate(over="ignore", invalid="ignore"):  # float64 answers may be as large as they like
            difference = np.abs(now[both] - was[both])
            self.largest = max(self.largest, float(difference.max(initial=0.0)))
            self.squares += float(np.sum(difference**2))
            centred = old - (self.origin or 0.0)
            self.sum += float(centred.sum())
            self.sum_squares += float(np.sum(centred**2))
        self.pairs += int(both.sum())
        self.values += old.size

    def distance(self) -> Distance:
        rmse = math.sqrt(self.squares / self.pairs) if self.pairs else 0.0
        variance = 0.0
        if self.values:
            mean = self.sum / self.values
            variance = max(self.sum_squares / self.values - mean * mean, 0.0)
        share = rmse / math.sqrt(variance) if variance > 0.0 else None
        return Distance(_finite(self.largest), _finite(rmse), _finite(share), self.lost, self.other)


def _finite(value: float | None) -> float | None:
    """JSON, and so the ledger, holds no infinity."""
    return value if value is not None and math.isfinite(value) else None
