"""Meters windows under a script on a clock that only moves when told to: the child process of the `play` fixture."""

import json
import mmap
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path


class Clock:
    """Nanoseconds, in the file that the scripted library reads too."""

    def __init__(self, path: str) -> None:
        Path(path).write_bytes(bytes(8))
        with open(path, "r+b") as file:
            self._shared = mmap.mmap(file.fileno(), 8)

    def __call__(self) -> int:
        return int.from_bytes(self._shared[:8], "little")

    def set(self, nanoseconds: int) -> None:
        self._shared[:8] = nanoseconds.to_bytes(8, "little")


def play(
    script: str, windows: Sequence[Sequence[float]], devices: list[int | str] | None, jitter: float
) -> list[object]:
    """Readings of the windows [begin, end] in seconds, each as JSON, with `by_gpu` and `usage`."""
    from dataclasses import asdict

    from gpuops.energy.meter import Meter
    from gpuops.errors import InputError

    Path(os.environ["FAKE_NVML"]).write_text(script.replace("SELF", str(os.getpid())))
    clock = Clock(os.environ["FAKE_NVML_CLOCK"])
    edges = sorted({edge for window in windows for edge in window})
    clock.set(int(max(edges[0] - 2, 0) * 1e9))  # the reading thread would have run for a while
    try:
        meter = Meter(devices, clock=clock)
    except InputError as error:
        return [{"error": str(error)}]
    meter.sampler.start = lambda: None  # type: ignore[method-assign]
    late = random.Random(0)

    def until(moment: float) -> None:
        while clock() < int(moment * 1e9):
            due = meter.sampler.poll() * (1 + jitter * late.random())
            clock.set(min(int(moment * 1e9), clock() + max(int(due * 1e9), 1)))

    marks = {}
    for edge in edges:
        until(edge)
        marks[edge] = meter.mark()
    until(edges[-1] + 0.5)
    told = []
    for begin, end in windows:
        a, b = marks[begin], marks[end]
        told.append(
            meter.between(a, b).to_json()
            | {"by_gpu": {id: reading.to_json() for id, reading in meter.by_sensor([(a, b)]).items()}}
            | {"usage": {id: asdict(usage) for id, usage in meter.usage([(a, b)]).items()}}
        )
    return told


if __name__ == "__main__":
    sys.stdout.write(json.dumps(play(**json.load(sys.stdin))))
