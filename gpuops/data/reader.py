"""From sample ids to filled slots: plan the distinct chunks, read their ranges, decode them, gather the windows.

One process a rank and threads only. A slot holds, for each declared tensor, the stored values of its variables side by
side, so that one kernel prepares them.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.data.sample import BoundSample, Cut, Ids
from gpuops.data.shard import Coordinates, Layout, ShardIndexes, layout, read_ranges
from gpuops.data.source import Source
from gpuops.errors import IntegrityError

Stored = dict[str, npt.NDArray[Any]]
"""Stored values by tensor name, each [n, channels, *spatial]."""


@dataclass(slots=True)
class Counters:
    """What reading cost so far; counts do not depend on the machine."""

    samples: int = 0
    """Samples put into slots."""
    requests: int = 0
    """Byte ranges asked of the store, shard indexes included."""
    bytes_read: int = 0
    """Bytes those requests returned."""
    bytes_useful: int = 0
    """Encoded bytes of the chunks that samples needed."""
    decodes: int = 0
    """Inner chunks decoded."""
    read_s: float = 0.0
    """Seconds in which a batch waited for its bytes, added up over batches."""
    decode_s: float = 0.0
    """Seconds in which a batch was decoded and gathered, added up over batches."""
    stall_s: float = 0.0
    """Seconds in which the consumer waited for a batch that was not ready."""
    slot_bytes: int = 0
    """Largest number of bytes held by read-ahead at one time."""

    def to_json(self) -> dict[str, float]:
        """All counters, and what is usually asked of them."""
        per_sample = max(self.samples, 1)
        return {
            **asdict(self),
            "requests_per_sample": self.requests / per_sample,
            "decodes_per_sample": self.decodes / per_sample,
            "bytes_per_useful_byte": self.bytes_read / max(self.bytes_useful, 1),
        }


@dataclass(frozen=True, slots=True)
class Slot:
    """One batch in stored form."""

    inputs: Stored
    """Input tensors."""
    targets: Stored
    """Target tensors."""
    ids: Ids
    """Sample ids, int64 [n]."""
    valid: npt.NDArray[np.bool_]
    """False for samples that only fill up the batch, [n]."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for side in (self.inputs, self.targets) for array in side.values())


def wire_inputs(sample: BoundSample, slot: Slot) -> Stored:
    """The inputs of a slot as a served model takes them: by variable instead of by tensor."""
    wire = {}
    for tensor, cuts in sample.inputs.items():
        edges = np.cumsum([cut.shape[0] for cut in cuts])
        for cut, part in zip(cuts, np.split(slot.inputs[tensor], edges[:-1], axis=1), strict=True):
            wire[cut.name] = np.ascontiguousarray(part)
    return wire


class Reader:
    """Reads batches of samples ahead of their consumer."""

    def __init__(self, source: Source, sample: BoundSample, *, threads: int | None = None, ahead: int = 2) -> None:
        """Prepare to read `sample` from `source`.

        Args:
            source: an opened source.
            sample: the declared sample bound to it.
            threads: decoding threads; the cores of this process if None.
            ahead: batches read ahead of the consumer.
        """
        self.sample, self.ahead = sample, ahead
        self.counters = Counters()
        self._store = source.store
        self._cuts = [cut for side in (sample.inputs, sample.targets) for cuts in side.values() for cut in cuts]
        self._layouts: dict[str, Layout] = {}
        self._indexes: dict[str, ShardIndexes] = {}
        self._coordinates: dict[str, npt.NDArray[Any]] = {}
        for cut in self._cuts:
            name = cut.variable.name
            if cut.records:
                self._layouts[name] = layout(cut.variable.array)
                self._indexes[name] = ShardIndexes(self._layouts[name], source.store)
            else:
                self._coordinates[name] = np.asarray(cut.variable.array[:])
        self._decoders = ThreadPoolExecutor(threads or len(os.sched_getaffinity(0)), "gpuops-decode")
        self._planner = ThreadPoolExecutor(1, "gpuops-read")

    def close(self) -> None:
        """Stop the threads; batches not yet delivered are dropped."""
        self._planner.shutdown(cancel_futures=True)
        self._decoders.shutdown(cancel_futures=True)

    def iterate(self, batches: Iterable[tuple[Ids, npt.NDArray[np.bool_]]]) -> Iterator[Slot]:
        """Slots of the given (ids, valid) batches, in order, `ahead` of them read before they are asked for."""
        pending: deque[Future[Slot]] = deque()
        remaining = iter(batches)
        try:
            while True:
                while len(pending) <= self.ahead and (batch := next(remaining, None)) is not None:
                    pending.append(self._planner.submit(self.read, *batch))
                if not pending:
                    return
                begin = time.perf_counter()
                slot = pending.popleft().result()
                self.counters.stall_s += time.perf_counter() - begin
                self.counters.slot_bytes = max(self.counters.slot_bytes, slot.nbytes * (self.ahead + 1))
                yield slot
        finally:
            for future in pending:
                future.cancel()

    def read(self, ids: Ids, valid: npt.NDArray[np.bool_] | None = None) -> Slot:
        """One batch, now.

        Raises:
            IntegrityError: a chunk is missing or fails its checksum; the message names variable, shard and record.
        """
        record, start = self.sample.split_id(ids)
        wanted: dict[str, list[Ids]] = {}
        for cut in self._cuts:
            if cut.records:
                wanted.setdefault(cut.variable.name, []).append(_records(cut, record).ravel())
        records = {name: np.unique(np.concatenate(parts)) for name, parts in wanted.items()}
        slabs = self._load(records)
        begin = time.perf_counter()

        def gather(side: Mapping[str, tuple[Cut, ...]]) -> Stored:
            return {
                name: np.concatenate([self._window(cut, slabs, records, record, start) for cut in cuts], axis=1)
                for name, cuts in side.items()
            }

        slot = Slot(
            gather(self.sample.inputs),
            gather(self.sample.targets),
            ids,
            np.ones(len(ids), bool) if valid is None else valid,
        )
        self.counters.decode_s += time.perf_counter() - begin
        self.counters.samples += len(ids)
        return slot

    def _window(
        self, cut: Cut, slabs: Mapping[str, npt.NDArray[Any]], records: Mapping[str, Ids], record: Ids, start: Ids
    ) -> npt.NDArray[Any]:
        """One field of a batch, [n, *cut.shape]."""
        name, count = cut.variable.name, len(record)
        if not cut.records:
            origin = record if cut.along == "samples" else start
            return self._coordinates[name][cut.positions(origin)]
        rows = np.searchsorted(records[name], _records(cut, record))
        values = slabs[name][rows, cut.positions(start)] if cut.along == "inside" else slabs[name][rows]
        return np.ascontiguousarray(values).reshape(count, *cut.shape)

    def _load(self, records: Mapping[str, Ids]) -> dict[str, npt.NDArray[Any]]:
        """Decoded records by variable, each [len(records), *record]; every distinct chunk is read and decoded once."""
        begin = time.perf_counter()
        indexes_before = self._index_cost()
        plan: list[tuple[str, Coordinates]] = []
        places: list[tuple[str, Any]] = []
        for name, rows in records.items():
            chunks = _chunks(self._layouts[name], rows)
            plan += [(name, chunk) for chunk in chunks]
            places += self._indexes[name].locate(chunks)
        encoded = read_ranges(self._store, places)
        middle = time.perf_counter()
        slabs = {name: self._empty(name, len(rows)) for name, rows in records.items()}

        def decode(item: tuple[tuple[str, Coordinates], tuple[str, Any], npt.NDArray[np.uint8] | None]) -> int:
            (name, chunk), (key, _), data = item
            if data is None:
                raise IntegrityError(f"{name}: chunk {key} is missing: ingest it again, or hold its samples out")
            try:
                _decode_rows(self._layouts[name], chunk, data, records[name], slabs[name])
            except ValueError as error:
                raise IntegrityError(
                    f"{name}: inner chunk {chunk} in {key} is damaged ({error}): restore that object or ingest it again"
                ) from error
            return data.nbytes

        useful = sum(self._decoders.map(decode, zip(plan, places, encoded, strict=True)))
        requests, bytes_read = (now - then for now, then in zip(self._index_cost(), indexes_before, strict=True))
        counters = self.counters
        counters.requests += len(plan) + requests
        counters.bytes_read += useful + bytes_read
        counters.bytes_useful += useful
        counters.decodes += len(plan)
        counters.read_s += middle - begin
        counters.decode_s += time.perf_counter() - middle
        return slabs

    def _index_cost(self) -> tuple[int, int]:
        """(requests, bytes) spent on shard indexes so far."""
        indexes = self._indexes.values()
        return sum(index.requests for index in indexes), sum(index.bytes_read for index in indexes)

    def _empty(self, name: str, rows: int) -> npt.NDArray[Any]:
        array = self._layouts[name].array
        return np.empty((rows, *array.shape[1:]), array.dtype)


def _records(cut: Cut, record: Ids) -> Ids:
    """Records that a field needs for samples at `record`, [n, steps] (or [n, 1])."""
    return cut.positions(record) if cut.along == "samples" else record[:, None]


def _chunks(place: Layout, records: Ids) -> list[Coordinates]:
    """Distinct inner chunks that hold the given records whole."""
    inner = [range(-(-size // chunk)) for size, chunk in zip(place.array.shape[1:], place.chunk[1:], strict=True)]
    grid = np.stack(np.meshgrid(np.unique(records // place.chunk[0]), *inner, indexing="ij"), axis=-1)
    return [tuple(map(int, coordinates)) for coordinates in grid.reshape(-1, place.array.ndim)]


def _decode_rows(
    place: Layout, chunk: Coordinates, data: npt.NDArray[np.uint8], records: Ids, slab: npt.NDArray[Any]
) -> None:
    """Decode one chunk and put the rows of `records` that it holds into their places in `slab`."""
    first = chunk[0] * place.chunk[0]
    low, high = np.searchsorted(records, (first, first + place.chunk[0]))
    if place.chunk == (1, *slab.shape[1:]):
        place.decode(data, slab[low : low + 1])  # a slice, because a record of a one-dimensional array is a scalar
        return
    decoded = np.empty(place.chunk, slab.dtype)
    place.decode(data, decoded)
    inside = tuple(
        slice(c * size, min((c + 1) * size, limit))
        for c, size, limit in zip(chunk[1:], place.chunk[1:], slab.shape[1:], strict=True)
    )
    kept = tuple(slice(0, s.stop - s.start) for s in inside)
    slab[(slice(low, high), *inside)] = decoded[records[low:high] - first][(slice(None), *kept)]
