"""Where joules come from: one `Sensor` a counter, of GPUs through NVML, of the host through RAPL, or none at all.

A sensor that cannot measure says why, in words meant for a person; it never answers 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Count:
    """What one counter answered."""

    energy_mj: int | None
    """Millijoules since some fixed moment; None if it did not answer, or if this board only tells its power."""
    power_mw: int | None = None
    """Power in milliwatts, where there is no energy counter."""
    reason: str | None = None
    """Why there is no answer."""


@dataclass(frozen=True, slots=True)
class Vitals:
    """What else a board says of itself; None for what it does not say."""

    power_mw: int | None = None
    """Power now, milliwatts."""
    busy_percent: int | None = None
    """Share of the last sampling period in which any kernel ran: time busy, not how much of the GPU was used."""
    memory_bytes: int | None = None
    """Memory in use, by all processes."""
    temperature_c: int | None = None
    """Temperature of the GPU, degrees Celsius."""
    sm_mhz: int | None = None
    """Clock of the multiprocessors."""
    tenancy: str = "unknown"
    """Whether other processes use it: "exclusive", "shared" or "unknown"."""


class Sensor(Protocol):
    """One counter of energy."""

    @property
    def id(self) -> str:
        """UUID of the GPU, or the name of the host's domain."""
        ...

    @property
    def name(self) -> str:
        """Model, for people."""
        ...

    @property
    def method(self) -> str:
        """How it measures; see `Reading.method`."""
        ...

    @property
    def scope(self) -> str:
        """What the counter includes; see `Reading.scope`."""
        ...

    @property
    def step_ms(self) -> float:
        """Longest known time between two steps of the counter."""
        ...

    def count(self) -> Count:
        """The counter now."""
        ...

    def vitals(self) -> Vitals:
        """Everything else now."""
        ...


@dataclass(frozen=True, slots=True)
class Found:
    """The sensors that there are, or why there is none."""

    sensors: Sequence[Sensor]
    """One a counter."""
    reason: str | None = None
    """Why there is none; None if there is one."""
