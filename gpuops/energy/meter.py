"""What a window of work cost: the energy at its end less that at its beginning, or null and why.

Rules:
- A powered GPU always draws something: a window that the counter's steps can hide altogether is null, never 0 J.
- A counter that began anew (the driver was loaded again) or a GPU that was lost leaves a gap, `lost_s`, never a
  negative figure; a window of which more than a hundredth is lost is null, and the reason says what was counted.
- One GPU without an answer makes the whole reading null: a sum over some of the GPUs is not the cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpuops.energy.nvml import open_gpus
from gpuops.energy.reading import Reading, joint_tenancy, together
from gpuops.energy.sampler import Sampler, mean
from gpuops.energy.sensor import Found, Sensor, Vitals
from gpuops.energy.track import Track
from gpuops.errors import InputError

COVERED = 0.99
"""Least share of a window that must have been counted."""


@dataclass(frozen=True, slots=True)
class Usage:
    """How one GPU was used in a window; None for what the board does not say."""

    mean_power_w: float | None
    """Mean power, watts: by the counter where it has an answer, else of the looks."""
    peak_power_w: float | None
    """Highest power at any look (twice a second), watts."""
    busy_share: float | None
    """Mean share of time in which any kernel ran, 0 to 1."""
    peak_memory_mb: float | None
    """Most memory in use, all processes, MB (10^6 bytes)."""
    peak_temperature_c: float | None
    """Highest temperature, degrees Celsius."""
    mean_sm_mhz: float | None
    """Mean clock of the multiprocessors."""


class Meter:
    """Energy of windows on this process's GPUs.

        with Meter() as meter:
            work()
        print(meter.reading.to_json())

    `mark` and `between` do the same for windows that overlap or follow each other. Work that is still queued on the GPU
    at the end is not in the window: synchronise first where it matters.

    Args:
        devices: GPUs to count: indices as torch numbers them, or UUIDs; a rank passes its own. None counts all
            visible ones.
        found: sensors to count with instead, such as the host's (`gpuops.energy.rapl.open_host`).
        clock: nanoseconds; the monotonic clock, unless a test has its own.
    """

    def __init__(
        self,
        devices: Sequence[int | str] | None = None,
        *,
        found: Found | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._found = open_gpus(devices) if found is None else found
        self.sampler = Sampler(self._found.sensors, clock)
        self._begun: int | None = None
        self._reading: Reading | None = None

    def __enter__(self) -> Meter:
        self._begun = self.mark()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._begun is not None, "entered"
        try:
            self._reading = self.between(self._begun, self.mark())
        finally:
            self.close()

    @property
    def reading(self) -> Reading:
        """Reading of the window that ended with the `with` block; InputError if none has."""
        if self._reading is None:
            raise InputError("no window has ended yet: read after `with Meter() as meter:`")
        return self._reading

    @property
    def ids(self) -> tuple[str, ...]:
        """UUIDs of the GPUs that are counted."""
        return tuple(sensor.id for sensor in self._found.sensors)

    def mark(self) -> int:
        """An edge of windows: this moment. The first one starts the reading thread."""
        self.sampler.start()
        return self.sampler.mark()

    def close(self) -> None:
        """Stop reading; windows between marks that are known can still be asked for."""
        self.sampler.close()

    def between(self, begin: int, end: int) -> Reading:
        """What all GPUs drew between two marks; waits for the counter's next step, a tenth of a second at most."""
        return self.over([(begin, end)])

    def over(self, windows: Sequence[tuple[int, int]]) -> Reading:
        """What all GPUs drew in several windows that do not overlap, as one reading."""
        readings = list(self.by_sensor(windows).values())
        if not readings:
            seconds = _seconds(windows)
            return Reading(None, "none", self._found.reason, None, "none", "unknown", 0.0, seconds, ())
        return together(readings)

    def by_sensor(self, windows: Sequence[tuple[int, int]]) -> dict[str, Reading]:
        """What each GPU drew in some windows, by UUID."""
        for mark in {mark for window in windows for mark in window}:
            self.sampler.wait(mark)
        return {sensor.id: self._reading_of(sensor, windows) for sensor in self._found.sensors}

    def names(self) -> dict[str, str]:
        """Model of each GPU, by UUID."""
        return {sensor.id: sensor.name for sensor in self._found.sensors}

    def usage(self, windows: Sequence[tuple[int, int]]) -> dict[str, Usage]:
        """How each GPU was used in some windows, by UUID."""
        readings = self.by_sensor(windows)
        return {id: _usage(self.looks(id, windows), readings[id]) for id in self.ids}

    def looks(self, sensor: str, windows: Sequence[tuple[int, int]]) -> list[Vitals]:
        """What a GPU said of itself in some windows."""
        looks = self.sampler.looks[sensor]
        return [vitals for at, vitals in looks if any(begin <= at <= end for begin, end in windows)]

    def _reading_of(self, sensor: Sensor, windows: Sequence[tuple[int, int]]) -> Reading:
        track = self.sampler.tracks[sensor.id]
        step_ms = sensor.step_ms if track.period_ns is None else track.period_ns / 1e6
        lost_s, seconds = sum(track.lost_ns(*window) for window in windows) / 1e9, _seconds(windows)
        energy_mj, bound_mj, reason = self._difference(sensor.id, windows)
        if reason is None:
            reason = _why_not(track, energy_mj, bound_mj, seconds, lost_s, step_ms)
        return Reading(
            energy_mj if reason is None else None,
            sensor.method,
            None if reason is None else f"{sensor.id}: {reason}",
            step_ms,
            sensor.scope,
            joint_tenancy([look.tenancy for look in self.looks(sensor.id, windows)]),
            lost_s=lost_s,
            seconds=seconds,
            gpus=(sensor.id,),
            bound_mj=bound_mj if reason is None else None,
        )

    def _difference(self, sensor: str, windows: Sequence[tuple[int, int]]) -> tuple[int, int | None, str | None]:
        """(millijoules, what the steps can hide, why unknown) of one counter over some windows."""
        track, energy_mj, bounds = self.sampler.tracks[sensor], 0, list[int | None]()
        for begin, end in windows:
            first, last = self.sampler.edge(begin, sensor), self.sampler.edge(end, sensor)
            if last is None and track.reason is not None and track.answered:
                last = track.last()
            if first is None or last is None:
                still = f"the counter did not advance within {(end - begin) / 1e9:.3f} s, so it does not count"
                return 0, None, track.reason or still
            energy_mj += last.energy_mj - first.energy_mj
            bounds += [first.bound_mj, last.bound_mj]
        known = [bound for bound in bounds if bound is not None]
        return energy_mj, sum(known) if len(known) == len(bounds) else None, None


def _seconds(windows: Sequence[tuple[int, int]]) -> float:
    return sum(end - begin for begin, end in windows) / 1e9


def _why_not(
    track: Track, energy_mj: int, bound_mj: int | None, seconds: float, lost_s: float, step_ms: float
) -> str | None:
    """Why a difference of counters is no answer; None if it is one."""
    if lost_s > (1 - COVERED) * seconds:
        why = track.reason or "the counter began anew, as when the driver is reloaded, or was not read"
        counted = f"{energy_mj / 1000:g} J were counted in the rest"
        return f"{lost_s:.2f} of {seconds:.2f} s are lost ({why}); {counted}"
    if energy_mj <= 0 or (bound_mj is not None and bound_mj >= energy_mj):
        steps = f"a counter that steps every {step_ms:.0f} ms"
        return f"a window of {seconds * 1000:.1f} ms is too short for {steps}: measure more work at once"
    return None


def _usage(looks: Sequence[Vitals], reading: Reading) -> Usage:
    def peak(values: Sequence[int | None], scale: float) -> float | None:
        known = [value for value in values if value is not None]
        return max(known) / scale if known else None

    powers = [look.power_mw for look in looks]
    looked, busy = mean(powers), mean([look.busy_percent for look in looks])
    return Usage(
        mean_power_w=reading.watts if reading.watts is not None or looked is None else looked / 1000,
        peak_power_w=peak(powers, 1000),
        busy_share=None if busy is None else busy / 100,
        peak_memory_mb=peak([look.memory_bytes for look in looks], 1e6),
        peak_temperature_c=peak([look.temperature_c for look in looks], 1),
        mean_sm_mhz=mean([look.sm_mhz for look in looks]),
    )
