"""Seconds of named stretches of work, on the processor or on a CUDA stream, without waiting for the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up how long stretches take: by the clock on a CPU, by events of the current stream on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._under_way: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def lap(self, name: str) -> Iterator[None]:
        """Time what is done, or on CUDA what is put on the current stream, inside."""
        if self._device.type != "cuda":
            begun = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - begun)
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._under_way.append((name, first, last))
        self._settle()

    def seconds(self) -> dict[str, float]:
        """Seconds by name, of the stretches that the device has finished."""
        self._settle()
        return dict(self._seconds)

    def _settle(self) -> None:
        while self._under_way and self._under_way[0][2].query():
            name, first, last = self._under_way.popleft()
            self._add(name, first.elapsed_time(last) / 1e3)

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
