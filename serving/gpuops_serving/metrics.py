"""Joules per request and per model version of a running server: its statistics and traces, and the GPU's counter.

A look at server and counters is booked (gpuops_serving.accounts) when it is `longest_s` old: then the counter's step
over its end is in, the traces are written, and executions that began in it have ended, or are too long to be placed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from itertools import islice

from gpuops.energy.meter import Meter
from gpuops.energy.nvml import open_gpus
from gpuops.energy.sensor import Found
from gpuops.errors import GpuopsError, UnavailableError
from gpuops_serving.accounts import Accounts, Course, Look, Totals
from gpuops_serving.client import Client
from gpuops_serving.trace import SLACK_NS, Traced, TraceReader, Window
from gpuops_serving.work import Key, Served, Statistics, Work, key_of

LONGEST_S = 10.0
"""Executions up to this long are placed in time."""


class ServerMeter:
    """Meters a server's models; call `poll` about once a second, or let the exporter do it.

    Args:
        client: Connection to the server, which must run on this host and see the GPUs that this process sees.
        trace: The server's traces, where it writes some.
        found: Sensors to count with; the visible GPUs if None.
        clock: nanoseconds; the monotonic clock, unless a test has its own.
        longest_s: Longest execution that is placed in time, seconds; also how late a look is booked.
    """

    def __init__(
        self,
        client: Client,
        *,
        trace: TraceReader | None = None,
        found: Found | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        longest_s: float = LONGEST_S,
    ) -> None:
        self._client, self._trace, self._clock = client, trace, clock
        # What else runs on the boards is not ours: the server is another process.
        self._found = open_gpus(own=set) if found is None else found
        self._meter = Meter(found=self._found, clock=clock)
        self._accounts = Accounts(self._meter.ids, self._found.reason)
        self._longest_ns = int(longest_s * 1e9)
        self._statistics: Statistics | None = None
        self._served: dict[Key, Served] = {}
        self._asked: tuple[int, int] | None = None
        self._answered = self._closed = False
        self._waiting: deque[Look] = deque()
        self._requests: list[Traced] = []
        self.last_error: str | None = "the server was not asked yet"
        """Why the server did not answer the last look; None if it did."""

    def __enter__(self) -> ServerMeter:
        self.poll()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def totals(self) -> Totals:
        """What was booked so far."""
        return self._accounts.totals

    @property
    def method(self) -> tuple[str, str | None]:
        """How energy is counted, and why not if it is not."""
        methods = dict.fromkeys(sensor.method for sensor in self._found.sensors)
        return ("+".join(methods), None) if methods else ("none", self._found.reason)

    @property
    def trace_reason(self) -> str | None:
        """Why traces were not used at the last look that had work; None if they were."""
        return self._accounts.trace_reason if self._trace else "no traces are read"

    @property
    def url(self) -> str:
        """The server's address."""
        return self._client.url

    @property
    def gpus(self) -> dict[str, str]:
        """Model of each GPU that is counted, by UUID, in CUDA's order."""
        return self._meter.names()

    @property
    def idle_w(self) -> dict[str, float]:
        """Lowest power seen with nothing to do, watts, by UUID of the GPU; absent until it was."""
        return {gpu: milliwatt / 1000 for gpu, milliwatt in self._accounts.idle_mw.items()}

    @property
    def silent(self) -> dict[str, str]:
        """Why a GPU's counter does not answer now, by UUID; absent if it does."""
        reasons = {gpu: track.reason for gpu, track in self._meter.sampler.tracks.items()}
        return {gpu: reason for gpu, reason in reasons.items() if reason is not None}

    @property
    def version_ids(self) -> dict[Key, str]:
        """Version id of each version that gpuops deployed and the server serves."""
        ids = {key: served.version_id for key, served in self._served.items()}
        return {key: version_id for key, version_id in ids.items() if version_id is not None}

    def poll(self) -> None:
        """Look at server, counters and traces; book what is old enough."""
        asked = self._clock()
        statistics: Statistics | None = None
        try:
            statistics = self._client.statistics()
            self.last_error = None
        except GpuopsError as error:
            self.last_error = str(error)
        mark = self._meter.mark()
        served, work, answered = dict(self._served), Work({}), statistics is not None
        if statistics is not None:
            if self._statistics is not None:
                work = Work.between(self._statistics, statistics)
            self._know(statistics, work.changed)
            self._statistics = statistics
        if self._asked is None:
            self._meter.sampler.keep_from(mark)
        else:
            away = not (answered and self._answered)
            self._waiting.append(Look(Window(*self._asked, asked, mark), work, away, served | self._served))
        self._asked, self._answered = (asked, mark), answered
        if self._trace is not None:
            self._requests += self._trace.read()
        self._book_until(mark - self._longest_ns)

    def close(self) -> None:
        """Look once more, book everything and stop reading; may be called again."""
        if self._closed:
            return
        self._closed = True
        try:
            self.poll()
            self._book_until(None)
        finally:
            self._meter.close()

    def _know(self, statistics: Statistics, changed: frozenset[Key]) -> None:
        """Ask for the configurations of versions that are new or were loaded again."""
        known = {}
        for key in map(key_of, statistics):
            if key in self._served and key not in changed:
                known[key] = self._served[key]
                continue
            try:
                known[key] = Served.of(self._client.raw_config(*key), key[1])
            except UnavailableError:
                break
            except GpuopsError:
                continue  # asked again at the next look
        self._served = known

    def _book_until(self, end_ns: int | None) -> None:
        """Book looks that ended before, all of them for None, each with those whose executions may reach into it."""
        sampler = self._meter.sampler
        while self._waiting and (end_ns is None or self._waiting[0].window.end_ns <= end_ns):
            end, joined = self._waiting[0].window.end_ns, 0
            for place, later in enumerate(islice(self._waiting, 1, None), 1):
                if later.window.begin_ns - later.reach_ns < end:
                    end, joined = later.window.end_ns, place
            look = self._waiting.popleft()
            for _ in range(joined):
                look = look.joined(self._waiting.popleft())
            sampler.wait(end)
            courses = {gpu: self._course(gpu, look.window.begin_ns, end) for gpu in self._meter.ids}
            self._accounts.book(look, courses, self._requests if self._trace else None)
            needed = look.window.asked_again_ns - SLACK_NS
            self._requests = [request for request in self._requests if request.done_ns > needed]
            sampler.keep_from(end)

    def _course(self, gpu: str, begin_ns: int, end_ns: int) -> Course:
        sampler = self._meter.sampler
        track = sampler.tracks[gpu]
        return Course(sampler.course(gpu, begin_ns, end_ns), track.lost_ns(begin_ns, end_ns), track.reason)
