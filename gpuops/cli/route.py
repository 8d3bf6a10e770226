"""`gpuops route`: a small router before one server."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table


def route(stable: str, candidate: str, share: float, shadow: bool, fallback: bool, port: int, server: str) -> None:
    """Route until interrupted, then print what each version did."""
    from gpuops_serving.compare import Target
    from gpuops_serving.router import Router

    targets = Target.parse(stable), Target.parse(candidate)
    router = Router(server, *targets, share=share, shadow=shadow, fallback=fallback, port=port)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    with router:
        sys.stdout.write(f"{router.url}\n")
        sys.stdout.flush()
        stopped.wait()
    _print(router)


def _print(router: Any) -> None:
    table = Table("version", "requests", "failed", "p50 ms", "p99 ms")
    for version, traffic in router.traffic.items():
        p50, p99 = np.percentile(traffic.ms, [50, 99]) if traffic.ms else (np.nan, np.nan)
        table.add_row(version, str(traffic.requests), str(traffic.failed), f"{p50:.3g}", f"{p99:.3g}")
    Console(stderr=True).print(table)
