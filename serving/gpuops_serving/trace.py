"""Triton's traces: when every request computed, read from its files; and OpenTelemetry attributes for its spans.

A server started with `trace_flags` writes a file of finished requests each time it has `log_frequency` of them:
FILE.0, FILE.1, ... Times are the host's monotonic clock, in nanoseconds, as `time.monotonic_ns`.

Its records are not to be trusted as JSON: a request's id, which clients choose, is written as it came, so it can break
a record or forge one. Only records of the exact form that Triton writes are taken, the first name and the last times
of each request, and whoever uses them holds their number against the statistics (`Window.holds`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpuops.energy.attribute import Span
from gpuops.errors import InputError
from gpuops_serving.work import Key

LOG_FREQUENCY = 100
"""Requests a file; a file is written when they are finished, so choose about as many as come in a second."""
SLACK_NS = 20_000_000
"""A finished request is counted in the statistics within this time."""
RACE_NS = 500_000_000
"""Files of one server may be finished in another order than they are numbered, this far apart."""

_NAMED = re.compile(r'\{"id":(\d+),"model_name":"([^"]*)","model_version":(-?\d+)')
_TIMED = re.compile(r'\{"id":(\d+),"timestamps":\[\{"name":"([A-Z_]+)","ns":(\d+)\}\]\}')


@dataclass(frozen=True, slots=True)
class Traced:
    """One request that was finished."""

    model: str
    """Model name."""
    version: str
    """Version number."""
    begin_ns: int | None
    """When its batch began to compute; None if it never did, as when the cache answered."""
    end_ns: int | None
    """When that ended; the requests of one batch have both in common."""
    done_ns: int
    """When it was finished."""

    @property
    def key(self) -> Key:
        """(model, version)."""
        return self.model, self.version


class TraceReader:
    """Reads the trace files of a server as they appear; what was written before is passed over.

    Args:
        file: As `trace_flags` was given it.
        remove: Delete files that were read; else they fill the disk, about 1 kB a request.
    """

    def __init__(self, file: str | Path, *, remove: bool = False) -> None:
        self._file = Path(file)
        self._remove = remove
        there = [
            (path.stat().st_mtime_ns, int(path.suffix[1:]))
            for path in self._file.parent.glob(f"{self._file.name}.*")
            if path.suffix[1:].isdecimal()
        ]
        self._last_ns, last = max(there, default=(0, -1))
        self._next = last + 1
        self.files = 0
        """Files that were read."""

    def read(self) -> list[Traced]:
        """Requests of the files that were completed since; a file that is being written waits for the next call."""
        found: list[Traced] = []
        # A server that starts again writes over its files from the first one on.
        if self._next and self._written(0) > self._last_ns + RACE_NS:
            self._next = 0
        while (written := self._written(self._next)) and written > self._last_ns - RACE_NS:
            path = self._path(self._next)
            text = path.read_bytes().decode("latin-1")
            # One that is not complete long before the next one was left so by a server that was killed.
            if not text.rstrip().endswith("]") and self._written(self._next + 1) <= written + RACE_NS:
                break
            found += parse(text)
            self._last_ns, self._next, self.files = max(self._last_ns, written), self._next + 1, self.files + 1
            if self._remove:
                path.unlink(missing_ok=True)
        return found

    def _path(self, number: int) -> Path:
        return self._file.with_name(f"{self._file.name}.{number}")

    def _written(self, number: int) -> int:
        """When a file was written, nanoseconds; 0 if it is not there."""
        try:
            return self._path(number).stat().st_mtime_ns
        except FileNotFoundError:
            return 0


def parse(text: str) -> list[Traced]:
    """Requests of one trace file, in the order in which they were finished."""
    names: dict[str, tuple[str, str]] = {}
    for number, model, version in _NAMED.findall(text):
        names.setdefault(number, (model, version))  # what a client wrote comes after what Triton did
    times: dict[str, dict[str, int]] = {number: {} for number in names}
    for number, name, ns in _TIMED.findall(text):
        if number in times:
            times[number][name] = int(ns)
    found = [
        Traced(*names[number], at.get("COMPUTE_START"), at.get("COMPUTE_END"), at["REQUEST_END"])
        for number, at in times.items()
        if "REQUEST_END" in at
    ]
    return sorted(found, key=lambda request: request.done_ns)


def spans(requests: Iterable[Traced]) -> list[Span[tuple[str, str, int]]]:
    """When each request computed, for `gpuops.energy.attribute.split`; keys are (model, version, place).

    Requests of one executed batch share it: together they weigh 1, as traces do not tell how many rows each has.
    """
    computed = [(place, r) for place, r in enumerate(requests) if r.begin_ns is not None and r.end_ns is not None]
    sizes = Counter((r.key, r.begin_ns, r.end_ns) for _, r in computed)
    return [
        Span((*r.key, place), r.begin_ns, r.end_ns, 1 / sizes[r.key, r.begin_ns, r.end_ns])
        for place, r in computed
        if r.begin_ns is not None and r.end_ns is not None and r.begin_ns <= r.end_ns
    ]


@dataclass(frozen=True, slots=True)
class Window:
    """Two questions for a server's statistics: each asked and answered at some moment, nanoseconds."""

    asked_ns: int
    """When the first was asked."""
    begin_ns: int
    """When it was answered."""
    asked_again_ns: int
    """When the second was asked."""
    end_ns: int
    """When it was answered."""

    def holds(self, requests: Sequence[Traced], counted: Mapping[Key, int]) -> str | None:
        """Why traces do not fit what the statistics counted between the two; None if they do.

        A request that was finished about when a question was answered may be counted or not.

        Args:
            requests: Traced requests, of any time.
            counted: Requests of each version by the statistics; others are not looked at.
        """
        most, least = Counter[Key](), Counter[Key]()
        for request in requests:
            at = request.done_ns
            most[request.key] += self.asked_ns - SLACK_NS < at <= self.end_ns + SLACK_NS
            least[request.key] += self.begin_ns + SLACK_NS < at <= self.asked_again_ns - SLACK_NS
        for key, count in counted.items():
            if not least[key] <= count <= most[key]:
                return (
                    f"traces hold {most[key]} of {count} requests of {':'.join(key)}: trace every one (rate=1), and "
                    "give a log-frequency that is reached within a second"
                )
        return None


def trace_flags(file: str | Path, *, log_frequency: int = LOG_FREQUENCY) -> list[str]:
    """Flags of tritonserver that make it write what `TraceReader` reads.

    Args:
        file: Where; best on a tmpfs, as each request adds about 1 kB.
        log_frequency: Requests a file.

    Raises:
        InputError: a log frequency below 1, with which nothing is written before the server ends.
    """
    if log_frequency < 1:
        raise InputError(f"log frequency {log_frequency}: at least 1 request a file")
    settings = ["mode=triton", "rate=1", "level=TIMESTAMPS"]
    return [
        f"--trace-config=triton,file={file}",
        f"--trace-config=triton,log-frequency={log_frequency}",
        *(f"--trace-config={setting}" for setting in settings),
    ]
