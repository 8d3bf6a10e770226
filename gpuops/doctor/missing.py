"""Which keys of an array are there, and which inner chunks of some of its shards, at a cost that does not grow with it.

`gpuops.data.census` reads every shard index, once, before an ingest; a look at an archive of any size reads a few.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import zarr.abc.store
from zarr.abc.store import ByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from gpuops.data.place import can_list, entries
from gpuops.data.reading.shard import ENTRY_BYTES, Layout

SHARDS = 64
"""Shard indexes read for one array, evenly spaced over its keys."""
NAMED = 3
"""Missing keys that are named."""
_METADATA = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")
_ABSENT = np.uint64(2**64 - 1)


@dataclass(frozen=True, slots=True)
class Presence:
    """Chunks of one array that are there."""

    keys: int
    """Keys (shards, or chunks where there are none) that the array would have in full."""
    present: int
    """Keys that are there."""
    shards: int
    """Shard indexes that were read; 0 without sharding."""
    inner: int
    """Inner chunks that those shards would have in full."""
    inner_present: int
    """Inner chunks that they have."""
    missing: tuple[str, ...]
    """The first keys that are not there, and after them shards that lack inner chunks."""

    @property
    def complete(self) -> bool:
        """Whether nothing that was looked at is missing."""
        return self.keys == self.present and self.inner == self.inner_present


def look(place: Layout, store: zarr.abc.store.Store, absent: Iterable[int] = ()) -> Presence | None:
    """Count an array's chunks, but for those whose records are all declared to be `absent`.

    None where the store cannot list its keys.
    """
    there = _keys(place, store)
    if there is None:
        return None
    outer = place.shard or place.chunk
    grid = [-(-size // step) for size, step in zip(place.array.shape, outer, strict=True)]
    rows = _empty_rows(place.array.shape[0], outer[0], absent)
    there -= {place.object_key(at) for at in itertools.product(rows, *map(range, grid[1:]))}
    total = math.prod(grid) - len(rows) * math.prod(grid[1:])
    missing: list[str] = []
    if len(there) < total:
        wanted_keys = (place.object_key(at) for at in itertools.product(*map(range, grid)) if at[0] not in rows)
        missing = list(itertools.islice((key for key in wanted_keys if key not in there), NAMED))
    shards = inner = inner_present = 0
    if place.shard is not None:
        for at in _spread(grid, SHARDS):
            key = place.object_key(at)
            if key not in there:
                continue
            wanted, found = _inner(place, store, key, at)
            shards, inner, inner_present = shards + 1, inner + wanted, inner_present + found
            if found < wanted and len(missing) < NAMED:
                missing.append(f"{key} ({wanted - found} of {wanted} inner chunks)")
    return Presence(total, len(there), shards, inner, inner_present, tuple(missing))


def _empty_rows(records: int, step: int, absent: Iterable[int]) -> set[int]:
    """Positions along the first axis of keys all of whose records are absent."""
    held = Counter(record // step for record in absent)
    return {row for row, count in held.items() if count == min(step, records - row * step)}


def _keys(place: Layout, store: zarr.abc.store.Store) -> set[str] | None:
    """Chunk keys below an array."""
    sized = entries(store, place.array.path)
    if sized is not None:
        return {entry.key for entry in sized if entry.key.rpartition("/")[2] not in _METADATA}
    if not can_list(store):
        return None

    async def listed() -> set[str]:
        found = {key async for key in store.list_prefix(f"{place.array.path}/")}
        return {key for key in found if key.rpartition("/")[2] not in _METADATA}

    return sync(listed())


def _spread(grid: list[int], most: int) -> Iterator[tuple[int, ...]]:
    """At most `most` positions of a grid, evenly spaced in C order."""
    total = math.prod(grid)
    for number in np.unique(np.linspace(0, max(total - 1, 0), min(most, total)).astype(np.int64)):
        yield tuple(int(at) for at in np.unravel_index(int(number), grid))


def _inner(place: Layout, store: zarr.abc.store.Store, key: str, at: tuple[int, ...]) -> tuple[int, int]:
    """(inner chunks that a shard would have inside the array, those that its index has)."""
    per, array = place.chunks_per_shard, place.array
    size = ENTRY_BYTES * math.prod(per) + 4
    where: ByteRequest = SuffixByteRequest(size) if place.index_at_end else RangeByteRequest(0, size)
    buffer = sync(store.get(key, default_buffer_prototype(), where))
    inside = np.ones(per, bool)
    for axis, (outer, count) in enumerate(zip(at, per, strict=True)):
        first = (outer * count + np.arange(count)) * place.chunk[axis]
        inside &= (first < array.shape[axis]).reshape([-1 if other == axis else 1 for other in range(len(per))])
    data = b"" if buffer is None else buffer.to_bytes()
    if len(data) != size:  # a cut shard has no index at all
        return int(inside.sum()), 0
    offsets = np.frombuffer(data[:-4], "<u8").reshape(*per, 2)[..., 0]
    return int(inside.sum()), int((inside & (offsets != _ABSENT)).sum())
