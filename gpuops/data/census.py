"""Which chunks of a Zarr array are not there: a reader would fill them in without a word.

`nchunks_initialized` counts store keys; of a sharded array the index of every shard is read as well.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.sync import sync

from gpuops.data.reading.shard import layout
from gpuops.data.reading.transport import read_ranges
from gpuops.errors import InputError

_BATCH = 256
"""Shard indexes read at a time."""
_ABSENT = np.uint64(2**64 - 1)


@dataclass(frozen=True, slots=True)
class Census:
    """Chunks of an array."""

    expected: int
    """Chunks that lie within the array (inner chunks, if it is sharded)."""
    absent: int
    """Those that are not in the store."""
    first: tuple[int, ...] | None
    """Index of the first value of the first chunk that is not there."""


def count_chunks(array: zarr.Array[Any]) -> Census:
    """Count the chunks of an array that are there and those that are not.

    Shards whose index lies elsewhere than in plain Zarr v3 are counted whole.
    """
    store, outer = array.store_path.store, array.shards or array.chunks
    grid = tuple(-(-size // step) for size, step in zip(array.shape, outer, strict=True))
    prefix = f"{array.path}/" if array.path else ""

    async def listed() -> set[str]:
        return {key async for key in store.list_prefix(prefix)}

    there = sync(listed())
    inner = tuple(s // c for s, c in zip(outer, array.chunks, strict=True))
    expected = absent = 0
    first: tuple[int, ...] | None = None
    present: list[tuple[tuple[int, ...], str]] = []
    for place in itertools.product(*map(range, grid)):
        within = [
            min(n, -(-(size - at * step) // chunk))
            for n, size, at, step, chunk in zip(inner, array.shape, place, outer, array.chunks, strict=True)
        ]
        expected += int(np.prod(within))
        key = prefix + array.metadata.encode_chunk_key(place)
        if key not in there:
            absent += int(np.prod(within))
            first = first or tuple(at * step for at, step in zip(place, outer, strict=True))
        elif array.shards is not None:
            present.append((place, key))
    if present:
        lost, where = _absent_inside(array, present, inner)
        absent += lost
        first = where if first is None else first if where is None else min(first, where)
    return Census(expected, absent, first)


def _absent_inside(
    array: zarr.Array[Any], present: list[tuple[tuple[int, ...], str]], inner: tuple[int, ...]
) -> tuple[int, tuple[int, ...] | None]:
    """Inner chunks missing from shards that are there, and the first value of the first of them."""
    try:
        place = layout(array)
    except InputError:
        return 0, None
    size = 16 * int(np.prod(inner)) + 4
    span: ByteRequest = SuffixByteRequest(size) if place.index_at_end else RangeByteRequest(0, size)
    lost, first = 0, None
    for begin in range(0, len(present), _BATCH):
        batch = present[begin : begin + _BATCH]
        found = read_ranges(array.store_path.store, [(key, span) for _, key in batch])
        for (shard, key), data in zip(batch, found, strict=True):
            if data is None or len(data) != size:
                raise InputError(f"{array.path}: shard {key} is cut short: restore the source")
            offsets = np.frombuffer(data[:-4].tobytes(), "<u8").reshape(*inner, 2)[..., 0]
            for hole in np.argwhere(offsets == _ABSENT):
                start = tuple((s * n + int(h)) * c for s, n, h, c in zip(shard, inner, hole, array.chunks, strict=True))
                if all(at < length for at, length in zip(start, array.shape, strict=True)):
                    lost += 1
                    first = start if first is None else min(first, start)
    return lost, first
