"""The meter, golden probes and version ids of a server as Prometheus metrics.

Labels are model, version and namespace (that of the server's model repository, or what the command is told). A series
whose value is unknown is absent, never 0: `gpuops_joules_unknown{reason}` says why.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from gpuops.errors import GpuopsError, UnavailableError
from gpuops_serving.metrics import Key, ServerMeter

VERSION_LABELS = ("model", "version", "namespace")


@dataclass(frozen=True, slots=True)
class Health:
    """What the last golden probe of one version found."""

    ok: bool
    """Whether it answered rightly."""
    seconds: float
    """Time to the answer."""


class Exporter:
    """Serves the metrics; `run` polls until `stop`.

    Args:
        meter: Of one server.
        version_ids: Asked at each scrape: version id by (model, version).
        probes: Asked every `probe_every_s`: health by (model, version).
        namespace: Label that tells servers apart.
    """

    def __init__(
        self,
        meter: ServerMeter,
        *,
        version_ids: Callable[[], Mapping[Key, str]] = dict,
        probes: Callable[[], Mapping[Key, Health]] = dict,
        namespace: str = "",
        probe_every_s: float = 30.0,
    ) -> None:
        self._meter = meter
        self._ask_version_ids, self._probe = version_ids, probes
        self._namespace = namespace
        self._probe_every_s = probe_every_s
        self._version_ids: Mapping[Key, str] = {}
        self._health: Mapping[Key, Health] = {}
        self._probed_s = -probe_every_s
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def serve(self, port: int, address: str = "127.0.0.1") -> int:
        """Start answering scrapes; returns the port. UnavailableError if it is taken."""
        registry = CollectorRegistry()
        registry.register(self)
        try:
            server, _ = start_http_server(port, addr=address, registry=registry)
        except OSError as error:
            raise UnavailableError(
                f"port {port} of {address} cannot be had ({error.strerror}): name another"
            ) from error
        self._server = server
        return int(server.server_port)

    def run(self, every_s: float = 1.0) -> None:
        """Poll until `stop`; a server that does not answer is asked again."""
        try:
            while True:
                self.step()
                if self._stopped.wait(every_s):
                    return
        finally:
            self._server.shutdown()
            self._server.server_close()
            self._meter.close()

    def stop(self) -> None:
        """Make `run` return."""
        self._stopped.set()

    def step(self) -> None:
        """One look at server and counters, and a golden probe when it is time."""
        with self._lock:
            self._meter.poll()
        if self._meter.last_error is not None:
            self._health = {key: Health(False, health.seconds) for key, health in self._health.items()}
            return
        if time.monotonic() - self._probed_s >= self._probe_every_s:
            self._probed_s = time.monotonic()
            try:
                self._version_ids = self._ask_version_ids()
                self._health = self._probe()
            except GpuopsError:
                self._probed_s -= self._probe_every_s  # at the next look again

    def collect(self) -> Iterable[Metric]:
        """What Prometheus scrapes."""
        with self._lock:
            yield from self._energy()
        yield from self._states()

    def _energy(self) -> Iterable[Metric]:
        totals, space = self._meter.totals, self._namespace
        attributed = CounterMetricFamily(
            "gpuops_energy_joules", "Energy of a version's requests.", labels=[*VERSION_LABELS, "gpu"]
        )
        for (gpu, model, version), uj in totals.shares_uj.items():
            attributed.add_metric([model, version, space, gpu], uj / 1e6)
        yield attributed
        for name, text, by_gpu, scale in (
            ("gpuops_idle_joules", "Energy while nothing computed.", totals.idle_uj, 1e6),
            ("gpuops_unattributed_joules", "Energy of work that cannot be told apart.", totals.unattributed_uj, 1e6),
            ("gpuops_counted_joules", "Energy that the GPU's counter counted.", totals.counted_uj, 1e6),
            ("gpuops_lost_seconds", "Time that the GPU's counter did not cover.", totals.lost_s, 1.0),
        ):
            family = CounterMetricFamily(name, text, labels=["gpu"])
            for gpu, value in by_gpu.items():
                family.add_metric([gpu], value / scale)
            yield family
        requests = CounterMetricFamily("gpuops_requests", "Requests answered or failed.", labels=VERSION_LABELS)
        each = GaugeMetricFamily("gpuops_joules_per_request", "Joules by requests so far.", labels=VERSION_LABELS)
        unknown = GaugeMetricFamily("gpuops_joules_unknown", "Why not.", labels=[*VERSION_LABELS, "reason"])
        for key, count in totals.requests.items():
            requests.add_metric([*key, space], count)
            if (joules := totals.joules_per_request(key)) is not None:
                each.add_metric([*key, space], joules)
        for key, reason in totals.unknown.items():
            unknown.add_metric([*key, space, reason], 1)
        yield from (requests, each, unknown)

    def _states(self) -> Iterable[Metric]:
        space, (method, reason) = self._namespace, self._meter.method
        up = GaugeMetricFamily("gpuops_server_up", "Whether the server answered the last look.", labels=["namespace"])
        up.add_metric([space], float(self._meter.last_error is None))
        meter = GaugeMetricFamily("gpuops_meter_up", "Whether energy is counted.", labels=["method", "reason"])
        meter.add_metric([method, reason or ""], float(reason is None))
        info = GaugeMetricFamily("gpuops_version_info", "Version id.", labels=[*VERSION_LABELS, "version_id"])
        for key, version_id in self._version_ids.items():
            info.add_metric([*key, space, version_id], 1)
        ok = GaugeMetricFamily(
            "gpuops_probe_ok", "Whether the golden request is answered rightly.", labels=VERSION_LABELS
        )
        seconds = GaugeMetricFamily("gpuops_probe_seconds", "Time of the golden request.", labels=VERSION_LABELS)
        for key, health in self._health.items():
            ok.add_metric([*key, space], float(health.ok))
            seconds.add_metric([*key, space], health.seconds)
        yield from (up, meter, info, ok, seconds)
