"""Where a chunk lies: an array's layout, and the indexes of its shards.

Follows the Zarr v3 sharding codec: an index of (offset, nbytes) pairs, little-endian uint64, one for each inner
chunk in C order, with a crc32c behind it, at the end (or the start) of each shard.
https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import RangeByteRequest, Store
from zarr.codecs import ShardingCodec

from gpuops.data.reading.codec import Chain, chain_v2, chain_v3, strip_crc32c
from gpuops.data.reading.transport import Span, Transport, open_transport
from gpuops.errors import InputError, IntegrityError

Coordinates = tuple[int, ...]
"""Position of an inner chunk on the grid of all inner chunks."""

ENTRY_BYTES = 16
"""Bytes of a shard's index for each of its inner chunks."""
_ABSENT = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Layout:
    """How one array lies in its store."""

    array: zarr.Array[Any]
    """The array."""
    chunk: tuple[int, ...]
    """Shape of an inner chunk: what is decoded at once."""
    shard: tuple[int, ...] | None
    """Shape of a shard; None where each chunk is a key of its own."""
    index_at_end: bool
    """Whether a shard's index lies at its end."""
    chain: Chain
    """How a chunk is decoded."""
    chunk_bytes: int = field(init=False)
    """Bytes of a decoded inner chunk."""

    def __post_init__(self) -> None:
        # Kept, because zarr works out a dtype anew each time it is asked.
        object.__setattr__(self, "chunk_bytes", math.prod(self.chunk) * int(self.array.dtype.itemsize))

    @property
    def codecs(self) -> tuple[str, ...]:
        """Names of the bytes-to-bytes codecs in the order they were applied at writing."""
        return self.chain.codecs

    @property
    def checksummed(self) -> bool:
        """Whether a flipped bit in a chunk is noticed."""
        return self.chain.checksummed

    @property
    def chunks_per_shard(self) -> tuple[int, ...]:
        """Inner chunks of a shard along each axis; ones without sharding."""
        return tuple(s // c for s, c in zip(self.shard or self.chunk, self.chunk, strict=True))

    @property
    def record_is_chunk(self) -> bool:
        """Whether an inner chunk is one whole record, so that it can be decoded where the record belongs."""
        return self.chunk == (1, *self.array.shape[1:])

    def key(self, chunk: Coordinates) -> tuple[str, int]:
        """Store key that holds an inner chunk, and its position in that key's index."""
        per = self.chunks_per_shard
        outer = tuple(c // n for c, n in zip(chunk, per, strict=True))
        inner = tuple(c % n for c, n in zip(chunk, per, strict=True))
        return self.object_key(outer), int(np.ravel_multi_index(inner, per))

    def object_key(self, outer: Coordinates) -> str:
        """Store key of a shard, or of a chunk that is a key of its own, by its position on their grid."""
        return f"{self.array.path}/{self.array.metadata.encode_chunk_key(outer)}".lstrip("/")

    def decode(self, encoded: Any, out: npt.NDArray[Any]) -> None:
        """Decode one inner chunk into `out` [*chunk], C-contiguous, of the array's dtype.

        Raises:
            ValueError: the bytes are damaged, or do not make exactly one chunk.
        """
        flat = out.reshape(-1).view(np.uint8)
        assert np.may_share_memory(flat, out), "out must be a contiguous array, not a copy of one"
        self.chain.decode(encoded, flat)


def layout(array: zarr.Array[Any]) -> Layout:
    """Read an array's layout; InputError names what this reader cannot decode."""
    metadata = array.metadata
    if metadata.zarr_format == 2:
        if metadata.order != "C" or metadata.filters or metadata.dtype.to_native_dtype().byteorder == ">":
            raise InputError(
                f"{array.path}: Fortran order, filters and big-endian v2 arrays are not read: re-ingest it"
            )
        return Layout(array, array.chunks, None, True, chain_v2(metadata.compressor))
    codecs, index_at_end = metadata.codecs, True
    if isinstance(codecs[0], ShardingCodec):
        sharding = codecs[0]
        index = [codec.to_dict()["name"] for codec in sharding.index_codecs]
        if len(codecs) > 1 or index != ["bytes", "crc32c"]:
            raise InputError(
                f"{array.path}: shards that are encoded again as a whole, or whose index is not plain bytes with a "
                "crc32c, are not read in place: re-ingest it with `gpuops ingest`"
            )
        index_at_end = sharding.index_location.value == "end"
        codecs = sharding.codecs
    documents: list[dict[str, Any]] = [codec.to_dict() for codec in codecs]
    if documents[0]["name"] != "bytes" or (documents[0].get("configuration") or {}).get("endian") == "big":
        raise InputError(
            f"{array.path}: codec {documents[0]['name']!r} (or big-endian bytes) is not read: re-ingest it"
        )
    return Layout(array, array.chunks, array.shards, index_at_end, chain_v3(array.path, documents[1:]))


@dataclass(frozen=True, slots=True)
class _Page:
    """Consecutive entries of one shard's index."""

    key: str
    """Key of the shard."""
    first: int
    """Position of the first entry in the shard's index."""
    entries: memoryview | None
    """Offset and size, turn by turn, as unsigned 64-bit integers; None for a shard that is not there."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.entries is None else self.entries.nbytes


@dataclass(frozen=True, slots=True)
class Spans:
    """Where chunks lie, by column."""

    keys: list[str]
    """Store keys."""
    starts: list[int]
    """First bytes."""
    stops: list[int | None]
    """Bytes after the last; None for the whole key, 0 for a chunk that is missing."""

    def __iter__(self) -> Iterator[Span]:
        return zip(self.keys, self.starts, self.stops, strict=True)


class ShardIndexes:
    """Shard indexes of one array in pages, kept up to a byte budget, least recently used out first. Thread-safe.

    A page is a whole index, which its checksum covers. Only the index of a shard with more than `PAGE_ENTRIES` chunks
    is cut up, and only where chunks bring checksums of their own, which notice an entry that leads to a wrong place.
    """

    PAGE_ENTRIES = 2**16

    def __init__(self, layout: Layout, store: Store | Transport, budget_bytes: int = 64 * 2**20) -> None:
        """Cache indexes of `layout`'s shards read from `store`."""
        self.layout, self._budget = layout, budget_bytes
        self._transport = open_transport(store) if isinstance(store, Store) else store
        self._per = layout.chunks_per_shard
        self._count = math.prod(self._per)
        self._grid = tuple(-(-s // n) for s, n in zip(layout.array.shape, layout.shard or layout.chunk, strict=True))
        paged = self._count > self.PAGE_ENTRIES and layout.checksummed
        self._page = self.PAGE_ENTRIES if paged else self._count
        self._pages_each = -(-self._count // self._page)
        self._whole = self._pages_each == 1
        self._linear = self._per[0] == self._count and self._grid[0] == math.prod(self._grid)
        self._pages: OrderedDict[int, _Page] = OrderedDict()
        self._underway: dict[int, Future[_Page]] = {}
        self._lock = threading.Lock()
        self._held = 0
        self.requests = 0
        """Requests made so far."""
        self.bytes_read = 0
        """Bytes read so far."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._held

    def locate(self, chunks: Sequence[Coordinates]) -> list[tuple[str, RangeByteRequest | None]]:
        """Key and byte range of each inner chunk; None as range means the whole key.

        Raises:
            IntegrityError: a shard or an inner chunk is missing, or an index is damaged.
        """
        found: list[tuple[str, RangeByteRequest | None]] = []
        spans = self.find(np.array(chunks, np.int64).reshape(len(chunks), -1))
        for chunk, (key, start, stop) in zip(chunks, spans, strict=True):
            if stop == 0:
                raise IntegrityError(self.missing(chunk, key))
            found.append((key, None if stop is None else RangeByteRequest(start, stop)))
        return found

    def missing(self, chunk: Coordinates, key: str) -> str:
        """What to say of an inner chunk that `find` gave an empty span."""
        remedy = "ingest it again, hold its samples out, or open the store with missing_chunks='fill'"
        known = self._pages.get(self._number(chunk))
        if known is not None and known.entries is None:
            return f"{self.layout.array.path}: shard {key} is missing: {remedy}"
        return f"{self.layout.array.path}: inner chunk {tuple(chunk)} is missing from shard {key}: {remedy}"

    def find(self, chunks: npt.NDArray[np.int64]) -> Spans:
        """Where each inner chunk lies, from grid positions [m, axes].

        Raises:
            IntegrityError: an index is damaged.
        """
        count = len(chunks)
        if self.layout.shard is None:
            keys = [self.layout.object_key(tuple(chunk)) for chunk in chunks.tolist()]
            return Spans(keys, [0] * count, [None] * count)
        if self._linear:  # a record a chunk: positions along the first axis are all there is to it
            shards, positions = np.divmod(chunks[:, 0], self._per[0])
        else:
            outer, inner = np.divmod(chunks, self._per)
            shards = np.ravel_multi_index(tuple(outer.T), self._grid)
            positions = np.ravel_multi_index(tuple(inner.T), self._per)
        numbers = (shards if self._whole else shards * self._pages_each + positions // self._page).tolist()
        pages = self._get(dict.fromkeys(numbers))
        found = [pages[number] for number in numbers]
        # Comprehensions, because planning holds the interpreter lock that the decoders wait for.
        if any(page.entries is None for page in pages.values()):
            found = [page if page.entries is not None else self._none(page) for page in found]
        ats = ((positions if self._whole else positions % self._page) * 2).tolist()
        starts = [page.entries[at] for page, at in zip(found, ats, strict=True)]  # type: ignore[index]
        sizes = [page.entries[at + 1] for page, at in zip(found, ats, strict=True)]  # type: ignore[index]
        stops: list[int | None] = list(map(add, starts, sizes))
        if _ABSENT in starts:
            absent = [start == _ABSENT for start in starts]
            starts = [0 if gone else start for start, gone in zip(starts, absent, strict=True)]
            stops = [0 if gone else stop for stop, gone in zip(stops, absent, strict=True)]
        return Spans([page.key for page in found], starts, stops)

    def _none(self, page: _Page) -> _Page:
        """The page of a shard that is not there, with every chunk absent."""
        return _Page(page.key, page.first, memoryview(np.full(2 * self._page, _ABSENT, np.uint64).tobytes()).cast("Q"))

    def _number(self, chunk: Coordinates) -> int:
        outer, inner = np.divmod(np.array(chunk, np.int64), self._per)
        shard = int(np.ravel_multi_index(tuple(outer), self._grid))
        return shard * self._pages_each + int(np.ravel_multi_index(tuple(inner), self._per)) // self._page

    def _get(self, numbers: dict[int, None]) -> dict[int, _Page]:
        """Pages by number: cached, read now, or awaited from the thread that is reading them."""
        found: dict[int, _Page] = {}
        awaited: dict[int, Future[_Page]] = {}
        mine: dict[int, Future[_Page]] = {}
        with self._lock:
            full = self._held > self._budget // 2  # before that none is thrown out, and their order is of no matter
            for number in numbers:
                if (page := self._pages.get(number)) is not None:
                    if full:
                        self._pages.move_to_end(number)
                    found[number] = page
                elif (future := self._underway.get(number)) is not None:
                    awaited[number] = future
                else:
                    mine[number] = self._underway[number] = Future()
        if mine:
            self._read(mine)
            found |= {number: future.result() for number, future in mine.items()}
        return found | {number: future.result() for number, future in awaited.items()}

    def _read(self, wanted: dict[int, Future[_Page]]) -> None:
        """Read pages in one go, fulfil their futures and cache them."""
        try:
            places = [self._place(number) for number in wanted]
            answers = self._transport.fetch([span for _, _, span in places])
            pages = [self._parse(key, first, data) for (key, first, _), data in zip(places, answers, strict=True)]
        except BaseException as error:
            with self._lock:
                for number, future in wanted.items():
                    del self._underway[number]
                    future.set_exception(error)
            raise
        with self._lock:
            for (number, future), page in zip(wanted.items(), pages, strict=True):
                self.requests += 1
                self.bytes_read += page.nbytes + (4 if page.nbytes == ENTRY_BYTES * self._count else 0)
                self._pages[number] = page
                self._held += page.nbytes
                del self._underway[number]
                future.set_result(page)
            while self._held > self._budget and len(self._pages) > 1:
                self._held -= self._pages.popitem(last=False)[1].nbytes

    def _place(self, number: int) -> tuple[str, int, Span]:
        """Key of a page's shard, its first entry, and the bytes to read; a negative start counts from the end."""
        shard, page = divmod(number, self._pages_each)
        key = self.layout.object_key(tuple(int(i) for i in np.unravel_index(shard, self._grid)))
        first, whole = page * self._page, ENTRY_BYTES * self._count + 4
        start = -whole if self.layout.index_at_end else 0
        if self._page == self._count:
            return key, first, (key, start, None if start else whole)
        start += ENTRY_BYTES * first
        return key, first, (key, start, start + ENTRY_BYTES * min(self._page, self._count - first))

    def _parse(self, key: str, first: int, data: Any) -> _Page:
        if data is None:
            return _Page(key, first, None)
        try:
            entries = strip_crc32c(data) if self._page == self._count else np.frombuffer(data, np.uint8)
            expected = ENTRY_BYTES * min(self._page, self._count - first)
            if entries.nbytes != expected:
                raise ValueError(f"{entries.nbytes} bytes where {expected} belong")
        except ValueError as error:
            raise IntegrityError(
                f"the index of shard {key} is damaged ({error}): restore it or ingest again"
            ) from error
        return _Page(key, first, memoryview(entries.tobytes()).cast("Q"))
