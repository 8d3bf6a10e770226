"""The limit of each case of bench_loader.py: positions known, memory there; reading and decoding are left.

It decodes with what was fastest here for these bytes: zstandard's context kept by thread or numcodecs (both are tried),
numcodecs for blosc, crc32c for checksums. Nothing of gpuops is in it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import crc32c
import harness
import numcodecs
import numpy as np
import numpy.typing as npt
import obstore
import zarr
import zstandard
from loader_cases import Case, Fields
from loader_subjects import AHEAD, BATCH, Epoch, Subject, read_ahead, steps
from obstore.store import ObjectStore
from zarr.abc.store import RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from gpuops.data.sample import Ids

OPEN_FILES = 128
"""More files than this are opened at each read: a job may have 1,024 descriptors."""
CONNECTIONS = (4, 16)
"""Concurrent GETs that are tried against an object store."""

Place = tuple[str, int, int]
"""Key, first byte and number of bytes of a chunk."""
Decode = Callable[[Any, Any], None]
"""Decodes one chunk, (encoded, out)."""
Fetch = Callable[[Sequence[Place]], list[Any]]
"""Gets the bytes of a batch's chunks."""


class _Kept(threading.local):
    """What a thread keeps from chunk to chunk."""

    def __init__(self) -> None:
        self.zstd = zstandard.ZstdDecompressor()
        self.scratch = bytearray(2**21)


_kept = _Kept()


@dataclass(frozen=True, slots=True)
class Limit:
    """Fills a ring of batches from known places."""

    case: Case
    """What is read."""
    places: list[Place]
    """Where each record lies."""
    ring: Fields
    """Batches, [AHEAD + 1, BATCH, *sample]."""
    fill: Callable[[Sequence[Place], Fields], None]
    """Reads and decodes chunks into rows; called with a share of a batch by each thread."""
    pool: ThreadPoolExecutor
    """Threads that read and decode: as many as cores; more of them are tried where pages come from the disk."""
    threads: int
    """Of `pool`."""
    planners: ThreadPoolExecutor
    """One thread a batch in flight, where a batch is more than independent rows."""
    fetch: Fetch | None = None
    """Gets all bytes of a batch at once, where that is faster than one by one."""
    decode: Decode | None = None
    """Decodes what `fetch` got."""

    def __call__(self, epoch: Epoch) -> Iterator[Fields]:
        return read_ahead(epoch, self._start)

    def _start(self, number: int, ids: Ids) -> Callable[[], Fields]:
        slot: Fields = self.ring[number % len(self.ring)]
        if self.fetch is None:
            futures = [self.pool.submit(self.fill, [self.places[i] for i in ids[s]], slot[s]) for s in self._shares()]
        else:
            futures = [self.planners.submit(self._whole, ids, slot)]

        def wait() -> Fields:
            for future in futures:
                future.result()
            return slot[: len(ids)]

        return wait

    def _whole(self, ids: Ids, slot: Fields) -> None:
        """All bytes of a batch in one go, then decode them."""
        assert self.fetch is not None
        assert self.decode is not None
        encoded, decode = self.fetch([self.places[i] for i in ids]), self.decode

        def share(part: slice) -> None:
            for data, row in zip(encoded[part], slot[: len(ids)][part], strict=True):
                decode(data, row)

        list(self.pool.map(share, self._shares()))

    def _shares(self) -> list[slice]:
        return [slice(first, None, self.threads) for first in range(self.threads)]


class SharedLimit:
    """For chunks that several samples need: decodes each once, when it is first wanted, and keeps it to the last time.

    What is kept has no budget: for windows in a global shuffle it grows to most of the array.
    """

    def __init__(self, limit: Limit) -> None:
        self._limit = limit

    def __call__(self, epoch: Epoch) -> Iterator[Fields]:
        case = self._limit.case
        batches = [np.divmod(steps(ids, case.window).ravel(), case.dates) for ids in epoch.batches]
        last = {chunk: number for number, (chunks, _) in enumerate(batches) for chunk in np.unique(chunks).tolist()}
        held: dict[int, Fields] = {}
        spare: list[Fields] = []

        def start(number: int, ids: Ids) -> Callable[[], Fields]:
            return self._limit.planners.submit(fill, number, self._limit.ring[number % (AHEAD + 1)]).result

        def fill(number: int, slot: Fields) -> Fields:
            chunks, inside = batches[number]
            wanted = [chunk for chunk in np.unique(chunks).tolist() if chunk not in held]
            shape = (case.dates, *case.shape)
            held.update({chunk: spare.pop() if spare else np.empty(shape, slot.dtype) for chunk in wanted})
            list(self._limit.pool.map(decode, wanted))
            rows = slot.reshape(-1, *case.shape)
            list(self._limit.pool.map(lambda part: gather(part, rows, chunks, inside), _halves(len(chunks))))
            spare.extend(held.pop(chunk) for chunk in np.unique(chunks).tolist() if last[chunk] == number)
            return slot

        def decode(chunk: int) -> None:
            # One chunk at a time, so that a thread takes the next when it is done.
            self._limit.fill([self._limit.places[chunk]], held[chunk][None])

        def gather(part: slice, rows: Fields, chunks: Ids, inside: Ids) -> None:
            for row, chunk, place in zip(rows[part], chunks[part].tolist(), inside[part].tolist(), strict=True):
                row[:] = held[chunk][place]

        return read_ahead(epoch, start)


def _halves(count: int) -> list[slice]:
    """Consecutive shares."""
    edges = np.linspace(0, count, harness.cores() + 1).astype(int).tolist()
    return [slice(low, high) for low, high in pairwise(edges)]


def limits(
    case: Case, folder: Path, array: zarr.Array[Any], bucket: ObjectStore | None, stack: ExitStack
) -> Mapping[str, Subject]:
    """The limit of a case with each decoder and way of reading that could be the fastest."""
    places = locate(array)
    ring = np.empty((AHEAD + 1, BATCH, *((case.window,) if case.window > 1 else ()), *case.shape), array.dtype)
    cores = harness.cores()
    pool = stack.enter_context(ThreadPoolExecutor(cores))
    # One planner where batches share chunks: what is decoded for one is there for the next.
    planners = stack.enter_context(ThreadPoolExecutor(1 if case.shared else AHEAD + 1))
    make = partial(Limit, case, places, ring, planners=planners, pool=pool, threads=cores)
    found: dict[str, Subject] = {}
    for name, decode in decoders(case.codec).items():
        if case.home == "icechunk":
            found[f"{name}, get_partial_values"] = make(
                fill=_nothing, fetch=partial(_partial_values, array.store_path.store), decode=decode
            )
        elif bucket is not None and not case.cached:
            for connections in CONNECTIONS:
                getters = stack.enter_context(ThreadPoolExecutor(connections))
                fetch = partial(_get_ranges, bucket, getters)
                found[f"{name}, {connections} GETs"] = make(fill=_nothing, fetch=fetch, decode=decode)
        else:
            files = _Files(folder, places, stack)
            fill = partial(_fill_raw, files) if case.codec == "none" else partial(_fill_decoded, files, decode)
            found[name] = SharedLimit(make(fill=fill)) if case.shared else make(fill=fill)
            if case.cold:  # threads that wait for the disk leave the cores to others
                more = stack.enter_context(ThreadPoolExecutor(4 * cores))
                found[f"{name}, {4 * cores} threads"] = make(fill=fill, pool=more, threads=4 * cores)
    return found


def locate(array: zarr.Array[Any]) -> list[Place]:
    """Where each chunk lies, from the shard indexes, or its key alone where it is one."""
    name, store = array.path.lstrip("/"), array.store_path.store
    tail = (0,) * (array.ndim - 1)
    per = (array.shards or array.chunks)[0]
    places: list[Place] = []
    for first in range(0, array.shape[0], per):
        key = f"{name}/{array.metadata.encode_chunk_key((first // per, *tail))}"
        if array.shards is None:
            places.append((key, 0, sync(store.getsize(key))))
            continue
        index = sync(store.get(key, default_buffer_prototype(), SuffixByteRequest(16 * per + 4)))
        assert index is not None
        entries = np.frombuffer(index.to_bytes()[:-4], "<u8").reshape(per, 2)[: array.shape[0] - first]
        places += [(key, int(offset), int(size)) for offset, size in entries]
    return places


def decoders(codec: str) -> dict[str, Decode]:
    """Ways to decode a codec's chunks, by the library's name."""
    match codec:
        case "zstd":
            return {"zstandard": _zstandard, "numcodecs": lambda data, out: numcodecs.Zstd().decode(data, out)}
        case "none":
            return {"crc32c": _checked_copy}
    return {"numcodecs": _blosc}


def _zstandard(data: Any, out: Any) -> None:
    _kept.zstd.stream_reader(data).readinto(out)


def _blosc(data: Any, out: Any) -> None:
    numcodecs.Blosc().decode(_checked(data), out)


def _crc32c(data: npt.NDArray[np.uint8]) -> int:
    """Without the interpreter lock where that pays; google-crc32c, as fast on one thread, never gives it up."""
    return int(crc32c.crc32c(data, gil_release_mode=int(len(data) > 2**17)))


def _checked(data: Any) -> npt.NDArray[np.uint8]:
    encoded = np.frombuffer(data, np.uint8)
    if _crc32c(encoded[:-4]) != int.from_bytes(encoded[-4:].tobytes(), "little"):
        raise SystemExit("a chunk is damaged")
    return encoded[:-4]


def _checked_copy(data: Any, out: Any) -> None:
    out.reshape(-1).view(np.uint8)[:] = _checked(data)


def _nothing(places: Sequence[Place], rows: Fields) -> None:
    raise AssertionError("bytes are fetched a batch at a time")


class _Files:
    """A folder's files by key; their descriptors are kept where there are few."""

    def __init__(self, folder: Path, places: Sequence[Place], stack: ExitStack) -> None:
        keys = {key for key, _, _ in places}
        self._folder = folder
        self._kept = {key: os.open(folder / key, os.O_RDONLY) for key in keys if len(keys) <= OPEN_FILES}
        for descriptor in self._kept.values():
            stack.callback(os.close, descriptor)

    def read(self, key: str, offset: int, parts: list[Any]) -> None:
        if key in self._kept:
            os.preadv(self._kept[key], parts, offset)
            return
        descriptor = os.open(self._folder / key, os.O_RDONLY)
        os.preadv(descriptor, parts, offset)
        os.close(descriptor)


def _fill_decoded(files: _Files, decode: Decode, places: Sequence[Place], rows: Fields) -> None:
    for (key, offset, size), row in zip(places, rows, strict=True):
        scratch = memoryview(_kept.scratch)[:size]
        files.read(key, offset, [scratch])
        decode(scratch, row)


def _fill_raw(files: _Files, places: Sequence[Place], rows: Fields) -> None:
    recorded = bytearray(4)
    for (key, offset, _), row in zip(places, rows, strict=True):
        files.read(key, offset, [row, recorded])
        if _crc32c(row.reshape(-1).view(np.uint8)) != int.from_bytes(recorded, "little"):
            raise SystemExit(f"{key} is damaged at {offset}")


def _partial_values(store: Store, places: Sequence[Place]) -> list[Any]:
    """Icechunk's own concurrent ranged get of a whole batch."""
    ranges = [(key, RangeByteRequest(offset, offset + size)) for key, offset, size in places]
    buffers = sync(store.get_partial_values(default_buffer_prototype(), ranges))
    return [buffer.as_numpy_array() for buffer in buffers if buffer is not None]


def _get_ranges(bucket: ObjectStore, getters: ThreadPoolExecutor, places: Sequence[Place]) -> list[Any]:
    def get(place: Place) -> Any:
        key, offset, size = place
        return obstore.get_range(bucket, key, start=offset, length=size)

    return list(getters.map(get, places))
