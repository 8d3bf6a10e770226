"""Two versions on the same requests: errors, latency, answers, joules, and a verdict.

Requests go to both in turn, in blocks, the first of each pair of blocks alternating, so that the machine's slow moments
fall on both alike. A latency ratio condemns a version only if its whole 95 % interval lies above what is allowed
(percentile bootstrap, Efron and Tibshirani 1993, section 13.3), so noise alone does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.energy.meter import Meter
from gpuops.energy.reading import Reading
from gpuops.errors import GpuopsError, InputError
from gpuops.spec import Arrays
from gpuops_serving.client import Client

BLOCKS = 10
"""Blocks that the requests to each version are sent in."""
FEW = 300
"""Fewer requests than this say nothing of a 99th percentile."""
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
        if not model or not version.isdigit():
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
    """Ratio of the 99th percentiles; looked at from `FEW` requests on."""
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
class Distance:
    """How far answers to the same samples lie apart."""

    max_abs: float
    """Largest absolute difference, physical units."""
    rmse: float
    """Root mean square difference, physical units."""
    of_spread: float | None
    """`rmse` by the standard deviation of the old answers; None where those do not vary."""
    lost: int
    """Values that are finite in the old answer alone."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the new version may take the old one's place, and why not."""

    reasons: tuple[str, ...]
    """What speaks against it; empty promotes."""
    old: Side
    """The version that serves."""
    new: Side
    """The version on trial."""
    p50: Ratio | None
    """Medians of latency; None if one side answered nothing."""
    p99: Ratio | None
    """99th percentiles; None also if there were too few requests."""
    distances: dict[str, Distance]
    """By output."""

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.reasons

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {"ok": self.ok, **asdict(self)}


class _Trial:
    """One version under way."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.ms: list[float] = []
        self.failures: list[str] = []
        self.answers: dict[int, dict[str, npt.NDArray[Any]]] = {}
        self.windows: list[tuple[int, int]] = []
        self.sent = 0

    def ask(self, client: Client, place: int, inputs: Arrays) -> None:
        self.sent += 1
        begin = time.perf_counter()
        try:
            answer = client.answer(self.target.model, inputs, self.target.version)
        except GpuopsError as error:
            self.failures.append(str(error))
            return
        self.ms.append((time.perf_counter() - begin) * 1e3)
        self.answers.setdefault(place, answer.outputs)

    def side(self, reading: Reading) -> Side:
        p50, p99 = (float(np.percentile(self.ms, q)) if self.ms else None for q in (50, 99))
        joules = None if reading.joules is None or not self.sent else reading.joules / self.sent
        first = self.failures[0] if self.failures else None
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
    """Send the same requests to two versions and judge the new one.

    Args:
        client: Connection to the server that has both.
        old: The version that serves.
        new: The version on trial.
        requests: Inputs by name, one request each; sent in turn, again from the first when they run out.
        count: Requests to each version.
        limits: How much worse the new one may be.
        meter: Counts the server's GPUs if they are this host's; None looks for them.
        progress: Called with (requests done, requests in all).

    Raises:
        InputError: no request is given.
    """
    if not requests or count < 1:
        raise InputError("nothing to compare on: give at least one request")
    limits = Limits() if limits is None else limits
    trials = _Trial(old), _Trial(new)
    own = Meter() if meter is None else meter
    try:
        for trial in trials:  # whoever is asked first must not pay for what is set up at a first request
            trial.ask(client, 0, requests[0])
            trial.ms.clear()
            trial.sent -= 1
        for block, places in enumerate(np.array_split(np.arange(count), min(BLOCKS, count))):
            for trial in trials if block % 2 == 0 else trials[::-1]:
                begin = own.mark()
                for place in places:
                    trial.ask(client, int(place) % len(requests), requests[int(place) % len(requests)])
                trial.windows.append((begin, own.mark()))
                progress(sum(t.sent for t in trials), 2 * count)
        sides = [trial.side(own.over(trial.windows)) for trial in trials]
    finally:
        if meter is None:
            own.close()
    p50, p99 = (_ratio(trials[0].ms, trials[1].ms, q) for q in (50, 99))
    distances = _distances(trials[0].answers, trials[1].answers)
    few = min(len(trial.ms) for trial in trials) < FEW
    found = Verdict((), sides[0], sides[1], p50, None if few else p99, distances)
    return Verdict(tuple(_against(found, limits)), *(getattr(found, f) for f in Verdict.__slots__[1:]))


def _against(found: Verdict, limits: Limits) -> list[str]:
    """What speaks against the new version."""
    old, new, reasons = found.old, found.new, []
    if old.failed == old.requests:
        return [f"{old.target} answered nothing itself, so nothing can be judged: {old.first_failure}"]
    if new.failed > old.failed + limits.errors * new.requests:
        reasons.append(
            f"{new.target} failed {new.failed} of {new.requests} requests, {old.target} {old.failed}: "
            f"{new.first_failure}"
        )
    for name, ratio, limit in (("median", found.p50, limits.p50), ("99th percentile", found.p99, limits.p99)):
        if ratio is not None and ratio.low > limit:
            reasons.append(f"{name} latency is {ratio.value:.2f}x (at least {ratio.low:.2f}x), allowed is {limit:g}x")
    for name, distance in found.distances.items():
        if distance.lost:
            reasons.append(f"{name}: {distance.lost} values are no numbers where {old.target} answers numbers")
        if limits.distance is not None and not distance.max_abs <= limits.distance:
            reasons.append(f"{name}: answers differ by {distance.max_abs:g}, allowed is {limits.distance:g}")
    if limits.joules is not None:
        if old.joules_per_request is None or new.joules_per_request is None:
            reasons.append(f"joules a request are unknown ({new.energy_reason}), so they cannot be held to a limit")
        elif new.joules_per_request > limits.joules * old.joules_per_request:
            ratio_j = new.joules_per_request / old.joules_per_request
            reasons.append(f"joules a request are {ratio_j:.2f}x, allowed is {limits.joules:g}x")
    return reasons


def _ratio(old: Sequence[float], new: Sequence[float], percentile: float) -> Ratio | None:
    """Ratio of percentiles with its bootstrap interval; the same samples always give the same interval."""
    if not old or not new:
        return None
    draw = np.random.default_rng(0)
    low, high = np.percentile(_resampled(new, percentile, draw) / _resampled(old, percentile, draw), [2.5, 97.5])
    value = float(np.percentile(new, percentile) / np.percentile(old, percentile))
    return Ratio(value, float(low), float(high))


def _resampled(values: Sequence[float], percentile: float, draw: np.random.Generator) -> npt.NDArray[np.float64]:
    resamples = draw.choice(np.asarray(values, np.float64), (_RESAMPLES, len(values)))
    return np.asarray(np.percentile(resamples, percentile, axis=1), np.float64)


def _distances(
    old: dict[int, dict[str, npt.NDArray[Any]]], new: dict[int, dict[str, npt.NDArray[Any]]]
) -> dict[str, Distance]:
    """Distances over the requests that both answered, by output; one of another shape is infinitely far."""
    both = sorted(old.keys() & new.keys())
    names = sorted({name for place in both for name in old[place]})
    found = {}
    for name in names:
        pairs = [(old[place][name], new[place].get(name)) for place in both]
        if any(b is None or a.shape != b.shape for a, b in pairs):
            found[name] = Distance(float("inf"), float("inf"), None, 0)
            continue
        was = np.concatenate([a.astype(np.float64).ravel() for a, _ in pairs])
        now = np.concatenate([b.astype(np.float64).ravel() for _, b in pairs if b is not None])
        finite = np.isfinite(was) & np.isfinite(now)
        difference = np.abs(now - was)[finite]
        rmse = float(np.sqrt(np.mean(difference**2))) if difference.size else 0.0
        spread = float(was[np.isfinite(was)].std()) if np.isfinite(was).any() else 0.0
        found[name] = Distance(
            float(difference.max(initial=0.0)),
            rmse,
            rmse / spread if spread else None,
            int((np.isfinite(was) & ~np.isfinite(now)).sum()),
        )
    return found
