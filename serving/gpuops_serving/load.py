"""Load on a served model: how long answers take at a rate, and how many there can be at a concurrency.

    open loop     requests arrive by a schedule, whatever the server does: what users of a service do. The latency of a
                  request runs from when it was due, so a server that stalls cannot hide the requests behind the stall
                  ("coordinated omission", Tene 2013).
    closed loop   `concurrency` requests are always under way, the next is sent when one is answered: what a batch job
                  does, and what comparisons of servers are made of.

Requests are encoded once and sent as bytes by one thread (`gpuops_serving.load_wire`), so that the load takes little of
the machine that it shares with a server. Answers are checked; a wrong one is a failure.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.errors import InputError
from gpuops_serving.client import Client
from gpuops_serving.load_wire import Endpoint, Shot
from gpuops_serving.metrics import ServerMeter

PERCENTILES = {"p50_ms": 50.0, "p95_ms": 95.0, "p99_ms": 99.0, "p999_ms": 99.9}
ARRIVALS = ("poisson", "constant")
FASTEST_PER_S = 20_000
"""Requests a second beyond which an open loop would measure itself."""
_SETTLE_S = 30.0
"""Longest wait for answers after the last request was sent."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one run of load found."""

    kind: str
    """"open" or "closed"."""
    offered_per_s: float | None
    """Requests a second that arrived; None in a closed loop."""
    concurrency: int | None
    """Requests under way in a closed loop."""
    seconds: float
    """Length of the run, warm-up left out."""
    sent: int
    """Requests sent in it."""
    answered: int
    """Requests answered rightly."""
    answered_per_s: float
    """By the time from the first request to the last answer."""
    failed: Mapping[str, int]
    """Requests by what went wrong; `load_wire.REJECTED` are those that the server turned away."""
    latency_ms: Mapping[str, float | None]
    """Percentiles over the answered ones (`PERCENTILES`) and "max_ms"; None if none was answered."""
    late_ms: float
    """99th percentile of how much later than due a request was sent: the load's own error, part of each latency."""
    batches: Mapping[int, int] | None = None
    """Executions of the model by batch size, by the server's statistics; None if it has none."""
    joules_per_request: float | None = None
    """None if unknown."""
    energy_reason: str | None = None
    """Why it is."""

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def open_loop(
    endpoint: Endpoint,
    shots: Sequence[Shot],
    *,
    rate_per_s: float,
    seconds: float,
    warm_up_s: float = 1.0,
    arrivals: str = "poisson",
    seed: int = 0,
    progress: Callable[[float, float], None] = lambda done_s, all_s: None,
) -> Load:
    """Send requests by a schedule that does not wait for answers.

    Args:
        endpoint: Where to.
        shots: Requests, sent in turn.
        rate_per_s: Requests a second.
        seconds: Length of the schedule after the warm-up.
        warm_up_s: Time at the same rate before it, in seconds; not counted.
        arrivals: "poisson" (independent users) or "constant".
        seed: Of the Poisson process.
        progress: Called with (seconds done, seconds in all).

    Raises:
        InputError: no request, or a rate or time that is not positive.
        UnavailableError: the server cannot be reached.
    """
    _check(shots, seconds=seconds, rate_per_s=rate_per_s)
    if rate_per_s > FASTEST_PER_S:
        raise InputError(f"{rate_per_s:g} requests a second: one thread sends {FASTEST_PER_S} at most; run several")
    due = schedule(rate_per_s, warm_up_s + seconds, arrivals, seed)
    recorder = _Recorder()

    async def run() -> None:
        tasks = set()
        async with endpoint.opened() as send:
            begin = time.perf_counter()
            recorder.begin = begin + warm_up_s
            for place, offset in enumerate(due):
                wait = begin + offset - time.perf_counter()
                if wait > 0 or place % 64 == 0:  # also let answers in when the schedule leaves no pause
                    await asyncio.sleep(max(wait, 0.0))
                task = asyncio.create_task(recorder.one(send, shots[place % len(shots)], begin + offset))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                progress(offset, warm_up_s + seconds)
            if tasks:
                _, late = await asyncio.wait(tasks, timeout=_SETTLE_S)
                for task in late:
                    task.cancel()

    _run(run())
    return recorder.load("open", seconds, offered_per_s=rate_per_s)


def closed_loop(
    endpoint: Endpoint,
    shots: Sequence[Shot],
    *,
    concurrency: int,
    seconds: float,
    warm_up_s: float = 0.5,
    progress: Callable[[float, float], None] = lambda done_s, all_s: None,
) -> Load:
    """Keep `concurrency` requests under way.

    Raises:
        InputError, UnavailableError: As `open_loop`.
    """
    _check(shots, seconds=seconds, concurrency=concurrency)
    recorder = _Recorder()

    async def work(send: Callable[[Shot], Any], worker: int, until: float) -> None:
        place = worker
        while (now := time.perf_counter()) < until:
            await recorder.one(send, shots[place % len(shots)], now)
            place += concurrency
            if worker == 0:
                progress(warm_up_s + seconds - (until - now), warm_up_s + seconds)

    async def run() -> None:
        async with endpoint.opened() as send:
            begin = time.perf_counter()
            recorder.begin = begin + warm_up_s
            until = recorder.begin + seconds
            await asyncio.gather(*(work(send, worker, until) for worker in range(concurrency)))

    _run(run())
    return recorder.load("closed", seconds, concurrency=concurrency)


def measured(client: Client, model: str, run: Callable[[], Load], version: str = "") -> Load:
    """`run` with what the server and the GPU's counter say of it: executions by batch size, joules a request.

    Args:
        client: Connection to the server; joules are known if it runs on this host, on a GPU.
        model: Model name.
        run: `open_loop` or `closed_loop`.
        version: Version number; all of the model's if empty.
    """
    before = client.statistics(model, version)
    with ServerMeter(client) as meter:
        found = run()
    after = client.statistics(model, version)
    keys = [key for key in meter.totals.requests if key[0] == model and version in ("", key[1])]
    joules = [meter.totals.joules_per_request(key) for key in keys]
    known = [value for value in joules if value is not None]
    reasons = [meter.totals.unknown[key] for key in keys if key in meter.totals.unknown]
    energy = sum(known) / len(known) if known and len(known) == len(keys) else None
    reason = None if energy is not None else next(iter(reasons), meter.method[1] or "the server counted no request")
    return replace(found, batches=_executions(before, after), joules_per_request=energy, energy_reason=reason)


def schedule(rate_per_s: float, seconds: float, arrivals: str, seed: int) -> npt.NDArray[np.float64]:
    """Arrival times in seconds from 0, ascending, below `seconds`."""
    if arrivals == "constant":
        return np.arange(int(rate_per_s * seconds)) / rate_per_s
    if arrivals != "poisson":
        raise InputError(f"arrivals {arrivals!r} are unknown: poisson or constant")
    draw = np.random.default_rng(seed)
    count = draw.poisson(rate_per_s * seconds)
    return np.sort(draw.uniform(0.0, seconds, count))  # a Poisson process, given its count, is uniform


class _Recorder:
    """What became of each request that was due after the warm-up."""

    def __init__(self) -> None:
        self.begin = 0.0
        self._last = 0.0
        self._ms: list[float] = []
        self._late: list[float] = []
        self._failed: Counter[str] = Counter()
        self._sent = 0

    async def one(self, send: Callable[[Shot], Any], shot: Shot, due: float) -> None:
        started = time.perf_counter()
        counted = due >= self.begin
        if counted:
            self._sent += 1
            self._late.append(started - due)
        try:
            wrong = await send(shot)
        except asyncio.CancelledError:
            wrong = f"no answer within {_SETTLE_S:g} s of the last request"
        if not counted:
            return
        self._last = time.perf_counter()
        if wrong is None:
            self._ms.append((self._last - due) * 1e3)
        else:
            self._failed[wrong] += 1

    def load(
        self, kind: str, seconds: float, *, offered_per_s: float | None = None, concurrency: int | None = None
    ) -> Load:
        latency: dict[str, float | None] = {
            name: float(np.percentile(self._ms, q)) if self._ms else None for name, q in PERCENTILES.items()
        }
        latency["max_ms"] = max(self._ms, default=None)
        late = float(np.percentile(self._late, 99)) * 1e3 if self._late else 0.0
        rate = len(self._ms) / (self._last - self.begin) if self._last > self.begin else 0.0
        failed = dict(self._failed)
        return Load(
            kind, offered_per_s, concurrency, seconds, self._sent, len(self._ms), rate, failed, latency, max(late, 0.0)
        )


def _executions(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> dict[int, int] | None:
    """Executions by batch size between two statistics; a reload in between counts anew."""

    def counts(statistics: Sequence[Mapping[str, Any]]) -> Counter[int]:
        found: Counter[int] = Counter()
        for entry in statistics:
            for batch in entry.get("batch_stats", []):
                found[int(batch["batch_size"])] += int(batch.get("compute_infer", {}).get("count", 0))
        return found

    was, now = counts(before), counts(after)
    if any(now[size] < was[size] for size in was):
        was = Counter()
    found = {size: now[size] - was[size] for size in sorted(now) if now[size] > was[size]}
    return found or None


def _check(shots: Sequence[Shot], **positive: float) -> None:
    if not shots:
        raise InputError("no request to send: give at least one sample")
    for name, value in positive.items():
        if not value > 0:
            raise InputError(f"{name} is {value:g}: give more than 0")


def _run(main: Any) -> None:
    # select() takes microseconds; epoll, asyncio's default, rounds each wait up to the next millisecond.
    def loop() -> asyncio.AbstractEventLoop:
        return asyncio.SelectorEventLoop(selectors.SelectSelector())

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main)
