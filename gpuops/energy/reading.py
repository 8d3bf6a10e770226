"""What a window of work cost, or null and why; and how the figures of several GPUs and ranks make one.

One GPU without an answer makes a joint reading null: a sum over some of the GPUs is not the cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpuops.errors import InputError


@dataclass(frozen=True, slots=True)
class Reading:
    """Energy of one window on some GPUs, or why it is not known."""

    energy_mj: int | None
    """Millijoules by the boards' counters, summed over `gpus`; None if unknown."""
    method: str
    """How it was measured: "nvml-counter", "nvml-power-integrated", "nvml-mean-power-integrated", "rapl-counter" or
    "none"; joined by "+" where GPUs differ."""
    reason: str | None
    """Why it is unknown; None if it is known."""
    resolution_ms: float | None
    """Time between two steps of the counter: as found, else the longest known; None if nothing counts."""
    scope: str
    """What is included: "gpu-board" (every process on it, no host), "cpu-package", "dram" or "none"."""
    tenancy: str
    """Whether this process had the GPUs to itself throughout: "exclusive", "shared" or "unknown"."""
    lost_s: float
    """Seconds of the window that a counter should have covered and did not (reset, lost GPU, no answer)."""
    seconds: float
    """Length of the window by the monotonic clock."""
    gpus: tuple[str, ...]
    """UUIDs of the GPUs (ids of the counters) counted."""
    bound_mj: int | None = None
    """Most that the counter's steps at both ends can have hidden, either way; None where no such bound is known.

    It bounds what the stepping adds, not how well the board's own sensor measures.
    """

    def __post_init__(self) -> None:
        if (self.energy_mj is None) == (self.reason is None):
            raise InputError("a reading has either energy or a reason why there is none")
        if self.energy_mj is not None and self.energy_mj < 0:
            raise InputError(f"a reading of {self.energy_mj} mJ: energy is not negative")

    @property
    def joules(self) -> float | None:
        """Energy in joules; None if unknown."""
        return None if self.energy_mj is None else self.energy_mj / 1000

    @property
    def watts(self) -> float | None:
        """Mean power over the window; None if unknown."""
        return None if self.energy_mj is None or self.seconds <= 0 else self.energy_mj / 1000 / self.seconds

    def to_json(self) -> dict[str, Any]:
        """JSON form for reports, with `joules` (null if unknown) and `reason`."""
        return {
            "joules": self.joules,
            "method": self.method,
            "reason": self.reason,
            "resolution_ms": self.resolution_ms,
            "bound_joules": None if self.bound_mj is None else self.bound_mj / 1000,
            "scope": self.scope,
            "tenancy": self.tenancy,
            "lost_s": self.lost_s,
            "seconds": self.seconds,
            "gpus": list(self.gpus),
        }


def together(readings: Sequence[Reading]) -> Reading:
    """One reading for counters that ran at the same time.

    Returns:
        The sum, exact in integer millijoules; null with the first reason if any is null. `seconds`, `lost_s` and
        `resolution_ms` are the longest of any, `gpus` those of all.

    Raises:
        InputError: no readings.
    """
    if not readings:
        raise InputError("no readings to sum: give at least one")
    known = [reading.energy_mj for reading in readings if reading.energy_mj is not None]
    steps = [reading.resolution_ms for reading in readings if reading.resolution_ms is not None]
    bounds = [reading.bound_mj for reading in readings if reading.bound_mj is not None]
    whole = len(known) == len(readings)
    return Reading(
        sum(known) if whole else None,
        _joined(reading.method for reading in readings),
        None if whole else next(reading.reason for reading in readings if reading.reason is not None),
        max(steps) if steps else None,
        _joined(reading.scope for reading in readings),
        joint_tenancy([reading.tenancy for reading in readings]),
        lost_s=max(reading.lost_s for reading in readings),
        seconds=max(reading.seconds for reading in readings),
        gpus=tuple(uuid for reading in readings for uuid in reading.gpus),
        bound_mj=sum(bounds) if whole and len(bounds) == len(readings) else None,
    )


def elect(rows: Iterable[tuple[str, Sequence[str]]]) -> list[tuple[str, ...]]:
    """Which of its GPUs each rank samples, so that each GPU is sampled once.

    Args:
        rows: (host, UUIDs of the GPUs it uses) of each rank, in rank order.

    Returns:
        For each rank the UUIDs that no rank before it on its host has: nothing for one that shares another's GPU.
    """
    taken: set[tuple[str, str]] = set()
    shares: list[tuple[str, ...]] = []
    for host, uuids in rows:
        mine = tuple(uuid for uuid in dict.fromkeys(uuids) if (host, uuid) not in taken)
        taken.update((host, uuid) for uuid in mine)
        shares.append(mine)
    return shares


def sum_over_ranks(rows: Iterable[tuple[str, Reading]]) -> Reading:
    """One reading for work that ran on several ranks at the same time.

    Args:
        rows: (host, reading) of each rank.

    Returns:
        As `together`; a reason that not all ranks give names the rank's host.

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
    total = together([reading for _, reading in ranks])
    if total.reason is None or len({reading.reason for _, reading in ranks}) == 1:
        return total
    host = next(host for host, reading in ranks if reading.reason is not None)
    return replace_reason(total, f"{host}: {total.reason}")


def replace_reason(reading: Reading, reason: str) -> Reading:
    """The same reading, null for another reason."""
    return replace(reading, energy_mj=None, reason=reason, bound_mj=None)


def joint_tenancy(seen: Sequence[str]) -> str:
    """Tenancy over several looks: one that saw others decides, else one that could not tell."""
    if "shared" in seen:
        return "shared"
    return "exclusive" if set(seen) == {"exclusive"} else "unknown"


def _joined(words: Iterable[str]) -> str:
    return "+".join(dict.fromkeys(words))
