"""What a subject of bench_loader.py is, the batches it delivers, and ours."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from loader_cases import VARIABLE, Fields

from gpuops.data.order import Lanes, Order
from gpuops.data.reading.reader import Reader
from gpuops.data.sample import BoundSample, Ids
from gpuops.data.source import Source

BATCH = 64
AHEAD = 2
"""Batches that the limit and tensorstore read ahead."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """What is delivered in one round."""

    order: Order
    """The order that gpuops computes while it reads."""
    batches: list[Ids]
    """The same batches for the other subjects, computed before."""

    def head(self, count: int) -> Epoch:
        """The first batches alone."""
        return replace(self, batches=self.batches[:count])


LANES = (4, 4)
"""Lanes, and chunks of each that are shuffled together, where chunks hold several samples."""

Subject = Callable[[Epoch], Iterator[Fields]]
"""Delivers an epoch's batches, each [n, y, x], or [n, steps, y, x] if samples are windows."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A subject in each of its settings; the fastest one enters the interleaved run."""

    variants: Mapping[str, Subject]
    """Subjects by setting; one without settings has the empty name."""
    ours: bool = True
    """Whether its work is done in this process, so that its processor time is known."""


def epoch(samples: int, fingerprint: str, number: int, dates: int = 1) -> Epoch:
    """A global shuffle, or one in lanes where chunks hold several samples."""
    lanes = Lanes(*LANES, dates) if dates > 1 else None
    order = Order(samples, seed=0, epoch=number, fingerprint=fingerprint, global_batch=BATCH, lanes=lanes)
    return Epoch(order, [order.batch(k, 0, 1)[0] for k in range(order.batches)])


def steps(ids: Ids, window: int) -> Ids:
    """Records of samples: [n] where a sample is one, else [n, window]."""
    return ids if window == 1 else ids[:, None] + np.arange(window)


def read_gpuops(reader: Reader, window: int, epoch: Epoch) -> Iterator[Fields]:
    for slot in reader.iterate(islice(epoch.order.shares(0, 0, 1), len(epoch.batches))):
        values = slot.inputs[VARIABLE]
        yield values[:, 0] if window == 1 else values


def read_afresh(opened: Source, bound: BoundSample, window: int, epoch: Epoch) -> Iterator[Fields]:
    """As `read_gpuops`, by a reader that has seen nothing: an array that fits its budget is not found in it."""
    reader = Reader(opened, bound)
    try:
        yield from read_gpuops(reader, window, epoch)
    finally:
        reader.close()


def read_ahead(epoch: Epoch, start: Callable[[int, Ids], Callable[[], Fields]]) -> Iterator[Fields]:
    """Batches of a subject whose `start` begins to read one and returns what waits for it."""
    pending: deque[Callable[[], Fields]] = deque()
    for number, ids in enumerate(epoch.batches):
        pending.append(start(number, ids))
        if len(pending) > AHEAD:
            yield pending.popleft()()
    while pending:
        yield pending.popleft()()
