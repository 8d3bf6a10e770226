"""The split conserves energy for any overlap, order, duplication or merge, and gives each its due."""

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuops.energy.attribute import Span, split
from gpuops.errors import InputError

MS = 1_000_000

READS = st.lists(st.tuples(st.integers(1, 400), st.integers(-500, 50_000)), min_size=2, max_size=30)
SPANS = st.lists(
    st.tuples(
        st.sampled_from("abcdef"), st.integers(-500, 3000), st.integers(0, 1500), st.sampled_from([0.25, 1.0, 3.0, 8.0])
    ),
    max_size=25,
)


def course(rises: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Reads from (milliseconds later, millijoules more); a counter that would fall below 0 begins anew there."""
    time, energy, reads = 0, 10_000, []
    for wait, rise in rises:
        time, energy = time + wait * MS, energy + rise if energy + rise >= 0 else 0
        reads.append((time, energy))
    return reads


def spans_of(drawn: Sequence[tuple[str, int, int, float]]) -> list[Span[str]]:
    return [Span(key, begin * MS, (begin + length) * MS, weight) for key, begin, length, weight in drawn]


def rise_uj(reads: Sequence[tuple[int, int]]) -> int:
    return 1000 * sum(max(b - a, 0) for (_, a), (_, b) in pairwise(reads))


@given(READS, SPANS)
def test_shares_idle_and_lost_are_what_the_counter_rose_by(rises: Any, drawn: Any) -> None:
    reads, spans = course(rises), spans_of(drawn)
    done = split(reads, spans, gap_ns=300 * MS)
    assert done.total_uj == rise_uj(reads)
    assert min([*done.shares_uj.values(), done.idle_uj, done.lost_uj]) >= 0
    assert set(done.shares_uj) == {span.key for span in spans}


@given(READS, SPANS, st.randoms(use_true_random=False))
def test_order_duplicates_and_cuts_change_nothing(rises: Any, drawn: Any, draw: random.Random) -> None:
    reads, spans = course(rises), spans_of(drawn)
    done = split(reads, spans)
    cut = []
    for span in spans:
        middle = (span.begin_ns + span.end_ns) // 2
        cut += [Span(span.key, span.begin_ns, middle, span.weight), Span(span.key, middle, span.end_ns, span.weight)]
    for other in (reads * 2, spans * 2), (reads, cut), (reads[::-1], spans[::-1]):
        told = [list(part) for part in other]
        for part in told:
            draw.shuffle(part)
        assert split(told[0], told[1]) == done


@given(READS, SPANS)
def test_a_key_draws_what_it_draws_alone_in_a_slow_and_plain_sum(rises: Any, drawn: Any) -> None:
    """Against the definition, millisecond by millisecond."""
    reads = course(rises)
    spans = spans_of({key: (key, begin, length, weight) for key, begin, length, weight in drawn}.values())
    done = split(reads, spans)
    due = {span.key: 0.0 for span in spans}
    for (t0, e0), (t1, e1) in pairwise(reads):
        if e1 < e0:
            continue
        for at in range(t0, t1, MS):
            live = [span for span in spans if span.begin_ns <= at < span.end_ns]
            for span in live:
                due[span.key] += 1000 * (e1 - e0) * MS / (t1 - t0) * span.weight / sum(s.weight for s in live)
    for key, share in done.shares_uj.items():
        assert share == pytest.approx(due[key], abs=1 + 1e-6 * due[key])


def test_two_at_once_share_by_weight_and_the_rest_is_idle() -> None:
    reads = [(0, 0), (100 * MS, 10_000), (200 * MS, 20_000)]
    done = split(reads, [Span("small", 0, 50 * MS), Span("large", 0, 100 * MS, 3.0)])
    assert done.shares_uj == {"small": 1_250_000, "large": 3_750_000 + 5_000_000}
    assert (done.idle_uj, done.lost_uj, done.lost) == (10_000_000, 0, ())


def test_a_counter_that_began_anew_and_a_long_gap_are_lost_and_not_idle() -> None:
    reads = [(0, 5_000), (100 * MS, 9_000), (200 * MS, 40), (300 * MS, 100), (5000 * MS, 900)]
    done = split(reads, [Span("work", 0, 6000 * MS)])
    assert done.shares_uj == {"work": 4_060_000}
    assert (done.idle_uj, done.lost_uj) == (0, 800_000)
    assert done.lost == ((100 * MS, 200 * MS), (300 * MS, 5000 * MS))


def test_many_requests_in_flight_conserve_to_a_billionth() -> None:
    """Eight streams of 60 ms for ten minutes; differences around each request would add up to several times that."""
    draw = random.Random(7)
    spans = []
    for stream in range(8):
        at = draw.randrange(50 * MS)
        while at < 600_000 * MS:
            spans.append(Span((stream, len(spans)), at, at + 60 * MS, draw.choice([1.0, 1 / 3])))
            at += draw.randrange(60 * MS, 65 * MS)
    reads = [(i * 100 * MS, 7_000_000 + i * 50_000 + draw.randrange(1000)) for i in range(6001)]
    done = split(reads, spans)
    assert done.total_uj == rise_uj(reads)
    assert len(done.shares_uj) > 70_000


@pytest.mark.parametrize(
    "wrong", [Span("a", 5, 4), Span("a", 0, 5, 0.0), Span("a", 0, 5, -1.0), Span("a", 0, 5, float("nan"))]
)
def test_impossible_spans_are_refused(wrong: Span[str]) -> None:
    with pytest.raises(InputError, match="positive weight"):
        split([(0, 0), (10, 5)], [wrong])


def test_two_answers_at_one_time_are_refused() -> None:
    with pytest.raises(InputError, match="read twice"):
        split([(0, 0), (10, 5), (10, 6)], [Span("a", 0, 5)])


@pytest.mark.parametrize("reads", [[], [(0, 5)]])
def test_no_window_has_no_energy(reads: list[tuple[int, int]]) -> None:
    done = split(reads, [Span("a", 0, 5)])
    assert (done.total_uj, done.shares_uj) == (0, {"a": 0})
