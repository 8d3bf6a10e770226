"""The course of a counter between marks, for those who split it; and what a meter that runs for days keeps."""

from itertools import pairwise

import pytest

from gpuops.energy.sampler import Sampler
from gpuops.energy.sensor import Count, Vitals
from gpuops.energy.track import Track

MS = 1_000_000


class Stepping:
    """A counter that steps every 20 ms, on a clock that the test moves: 100 W, and 400 W from 3 s on."""

    id, name, method, scope, step_ms = "GPU-a", "H100", "nvml-counter", "gpu-board", 20.0

    def __init__(self) -> None:
        self.now_ns = 0

    def count(self) -> Count:
        at_ms = self.now_ns // (20 * MS) * 20
        return Count(100 * at_ms // 1 + 300 * max(at_ms - 3000, 0))

    def vitals(self) -> Vitals:
        return Vitals()


@pytest.fixture
def counter() -> Stepping:
    return Stepping()


@pytest.fixture
def sampler(counter: Stepping) -> Sampler:
    return Sampler([counter], clock=lambda: counter.now_ns)


def pass_time(sampler: Sampler, counter: Stepping, ms: int) -> None:
    until = counter.now_ns + ms * MS
    while counter.now_ns < until:
        counter.now_ns = min(until, counter.now_ns + max(int(sampler.poll() * 1e9), 1))


def test_a_course_goes_from_mark_to_mark_over_the_steps_between(sampler: Sampler, counter: Stepping) -> None:
    pass_time(sampler, counter, 1000)
    begin = sampler.mark()
    sampler.keep_from(begin)
    pass_time(sampler, counter, 4000)
    end = sampler.mark()
    pass_time(sampler, counter, 500)
    course = sampler.course("GPU-a", begin, end)
    assert (course[0][0], course[-1][0]) == (begin, end)
    assert course[-1][1] - course[0][1] == pytest.approx(2 * 100_000 + 2 * 400_000, rel=0.01)
    assert all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(course))
    assert len(course) > 70, "a step is seen at each read, which are 50 ms apart"
    half = min(course, key=lambda read: abs(read[0] - 3000 * MS))
    assert half[1] - course[0][1] == pytest.approx(2 * 100_000, rel=0.1), "it follows the change of power"


def test_courses_of_windows_that_follow_each_other_meet(sampler: Sampler, counter: Stepping) -> None:
    sampler.keep_from(sampler.mark())
    marks = []
    for _ in range(5):
        pass_time(sampler, counter, 730)
        marks.append(sampler.mark())
    pass_time(sampler, counter, 500)
    courses = [sampler.course("GPU-a", *pair) for pair in pairwise(marks)]
    assert all(a[-1] == b[0] for a, b in pairwise(courses))


def test_an_edge_that_is_not_known_is_left_out(sampler: Sampler, counter: Stepping) -> None:
    pass_time(sampler, counter, 500)
    begin = sampler.mark()
    pass_time(sampler, counter, 500)
    end = sampler.mark()
    course = sampler.course("GPU-a", begin, end)
    assert course[0][0] == begin
    assert course[-1][0] < end, "its next steps are not seen yet"


def test_marks_before_one_are_forgotten_and_steps_after_it_are_kept(sampler: Sampler, counter: Stepping) -> None:
    for _ in range(20):
        pass_time(sampler, counter, 1000)
        mark = sampler.mark()
        pass_time(sampler, counter, 100)
        sampler.keep_from(mark)
    assert len(sampler._marks) <= 2
    assert len(sampler.tracks["GPU-a"].steps(0, counter.now_ns)) < 200, "not those of all 22 seconds"
    pass_time(sampler, counter, 20_000)
    steps = sampler.tracks["GPU-a"].steps(mark, counter.now_ns)
    assert steps[0][0] < mark + 200 * MS
    assert len(steps) > 300


def test_a_step_at_a_moment_is_not_between_it_and_another() -> None:
    track = Track()
    for at, mj in ((0, 5), (10, 9), (20, 0), (30, 2), (40, 3)):  # it begins anew at 20
        track.see(at, Count(mj))
    assert track.steps(0, 20) == [(5, 4)]
    assert track.steps(20, 40) == [(25, 6), (35, 7)]
