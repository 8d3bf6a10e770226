"""Idle and shares add up to what the counter rose by, and each gets what its definition says."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuops.energy.attribute import Span
from gpuops_serving.shares import share_by_spans, share_by_time

MS = 1_000_000
IDLE_MW = st.one_of(st.none(), st.sampled_from([0.0, 60_000.0, 500_000.0]))
READS = st.lists(st.tuples(st.integers(1, 120), st.integers(0, 40_000)), min_size=1, max_size=12)
SPANS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(-200, 900), st.integers(0, 400), st.sampled_from([0.5, 1.0, 3.0])),
    max_size=12,
)


def course(rises: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Reads from (milliseconds later, millijoules more)."""
    reads = [(0, 5_000)]
    for wait, rise in rises:
        reads.append((reads[-1][0] + wait * MS, reads[-1][1] + rise))
    return reads


@given(READS, SPANS, IDLE_MW)
def test_spans_and_idle_share_what_was_counted_as_defined(rises: Any, drawn: Any, idle_mw: float | None) -> None:
    reads = course(rises)
    # One span a key, so that a slow and plain sum, millisecond by millisecond, needs no union.
    spans = {key: Span(key, begin * MS, (begin + length) * MS, weight) for key, begin, length, weight in drawn}
    found = share_by_spans(reads, list(spans.values()), idle_mw)
    assert found.idle_uj + sum(found.shares_uj.values()) == 1000 * (reads[-1][1] - reads[0][1])
    assert min([found.idle_uj, *found.shares_uj.values()]) >= 0
    due, idle = dict.fromkeys(spans, 0.0), 0.0
    for (since, low), (until, high) in pairwise(reads):
        moments = range(since, until, MS)
        live = [[span for span in spans.values() if span.begin_ns <= at < span.end_ns] for at in moments]
        free, rise = sum(not now for now in live), 1000.0 * (high - low)
        if free == len(live):
            idle += rise
            continue
        alone = rise * free / len(live) if idle_mw is None else min(idle_mw * free, rise)  # mW * ms are microjoules
        idle += alone
        for now in filter(None, live):
            for span in now:
                due[span.key] += (rise - alone) / (len(live) - free) * span.weight / sum(s.weight for s in now)
    # Idle energy is taken in whole millijoules, the rest of one carried on.
    assert found.idle_uj == pytest.approx(idle, abs=1001)
    for key, share in due.items():
        assert found.shares_uj[key] == pytest.approx(share, abs=1001)


BUSY = st.dictionaries(st.sampled_from("abc"), st.one_of(st.just(0.0), st.floats(0.1, 3e9)), max_size=3)


@given(st.integers(0, 10**6), st.integers(1, 2 * 10**9), BUSY, IDLE_MW)
def test_times_and_idle_share_what_was_counted_as_defined(
    rise_mj: int, length_ns: int, busy: dict[str, float], idle_mw: float | None
) -> None:
    found = share_by_time(rise_mj, length_ns, busy, idle_mw)
    assert found.idle_uj + sum(found.shares_uj.values()) == 1000 * rise_mj
    assert set(found.shares_uj) == set(busy)
    computing = sum(busy.values())
    if not computing:
        assert found.idle_uj == 1000 * rise_mj
        return
    free = max(length_ns - computing, 0)
    idle = rise_mj * 1000 * free / length_ns if idle_mw is None else min(idle_mw * free / 1e6, rise_mj * 1000)
    assert found.idle_uj == pytest.approx(idle, abs=501)
    for key, ns in busy.items():
        assert found.shares_uj[key] == pytest.approx((rise_mj * 1000 - idle) * ns / computing, abs=502)


def test_a_batch_between_two_reads_gets_all_but_idle_power() -> None:
    reads = [(0, 0), (100 * MS, 10_000), (200 * MS, 20_000)]
    found = share_by_spans(reads, [Span("a", 110 * MS, 130 * MS), Span("b", 120 * MS, 130 * MS)], 50_000.0)
    assert found.idle_uj == 10_000_000 + 4_000_000
    assert found.shares_uj == {"a": 4_500_000, "b": 1_500_000}


def test_idle_energy_below_a_millijoule_is_not_rounded_away() -> None:
    """Reads a millisecond apart: each gives 0.4 mJ to idle, which alone would be 0."""
    reads = [(i * MS, 2 * i) for i in range(1001)]
    found = share_by_spans(reads, [Span("a", i * MS, i * MS + MS // 2) for i in range(1000)], 800.0)
    assert found.idle_uj == pytest.approx(400_000, abs=1000)
