"""What a window of work cost: the difference of two counter readings, or null and why.

Rules:
- A counter that went backwards (the driver was reloaded) gives null, never a negative or partial figure.
- A powered GPU always draws something, so a difference of 0 mJ means that the counter did not step inside the window:
  null, never 0 J. A window of a few steps is reported as counted; it may be wrong by one step, `resolution_ms`.
- One GPU without an answer makes the whole reading null: a sum over some of the GPUs is not the cost.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpuops.energy.sensor import Count, open_sensor
from gpuops.errors import InputError


@dataclass(frozen=True, slots=True)
class Reading:
    """Energy of one window on some GPUs, or why it is not known."""

    energy_mj: int | None
    """Millijoules by the boards' counters, summed over `gpus`; None if unknown."""
    method: str
    """How it was measured: "nvml-counter" or "none"."""
    reason: str | None
    """Why it is unknown; None if it is known."""
    resolution_ms: float | None
    """Longest time between two steps of the counter, an upper bound; None if nothing counts."""
    scope: str
    """What is included: "gpu-board" (every process on it, no host) or "none"."""
    tenancy: str
    """Whether this process had the GPUs to itself at both edges: "exclusive", "shared" or "unknown"."""
    lost_s: float
    """Seconds of the window that a counter should have covered and did not."""
    seconds: float
    """Length of the window by the monotonic clock."""
    gpus: tuple[str, ...]
    """UUIDs of the GPUs counted."""

    def __post_init__(self) -> None:
        if (self.energy_mj is None) == (self.reason is None):
            raise InputError("a reading has either energy or a reason why there is none")
        if self.energy_mj is not None and self.energy_mj < 0:
            raise InputError(f"a reading of {self.energy_mj} mJ: energy is not negative")

    @property
    def joules(self) -> float | None:
        """Energy in joules; None if unknown."""
        return None if self.energy_mj is None else self.energy_mj / 1000

    def to_json(self) -> dict[str, Any]:
        """JSON form for reports, with `joules` (null if unknown) and `reason`."""
        return {
            "joules": self.joules,
            "method": self.method,
            "reason": self.reason,
            "resolution_ms": self.resolution_ms,
            "scope": self.scope,
            "tenancy": self.tenancy,
            "lost_s": self.lost_s,
            "seconds": self.seconds,
            "gpus": list(self.gpus),
        }


class Meter:
    """Energy of windows on this process's GPUs.

        with Meter() as meter:
            work()
        print(meter.reading.to_json())

    `begin` and `end` do the same across callbacks. Work that is still queued on the GPU at the end is not in the
    window: synchronise first where it matters.

    Args:
        devices: GPUs to count: indices as torch numbers them, or UUIDs; a rank passes its own. None counts all
            visible ones.
    """

    def __init__(self, devices: Sequence[int | str] | None = None) -> None:
        self._sensor = open_sensor(devices)
        self._start: tuple[float, dict[str, Count], str] | None = None
        self._reading: Reading | None = None

    def __enter__(self) -> Meter:
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def reading(self) -> Reading:
        """Reading of the last window that ended; InputError if none has."""
        if self._reading is None:
            raise InputError("no window has ended yet: read after `with Meter() as meter:` or after end()")
        return self._reading

    def begin(self) -> None:
        """Open a window; one that was left open (its work failed) is dropped."""
        tenancy = self._sensor.tenancy()
        counts = self._sensor.read()
        self._start = (time.perf_counter(), counts, tenancy)

    def end(self) -> Reading:
        """Close the window and return what it cost.

        Raises:
            InputError: no window is open.
        """
        # The clock is read inside the counter readings at both edges, so `seconds` never exceeds what was counted.
        now = time.perf_counter()
        if self._start is None:
            raise InputError("no window is open: call begin() before end()")
        sensor = self._sensor
        (began, start, tenancy), self._start = self._start, None
        seconds = now - began
        energy_mj, reason = _difference(start, sensor.read(), seconds, sensor.resolution_ms)
        if sensor.reason is not None:
            energy_mj, reason = None, sensor.reason
        self._reading = Reading(
            energy_mj,
            sensor.method,
            reason,
            sensor.resolution_ms,
            sensor.scope,
            _joint_tenancy((tenancy, sensor.tenancy())),
            lost_s=seconds if energy_mj is None and start else 0.0,
            seconds=seconds,
            gpus=tuple(start),
        )
        return self._reading


def sum_over_ranks(rows: Iterable[tuple[str, Reading]]) -> Reading:
    """One reading for work that ran on several ranks at the same time.

    Args:
        rows: (host name, reading) of each rank.

    Returns:
        The sum, exact in integer millijoules; null with the reason if any rank's is null. `seconds` and
        `lost_s` are the longest of any rank, `gpus` those of all.

    Raises:
        InputError: no rows, or a GPU that two rows counted.
    """
    ranks = list(rows)
    if not ranks:
        raise InputError("no readings to sum: give one row a rank")
    counted: set[tuple[str, str]] = set()
    for host, reading in ranks:
        for uuid in reading.gpus:
            if (host, uuid) in counted:
                raise InputError(
                    f"GPU {uuid} on {host} is counted by two ranks: give each rank its own, Meter(devices=[local_rank])"
                )
            counted.add((host, uuid))
    readings = [reading for _, reading in ranks]
    known = [reading.energy_mj for reading in readings if reading.energy_mj is not None]
    steps = [reading.resolution_ms for reading in readings if reading.resolution_ms is not None]
    whole = len(known) == len(readings)
    return Reading(
        sum(known) if whole else None,
        _common(reading.method for reading in readings),
        None if whole else _why_unknown(ranks),
        max(steps) if steps else None,
        _common(reading.scope for reading in readings),
        _joint_tenancy([reading.tenancy for reading in readings]),
        lost_s=max(reading.lost_s for reading in readings),
        seconds=max(reading.seconds for reading in readings),
        gpus=tuple(uuid for reading in readings for uuid in reading.gpus),
    )


def _why_unknown(ranks: Sequence[tuple[str, Reading]]) -> str:
    """The reason that all ranks give, or the first one with its host."""
    reasons = {reading.reason for _, reading in ranks}
    host, first = next((host, reading.reason) for host, reading in ranks if reading.reason is not None)
    return str(first) if len(reasons) == 1 else f"{host}: {first}"


def _difference(
    start: Mapping[str, Count], end: Mapping[str, Count], seconds: float, resolution_ms: float | None
) -> tuple[int | None, str | None]:
    """(millijoules, None) between two readings of the same GPUs, or (None, reason)."""
    total_mj = 0
    for uuid, first in start.items():
        last = end[uuid]
        if first.energy_mj is None or last.energy_mj is None:
            return None, f"{uuid}: {first.reason or last.reason}"
        spent_mj = last.energy_mj - first.energy_mj
        if spent_mj < 0:
            return None, f"{uuid}: counter reset from {first.energy_mj} to {last.energy_mj} mJ (driver reloaded)"
        if spent_mj == 0:
            if resolution_ms is not None and seconds * 1000 < resolution_ms:
                bound = f"shorter than the counter's step, up to {resolution_ms:g} ms"
                return None, f"{uuid}: the window of {seconds * 1000:.1f} ms is {bound}: measure more work at once"
            return None, f"{uuid}: the counter did not advance in {seconds:.3f} s, so it does not count"
        total_mj += spent_mj
    return total_mj, None


def _joint_tenancy(seen: Sequence[str]) -> str:
    if "shared" in seen:
        return "shared"
    return "exclusive" if set(seen) == {"exclusive"} else "unknown"


def _common(words: Iterable[str]) -> str:
    distinct = set(words)
    return distinct.pop() if len(distinct) == 1 else "none"
