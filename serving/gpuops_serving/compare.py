"""Two versions on the same requests: errors, latency, answers, joules, and a verdict.

Requests go to both in blocks, the first of each pair of blocks alternating, so that the machine's slow moments fall on
both alike. A latency ratio condemns a version only if its whole 95 % interval lies above what is allowed. The interval
is a percentile bootstrap (Efron and Tibshirani 1993, section 13.3) over pairs of blocks rather than requests, as
requests of one moment are slow together: one stalled block cannot condemn, and a version compared with its own
latencies has a ratio of exactly 1.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from gpuops.energy.meter import Meter
from gpuops.energy.reading import Reading
from gpuops.energy.sensor import Found
from gpuops.errors import GpuopsError, InputError
from gpuops.spec import Arrays
from gpuops_serving.client import Client
from gpuops_serving.distance import Distance, Distances

BLOCKS = 20
"""Blocks that the requests to each version are sent in."""
FEWEST = {50: 20, 99: 300}
"""Fewer answers than this say nothing of a percentile of latency."""
WARM_UP = 8
"""Requests to each version at first that do not count."""
_RESAMPLES = 500


@dataclass(frozen=True, slots=True)
class Target:
    """One version of a model."""

    model: str
    """Model name."""
    version: str
    """Version number."""

    @classmethod
    def parse(cls, text: str) -> Target:
        """From MODEL:VERSION."""
        model, _, version = text.rpartition(":")
        if not model or not (version.isascii() and version.isdigit()):
            raise InputError(f"{text!r} names no version: write MODEL:VERSION, such as forecast:3")
        return cls(model, version)

    def __str__(self) -> str:
        return f"{self.model}:{self.version}"


@dataclass(frozen=True, slots=True)
class Limits:
    """How much worse the new version may be."""

    errors: float = 0.0
    """Share of requests that only the new version fails."""
    p50: float = 1.25
    """Ratio of the medians of latency, new to old."""
    p99: float = 1.5
    """Ratio of the 99th percentiles."""
    distance: float | None = None
    """Largest absolute difference of answers, physical units; None: another model answers something else."""
    joules: float | None = None
    """Ratio of joules a request; None does not judge by it."""


@dataclass(frozen=True, slots=True)
class Side:
    """What one version did."""

    target: str
    """MODEL:VERSION."""
    requests: int
    """Requests sent."""
    failed: int
    """Requests that were refused, not answered, or answered emptily."""
    first_failure: str | None
    """What the first one said."""
    p50_ms: float | None
    """Median latency of the answered ones, milliseconds; None if none was answered."""
    p99_ms: float | None
    """Their 99th percentile."""
    joules_per_request: float | None
    """Energy over its blocks by its requests, whole boards; None if unknown."""
    energy_reason: str | None
    """Why it is unknown."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """New to old, with the interval that 95 % of resamples fall in."""

    value: float
    """Of what was measured."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the new version may take the old one's place, and why not."""

    reasons: tuple[str, ...]
    """What speaks against it; empty promotes."""
    old: Side
    """The version that serves."""
    new: Side
    """The version on trial."""
    only_new_failed: int
    """Requests that the new version failed and the old one answered."""
    p50: Ratio | None
    """Medians of latency; None if too few requests were answered (`FEWEST`), and then they are not judged."""
    p99: Ratio | None
    """99th percentiles, likewise."""
    distances: Mapping[str, Distance]
    """By output, over all requests that both answered."""

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.reasons

    def to_json(self) -> dict[str, Any]:
        """JSON form; `from_json` is its inverse."""
        return {"ok": self.ok, **asdict(self)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Verdict:
        """Inverse of `to_json`."""
        p50, p99 = (None if (r := document[key]) is None else Ratio(**r) for key in ("p50", "p99"))
        return cls(
            tuple(document["reasons"]),
            Side(**document["old"]),
            Side(**document["new"]),
            document["only_new_failed"],
            p50,
            p99,
            {name: Distance(**distance) for name, distance in document["distances"].items()},
        )


Outputs = Mapping[str, npt.NDArray[Any]]


class _Trial:
    """One version under way."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.sent = 0
        self.ms: list[list[float]] = []
        """Latencies by block."""
        self.failures: dict[int, str] = {}
        """What was said, by the request's place."""
        self.windows: list[tuple[int, int]] = []

    def block(self, client: Client, requests: Sequence[Arrays], places: Sequence[int]) -> dict[int, Outputs]:
        """Send the requests of one block; the answers by place."""
        ms: list[float] = []
        answers: dict[int, Outputs] = {}
        for place in places:
            begin = time.perf_counter()
            try:
                answer = client.answer(self.target.model, requests[place % len(requests)], self.target.version)
            except GpuopsError as error:
                self.failures[place] = str(error)
            else:
                ms.append((time.perf_counter() - begin) * 1e3)
                answers[place] = answer.outputs
        self.sent += len(places)
        self.ms.append(ms)
        return answers

    def side(self, reading: Reading) -> Side:
        every = [ms for block in self.ms for ms in block]
        p50, p99 = (float(np.percentile(every, q)) if every else None for q in (50, 99))
        joules = None if reading.joules is None else reading.joules / self.sent
        first = self.failures[min(self.failures)] if self.failures else None
        return Side(str(self.target), self.sent, len(self.failures), first, p50, p99, joules, reading.reason)


def compare(
    client: Client,
    old: Target,
    new: Target,
    requests: Sequence[Arrays],
    *,
    count: int = 400,
    limits: Limits | None = None,
    meter: Meter | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verdict:
    """Send the same requests to two versions and judge the new one; ends early once failures condemn it.

    Args:
        client: Connection to the server that has both.
        old: The version that serves.
        new: The version on trial.
        requests: Inputs by name, one request each; sent in turn, again from the first when they run out.
        count: Requests to each version.
        limits: How much worse the new one may be.
        meter: Counts the server's GPUs; None takes this host's if the server runs here.
        progress: Called with (requests done, requests in all).

    Raises:
        InputError: no request is given.
    """
    if not requests or count < 1:
        raise InputError("nothing to compare on: give at least one request")
    limits = limits or Limits()
    trials = _Trial(old), _Trial(new)
    distances = Distances()
    own = Meter(found=_sensors_of(client.url)) if meter is None else meter
    try:
        for target in (old, new):  # whoever is asked first must not pay for what is set up at a first request
            with suppress(GpuopsError):
                for inputs in requests[:WARM_UP]:
                    client.answer(target.model, inputs, target.version)
        last: _Trial | None = None
        for number, places in enumerate(np.array_split(np.arange(count), min(BLOCKS, count))):
            answers: dict[_Trial, dict[int, Outputs]] = {}
            for trial in trials if number % 2 == 0 else trials[::-1]:
                # Two blocks of one version that follow each other are one window: a counter blurs each edge.
                begin = trial.windows.pop()[0] if trial is last else own.mark()
                answers[trial] = trial.block(client, requests, places.tolist())
                trial.windows.append((begin, own.mark()))
                last = trial
                progress(sum(t.sent for t in trials), 2 * count)
            was, now = (answers[trial] for trial in trials)
            for place in was.keys() & now.keys():
                distances.see(was[place], now[place])
            only_new = trials[1].failures.keys() - trials[0].failures.keys()
            if len(only_new) > limits.errors * count or len(trials[0].failures) == trials[0].sent:
                break  # nothing that follows can change the verdict, and a dead version may take a second to say so
        sides = [trial.side(own.over(trial.windows)) for trial in trials]
    finally:
        if meter is None:
            own.close()
    found = Verdict(
        reasons=(),
        old=sides[0],
        new=sides[1],
        only_new_failed=len(only_new),
        p50=_ratio(trials[0].ms, trials[1].ms, 50),
        p99=_ratio(trials[0].ms, trials[1].ms, 99),
        distances=distances.found(),
    )
    return replace(found, reasons=tuple(_against(found, limits)))


def _against(found: Verdict, limits: Limits) -> list[str]:
    """What speaks against the new version."""
    old, new, reasons = found.old, found.new, []
    if old.failed == old.requests:
        return [f"{old.target} answered nothing itself, so nothing can be judged: {old.first_failure}"]
    if found.only_new_failed > limits.errors * new.requests:
        reasons.append(
            f"{new.target} failed {found.only_new_failed} of {new.requests} requests that {old.target} answered: "
            f"{new.first_failure}"
        )
    for name, ratio, limit in (("median", found.p50, limits.p50), ("99th percentile", found.p99, limits.p99)):
        if ratio is not None and ratio.low > limit:
            reasons.append(f"{name} latency is {ratio.value:.2f}x (at least {ratio.low:.2f}x), allowed is {limit:g}x")
    for name, distance in found.distances.items():
        if distance.other is not None:
            reasons.append(f"{name} is {distance.other}: clients of {old.target} cannot take it")
        if distance.lost:
            reasons.append(f"{name}: {distance.lost} values are no numbers where {old.target} answers numbers")
        if limits.distance is not None and (distance.max_abs is None or distance.max_abs > limits.distance):
            far = "infinitely" if distance.max_abs is None else f"by {distance.max_abs:g}"
            reasons.append(f"{name}: answers differ {far}, allowed is {limits.distance:g}")
    if limits.joules is not None:
        if old.joules_per_request is None or new.joules_per_request is None:
            why = new.energy_reason or old.energy_reason
            reasons.append(f"joules a request are unknown ({why}), so they cannot be held to a limit")
        elif new.joules_per_request > limits.joules * old.joules_per_request:
            ratio_j = new.joules_per_request / old.joules_per_request
            reasons.append(f"joules a request are {ratio_j:.2f}x, allowed is {limits.joules:g}x")
    return reasons


def _ratio(old: Sequence[Sequence[float]], new: Sequence[Sequence[float]], percentile: int) -> Ratio | None:
    """Ratio of percentiles with its bootstrap interval; the same latencies always give the same interval."""
    pairs = [(a, b) for a, b in zip(old, new, strict=True) if a and b]
    was, now = (_Pool([pair[side] for pair in pairs]) for side in (0, 1))
    if min(was.size, now.size) < FEWEST[percentile]:
        return None
    once = np.ones(len(pairs), np.int64)
    picks = np.random.default_rng(0).multinomial(len(pairs), once / len(pairs), _RESAMPLES)
    ratios = [now.percentile(percentile, times) / was.percentile(percentile, times) for times in (once, *picks)]
    low, high = np.percentile(ratios[1:], [2.5, 97.5])
    return Ratio(ratios[0], float(low), float(high))


class _Pool:
    """Latencies of all blocks, sorted once for all resamples."""

    def __init__(self, blocks: Sequence[Sequence[float]]) -> None:
        every = np.concatenate([np.empty(0), *map(np.asarray, blocks)])
        order = np.argsort(every)
        self.size = len(every)
        self._sorted = every[order]
        self._block = np.repeat(np.arange(len(blocks)), [len(block) for block in blocks])[order]

    def percentile(self, percentile: int, times: npt.NDArray[np.int64]) -> float:
        """As numpy's, of a pool that holds block k `times[k]` times."""
        upto = np.cumsum(times[self._block])
        place = (upto[-1] - 1) * percentile / 100
        low = math.floor(place)
        a, b = self._sorted[np.searchsorted(upto, [low, min(low + 1, upto[-1] - 1)], side="right")]
        return float(a + (place - low) * (b - a))


def _sensors_of(url: str) -> Found | None:
    """None, which is this host's GPUs; no sensor if the server runs elsewhere, as theirs is not its energy."""
    host = urlsplit(url).hostname
    try:
        for family, kind, _, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with socket.socket(family, kind) as own:
                own.bind(address)  # only an address of this host can be bound
    except OSError:
        return Found((), f"{host} is another host: its energy is counted there, with gpuops beside the server")
    return None
