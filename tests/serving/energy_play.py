"""Meters scripted servers over a scripted driver, on a clock that only moves when told to: a child of test_accounts.

The driver is fake_nvml.c under the real nvidia-ml-py. A play is one line of JSON on stdin, its outcome one on stdout:
    script      for fake_nvml.c
    configs     {"MODEL:VERSION": configuration as Triton's JSON}; one that is left out cannot be read
    looks       [{"at": seconds, "statistics": [...] or null for no answer, "traces": [[MODEL, VERSION, begin, end]]}]
    longest_s   as ServerMeter's; traces are read only if a look has some
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from gpuops.errors import InputError, UnavailableError
from gpuops_serving.exporter import energy_report
from gpuops_serving.metrics import ServerMeter
from gpuops_serving.trace import Traced
from tests.gpuops.energy.play import Clock

LINES = ("idle", "loading", "unattributed", "lost", "counted")


class Server:
    """Answers a client's questions from a play."""

    url = "http://127.0.0.1:8000"

    def __init__(self, play: dict[str, Any]) -> None:
        self.configs = play["configs"]
        self.look: dict[str, Any] = {}

    def statistics(self) -> list[dict[str, Any]]:
        if self.look["statistics"] is None:
            raise UnavailableError("no answer")
        return self.look["statistics"]

    def raw_config(self, model: str, version: str) -> dict[str, Any]:
        if f"{model}:{version}" not in self.configs:
            raise InputError("restricted")
        return self.configs[f"{model}:{version}"]

    def read(self) -> list[Traced]:
        """As a TraceReader: what was written since the last look."""
        return [
            Traced(model, version, int(begin * 1e9), int(end * 1e9), int(end * 1e9) + 10_000)
            for model, version, begin, end in self.look.get("traces", [])
        ]


def sums(meter: ServerMeter) -> dict[str, Any]:
    """Every figure of the totals, flat; none of them may ever fall."""
    totals = meter.totals
    flat = {f"{line}/{gpu}": uj for line in LINES for gpu, uj in getattr(totals, f"{line}_uj").items()}
    flat |= {f"shares/{'/'.join(key)}": uj for key, uj in totals.shares_uj.items()}
    flat |= {f"attributed/{'/'.join(key)}": uj for key, uj in totals.attributed_uj.items()}
    flat |= {f"lost_s/{gpu}": seconds for gpu, seconds in totals.lost_s.items()}
    for name in ("requests", "metered"):
        flat |= {f"{name}/{':'.join(key)}": count for key, count in getattr(totals, name).items()}
    return flat


def play(asked: dict[str, Any], clock: Clock) -> dict[str, Any]:
    Path(os.environ["FAKE_NVML"]).write_text(asked["script"])
    looks, server = asked["looks"], Server(asked)
    clock.set(int(max(looks[0]["at"] - 1, 0) * 1e9))
    trace: Any = server if any("traces" in look for look in looks) else None
    meter = ServerMeter(server, trace=trace, clock=clock, longest_s=asked["longest_s"])  # type: ignore[arg-type]
    sampler = meter._meter.sampler
    sampler.start = lambda: None  # type: ignore[method-assign]
    counters = {sensor.id: sensor for sensor in sampler.sensors}
    read: dict[str, int] = {}
    rose = dict.fromkeys(counters, 0)
    history, rises = [], []

    def read_once(before_ns: float) -> None:
        """What the reading thread does, and the time until it does so again."""
        due = sampler.poll()
        for gpu, sensor in counters.items():
            now = sensor.count().energy_mj
            if now is not None:
                rose[gpu] += max(now - read.get(gpu, now), 0)
                read[gpu] = now
        clock.set(int(min(before_ns, clock() + max(int(due * 1e9), 1))))

    def wait(mark: int) -> None:
        while mark in sampler._open:
            read_once(float("inf"))

    sampler.wait = wait  # type: ignore[method-assign]
    for look in looks:
        while clock() < int(look["at"] * 1e9):
            read_once(look["at"] * 1e9)
        server.look = look
        meter.poll()
        rises.append(dict(rose))
        history.append(sums(meter))
    meter._book_until(None)
    history.append(sums(meter))
    return {
        "history": history,
        "rose_mj": rises,
        "unknown": {":".join(key): reason for key, reason in meter.totals.unknown.items()},
        "report": energy_report(meter),
        "marks": len(sampler._marks),
    }


if __name__ == "__main__":
    moved = Clock(os.environ["FAKE_NVML_CLOCK"])
    for line in sys.stdin:
        try:
            told = play(json.loads(line), moved)
        except Exception:
            told = {"error": traceback.format_exc()}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
