"""The accounts of joules: every microjoule that a GPU's counter rose by, on one line each.

    shares         to the versions that computed (gpuops_serving.shares)
    idle           what the board draws with nothing to do (its lowest mean power over a look without work, once there
                   was one), for the time in which nothing computed
    loading        looks in which a version was loaded or unloaded: warm-up, and requests that cannot be told from it
    unattributed   looks in which the server did not answer; GPUs that hold a version whose computing cannot be placed
                   in time (streaming, in-flight batching); shares of versions that are not measured on all their GPUs
    lost           counted around a gap or a reset of the counter, so that nobody knows when

Who computed when is known best from traces, else for how long from statistics; `Totals.attributed_uj` tells which.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from gpuops.energy.attribute import Span
from gpuops.energy.meter import COVERED
from gpuops_serving.shares import Shares, share_by_spans, share_by_time
from gpuops_serving.trace import Traced, Window, spans
from gpuops_serving.work import IN_FLIGHT, STREAMS, Done, Key, Served, Work

SHORT = 0.05
"""Executions that are longer than this part of a look join it to the one before, in which they may have begun."""
IDLE_LOOK_NS = 500_000_000
"""A shorter look says nothing of idle power: the counter's steps are not small beside it."""

ON_CPU = "computes on the CPU, which no counter here covers"
NOT_HERE = "computes on GPUs that are not visible here"
NO_CONFIG = "its configuration could not be read, so nobody knows where it computes"
UNTIMED = "its backend does not report for how long it computes"
TOO_LONG = (
    "reports more computing time than its instances had: executions longer than the meter waits, or several at once "
    "in one instance"
)
AWAY = "the server did not answer"
LOADING = "a version was loaded or unloaded"
LOST = "the counter was not read throughout, or began anew"


@dataclass(slots=True)
class Totals:
    """What was settled so far; energy in microjoules. No figure in here ever falls."""

    shares_uj: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """By (GPU, model, version): energy of `metered` requests."""
    idle_uj: Counter[str] = field(default_factory=Counter)
    """By GPU."""
    loading_uj: Counter[str] = field(default_factory=Counter)
    """By GPU."""
    unattributed_uj: Counter[str] = field(default_factory=Counter)
    """By GPU."""
    lost_uj: Counter[str] = field(default_factory=Counter)
    """By GPU."""
    counted_uj: Counter[str] = field(default_factory=Counter)
    """By GPU: what the counter rose by, the sum of the lines above."""
    lost_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By GPU: seconds that the counter did not cover."""
    attributed_uj: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By (GPU, "trace" or "statistics"): the shares, by how they were found."""
    requests: Counter[Key] = field(default_factory=Counter)
    """By (model, version): requests answered or failed, without the server's own warm-up."""
    metered: Counter[Key] = field(default_factory=Counter)
    """Those of them whose energy is in `shares_uj`."""
    unknown: dict[Key, str] = field(default_factory=dict)
    """Why a version's joules were not known at the last look."""

    def joules(self, key: Key) -> float | None:
        """Joules of a version's metered requests; None if there are none."""
        if not self.metered[key]:
            return None
        return sum(uj for (_, *owner), uj in self.shares_uj.items() if tuple(owner) == key) / 1e6

    def joules_per_request(self, key: Key) -> float | None:
        """Joules by metered requests of a version; None if there are none."""
        joules = self.joules(key)
        return None if joules is None else joules / self.metered[key]

    def copy(self) -> Totals:
        """As they are now."""
        return Totals(**{name: getattr(self, name).copy() for name in Totals.__slots__})


@dataclass(frozen=True, slots=True)
class Look:
    """What is known of a server between two looks at it."""

    window: Window
    """When the looks were."""
    work: Work
    """What it did, as far as it is known."""
    away: bool
    """Whether it did not answer at both looks, so that some of the work is older or not known."""
    served: Mapping[Key, Served]
    """Configurations of the versions that could be read."""

    @property
    def length_ns(self) -> int:
        """Time between the looks, nanoseconds."""
        return self.window.end_ns - self.window.begin_ns

    @property
    def reach_ns(self) -> int:
        """How long before the first look an execution that ended after it may have begun, nanoseconds."""
        reach = 0.0
        for key, done in self.work.done.items():
            served = self.served.get(key)
            if served is not None and (served.gpus is None or served.why_unknown):
                continue
            mean = done.busy_ns / max(done.executions, 1)
            reach = max(reach, self.over_ns(key), mean if mean > SHORT * self.length_ns else 0.0)
        return int(reach)

    def over_ns(self, key: Key) -> float:
        """Computing time of a version that cannot have been between the looks; 0 or less if all can."""
        if key not in self.work.done:
            return 0.0
        done = self.work.done[key]
        instances = self.served[key].instances if key in self.served else 1
        return max(done.busy_ns / instances, done.busy_ns / max(done.executions, 1)) - self.length_ns

    def joined(self, later: Look) -> Look:
        """This one and the next as one."""
        window = replace(self.window, asked_again_ns=later.window.asked_again_ns, end_ns=later.window.end_ns)
        return Look(window, self.work + later.work, self.away or later.away, {**self.served, **later.served})


@dataclass(frozen=True, slots=True)
class Course:
    """One GPU's counter between two looks."""

    reads: Sequence[tuple[int, int]]
    """(time in ns, mJ), both ascending, from the first look to the second, as far as it was known there."""
    lost_ns: int
    """How much of the time it does not cover, nanoseconds."""
    reason: str | None
    """Why it did not answer at its last read."""


@dataclass(frozen=True, slots=True)
class _Verdict:
    """Whether one GPU's energy between two looks can be shared among versions."""

    rise_mj: int
    line: Counter[str]
    """Where all of it goes if not."""
    reason: str | None


class Accounts:
    """Books looks in their order.

    Args:
        gpus: GPUs that are counted, in CUDA's order.
        none: Why there are none.
    """

    def __init__(self, gpus: Sequence[str], none: str | None) -> None:
        self.totals = Totals()
        self.idle_mw: dict[str, float] = {}
        """Lowest power with nothing to do, milliwatts, by GPU."""
        self.trace_reason: str | None = None
        """Why traces were not used at the last look with work that had some; None if they were."""
        self._gpus, self._none = tuple(gpus), none
        self._last_mj: dict[str, tuple[int, int]] = {}

    def book(self, look: Look, courses: Mapping[str, Course], requests: Sequence[Traced] | None) -> None:
        """Book one look.

        Args:
            look: What the server did.
            courses: The counters, by GPU.
            requests: Traced requests around it; None if the server writes no traces.
        """
        totals, done = self.totals, look.work.done
        on = {key: served.on(self._gpus) for key, served in look.served.items()}
        verdicts = {gpu: self._verdict(gpu, look, courses[gpu], on) for gpu in self._gpus}
        reasons = {key: self._why_unknown(key, look, on, verdicts) for key in done}
        traced = self._fitting(look, requests, {key: did for key, did in done.items() if on.get(key)})
        for gpu, verdict in verdicts.items():
            if gpu not in self._last_mj:
                continue  # it never answered: unknown, not 0
            totals.counted_uj[gpu] += verdict.rise_mj * 1000
            if verdict.reason is not None:
                verdict.line[gpu] += verdict.rise_mj * 1000
                continue
            owners = {key: len(on[key]) for key in done if gpu in on.get(key, ())}
            if traced is None:
                # Statistics do not say on which of its GPUs an instance computed: on each alike.
                busy = {key: done[key].busy_ns / count for key, count in owners.items()}
                found = share_by_time(verdict.rise_mj, look.length_ns, busy, self.idle_mw.get(gpu))
            else:
                end_mj = self._last_mj[gpu][1]
                reads = [(at, max(mj, end_mj - verdict.rise_mj)) for at, mj in courses[gpu].reads]
                reads[-1] = reads[-1][0], end_mj
                found = _by_trace(reads, traced, owners, self.idle_mw.get(gpu))
            totals.idle_uj[gpu] += found.idle_uj
            if found.idle_uj == verdict.rise_mj * 1000 and look.length_ns >= IDLE_LOOK_NS and not _busy(owners, done):
                mean_mw = verdict.rise_mj * 1e9 / look.length_ns
                self.idle_mw[gpu] = min(self.idle_mw.get(gpu, mean_mw), mean_mw)
            for key, uj in found.shares_uj.items():
                if reasons[key] is not None:
                    totals.unattributed_uj[gpu] += uj
                elif uj or done[key].requests:
                    totals.shares_uj[gpu, *key] += uj
                    totals.attributed_uj[gpu, "statistics" if traced is None else "trace"] += uj
        for key, did in done.items():
            warm_up = look.served[key].warm_up if did.anew and key in look.served else 0
            answered = max(did.requests - warm_up, 0)
            totals.requests[key] += answered
            totals.metered[key] += answered if reasons[key] is None else 0
        totals.unknown = {key: reason for key, reason in reasons.items() if reason is not None}

    def _verdict(self, gpu: str, look: Look, course: Course, on: Mapping[Key, Sequence[str]]) -> _Verdict:
        """Take the counter on, and say whether what it rose by can be shared."""
        begin, end, lost_ns = look.window.begin_ns, look.window.end_ns, course.lost_ns
        totals, rise_mj, whole = self.totals, 0, False
        if course.reads:
            known_at, before_mj = self._last_mj.setdefault(gpu, course.reads[0])
            last_at, last_mj = course.reads[-1]
            # What is known of an edge may have changed by a hair since it was the end of a look.
            self._last_mj[gpu] = last_at, max(last_mj, before_mj)
            rise_mj = self._last_mj[gpu][1] - before_mj
            whole = known_at == course.reads[0][0] == begin and last_at == end
            lost_ns = max(lost_ns, end - last_at)
        totals.lost_s[gpu] += (lost_ns if course.reads else look.length_ns) / 1e9
        if not whole or lost_ns > (1 - COVERED) * look.length_ns:
            return _Verdict(rise_mj, totals.lost_uj, course.reason or LOST)
        if look.away:
            return _Verdict(rise_mj, totals.unattributed_uj, AWAY)
        if any(gpu in on.get(key, self._gpus) for key in look.work.changed):
            return _Verdict(rise_mj, totals.loading_uj, LOADING)
        for key, did in look.work.done.items():
            if gpu in on.get(key, self._gpus if did.busy_ns else ()):
                reason = _unplaced(key, did, look)
                if reason is not None:
                    return _Verdict(rise_mj, totals.unattributed_uj, f"shares a GPU with {':'.join(key)}: {reason}")
        return _Verdict(rise_mj, totals.idle_uj, None)

    def _why_unknown(
        self, key: Key, look: Look, on: Mapping[Key, Sequence[str]], verdicts: Mapping[str, _Verdict]
    ) -> str | None:
        served = look.served.get(key)
        if served is None:
            return NO_CONFIG
        if served.why_unknown is not None:
            return served.why_unknown
        if served.gpus is None:
            return ON_CPU
        if not self._gpus:
            return self._none
        own = _unplaced(key, look.work.done[key], look)
        if own is not None or not on[key]:
            return own or NOT_HERE
        return next((verdicts[gpu].reason for gpu in on[key] if verdicts[gpu].reason is not None), None)

    def _fitting(
        self, look: Look, requests: Sequence[Traced] | None, done: Mapping[Key, Done]
    ) -> Sequence[Traced] | None:
        """The traced requests if they are all there, else None."""
        if requests is None or look.away or look.work.changed:
            return None
        reason = look.window.holds(requests, {key: did.requests for key, did in done.items()})
        if any(did.requests for did in done.values()):
            self.trace_reason = reason
        return requests if reason is None else None


def _unplaced(key: Key, did: Done, look: Look) -> str | None:
    """Why nobody knows when a version computed; None if it can be told."""
    served = look.served.get(key)
    if served is None:
        return NO_CONFIG
    if served.why_unknown in (STREAMS, IN_FLIGHT):
        return served.why_unknown
    if did.untimed:
        return UNTIMED
    return TOO_LONG if look.over_ns(key) > SHORT * look.length_ns else None


def _busy(owners: Mapping[Key, int], done: Mapping[Key, Done]) -> bool:
    return any(done[key].busy_ns for key in owners)


def _by_trace(
    reads: Sequence[tuple[int, int]], requests: Sequence[Traced], owners: Mapping[Key, int], idle_mw: float | None
) -> Shares[Key]:
    """Shares by traced requests; `owners` counts the GPUs of each version, on each of which it computed alike."""
    placed = [
        Span(span.key, span.begin_ns, span.end_ns, span.weight / owners[span.key[:2]])
        for span in spans(requests)
        if span.key[:2] in owners and span.end_ns > reads[0][0] and span.begin_ns < reads[-1][0]
    ]
    found, shares = share_by_spans(reads, placed, idle_mw), Counter[Key]()
    for (model, version, _), uj in found.shares_uj.items():
        shares[model, version] += uj
    return Shares(shares, found.idle_uj)
