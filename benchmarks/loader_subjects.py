"""The subjects of bench_loader.py: what delivers the batches of an epoch, ours, the limit and the peers."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import harness
import numcodecs
import numpy as np
import numpy.typing as npt
import torch
import zarr
from torch.utils.data import DataLoader
from zarr.core.sync import sync

from gpuops.data import source
from gpuops.data.order import Order
from gpuops.data.reader import Reader
from gpuops.data.sample import Ids
from gpuops.data.shard import ShardIndexes, layout

VARIABLE = "field"
BATCH = 64
AHEAD = 2
"""Batches that gpuops, the limit and tensorstore read ahead."""
WORKERS = 2
"""Processes of the DataLoader."""

Fields = npt.NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class Epoch:
    """What is delivered in one round."""

    order: Order
    """The order that gpuops computes while it reads."""
    batches: list[Ids]
    """The same batches for the other subjects, computed before."""


Subject = Callable[[Epoch], Iterator[Fields]]
"""Delivers an epoch's batches, each [n, y, x]."""


def epoch(samples: int, fingerprint: str, number: int) -> Epoch:
    order = Order(samples, seed=0, epoch=number, fingerprint=fingerprint, global_batch=BATCH)
    return Epoch(order, [order.batch(k, 0, 1)[0] for k in range(order.batches)])


def read_gpuops(reader: Reader, epoch: Epoch) -> Iterator[Fields]:
    for slot in reader.iterate(epoch.order.batch(k, 0, 1) for k in range(epoch.order.batches)):
        yield slot.inputs[VARIABLE][:, 0]


def read_oindex(array: zarr.Array[Any], epoch: Epoch) -> Iterator[Fields]:
    for ids in epoch.batches:
        yield array.oindex[ids]


def read_getitem(array: zarr.Array[Any], epoch: Epoch) -> Iterator[Fields]:
    for ids in epoch.batches:
        yield np.stack([array[int(i)] for i in ids])


def read_async(array: zarr.Array[Any], epoch: Epoch) -> Iterator[Fields]:
    async def gathered(ids: Ids) -> Fields:
        return np.stack(await asyncio.gather(*(array.async_array.getitem(int(i)) for i in ids)))

    for ids in epoch.batches:
        yield sync(gathered(ids))


def read_ahead(epoch: Epoch, start: Callable[[int, Ids], Callable[[], Fields]]) -> Iterator[Fields]:
    """Batches of a subject whose `start` begins to read one and returns what waits for it."""
    pending: deque[Callable[[], Fields]] = deque()
    for number, ids in enumerate(epoch.batches):
        pending.append(start(number, ids))
        if len(pending) > AHEAD:
            yield pending.popleft()()
    while pending:
        yield pending.popleft()()


class Limit:
    """What the machine can do: positions known, files open, memory there; reading and decoding are left."""

    def __init__(self, store: Path, stack: ExitStack) -> None:
        array = source.open(store).variable(VARIABLE).array
        place = layout(array)
        located = ShardIndexes(place, array.store_path.store).locate([(i, 0, 0) for i in range(array.shape[0])])
        files = {key: os.open(store / key, os.O_RDONLY) for key, _ in located}
        for descriptor in files.values():
            stack.callback(os.close, descriptor)
        self._places = [(files[key], span.start, span.end - span.start) for key, span in located]
        self._fill = self._fill_zstd if "zstd+checksum" in place.codecs else self._fill_checksummed
        self._ring = np.empty((AHEAD + 1, BATCH, *array.shape[1:]), array.dtype)
        self._threads = harness.cores()
        self._pool = stack.enter_context(ThreadPoolExecutor(self._threads))

    def __call__(self, epoch: Epoch) -> Iterator[Fields]:
        return read_ahead(epoch, self._start)

    def _start(self, number: int, ids: Ids) -> Callable[[], Fields]:
        slot = self._ring[number % len(self._ring)]
        shares = [slice(first, None, self._threads) for first in range(self._threads)]
        futures = [self._pool.submit(self._fill, ids[share], slot[share]) for share in shares]

        def wait() -> Fields:
            for future in futures:
                future.result()
            return slot

        return wait

    def _fill_zstd(self, ids: Ids, rows: Fields) -> None:
        decode = numcodecs.Zstd().decode  # a new decompression context every call, as numcodecs has no other way
        for i, row in zip(ids, rows, strict=True):
            descriptor, offset, size = self._places[i]
            decode(os.pread(descriptor, size, offset), row)

    def _fill_checksummed(self, ids: Ids, rows: Fields) -> None:
        recorded = bytearray(4)
        for i, row in zip(ids, rows, strict=True):
            descriptor, offset, _ = self._places[i]
            os.preadv(descriptor, [row, recorded], offset)
            if google_crc32c.value(row) != int.from_bytes(recorded, "little"):
                raise SystemExit(f"sample {i} is damaged")


class ZarrDataset:
    """A map-style dataset as most people write it; each worker opens the array for itself."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._array: Any = None

    def __getitem__(self, index: int) -> torch.Tensor:
        if self._array is None:
            self._array = source.open(self._store).variable(VARIABLE).array
        return torch.from_numpy(self._array[int(index)])


class DataLoaderSubject:
    """One DataLoader for all rounds: its worker processes start in the untimed delivery and stay."""

    def __init__(self, store: Path) -> None:
        self._batches: list[Ids] = []
        # Spawned, because the threads of the other subjects do not survive a fork.
        self._loader: DataLoader[torch.Tensor] = DataLoader(
            ZarrDataset(store),  # type: ignore[arg-type]
            batch_sampler=self._batches,
            num_workers=WORKERS,
            multiprocessing_context="spawn",
            persistent_workers=True,
        )

    def __call__(self, epoch: Epoch) -> Iterator[Fields]:
        self._batches[:] = epoch.batches
        for batch in self._loader:
            yield batch.numpy()


def open_tensorstore(store: Path) -> Subject:
    """Tensorstore on as many threads, with a cache for the shard indexes and none worth the name for samples."""
    import tensorstore

    threads, cache_bytes = harness.cores(), 2**20
    array = tensorstore.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store / VARIABLE)}},
        context=tensorstore.Context(
            {
                "data_copy_concurrency": {"limit": threads},
                "file_io_concurrency": {"limit": threads},
                "cache_pool": {"total_bytes_limit": cache_bytes},
            }
        ),
        open=True,
        read=True,
    ).result()

    def start(number: int, ids: Ids) -> Callable[[], Fields]:
        return array[ids].read().result

    return partial(read_ahead, start=start)
