"""One thread that reads some counters: twice a step of theirs, more often only around the edges of a window."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from gpuops.energy.sensor import Sensor, Vitals
from gpuops.energy.track import Edge, Track

SLOWEST_S = 0.05
"""Counters are read at most 20 times a second away from edges: faster reads of power fail on some boards."""
WATCHED_S = 0.002
"""While the length of a step is not known yet, and around edges (a twentieth of the step, at most 5 ms)."""
VITALS_S = 0.5
LOOKS = 4096
"""Looks at a board's vitals that are kept; beyond, every second one is dropped."""


class Sampler:
    """Reads sensors and keeps their course; `poll` is one round, the thread does nothing else.

    Args:
        sensors: what to read.
        clock: nanoseconds; the monotonic clock, unless a test has its own.
    """

    def __init__(self, sensors: Sequence[Sensor], clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.sensors = tuple(sensors)
        self.tracks = {sensor.id: Track() for sensor in self.sensors}
        self.looks: dict[str, list[tuple[int, Vitals]]] = {sensor.id: [] for sensor in self.sensors}
        """Vitals of each board, with the time of each look."""
        self.cpu_s = 0.0
        """Processor time that the thread has taken."""
        self._clock, self._began_ns = clock, clock()
        self._look_ns, self._looks_s = self._began_ns, VITALS_S
        self._marks: dict[int, dict[str, Edge]] = {}
        self._open: list[int] = []
        self._kept_ns: int | None = None
        self._changed = threading.Condition()
        self._running = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Read from now on, in a thread of its own."""
        if self._thread is None and self.sensors:
            self._running = True
            self._thread = threading.Thread(target=self._run, name="gpuops-energy", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop reading."""
        with self._changed:
            self._running = False
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def mark(self) -> int:
        """Read everything now, and watch for the next steps; returns the moment, for `edge`."""
        with self._changed:
            now = self._read()
            while now in self._marks:  # two marks within the clock's resolution
                now += 1
            self._look(now)
            self._marks[now] = {}
            self._open.append(now)
            self._settle()
            self._changed.notify_all()
            return now

    def edge(self, mark_ns: int, sensor: str) -> Edge | None:
        """The energy at a mark, if a step after it was seen."""
        return self._marks[mark_ns].get(sensor)

    def course(self, sensor: str, begin_ns: int, end_ns: int) -> list[tuple[int, int]]:
        """A counter from one mark to another, as `attribute.split` takes reads: (when in ns, mJ), both ascending.

        The marks, where the energy at them is known, and the steps between them that are kept (`keep_from`).
        """
        first, last = self.edge(begin_ns, sensor), self.edge(end_ns, sensor)
        with self._changed:
            steps = self.tracks[sensor].steps(begin_ns, end_ns)
        found = [] if first is None else [(begin_ns, first.energy_mj)]
        ceiling = None if last is None else last.energy_mj
        for at, mj in steps:
            if (not found or mj >= found[-1][1]) and (ceiling is None or mj <= ceiling):
                found.append((at, mj))
        if ceiling is not None:
            found.append((end_ns, max([ceiling, *(mj for _, mj in found[-1:])])))
        return found

    def keep_from(self, mark_ns: int) -> None:
        """Forget the marks before one, and keep the counters' steps from it on, for `course`.

        Without it every mark is kept, so whoever marks for days calls this as soon as windows are done with.
        """
        with self._changed:
            self._kept_ns = mark_ns
            for mark in [mark for mark in self._marks if mark < mark_ns and mark not in self._open]:
                del self._marks[mark]

    def wait(self, mark_ns: int) -> None:
        """Return when the energy at a mark is known, or is not going to be."""
        with self._changed:
            self._changed.wait_for(lambda: mark_ns not in self._open or not self._running, timeout=60)

    def poll(self) -> float:
        """Read once; the seconds until the next read is due."""
        with self._changed:
            now = self._read()
            if now >= self._look_ns + self._looks_s * 1e9:
                self._look(now)
            self._settle()
            watched = any(self._watched(sensor, now) for sensor in self.sensors)
        periods = [track.period_ns or 0 for track in self.tracks.values()]
        if watched:
            known = [period / 20e9 for period in periods if period]
            return min(max(min(known), 0.001), 0.005) if known else WATCHED_S
        return max(max(periods, default=0) / 2e9, SLOWEST_S)

    def _run(self) -> None:
        while True:
            due = self.poll()
            self.cpu_s = time.thread_time()
            with self._changed:
                if not self._running:
                    return
                self._changed.wait(due)

    def _read(self) -> int:
        """Read every counter; the time of the last read."""
        now = self._clock()
        for sensor in self.sensors:
            begun = self._clock()
            count = sensor.count()
            now = (begun + self._clock()) // 2
            self.tracks[sensor.id].see(now, count)
        return now

    def _look(self, now: int) -> None:
        self._look_ns = now
        for sensor in self.sensors:
            self.looks[sensor.id].append((now, sensor.vitals()))
        if any(len(looks) > LOOKS for looks in self.looks.values()):
            self._looks_s *= 2
            for looks in self.looks.values():
                del looks[1::2]

    def _settle(self) -> None:
        """Fix the energy at marks for which a later step was seen, and give up those that wait for one in vain."""
        now = self._clock()
        for mark in list(self._open):
            edges, waiting = self._marks[mark], False
            for sensor in self.sensors:
                if sensor.id in edges:
                    continue
                track = self.tracks[sensor.id]
                patient = track.reason is None and now - mark < _patience_ns(sensor)
                if (edge := track.at(mark, at_once=not patient)) is not None:
                    edges[sensor.id] = edge
                elif patient:
                    waiting = True
            if not waiting:
                self._open.remove(mark)
                self._changed.notify_all()
        for track in self.tracks.values():
            track.forget_before(min([*self._open, now if self._kept_ns is None else self._kept_ns]))

    def _watched(self, sensor: Sensor, now: int) -> bool:
        """Whether the next step of a counter should be seen as it happens."""
        track = self.tracks[sensor.id]
        if not sensor.method.endswith("counter") or sensor.step_ms < 5 or track.reason is not None:
            return False
        unknown = track.period_ns is None and now - self._began_ns < _patience_ns(sensor)
        return unknown or any(sensor.id not in self._marks[mark] for mark in self._open)


def _patience_ns(sensor: Sensor) -> int:
    """How long to wait for a step: one that does not come in four steps' time does not come."""
    return int(max(4 * sensor.step_ms, 400) * 1e6)


def mean(values: Sequence[Any]) -> float | None:
    """Mean of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
