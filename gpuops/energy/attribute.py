"""The conserving split: who drew the joules that one GPU's counter counted.

Between two reads of the counter the power is taken as constant, and whoever computes at a moment shares it by weight.
What is drawn while nobody computes is idle. What was counted over a gap too long for that, or cannot be known because
the counter began anew, is lost. Shares, idle and lost add up to what the counter rose by, to the microjoule.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

from gpuops.errors import InputError

Key = TypeVar("Key", bound=Hashable)
GAP_NS = 1_000_000_000
"""Reads farther apart say nothing of who drew what between them."""


@dataclass(frozen=True, slots=True)
class Span(Generic[Key]):
    """A piece of work that computed for a while."""

    key: Key
    """What the work was done for, such as a request or a model version."""
    begin_ns: int
    """When it began."""
    end_ns: int
    """When it ended."""
    weight: float = 1.0
    """Its share beside others of the same moment, such as the rows of a batch; more than 0."""


@dataclass(frozen=True, slots=True)
class Split(Generic[Key]):
    """Whose the energy was; microjoules, so that shares of a counter in millijoules can be whole numbers."""

    shares_uj: dict[Key, int]
    """Energy of every key that was given, 0 for one that never computed while the counter was read."""
    idle_uj: int
    """Drawn while nobody computed."""
    lost_uj: int
    """Counted, but over gaps too long to be split."""
    lost: tuple[tuple[int, int], ...]
    """Those gaps, and the intervals in which the counter began anew, (begin, end) in nanoseconds."""

    @property
    def total_uj(self) -> int:
        """What the counter rose by."""
        return sum(self.shares_uj.values()) + self.idle_uj + self.lost_uj


def split(reads: Iterable[tuple[int, int]], spans: Iterable[Span[Key]], *, gap_ns: int = GAP_NS) -> Split[Key]:
    """Split a counter's energy among overlapping pieces of work.

    The result does not depend on the order of reads or spans, nor on how often one is told; spans of one key that touch
    or overlap count as one, with the largest of their weights where they overlap.

    Time is O((r + s) log(r + s)): work that computes at weight w draws w times what one unit of weight draws, and that
    is one running sum (the virtual time of fair queueing, Demers, Keshav and Shenker 1989).

    Args:
        reads: (time in ns, counter in mJ) of each read.
        spans: what computed when; outside of the reads they draw nothing.
        gap_ns: longest time between two reads that is split.

    Raises:
        InputError: a span that ends before it begins or whose weight is not positive, or two reads of one time that
            differ.
    """
    points = _checked(reads)
    pieces = _united(spans)
    shares: dict[Key, float] = {piece.key: 0.0 for piece in pieces}
    idle, lost_uj, lost = 0.0, 0, list[tuple[int, int]]()

    # Every change of who computes, in time order: weights that join, and weights that leave.
    changes = sorted(
        (at, index, way)
        for index, piece in enumerate(pieces)
        if piece.begin_ns < piece.end_ns
        for at, way in ((piece.begin_ns, 1), (piece.end_ns, -1))
    )
    turn, active, weight, unit_uj = 0, 0, 0.0, 0.0
    entered = [0.0] * len(pieces)

    def change(until_ns: int) -> None:
        nonlocal turn, active, weight
        while turn < len(changes) and changes[turn][0] <= until_ns:
            _, index, way = changes[turn]
            if way > 0:
                entered[index] = unit_uj
            else:
                shares[pieces[index].key] += pieces[index].weight * (unit_uj - entered[index])
            active += way
            weight = weight + way * pieces[index].weight if active else 0.0  # rounding does not outlive its causes
            turn += 1

    for (begin_ns, begin_mj), (end_ns, end_mj) in pairwise(points):
        rise_uj = (end_mj - begin_mj) * 1000
        if rise_uj < 0 or end_ns - begin_ns > gap_ns:
            lost.append((begin_ns, end_ns))
            lost_uj += max(rise_uj, 0)
            change(end_ns)
            continue
        at = begin_ns
        change(at)
        while at < end_ns:
            until = min(changes[turn][0], end_ns) if turn < len(changes) else end_ns
            part = rise_uj * (until - at) / (end_ns - begin_ns)
            if active:
                unit_uj += part / weight
            else:
                idle += part
            at = until
            change(at)
    for index, piece in enumerate(pieces):  # still computing at the last read
        if points and piece.begin_ns <= points[-1][0] < piece.end_ns:
            shares[piece.key] += piece.weight * (unit_uj - entered[index])
    counted = sum(max(end - begin, 0) for (_, begin), (_, end) in pairwise(points)) * 1000 - lost_uj
    keys = sorted(shares, key=repr)
    whole = _whole([*(shares[key] for key in keys), idle], counted)
    return Split(dict(zip(keys, whole[:-1], strict=True)), whole[-1], lost_uj, tuple(lost))


def _checked(reads: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    points = sorted(set(reads))
    for (at, _), (then, _) in pairwise(points):
        if at == then:
            raise InputError(f"the counter was read twice at {at} ns and differs: give each read its own time")
    return points


def _united(spans: Iterable[Span[Key]]) -> list[Span[Key]]:
    """Spans that do not overlap others of their key, in an order that does not depend on how they were told."""
    by_key: dict[Key, list[Span[Key]]] = {}
    for span in spans:
        if span.end_ns < span.begin_ns or not span.weight > 0:
            raise InputError(
                f"{span} ends before it begins, or weighs nothing: give begin <= end and a positive weight"
            )
        by_key.setdefault(span.key, []).append(span)
    return [piece for key in sorted(by_key, key=repr) for piece in _union(by_key[key])]


def _union(spans: Sequence[Span[Key]]) -> list[Span[Key]]:
    """Spans of one key, cut and joined so that none overlap; the largest weight counts where some did."""
    changes = sorted(
        change for span in spans for change in ((span.begin_ns, 0, span.weight), (span.end_ns, 1, span.weight))
    )
    pieces: list[Span[Key]] = []
    weights: list[float] = []
    for (at, ends, weight), (until, _, _) in pairwise([*changes, changes[-1]]):
        if ends:
            weights.remove(weight)
        else:
            insort(weights, weight)
        if not weights or until == at:
            continue
        if pieces and pieces[-1].end_ns == at and pieces[-1].weight == weights[-1]:
            pieces[-1] = Span(spans[0].key, pieces[-1].begin_ns, until, weights[-1])
        else:
            pieces.append(Span(spans[0].key, at, until, weights[-1]))
    return pieces or [Span(spans[0].key, spans[0].begin_ns, spans[0].begin_ns, 1.0)]


def _whole(parts: Sequence[float], total: int) -> list[int]:
    """Whole numbers nearest to the parts that add up to the total (largest remainder, Hamilton's method)."""
    whole = [max(int(part), 0) for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda i: (whole[i] - parts[i], i))
    missing = total - sum(whole)
    step = 1 if missing > 0 else -1
    order = by_remainder if missing > 0 else by_remainder[::-1]
    while missing:
        # float rounding leaves a few units more than there are parts only where the energy is astronomical
        for index in order:
            if missing and whole[index] + step >= 0:
                whole[index] += step
                missing -= step
    return whole
