"""The course of one counter, put together from the moments at which it was read.

A counter of energy rises in steps, 10 to 100 ms apart, and is read from time to time. Between two steps the power is
taken as constant, or as changing once, from that of the step before to that of the step after, where that agrees with
what the step rose by (subcell resolution: Harten, J. Comput. Phys. 83, 1989). So the energy at any moment is a point of
a broken line, and the energies of windows that follow each other add up to that of the whole. What the steps can hide
is bounded by the steps on both sides of a moment.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from statistics import median

from gpuops.energy.sensor import Count

NARROW_NS = 6_000_000
"""A step seen between two reads this close is known well enough to time the next by."""
GAP_NS = 2_000_000_000
"""Power that was not read for longer is not integrated: nobody knows what was drawn."""
_PERIODS = 15
_KEPT = 64
_MW_NS_PER_MJ = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Edge:
    """The energy at one moment, counted from the first read."""

    energy_mj: int
    """The best estimate."""
    low_mj: int | None
    """It was at least this; None where power is integrated, which knows no such bound."""
    high_mj: int | None
    """It was at most this."""

    @property
    def bound_mj(self) -> int | None:
        """Farthest that the truth can be from the estimate."""
        if self.low_mj is None or self.high_mj is None:
            return None
        return max(self.high_mj - self.energy_mj, self.energy_mj - self.low_mj)


class Track:
    """Steps of one counter, in the order in which they were seen; times are nanoseconds of one clock."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """Why the last read had no answer; None if it had one."""
        self.lost: list[tuple[int, int]] = []
        """Intervals whose energy is not known: a counter that began anew, power that was not read."""
        # Step i was seen between the reads at _before[i] and _after[i]; then _energy[i] was counted.
        self._before: list[int] = []
        self._after: list[int] = []
        self._energy: list[int] = []
        self._read_ns = 0
        self._last = Count(None)
        self._gaps_ns: list[int] = []
        self.period_ns: int | None = None
        """Time between two steps, as found while they were watched closely; None if they were not yet."""
        self._carry = 0
        self._integrated = False

    @property
    def answered(self) -> bool:
        """Whether there was any answer yet."""
        return bool(self._energy)

    def see(self, time_ns: int, count: Count) -> None:
        """Take one read into account."""
        if count.energy_mj is None and count.power_mw is None:
            self.reason = count.reason
            return
        self.reason = None
        if not self._energy:
            self._step(time_ns, time_ns, 0)
        elif count.energy_mj is not None and self._last.energy_mj is not None:
            self._count(time_ns, count.energy_mj - self._last.energy_mj)
        elif count.power_mw is not None and self._last.power_mw is not None:
            self._integrate(time_ns, count.power_mw + self._last.power_mw)
        self._read_ns, self._last = time_ns, count

    def at(self, time_ns: int, *, at_once: bool = False) -> Edge | None:
        """The energy at a moment at which the counter was read; None before the next two steps show it.

        Args:
            time_ns: the moment.
            at_once: be content with the next step.
        """
        after = bisect_right(self._after, time_ns)
        missing = len(self._after) - after
        if missing < (1 if at_once or self._integrated else 2) or after == 0:
            return None
        low, high = self._energy[after - 1], self._energy[after]
        energy = low + round(self._within(after, time_ns))
        return Edge(energy, None, None) if self._integrated else Edge(energy, low, high)

    def last(self) -> Edge:
        """What was counted up to the last step that was seen."""
        return Edge(self._energy[-1], self._energy[-1], self._energy[-1])

    def lost_ns(self, begin_ns: int, end_ns: int) -> int:
        """How much of a window is lost; a counter that has not answered since its last read is lost since then."""
        lost = list(self.lost)
        if self.reason is not None:
            lost.append((self._read_ns if self._energy else begin_ns, end_ns))
        return sum(max(min(last, end_ns) - max(first, begin_ns), 0) for first, last in lost)

    def steps(self, begin_ns: int, end_ns: int) -> list[tuple[int, int]]:
        """The steps between two moments that are still kept: (when, energy counted then in mJ), times ascending."""
        found: list[tuple[int, int]] = []
        first, last = bisect_right(self._after, begin_ns), bisect_right(self._before, end_ns)
        for step in range(first, last):
            at = round(self._time(step))
            if begin_ns < at < end_ns and (not found or at > found[-1][0]):
                found.append((at, self._energy[step]))
        return found

    def forget_before(self, time_ns: int) -> None:
        """Drop steps that no moment from this one on needs."""
        keep = bisect_right(self._after, time_ns) - 4
        if keep > _KEPT:
            del self._before[:keep], self._after[:keep], self._energy[:keep]

    def _count(self, time_ns: int, rise_mj: int) -> None:
        if rise_mj < 0:  # the driver was loaded anew
            self.lost.append((self._read_ns, time_ns))
            self._step(time_ns, time_ns, self._energy[-1])
        elif rise_mj > 0:
            narrow = time_ns - self._read_ns <= NARROW_NS
            if narrow and self._after[-1] - self._before[-1] <= NARROW_NS and len(self._after) > 1:
                self._gaps_ns = [*self._gaps_ns, time_ns - self._after[-1]][-_PERIODS:]
                self.period_ns = int(median(self._gaps_ns))
            self._step(self._read_ns, time_ns, self._energy[-1] + rise_mj)

    def _integrate(self, time_ns: int, both_mw: int) -> None:
        """The trapezoid between two reads of the power."""
        self._integrated = True
        rise = 0
        if time_ns - self._read_ns > GAP_NS:
            self.lost.append((self._read_ns, time_ns))
        else:
            rise, self._carry = divmod(both_mw * (time_ns - self._read_ns) // 2 + self._carry, _MW_NS_PER_MJ)
        self._step(time_ns, time_ns, self._energy[-1] + rise)

    def _step(self, before_ns: int, after_ns: int, energy_mj: int) -> None:
        self._before.append(before_ns)
        self._after.append(after_ns)
        self._energy.append(energy_mj)

    def _within(self, after: int, time_ns: int) -> float:
        """Energy from the step before a moment to that moment; `after` is the next step."""
        begin, end, rise = self._time(after - 1), self._time(after), self._energy[after] - self._energy[after - 1]
        if end <= begin:
            return float(rise)
        passed = min(max(time_ns - begin, 0.0), end - begin)
        before, later = self._power(after - 1), self._power(after + 1)
        if before is not None and later is not None and before != later:
            change = (later * (end - begin) - rise) / (later - before)  # when one power has to follow on the other
            if 0 <= change <= end - begin:
                return before * min(passed, change) + later * max(passed - change, 0.0)
        return rise * passed / (end - begin)

    def _power(self, step: int) -> float | None:
        """Mean power of what ends with a step, mJ a nanosecond; None if it is not known."""
        if not 2 <= step < len(self._after) or self._integrated:
            return None
        begin, end = self._time(step - 1), self._time(step)
        return (self._energy[step] - self._energy[step - 1]) / (end - begin) if end > begin else None

    def _time(self, step: int) -> float:
        """When a step was: in the middle of the reads around it, or by its neighbour where that one is known better."""
        before, after = self._before[step], self._after[step]
        period, middle = self.period_ns, (before + after) / 2
        first = step == 0 and len(self._after) > 1
        if period is None or (after - before <= NARROW_NS and not first):
            return middle
        for neighbour, offset in ((step + 1, -period), (step - 1, period)):
            if 0 < neighbour < len(self._after):
                begin, end = self._before[neighbour], self._after[neighbour]
                if 0 < end - begin <= NARROW_NS:
                    guess = (begin + end) / 2 + offset
                    return min(guess, after) if first else min(max(guess, before), after)
        return middle
