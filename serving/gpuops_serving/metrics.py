"""Joules per request and per model version: Triton's statistics and the GPU's counter, split without a remainder.

Triton tells for how long each version of each model computed (statistics deltas), the counter what the board drew.
In each interval between two looks, on each GPU:

    idle      what the board draws with nothing to do (its lowest mean power over an interval without work, once there
              was one), for the time in which nothing computed
    shares    the rest, to the versions that computed there, by their computing time
    unattributed   the shares of what cannot be told apart: models whose statistics do not say who computed when
              (decoupled: streaming, in-flight batching), and intervals in which the server did not answer
    lost      what the counter itself lost (reset, gap)

Idle, shares, unattributed and lost add up to what the counter rose by, to the microjoule (gpuops.energy.attribute).
An interval is settled one look later, when the counter's step over its end is in.

Where Triton writes traces (`--trace-config`), real begin and end of every request replace the deltas
(gpuops_serving.trace).
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpuops.energy.attribute import Span, split
from gpuops.energy.meter import Meter
from gpuops.energy.nvml import open_gpus
from gpuops.energy.sensor import Found
from gpuops.errors import GpuopsError
from gpuops_serving.client import Client

Key = tuple[str, str]
"""(model, version)."""
DECOUPLED = "streams its answers, so its statistics do not say who computed when"
ON_CPU = "computes on the CPU, which no counter here covers"


@dataclass(frozen=True, slots=True)
class Work:
    """What a server did between two looks."""

    requests: Mapping[Key, int]
    """Requests answered, failed ones included."""
    busy_ns: Mapping[Key, int]
    """Time in which instances computed, input and output copies included, nanoseconds."""

    @classmethod
    def between(cls, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> Work:
        """From two statistics; a version that counts anew (it was loaded again) has done what it counts now."""
        old = {_key(entry): entry for entry in before}
        requests, busy = {}, {}
        for entry in after:
            key = _key(entry)
            now, then = _counts(entry), _counts(old.get(key, {}))
            reset = any(a < b for a, b in zip(now, then, strict=True))
            requests[key], busy[key] = now if reset else (now[0] - then[0], now[1] - then[1])
        return cls(requests, busy)


def _key(entry: Mapping[str, Any]) -> Key:
    return str(entry["name"]), str(entry["version"])


def _counts(entry: Mapping[str, Any]) -> tuple[int, int]:
    """(requests, nanoseconds computing) of a version's statistics."""
    stats = entry.get("inference_stats", {})
    requests = sum(int(stats.get(kind, {}).get("count", 0)) for kind in ("success", "fail"))
    # Statistics per batch count an execution once; those per request would count it for each request that it held.
    busy = sum(
        int(batch.get(part, {}).get("ns", 0))
        for batch in entry.get("batch_stats", [])
        for part in ("compute_input", "compute_infer", "compute_output")
    )
    return requests, busy


@dataclass(slots=True)
class Totals:
    """What was counted since the meter began; microjoules, by GPU and owner."""

    shares_uj: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """By (GPU, model, version)."""
    idle_uj: Counter[str] = field(default_factory=Counter)
    """By GPU."""
    unattributed_uj: Counter[str] = field(default_factory=Counter)
    """By GPU."""
    counted_uj: Counter[str] = field(default_factory=Counter)
    """By GPU: what the counter rose by. Shares, idle and unattributed add up to it."""
    lost_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By GPU: seconds that the counter did not cover."""
    requests: Counter[Key] = field(default_factory=Counter)
    """By (model, version), in settled intervals."""
    unknown: dict[Key, str] = field(default_factory=dict)
    """Why a version's joules are not known."""

    def joules_per_request(self, key: Key) -> float | None:
        """Joules by requests of a version since the meter began; None if unknown or nothing was asked."""
        if key in self.unknown or not self.requests[key] or not self.counted_uj:
            return None
        return sum(uj for (_, *owner), uj in self.shares_uj.items() if tuple(owner) == key) / 1e6 / self.requests[key]


@dataclass(frozen=True, slots=True)
class _Interval:
    begin: int
    end: int
    work: Work | None


class ServerMeter:
    """Meters a server's models; call `poll` about once a second, or let the exporter do it.

    Args:
        client: Connection to the server, which must run on this host: the GPUs read are this host's.
        found: Sensors to count with; the visible GPUs if None.
        clock: nanoseconds; the monotonic clock, unless a test has its own.
    """

    def __init__(
        self, client: Client, *, found: Found | None = None, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._client = client
        # What else runs on the boards is not ours: the server is another process.
        self._found = open_gpus(own=set) if found is None else found
        self._meter = Meter(found=self._found, clock=clock)
        self._statistics: Sequence[Mapping[str, Any]] | None = None
        self._mark: int | None = None
        self._waiting: deque[_Interval] = deque()
        self._idle_mw: dict[str, float] = {}
        self._configs: dict[str, Mapping[str, Any]] = {}
        self.totals = Totals()
        self.last_error: str | None = None

    def __enter__(self) -> ServerMeter:
        self.poll()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def method(self) -> tuple[str, str | None]:
        """How energy is counted, and why not if it is not."""
        return (self._found.sensors[0].method, None) if self._found.sensors else ("none", self._found.reason)

    def close(self) -> None:
        """Settle what is left and stop reading."""
        try:
            self.poll()
            while self._waiting:
                self._settle(self._waiting.popleft())
        finally:
            self._meter.close()

    def poll(self) -> None:
        """Look at the server and the counters; settles the interval before the last."""
        try:
            statistics: Sequence[Mapping[str, Any]] | None = self._client.statistics()
            self.last_error = None
        except GpuopsError as error:
            statistics, self.last_error = None, str(error)
        mark = self._meter.mark()
        if self._mark is not None:
            work = None
            if statistics is not None and self._statistics is not None:
                work = Work.between(self._statistics, statistics)
            self._waiting.append(_Interval(self._mark, mark, work))
        if statistics is not None or self._statistics is None:
            self._statistics = statistics
        else:
            self._statistics = None  # what was done meanwhile cannot be put in time: it is nobody's
        self._mark = mark
        while len(self._waiting) > 1:
            self._settle(self._waiting.popleft())

    def _settle(self, interval: _Interval) -> None:
        readings = self._meter.by_sensor([(interval.begin, interval.end)])
        if interval.work is not None:
            self.totals.requests.update(interval.work.requests)
        owners = {} if interval.work is None else self._owners(interval.work)
        length = interval.end - interval.begin
        for gpu, reading in readings.items():
            self.totals.lost_s[gpu] += reading.lost_s
            if reading.energy_mj is None or length <= 0:
                continue
            used = {key: self._gpus_of(key[0]) for key in owners}
            # Statistics do not say on which of its GPUs an instance computed: on each alike.
            busy = {key: ns / len(used[key]) for key, ns in owners.items() if ns and gpu in used[key]}
            found = split_interval(reading.energy_mj, length, busy, interval.work is None, self._idle_mw.get(gpu))
            if interval.work is not None and not busy:
                mean_mw = reading.energy_mj * 1e9 / length
                self._idle_mw[gpu] = min(self._idle_mw.get(gpu, mean_mw), mean_mw)
            self.totals.counted_uj[gpu] += reading.energy_mj * 1000
            self.totals.idle_uj[gpu] += found.idle_uj
            self.totals.unattributed_uj[gpu] += found.unattributed_uj
            for (model, version), uj in found.shares_uj.items():
                if (model, version) in self.totals.unknown:
                    self.totals.unattributed_uj[gpu] += uj
                else:
                    self.totals.shares_uj[gpu, model, version] += uj

    def _owners(self, work: Work) -> dict[Key, int]:
        """Computing time by version, and a note of those whose joules cannot be known."""
        for key in work.busy_ns:
            config = self._config(key[0])
            if config.get("model_transaction_policy", {}).get("decoupled"):
                self.totals.unknown[key] = DECOUPLED
            elif not self._found.sensors:
                self.totals.unknown[key] = self._found.reason or "nothing counts"
            elif not self._gpus_of(key[0]):
                self.totals.unknown[key] = ON_CPU
        return dict(work.busy_ns)

    def _gpus_of(self, model: str) -> set[str]:
        """GPUs that a model has instances on: all visible ones, or those its configuration numbers."""
        ids = [sensor.id for sensor in self._found.sensors]
        return {
            gpu
            for group in self._config(model).get("instance_group", [])
            if group.get("kind") != "KIND_CPU"
            for index, gpu in enumerate(ids)
            if not group.get("gpus") or index in map(int, group["gpus"])
        }

    def _config(self, model: str) -> Mapping[str, Any]:
        if model not in self._configs:
            try:
                self._configs[model] = self._client.raw_config(model)
            except GpuopsError:
                return {}  # asked again at the next interval
        return self._configs[model]


@dataclass(frozen=True, slots=True)
class Shares:
    """Whose one interval's energy was, microjoules."""

    shares_uj: Mapping[Key, int]
    """By (model, version)."""
    idle_uj: int
    """Nobody's, as nothing computed."""
    unattributed_uj: int
    """Somebody's, and not known whose."""


_IDLE = ("", "idle")  # no model has an empty name


def split_interval(
    energy_mj: int, length_ns: int, busy_ns: Mapping[Key, float], unknown: bool, idle_mw: float | None
) -> Shares:
    """Split what one GPU's counter rose by in one interval.

    Args:
        energy_mj: Rise of the counter, millijoules.
        length_ns: Length of the interval, nanoseconds.
        busy_ns: Computing time by version, nanoseconds, positive.
        unknown: Nothing is known of who computed.
        idle_mw: What the board draws with nothing to do, milliwatts; None if that was never seen: then idle time draws
            as much as computing time does.
    """
    if unknown:
        return Shares({}, 0, energy_mj * 1000)
    computing = sum(busy_ns.values())
    free_ns = max(length_ns - computing, 0.0)  # instances that computed at the same time leave none
    spans: list[Span[Key]] = [Span(key, 0, length_ns, ns) for key, ns in busy_ns.items()]
    if free_ns and busy_ns:
        weight = free_ns
        if idle_mw is not None and energy_mj:
            idle_mj = min(idle_mw * free_ns / 1e9, energy_mj * 1.0)
            # The weight that gives idle time this part of the energy; all of it leaves the others nothing.
            weight = computing * idle_mj / (energy_mj - idle_mj) if idle_mj < energy_mj else computing * 1e9
        if weight > 0:
            spans.append(Span(_IDLE, 0, length_ns, weight))
    found = split([(0, 0), (length_ns, energy_mj)], spans, gap_ns=length_ns)
    shares = dict(found.shares_uj)
    idle_uj = shares.pop(_IDLE, 0) + found.idle_uj
    return Shares(shares, idle_uj, 0)
