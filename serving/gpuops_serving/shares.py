"""Whose one GPU's energy was between two looks: idle, and what the versions share that computed there.

The board draws its idle power while nothing computes; the rest is shared by those who computed, by the conserving split
of gpuops.energy.attribute. Idle and shares add up to what the counter rose by, to the microjoule.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Generic, TypeVar

from gpuops.energy.attribute import Span, split

K = TypeVar("K", bound=Hashable)
_MW_NS_PER_MJ = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Shares(Generic[K]):
    """Whose the energy was, microjoules."""

    shares_uj: Mapping[K, int]
    """By who computed."""
    idle_uj: int
    """Nobody's, as nothing computed."""


def share_by_time(rise_mj: int, length_ns: int, busy_ns: Mapping[K, float], idle_mw: float | None) -> Shares[K]:
    """Share what a counter rose by among those who computed, by their computing time.

    It is known for how long each computed, not when: time in which several did is counted to each of them, so that
    less of it looks idle than was.

    Args:
        rise_mj: Rise of the counter, millijoules.
        length_ns: Time in which it rose, nanoseconds, positive.
        busy_ns: Computing time, nanoseconds; who has none gets nothing.
        idle_mw: What the board draws with nothing to do, milliwatts; None if that was never seen: then idle time draws
            as much as computing time does.
    """
    spans = [Span(key, 0, length_ns, ns) for key, ns in busy_ns.items() if ns > 0]
    free_ns = length_ns - min(sum(span.weight for span in spans), length_ns)
    idle_mj = round(_idle_mj(rise_mj, length_ns, free_ns, idle_mw)) if spans else rise_mj
    found = split([(0, 0), (length_ns, rise_mj - idle_mj)], spans, gap_ns=length_ns)
    return Shares(dict.fromkeys(busy_ns, 0) | found.shares_uj, idle_mj * 1000 + found.idle_uj)


def share_by_spans(reads: Sequence[tuple[int, int]], spans: Sequence[Span[K]], idle_mw: float | None) -> Shares[K]:
    """Share what a counter rose by among those who computed, by when they did.

    Between two reads those who computed share what is left when the time in which nobody did has drawn its idle power.

    Args:
        reads: (time in ns, counter in mJ), both ascending, at least two.
        spans: Who computed when; what lies outside of the reads is cut off.
        idle_mw: As `share_by_time`.
    """
    begin, end = reads[0][0], reads[-1][0]
    cut = [
        Span(span.key, max(span.begin_ns, begin), min(span.end_ns, end), span.weight)
        for span in spans
        if span.begin_ns < end and span.end_ns > begin
    ]
    clock = _ActiveClock(cut)
    # The counter without idle power, on a clock that stands still while nobody computes.
    points, active_mj, idle_mj, carry = [(0, 0)], 0, 0, 0.0
    for (since, low), (until, high) in pairwise(reads):
        computing = clock(until) - clock(since)
        idle = float(high - low)
        if computing:
            idle = _idle_mj(high - low, until - since, until - since - computing, idle_mw) + carry
        whole = min(max(round(idle), 0), high - low)
        carry = idle - whole if computing else carry
        idle_mj += whole
        active_mj += high - low - whole
        points.append((clock(until), active_mj))
    moved = [Span(span.key, clock(span.begin_ns), clock(span.end_ns), span.weight) for span in cut]
    found = split(points, moved, gap_ns=end - begin)
    return Shares(dict.fromkeys((span.key for span in spans), 0) | found.shares_uj, idle_mj * 1000 + found.idle_uj)


def _idle_mj(rise_mj: int, length_ns: int, free_ns: float, idle_mw: float | None) -> float:
    """What the time in which nothing computed drew; never more than the counter rose by."""
    if idle_mw is None:
        return rise_mj * free_ns / length_ns
    return min(idle_mw * free_ns / _MW_NS_PER_MJ, float(rise_mj))


class _ActiveClock:
    """Time in which anybody computed, up to a moment."""

    def __init__(self, spans: Sequence[Span[K]]) -> None:
        pieces: list[tuple[int, int]] = []
        for begin, end in sorted((span.begin_ns, span.end_ns) for span in spans):
            if pieces and begin <= pieces[-1][1]:
                pieces[-1] = pieces[-1][0], max(pieces[-1][1], end)
            else:
                pieces.append((begin, end))
        self._begins = [begin for begin, _ in pieces]
        self._lengths = [end - begin for begin, end in pieces]
        self._before = [0, *accumulate(self._lengths)]

    def __call__(self, at_ns: int) -> int:
        piece = bisect_right(self._begins, at_ns) - 1
        if piece < 0:
            return 0
        return self._before[piece] + min(at_ns - self._begins[piece], self._lengths[piece])
