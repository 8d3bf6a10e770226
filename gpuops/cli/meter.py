"""`gpuops meter`: joules per request and per model version of a server on this host."""

from __future__ import annotations

import signal
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from gpuops.cli.connection import Connection
from gpuops.cli.output import print_json, progress, say
from gpuops.errors import InputError, UnavailableError


def meter(
    connection: Connection,
    port: int | None,
    address: str,
    seconds: float,
    every: float,
    trace: str | None,
    repository: str | None,
    namespace: str,
    json: bool,
) -> None:
    """Report after some seconds, or serve metrics until interrupted."""
    from gpuops_serving.exporter import Exporter, energy_report, repository_probe
    from gpuops_serving.metrics import ServerMeter
    from gpuops_serving.trace import TraceReader

    if seconds <= 0 or every <= 0:
        raise InputError("--seconds and --every must be more than 0")
    with connection.client() as client:
        server_meter = ServerMeter(client, trace=None if trace is None else TraceReader(trace, remove=True))
        if port is None:
            with server_meter, progress("seconds") as bar:
                answered = _watch(server_meter, seconds, every, bar)
            if not answered:
                raise UnavailableError(f"no answer from {connection.server} in {seconds:g} s: is a server there?")
            report = energy_report(server_meter)
            if json:
                print_json(report)
            else:
                _print(report)
                if trace is not None and report["trace"] != "used":
                    say(f"the traces in {trace} were not used: {report['trace']}")
            return
        asked = None if repository is None else repository_probe(connection.client, repository)
        exporter = Exporter(server_meter, probe=asked, namespace=namespace)
        served = exporter.serve(port, address)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: exporter.stop())
        sys.stdout.write(f"http://{address}:{served}/metrics\n")
        sys.stdout.flush()
        exporter.run(every)


def _watch(server_meter: Any, seconds: float, every: float, bar: Any) -> bool:
    """Look at the server for a while; whether it ever answered."""
    begin, answered = time.monotonic(), server_meter.last_error is None
    while (left := begin + seconds - time.monotonic()) > 0:
        time.sleep(min(every, left))
        server_meter.poll()
        bar(time.monotonic() - begin, seconds)
        if server_meter.last_error is not None:
            say(f"no answer: {server_meter.last_error}")
        else:
            answered = True
    return answered


def _print(report: dict[str, Any]) -> None:
    table = Table("model", "version", "requests", "joules", "joules a request", "why unknown")
    for row in report["models"]:
        numbers = (row["requests"], *(_number(row[key]) for key in ("joules", "joules_per_request")))
        table.add_row(row["model"], row["version"], *map(str, numbers), row["reason"] or "")
    Console().print(table)


def _number(value: float | None) -> str:
    return "null" if value is None else f"{value:.4g}"
