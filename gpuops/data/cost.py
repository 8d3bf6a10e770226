"""What a layout costs a reader, by arithmetic alone: bytes decoded per useful byte, requests a sample, bytes packed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpuops.data.reading.shard import Layout
from gpuops.data.source import Source
from gpuops.data.variable import Variable

SMALL, LARGE = 64 * 2**10, 16 * 2**20
"""Bytes of a decoded chunk below which requests are the limit, and above which one sample waits for one thread."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one record of an array costs where it lies."""

    record_bytes: int
    """Decoded bytes of a record."""
    chunk_bytes: int
    """Decoded bytes of an inner chunk."""
    records_per_chunk: int
    """Records that share an inner chunk."""
    chunks_per_record: int
    """Inner chunks that a record lies in: requests of a random record, once the shard index is cached."""

    @property
    def decoded_per_useful(self) -> float:
        """Bytes decoded per byte of a random record, edges of chunks included."""
        return self.chunks_per_record * self.chunk_bytes / max(self.record_bytes, 1)

    @property
    def decoded_in_lanes(self) -> float:
        """The same when lanes read all records of a chunk while it is decoded: what lies over the edges is left."""
        return self.decoded_per_useful / self.records_per_chunk


def cost(place: Layout) -> Cost:
    """What one record of an array [records, ...] costs."""
    shape = place.array.shape
    across = (-(-size // chunk) for size, chunk in zip(shape[1:], place.chunk[1:], strict=True))
    record = math.prod(shape[1:]) * place.array.dtype.itemsize
    return Cost(record, place.chunk_bytes, min(place.chunk[0], max(shape[0], 1)), math.prod(across))


def packed_itemsize(variable: Variable) -> int:
    """Bytes a value when floats are packed to 16 bits, if the tolerance allows it; packed values stay as they are."""
    size = variable.array.dtype.itemsize
    return min(size, 2) if variable.array.dtype.kind == "f" else int(size)


def sampled(source: Source) -> dict[str, Variable]:
    """Variables of two axes or more that have records: those that are not static beside another one.

    A variable is static if all of its dimensions lie behind the first axis of another (a land-sea mask).
    """
    wide = {name: variable for name, variable in source.variables.items() if variable.array.ndim >= 2}
    inner = [set(variable.dims[1:]) for variable in wide.values()]
    return {name: v for name, v in sorted(wide.items()) if not any(set(v.dims) <= dims for dims in inner)}
