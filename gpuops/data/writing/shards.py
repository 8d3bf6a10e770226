"""One shard at a time: arrays of whole shards, written, read back, counted and described."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.core.sync import sync

from gpuops.data.reading.shard import ShardIndexes, layout
from gpuops.data.reading.transport import read_ranges
from gpuops.data.statistics import describe
from gpuops.data.writing.block import Block, Records, pieces
from gpuops.data.writing.quality import Violation, check, constant
from gpuops.data.writing.recipe import Recipe
from gpuops.drift import Sketch
from gpuops.errors import IntegrityError

SHARD_BYTES = 256 * 2**20
"""Largest size of a shard, before compression."""
SHARDS = 16
"""Smallest number of shards aimed at, so that small arrays are still read and written in parallel."""
DIGEST_BYTES = 16
"""Bytes kept of the sha256 of a record, by which duplicates are found."""
FOUND = ("nan", "infinite", "constant", "max_error")
"""Columns of what was found in the source of a shard."""
_NOTHING = "nothing was committed; check the disk and ingest again"


@dataclass(frozen=True, slots=True)
class Written:
    """What one task found and wrote."""

    name: str
    """Variable."""
    shard: int
    """Position of the shard on the sample axis."""
    digest: str
    """sha256 of the shard as it lies in the store."""
    size: int
    """Bytes of the shard as it lies in the store."""
    rows: npt.NDArray[np.float64]
    """Statistics, [records, channels, 5]."""
    sketch: Sketch
    """Histogram of the stored values."""
    violations: list[Violation]
    """Broken rules."""
    nbytes: int
    """Packed bytes."""
    records: npt.NDArray[np.uint8]
    """Digests of the records, [records, DIGEST_BYTES]."""
    found: npt.NDArray[np.float64]
    """What was found in the source, by FOUND; max_error is NaN where nothing was packed. Appended records alone."""


def create(root: zarr.Group, block: Block, recipe: Recipe, located: list[str]) -> zarr.Array[Any]:
    """Create a variable's array: whole records in inner chunks, whole chunks in shards, a checksum in each chunk."""
    record = block.shape[1:]
    attributes: dict[str, Any] = packing_attributes(block)
    optional = {
        "long_name": block.long_name or None,
        "gpuops_fill": block.fill,
        "coordinates": " ".join(located) or None,
    }
    attributes |= {key: value for key, value in optional.items() if value is not None}
    return root.create_array(
        block.name,
        shape=block.shape,
        dtype=block.dtype,
        chunks=(recipe.chunk_records, *record),
        shards=(_shard_records(block, recipe), *record),
        compressors=_compressors(recipe.codec),
        filters=None,
        fill_value=0,
        dimension_names=block.dims,
        attributes=attributes,
        config={"write_empty_chunks": True},
    )


def packing_attributes(block: Block) -> dict[str, Any]:
    """The CF attributes that say what a variable's stored values mean."""
    attributes: dict[str, Any] = {"scale_factor": block.scale, "add_offset": block.offset, "units": block.unit}
    if block.packing is None and block.input.attributes.get("dtype") == "bool":
        attributes["dtype"] = "bool"
    return attributes if block.missing is None else {**attributes, "_FillValue": block.missing}


def write_whole(
    group: zarr.Group, name: str, values: npt.NDArray[Any], dims: tuple[str, ...], attributes: Mapping[str, Any]
) -> zarr.Array[Any]:
    """Store a coordinate or a static field in one go, in place of what a killed ingest left of it."""
    return group.create_array(
        name,
        data=values,
        dimension_names=dims,
        attributes=dict(attributes),
        compressors=[ZstdCodec(level=1, checksum=True)],
        config={"write_empty_chunks": True},
        overwrite=True,
    )


def _compressors(codec: str) -> list[Any]:
    match codec:
        case "zstd":
            return [ZstdCodec(level=1, checksum=True)]
        case "blosc-lz4" | "blosc-zstd":
            cname, level = codec.removeprefix("blosc-"), 1 if codec == "blosc-zstd" else 5
            return [BloscCodec(cname=cname, clevel=level, shuffle="bitshuffle"), Crc32cCodec()]  # type: ignore[arg-type]
    return [Crc32cCodec()]


def _shard_records(block: Block, recipe: Recipe) -> int:
    """Records a shard; whole rows of tiles where they fit. Depends on the data alone, never on the machine."""
    if recipe.shard_records is not None:
        records = recipe.shard_records
    else:
        record_bytes = math.prod(block.shape[1:]) * block.dtype.itemsize
        records = max(1, min(block.shape[0] // SHARDS, SHARD_BYTES // record_bytes))
        if block.tiling is not None:
            columns = block.sizes[block.tiling.columns] // block.tiling.size
            if records > columns:
                records -= records % columns
    return max(recipe.chunk_records, records - records % recipe.chunk_records)


def write_shard(block: Block, array: zarr.Array[Any], shard: int, first: int, last: int) -> Written:
    """Read a shard's records, check and describe them, write the shard, read it back.

    Where the shard holds records from before an append, those are read from the store as it was and written again.

    Raises:
        IntegrityError: the shard did not read back as it was written.
    """
    begin = max(first, block.before)
    read = block.read(begin, last)
    records = read.stored
    if begin > first:
        records = np.concatenate([block.kept(first, begin), records])
    packing = (block.scale, block.offset, block.missing)
    violations, rows = list(read.violations), []
    for part in pieces(records.shape):
        violations += check(block.name, records[part], first + part.start, block.rules, packing)
        rows.append(describe(records[part], *packing))
    _clear(array, first)
    array[first:last] = records
    encoded = read_back(array, records, shard, first)
    sketch = Sketch.of(records, *_sketch_range(block), missing=block.missing)
    return Written(
        name=block.name,
        shard=shard,
        digest=hashlib.sha256(encoded).hexdigest(),
        size=len(encoded),
        rows=np.concatenate(rows),
        sketch=sketch,
        violations=violations,
        nbytes=records.nbytes,
        records=_digests(records),
        found=_found(read),
    )


def _clear(array: zarr.Array[Any], first: int) -> None:
    """Remove what a killed ingest left of a shard: zarr reads one before it replaces it, and stops if it is damaged."""
    place = layout(array)
    sync(array.store_path.store.delete(place.key((first // place.chunk[0], *(0,) * (array.ndim - 1)))[0]))


def _digests(records: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    whole = b"".join(hashlib.sha256(np.ascontiguousarray(one).data).digest()[:DIGEST_BYTES] for one in records)
    return np.frombuffer(whole, np.uint8).reshape(len(records), DIGEST_BYTES)


def _found(read: Records) -> npt.NDArray[np.float64]:
    error = np.nan if read.max_error is None else read.max_error
    return np.array([read.nan, read.infinite, int(constant(read.stored).sum()), error])


def read_back(array: zarr.Array[Any], records: npt.NDArray[Any], shard: int, first: int) -> memoryview:
    """Compare every inner chunk of a shard with what was written, by our own decoder; return the shard's bytes.

    Raises:
        IntegrityError: a chunk is missing, overlaps another, lies outside the shard, or holds something else.
    """
    place = layout(array)
    store = array.store_path.store
    per = place.chunk[0]
    chunks = [(first // per + i, *(0,) * (array.ndim - 1)) for i in range(-(-len(records) // per))]
    key, _ = place.key(chunks[0])
    (whole,) = read_ranges(store, [(key, None)])
    spans = [span for _, span in ShardIndexes(place, store).locate(chunks)]
    end = 0
    for span in sorted(spans, key=lambda span: span.start):  # type: ignore[union-attr]
        assert span is not None
        if span.start < end or whole is None or span.end > len(whole):
            raise IntegrityError(f"{array.path}: the index of shard {shard} points wrong: {_NOTHING}")
        end = span.end
    assert whole is not None
    got = np.empty((per, *records.shape[1:]), records.dtype)
    for i, span in enumerate(spans):
        assert span is not None
        want = records[i * per : (i + 1) * per]
        try:
            place.decode(whole[span.start : span.end], got)
        except ValueError as error:
            raise IntegrityError(f"{array.path}: shard {shard} cannot be read back ({error}): {_NOTHING}") from error
        if not np.array_equal(got[: len(want)].view(np.uint8), want.view(np.uint8)):
            raise IntegrityError(f"{array.path}: shard {shard} did not read back as written: {_NOTHING}")
    return whole.data


def digest_of(array: zarr.Array[Any], first: int) -> str | None:
    """sha256 of the shard that holds record `first`, as it lies in the store; None if it is not there."""
    place = layout(array)
    key, _ = place.key((first // place.chunk[0], *(0,) * (array.ndim - 1)))
    (whole,) = read_ranges(array.store_path.store, [(key, None)])
    return None if whole is None else hashlib.sha256(whole.data).hexdigest()


def census(array: zarr.Array[Any], sizes: dict[int, int]) -> None:
    """Check in the store to be committed that every shard is there in its size, with every inner chunk.

    Args:
        array: of the merged store.
        sizes: bytes of the shards written, by position on the sample axis.

    Raises:
        IntegrityError: a shard or an inner chunk is missing; the message names it.
    """
    place = layout(array)
    assert place.shard is not None
    store, indexes = array.store_path.store, ShardIndexes(place, array.store_path.store)
    per_shard, per = place.shard[0], place.chunk[0]
    for shard, size in sizes.items():
        chunks = range(shard * per_shard // per, -(-min((shard + 1) * per_shard, array.shape[0]) // per))
        spans = indexes.locate([(chunk, *(0,) * (array.ndim - 1)) for chunk in chunks])
        key = spans[0][0]
        if sync(store.getsize(key)) != size:
            raise IntegrityError(f"{array.path}: shard {shard} is not as long as it was written: {_NOTHING}")
        if len({(span.start, span.end) for _, span in spans if span is not None}) != len(spans):
            raise IntegrityError(f"{array.path}: shard {shard} holds inner chunks twice: {_NOTHING}")


def _sketch_range(block: Block) -> tuple[float, float]:
    """Range of the histogram of stored values: exact for 8 bits, else the rules' bounds, else the dtype's."""
    dtype = block.dtype
    if dtype.itemsize == 1:
        info = np.iinfo(dtype)
        return info.min - 0.5, info.max + 0.5
    bounds = (block.rules.valid_min, block.rules.valid_max)
    if None not in bounds:
        stored = sorted((bound - block.offset) / block.scale for bound in bounds if bound is not None)
        return stored[0], stored[1]
    limits = np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(np.float16)
    return float(limits.min), float(limits.max)
