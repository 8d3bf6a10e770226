"""Where a chunk lies and how it is decoded: shard indexes, byte ranges, codec chains.

Follows the Zarr v3 sharding codec: an index of (offset, nbytes) pairs, little-endian uint64, one for each inner
chunk in C order, with a crc32c behind it, at the end (or the start) of each shard.
https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/
"""

from __future__ import annotations

import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.codecs import ShardingCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync

from gpuops.errors import InputError, IntegrityError

Bytes = npt.NDArray[np.uint8]
Coordinates = tuple[int, ...]
"""Position of an inner chunk on the grid of all inner chunks."""
Filter = Callable[..., Any]
"""One step of a codec chain: (encoded, out=None) to decoded bytes, in `out` where it is given."""

_ABSENT = np.uint64(2**64 - 1)
_CHECKSUMMED = ("crc32c", "zstd+checksum", "gzip", "zlib", "bz2", "fletcher32", "adler32", "crc32")


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
    filters: tuple[Filter, ...]
    """Decoding steps in the order they are applied."""
    codecs: tuple[str, ...]
    """Names of the bytes-to-bytes codecs in the order they were applied at writing."""

    @property
    def checksummed(self) -> bool:
        """Whether a flipped bit in a chunk is noticed."""
        return any(name in _CHECKSUMMED for name in self.codecs)

    @property
    def chunks_per_shard(self) -> tuple[int, ...]:
        """Inner chunks of a shard along each axis; ones without sharding."""
        return tuple(s // c for s, c in zip(self.shard or self.chunk, self.chunk, strict=True))

    def key(self, chunk: Coordinates) -> tuple[str, int]:
        """Store key that holds an inner chunk, and its position in that key's index."""
        per = self.chunks_per_shard
        outer = tuple(c // n for c, n in zip(chunk, per, strict=True))
        inner = tuple(c % n for c, n in zip(chunk, per, strict=True))
        name = self.array.metadata.encode_chunk_key(outer)
        return f"{self.array.path}/{name}".lstrip("/"), int(np.ravel_multi_index(inner, per))

    def decode(self, encoded: Bytes, out: npt.NDArray[Any]) -> None:
        """Decode one inner chunk into `out` [*chunk], C-contiguous, of the array's dtype.

        Raises:
            ValueError: the bytes are damaged, or do not make exactly one chunk.
        """
        flat = out.reshape(-1).view(np.uint8)
        assert np.may_share_memory(flat, out), "out must be a contiguous array, not a copy of one"
        *earlier, last = self.filters or (_copy,)
        data: Any = encoded
        try:
            for step in earlier:
                data = step(data)
            last(data, flat)
        except Exception as error:  # each codec raises its library's own: zlib.error, EOFError, BadGzipFile, ...
            raise ValueError(str(error) or type(error).__name__) from error


def layout(array: zarr.Array[Any]) -> Layout:
    """Read an array's layout; InputError names what this reader cannot decode."""
    metadata = array.metadata
    if metadata.zarr_format == 2:
        if metadata.order != "C" or metadata.filters or metadata.dtype.to_native_dtype().byteorder == ">":
            raise InputError(
                f"{array.path}: Fortran order, filters and big-endian v2 arrays are not read: re-ingest it"
            )
        compressor = metadata.compressor
        chain = [] if compressor is None else [_numcodecs_filter(compressor)]
        return _layout(array, array.chunks, None, True, chain)
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
    return _layout(array, array.chunks, array.shards, index_at_end, [_filter(array.path, d) for d in documents[1:]])


def _layout(
    array: zarr.Array[Any],
    chunk: tuple[int, ...],
    shard: tuple[int, ...] | None,
    index_at_end: bool,
    chain: Sequence[tuple[str, Filter]],
) -> Layout:
    names, filters = tuple(name for name, _ in chain), tuple(step for _, step in reversed(chain))
    return Layout(array, chunk, shard, index_at_end, filters, names)


def _filter(path: str, codec: dict[str, Any]) -> tuple[str, Filter]:
    name, configuration = codec["name"], codec.get("configuration") or {}
    match name:
        case "zstd":
            return "zstd+checksum" if configuration.get("checksum") else "zstd", _zstd
        case "blosc":
            return name, _blosc
        case "gzip":
            return name, _whole(numcodecs.GZip().decode)
        case "crc32c":
            return name, _strip_crc32c
    raise InputError(f"{path}: codec {name!r} is not read in place: re-ingest it with `gpuops ingest`")


def _numcodecs_filter(compressor: Any) -> tuple[str, Filter]:
    """The v2 compressor as a step of a chain."""
    match compressor.codec_id:
        case "zstd":
            return "zstd+checksum" if getattr(compressor, "checksum", False) else "zstd", _zstd
        case "blosc":
            return "blosc", _blosc
    return compressor.codec_id, _whole(compressor.decode)


def _copy(data: Any, out: Bytes | None = None) -> Bytes:
    """The bytes as they are, copied to `out`, which they must fill."""
    body = np.frombuffer(data, np.uint8)
    if out is not None:
        if body.size != out.size:  # NumPy would broadcast one byte over all of them
            raise ValueError(f"{body.size} bytes where {out.size} belong")
        out[:] = body
    return body


def _whole(decode: Callable[[Any], Any]) -> Filter:
    """A codec that is not trusted with `out`: numcodecs leaves the rest of a buffer that is too large as it was."""
    return lambda data, out=None: _copy(decode(data), out)


def _zstd(data: Any, out: Bytes | None = None) -> Any:
    """Zstandard, straight into `out` where the frame says that it fills it."""
    if out is None or _zstd_size(data) != out.size:
        return _copy(numcodecs.Zstd().decode(data), out)
    return numcodecs.Zstd().decode(data, out)


def _zstd_size(data: Any) -> int | None:
    """Size of the content that a frame's header records, None if it does not: RFC 8878, section 3.1.1.1."""
    header = bytes(memoryview(data)[:18])
    if len(header) < 6 or header[:4] != b"\x28\xb5\x2f\xfd":
        return None
    single_segment, flag = header[4] >> 5 & 1, header[4] >> 6
    width = (single_segment, 2, 4, 8)[flag]
    first = 5 + (1 - single_segment) + (0, 1, 2, 4)[header[4] & 3]
    if width == 0 or len(header) < first + width:
        return None
    return int.from_bytes(header[first : first + width], "little") + (256 if width == 2 else 0)


def _blosc(data: Any, out: Bytes | None = None) -> Any:
    """Blosc, once its header agrees with what is there: the library reads past the end of a cut buffer."""
    _, size, _, encoded = struct.unpack("<4siii", bytes(memoryview(data)[:16]).ljust(16, b"\0"))
    if encoded != len(data) or (out is not None and size != out.size):
        raise ValueError(f"a blosc frame of {encoded} bytes that makes {size}, in {len(data)}")
    return numcodecs.Blosc().decode(data, out)


def _strip_crc32c(data: Any, out: Bytes | None = None) -> Bytes:
    """The bytes before a trailing little-endian crc32c, after comparing it."""
    array = np.frombuffer(data, np.uint8)
    body, recorded = array[:-4], int.from_bytes(array[-4:].tobytes(), "little")
    if google_crc32c.value(body) != recorded:
        raise ValueError("checksum differs")
    return _copy(body, out)


def read_ranges(store: Store, requests: Iterable[tuple[str, ByteRequest | None]]) -> list[Bytes | None]:
    """Bytes of several key ranges in one call to the store; None for a key that is not there.

    Raises:
        IntegrityError: the store does not give a key's bytes up; the message names the key.
    """
    listed, prototype = list(requests), default_buffer_prototype()
    try:
        buffers = sync(store.get_partial_values(prototype, listed))
    except Exception:  # one absent key or cut object fails the whole call, in each store's own way: ask one by one
        buffers = [_read_one(store, key, where) for key, where in listed]
    return [None if buffer is None else np.frombuffer(buffer.to_bytes(), np.uint8) for buffer in buffers]


def _read_one(store: Store, key: str, where: ByteRequest | None) -> Buffer | None:
    try:
        return sync(store.get(key, default_buffer_prototype(), where))
    except Exception as error:
        reason = " ".join(str(error).splitlines()[:1]).strip()
        raise IntegrityError(f"{key} cannot be read ({reason}): restore that object or ingest it again") from error


class ShardIndexes:
    """Shard indexes of one array, kept up to a byte budget, least recently used out first. Thread-safe."""

    def __init__(self, layout: Layout, store: Store, budget_bytes: int = 64 * 2**20) -> None:
        """Cache indexes of `layout`'s shards read from `store`."""
        self.layout, self._store, self._budget = layout, store, budget_bytes
        self._cache: OrderedDict[str, npt.NDArray[np.uint64]] = OrderedDict()
        self._lock = threading.Lock()
        self.requests = 0
        """Requests made so far."""
        self.bytes_read = 0
        """Bytes read so far."""

    def locate(self, chunks: Sequence[Coordinates]) -> list[tuple[str, RangeByteRequest | None]]:
        """Key and byte range of each inner chunk; None as range means the whole key.

        Raises:
            IntegrityError: a shard or an inner chunk is missing, or an index is damaged.
        """
        places = [self.layout.key(chunk) for chunk in chunks]
        if self.layout.shard is None:
            return [(key, None) for key, _ in places]
        indexes = self._indexes({key for key, _ in places})
        ranges: list[tuple[str, RangeByteRequest | None]] = []
        for chunk, (key, position) in zip(chunks, places, strict=True):
            offset, size = indexes[key][position]
            if offset == _ABSENT:
                raise IntegrityError(
                    f"{self.layout.array.path}: inner chunk {chunk} is missing from shard {key}: ingest it again, "
                    "or hold its samples out"
                )
            ranges.append((key, RangeByteRequest(int(offset), int(offset) + int(size))))
        return ranges

    def _indexes(self, keys: set[str]) -> dict[str, npt.NDArray[np.uint64]]:
        with self._lock:
            found = {key: self._cache[key] for key in keys if key in self._cache}
            for key in found:
                self._cache.move_to_end(key)
        absent = sorted(keys - found.keys())
        if absent:
            count = int(np.prod(self.layout.chunks_per_shard))
            size = 16 * count + 4
            where: ByteRequest = SuffixByteRequest(size) if self.layout.index_at_end else RangeByteRequest(0, size)
            for key, data in zip(absent, read_ranges(self._store, [(key, where) for key in absent]), strict=True):
                found[key] = self._parse(key, data, count)
            with self._lock:
                self.requests += len(absent)
                self.bytes_read += size * len(absent)
                self._cache.update({key: found[key] for key in absent})
                while sum(index.nbytes for index in self._cache.values()) > self._budget and len(self._cache) > 1:
                    self._cache.popitem(last=False)
        return found

    def _parse(self, key: str, data: Bytes | None, count: int) -> npt.NDArray[np.uint64]:
        if data is None:
            raise IntegrityError(f"shard {key} is missing: ingest it again, or hold its samples out")
        try:
            return np.frombuffer(_strip_crc32c(data), "<u8").reshape(count, 2)
        except ValueError as error:
            raise IntegrityError(
                f"the index of shard {key} is damaged ({error}): restore it or ingest again"
            ) from error
