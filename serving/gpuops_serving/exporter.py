"""The meter, golden probes and version ids of a server as Prometheus metrics, and the meter as JSON.

Labels are model, version and namespace (what tells this server from others). A series whose value is unknown is absent,
never 0: `gpuops_joules_unknown{reason}` and `gpuops_gpu_unknown{reason}` say why. Counters only rise; when this process
starts again they begin at 0, which Prometheus' `rate` and `increase` take into account.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from gpuops.errors import GpuopsError, InputError, UnavailableError
from gpuops_serving.accounts import Totals
from gpuops_serving.client import Client
from gpuops_serving.metrics import ServerMeter
from gpuops_serving.probe import probe
from gpuops_serving.repository import ServedVersion, served_versions
from gpuops_serving.work import Key

OWNER = ("model", "version", "namespace")
GPU = ("gpu", "namespace")
STOP_WITHIN_S = 0.1
NOTHING = "nothing was asked of it since the meter began"
_LINES = (
    ("counted", "Energy by the GPU's counter: the sum of all that follows and of gpuops_energy_joules."),
    ("idle", "Energy while nothing computed."),
    ("loading", "Energy while versions were loaded or unloaded, warm-up included."),
    ("unattributed", "Energy of work that cannot be told apart."),
    ("lost", "Energy around gaps and resets of the counter."),
)


@dataclass(frozen=True, slots=True)
class Probed:
    """What the golden request to one version found."""

    model: str
    """Model name."""
    version: str
    """Version number."""
    ok: bool
    """Whether it was answered rightly."""
    ms: float | None
    """Time to the answer, milliseconds; None if there was none."""


@dataclass(frozen=True, slots=True)
class _Shown:
    """What a scrape is answered with, until the next look."""

    totals: Totals
    up: bool
    method: str
    reason: str | None
    silent: Mapping[str, str]
    version_ids: Mapping[Key, str]


class Exporter:
    """Serves the metrics; `run` looks at the server until `stop`.

    Scrapes are answered from what the last look found, so neither waits for the other.

    Args:
        meter: Of one server.
        probe: Asks golden requests, as `repository_probe` does. It is called from a thread of its own, so it needs a
            client of its own. None probes nothing.
        namespace: What tells this server from others.
        probe_every_s: Seconds between two probes.
    """

    def __init__(
        self,
        meter: ServerMeter,
        *,
        probe: Callable[[], Sequence[Probed]] | None = None,
        namespace: str = "",
        probe_every_s: float = 30.0,
    ) -> None:
        self._meter, self._ask, self._namespace, self._probe_every_s = meter, probe, namespace, probe_every_s
        self._probed: Mapping[Key, Probed] = {}
        self._stopped = False  # not an Event: its lock is not reentrant, and `stop` may run in a signal handler
        self._shown = self._seen()

    def serve(self, port: int, address: str = "127.0.0.1") -> int:
        """Start answering scrapes; returns the port, a free one for 0.

        Raises:
            InputError: no port has this number.
            UnavailableError: the port is taken.
        """
        if not 0 <= port < 2**16:
            raise InputError(f"port {port}: name one of 1 to 65535, or 0 for a free one")
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, addr=address, registry=registry)
        except OSError as error:
            raise UnavailableError(
                f"port {port} of {address} cannot be had ({error.strerror}): name another, or 0 for a free one"
            ) from error
        return int(self._server.server_port)

    def run(self, every_s: float = 1.0) -> None:
        """Look every `every_s` until `stop`, then end what `serve` began and close the meter.

        A server that does not answer is asked again at the next look.
        """
        prober = threading.Thread(target=self._repeat, args=(self.probe, self._probe_every_s), daemon=True)
        prober.start()
        try:
            self._repeat(self.look, every_s)
        finally:
            self._stopped = True
            self._meter.close()
            self.shutdown()

    def stop(self) -> None:
        """Make `run` return; safe in a signal handler."""
        self._stopped = True

    def shutdown(self) -> None:
        """End answering scrapes."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def look(self) -> None:
        """Look at server and counters once."""
        self._meter.poll()
        self._shown = self._seen()

    def probe(self) -> None:
        """Ask the golden requests once; a version that was asked before and is not now is not healthy."""
        if self._ask is None:
            return
        found = {key: replace(probed, ok=False, ms=None) for key, probed in self._probed.items()}
        with suppress(GpuopsError):
            found |= {(probed.model, probed.version): probed for probed in self._ask()}
        self._probed = found

    def collect(self) -> Iterable[Metric]:
        """What Prometheus scrapes."""
        shown = self._shown
        yield from self._energy(shown.totals)
        yield from self._versions(shown)
        yield from self._states(shown)

    def _repeat(self, action: Callable[[], None], every_s: float) -> None:
        while not self._stopped:
            due_s = time.monotonic() + every_s
            action()
            while not self._stopped and (left_s := due_s - time.monotonic()) > 0:
                time.sleep(min(left_s, STOP_WITHIN_S))

    def _seen(self) -> _Shown:
        meter = self._meter
        up = meter.last_error is None
        return _Shown(meter.totals.copy(), up, *meter.method, meter.silent, meter.version_ids)

    def _energy(self, totals: Totals) -> Iterable[Metric]:
        space = self._namespace
        energy = _counter("energy_joules", "Energy of a version's metered requests.", (*OWNER, "gpu"))
        for (gpu, model, version), uj in totals.shares_uj.items():
            energy.add_metric([model, version, space, gpu], uj / 1e6)
        yield energy
        for line, text in _LINES:
            family = _counter(f"{line}_joules", text, GPU)
            for gpu in totals.counted_uj:
                family.add_metric([gpu, space], getattr(totals, f"{line}_uj")[gpu] / 1e6)
            yield family
        found = _counter("attributed_joules", "gpuops_energy_joules by how it was split.", (*GPU, "method"))
        for (gpu, method), uj in totals.attributed_uj.items():
            found.add_metric([gpu, space, method], uj / 1e6)
        yield found
        lost = _counter("lost_seconds", "Time that the GPU's counter did not cover.", GPU)
        for gpu, seconds in totals.lost_s.items():
            lost.add_metric([gpu, space], seconds)
        yield lost

    def _versions(self, shown: _Shown) -> Iterable[Metric]:
        totals, space = shown.totals, self._namespace
        requests = _counter("requests", "Requests answered or failed, without warm-up.", OWNER)
        metered = _counter("metered_requests", "Those whose energy is in gpuops_energy_joules.", OWNER)
        each = _gauge("joules_per_request", "Joules by metered requests so far.", OWNER)
        for key, count in totals.requests.items():
            requests.add_metric([*key, space], count)
            if (joules := totals.joules_per_request(key)) is not None:
                metered.add_metric([*key, space], totals.metered[key])
                each.add_metric([*key, space], joules)
        unknown = _gauge("joules_unknown", "Why joules are not known now.", (*OWNER, "reason"))
        for key, reason in totals.unknown.items():
            unknown.add_metric([*key, space, reason], 1)
        info = _gauge("version_info", "Version id (lineage).", (*OWNER, "version_id"))
        for key, version_id in shown.version_ids.items():
            info.add_metric([*key, space, version_id], 1)
        yield from (requests, metered, each, unknown, info)

    def _states(self, shown: _Shown) -> Iterable[Metric]:
        space = self._namespace
        up = _gauge("server_up", "Whether the server answered the last look.", ("namespace",))
        up.add_metric([space], float(shown.up))
        meter = _gauge("meter_up", "Whether energy is counted.", ("namespace", "method", "reason"))
        meter.add_metric([space, shown.method, shown.reason or ""], float(shown.reason is None))
        silent = _gauge("gpu_unknown", "Why a GPU's energy is not counted now.", (*GPU, "reason"))
        for gpu, reason in shown.silent.items():
            silent.add_metric([gpu, space, reason], 1)
        ok = _gauge("probe_ok", "Whether the golden request is answered rightly.", OWNER)
        seconds = _gauge("probe_seconds", "Time of the golden request.", OWNER)
        for key, probed in self._probed.items():
            ok.add_metric([*key, space], float(probed.ok and shown.up))
            if probed.ms is not None:
                seconds.add_metric([*key, space], probed.ms / 1e3)
        yield from (up, meter, silent, ok, seconds)


def _counter(name: str, text: str, labels: Sequence[str]) -> Any:
    return CounterMetricFamily(f"gpuops_{name}", text, labels=labels)


def _gauge(name: str, text: str, labels: Sequence[str]) -> Any:
    return GaugeMetricFamily(f"gpuops_{name}", text, labels=labels)


def repository_probe(connect: Callable[[], Client], repository: str | Path) -> Callable[[], list[Probed]]:
    """Golden requests to every version that a repository of ours asks a server to serve, for `Exporter`.

    Args:
        connect: Makes a client; each round of requests has one of its own.
        repository: Model repository that `deploy` wrote, read anew at each round.
    """

    def ask() -> list[Probed]:
        with connect() as client:
            return [_probed(client, served) for served in served_versions(repository, keys=())]

    return ask


def _probed(client: Client, served: ServedVersion) -> Probed:
    version = str(served.version)
    try:
        found = probe(client, served.name, served.golden, served.tolerance, version=version)
    except GpuopsError:
        return Probed(served.name, version, False, None)
    return Probed(served.name, version, True, found.ms)


def energy_report(meter: ServerMeter) -> dict[str, Any]:
    """JSON of what a meter has booked; energy in joules, null with the reason where it is not known.

    Close the meter first if the last seconds are to be in it.
    """
    totals, (method, reason) = meter.totals, meter.method
    keys = sorted({*totals.requests, *totals.unknown})
    return {
        "server": meter.url,
        "method": method,
        "reason": reason,
        "trace": meter.trace_reason or "used",
        "models": [_version(meter, key) for key in keys],
        "gpus": [_gpu(meter, gpu) for gpu in meter.gpus],
    }


def _version(meter: ServerMeter, key: Key) -> dict[str, Any]:
    totals = meter.totals
    per_request = totals.joules_per_request(key)
    return {
        "model": key[0],
        "version": key[1],
        "version_id": meter.version_ids.get(key),
        "requests": totals.requests[key],
        "metered_requests": totals.metered[key],
        "joules": totals.joules(key),
        "joules_per_request": per_request,
        "reason": totals.unknown.get(key, NOTHING if per_request is None else None),
    }


def _gpu(meter: ServerMeter, gpu: str) -> dict[str, Any]:
    totals = meter.totals
    lines = {
        "counted": totals.counted_uj,
        "idle": totals.idle_uj,
        "loading": totals.loading_uj,
        "unattributed": totals.unattributed_uj,
        "lost": totals.lost_uj,
    }
    by_method = {method: totals.attributed_uj[gpu, method] / 1e6 for method in ("trace", "statistics")}
    joules: dict[str, Any] = {name: line[gpu] / 1e6 for name, line in lines.items()}
    return {
        "gpu": gpu,
        "name": meter.gpus[gpu],
        "joules": joules | {"attributed": by_method} if gpu in totals.counted_uj else None,
        "idle_w": meter.idle_w.get(gpu),
        "lost_s": totals.lost_s[gpu],
        "reason": meter.silent.get(gpu),
    }
