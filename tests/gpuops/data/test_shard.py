"""Chunks where they lie: the same bytes as zarr-python reads, and every kind of damage noticed and named."""

import itertools
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import numpy.typing as npt
import pytest
import zarr
from zarr.codecs import (
    BloscCodec,
    BytesCodec,
    Crc32cCodec,
    GzipCodec,
    ShardingCodec,
    TransposeCodec,
    ZstdCodec,
)
from zarr.storage import LocalStore

from gpuops.data.reading.shard import ShardIndexes, layout
from gpuops.data.reading.transport import read_ranges
from gpuops.errors import InputError, IntegrityError

CHAINS: dict[str, list[Any]] = {
    "zstd": [ZstdCodec(level=1)],
    "zstd checksum": [ZstdCodec(level=3, checksum=True)],
    "blosc lz4": [BloscCodec(cname="lz4", shuffle="shuffle")],
    "blosc zstd bitshuffle": [BloscCodec(cname="zstd", shuffle="bitshuffle")],
    "gzip": [GzipCodec(level=5)],
    "crc32c": [Crc32cCodec()],
    "blosc, then crc32c": [BloscCodec(cname="lz4"), Crc32cCodec()],
    "none": [],
}
CHECKSUMMED = {"zstd checksum", "gzip", "crc32c", "blosc, then crc32c"}


def values(dtype: str = "int16") -> npt.NDArray[Any]:
    return np.random.default_rng(1).integers(-100, 100, (10, 7, 6)).astype(dtype)


def write(path: Path, array: npt.NDArray[Any], chain: Iterable[Any], **options: Any) -> zarr.Array[Any]:
    """`array` in chunks of (2, 4, 3), which divide no axis but the first."""
    whole = {"chunks": (2, 4, 3), "filters": None, "config": {"write_empty_chunks": True}, **options}
    root = zarr.open_group(path, mode="w")
    made = root.create_array("a", shape=array.shape, dtype=array.dtype, compressors=list(chain) or None, **whole)
    made[:] = array
    return made


def write_index_first(path: Path, array: npt.NDArray[Any], **sharding: Any) -> zarr.Array[Any]:
    """Sharded by hand, because create_array sets neither the place of the index nor its codecs."""
    root = zarr.open_group(path, mode="w")
    codec = ShardingCodec(chunk_shape=(2, 4, 3), codecs=[BytesCodec(), ZstdCodec()], **sharding)
    made = root.create_array(
        "a",
        shape=array.shape,
        dtype=array.dtype,
        chunks=(4, 8, 6),
        serializer=codec,
        compressors=None,
        filters=None,
        config={"write_empty_chunks": True},
    )
    made[:] = array
    return made


def all_chunks(array: zarr.Array[Any]) -> list[tuple[int, ...]]:
    grid = [range(-(-size // chunk)) for size, chunk in zip(array.shape, array.chunks, strict=True)]
    return list(itertools.product(*grid))


def read_all(array: zarr.Array[Any]) -> npt.NDArray[Any]:
    """The whole array by our own decoder, one inner chunk after the other."""
    place = layout(array)
    chunks = all_chunks(array)
    ranges = ShardIndexes(place, array.store).locate(chunks)
    got = np.zeros([-(-s // c) * c for s, c in zip(array.shape, place.chunk, strict=True)], array.dtype)
    for chunk, encoded in zip(chunks, read_ranges(array.store, ranges), strict=True):
        assert encoded is not None
        out = np.empty(place.chunk, array.dtype)
        place.decode(encoded, out)
        got[tuple(slice(i * n, (i + 1) * n) for i, n in zip(chunk, place.chunk, strict=True))] = out
    return got[tuple(map(slice, array.shape))]


def damage(file: Path, position: int, bit: int = 1) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= bit
    file.write_bytes(content)


# the same bytes as zarr-python


@pytest.mark.parametrize("shards", [(4, 8, 6), (2, 4, 3), (10, 8, 6), None])
@pytest.mark.parametrize("chain", CHAINS)
def test_every_inner_chunk_is_what_zarr_reads(tmp_path: Path, chain: str, shards: tuple[int, ...] | None) -> None:
    array = write(tmp_path, values(), CHAINS[chain], shards=shards)
    np.testing.assert_array_equal(read_all(array), array[:])
    np.testing.assert_array_equal(read_all(array), values())
    assert layout(array).checksummed == (chain in CHECKSUMMED)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32", "float64"])
def test_every_dtype(tmp_path: Path, dtype: str) -> None:
    array = write(tmp_path, values(dtype), [ZstdCodec()], shards=(4, 8, 6))
    np.testing.assert_array_equal(read_all(array), values(dtype))


@pytest.mark.parametrize("where", ["start", "end"])
def test_index_at_either_end(tmp_path: Path, where: str) -> None:
    array = write_index_first(tmp_path, values(), index_location=where)
    assert layout(array).index_at_end == (where == "end")
    np.testing.assert_array_equal(read_all(array), values())


@pytest.mark.parametrize(
    "compressor",
    [
        None,
        numcodecs.Zstd(),
        numcodecs.Blosc("lz4"),
        numcodecs.Blosc("zstd", shuffle=2),
        numcodecs.GZip(),
        numcodecs.Zlib(),
        numcodecs.LZ4(),
    ],
    ids=lambda codec: "none" if codec is None else codec.codec_id,
)
@pytest.mark.parametrize("separator", [".", "/"])
def test_zarr_v2(tmp_path: Path, compressor: Any, separator: str) -> None:
    root = zarr.open_group(tmp_path, mode="w", zarr_format=2)
    keys: Any = {"name": "v2", "separator": separator}
    options: dict[str, Any] = {"compressors": compressor, "filters": None, "chunk_key_encoding": keys}
    array = root.create_array("a", shape=(10, 7, 6), chunks=(2, 4, 3), dtype="int16", **options)
    array[:] = values()
    np.testing.assert_array_equal(read_all(array), values())


def test_zstd_frames_without_a_content_size_are_read(tmp_path: Path) -> None:
    # What a streaming writer makes: numcodecs cannot write it, so the smallest such frame is written by hand.
    body = np.arange(24, dtype=np.int16)
    array = write(tmp_path, body.reshape(2, 4, 3), [ZstdCodec()], shards=None)
    raw = body.tobytes()
    frame = b"\x28\xb5\x2f\xfd" + b"\x00\x00" + (1 | len(raw) << 3).to_bytes(3, "little") + raw
    (tmp_path / "a" / "c" / "0" / "0" / "0").write_bytes(frame)
    np.testing.assert_array_equal(array[:], body.reshape(2, 4, 3))
    np.testing.assert_array_equal(read_all(array), body.reshape(2, 4, 3))


# what is not read is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"filters": [TransposeCodec(order=(2, 1, 0))]}, "'transpose'"),
        ({"serializer": BytesCodec(endian="big")}, "big-endian"),
    ],
)
def test_other_codecs_are_refused_by_name(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    array = write(tmp_path, values(), [], **options)
    with pytest.raises(InputError, match=f"a: codec .*{words}.*re-ingest"):
        layout(array)


@pytest.mark.parametrize("options", [{"order": "F"}, {"filters": [numcodecs.Delta("int16")]}])
def test_v2_orders_and_filters_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    root = zarr.open_group(tmp_path, mode="w", zarr_format=2)
    array = root.create_array("a", shape=(4, 6), chunks=(2, 3), dtype="int16", **{"filters": None, **options})
    with pytest.raises(InputError, match="re-ingest"):
        layout(array)
    big = root.create_array("b", shape=(4, 6), chunks=(2, 3), dtype=">i2", filters=None)
    with pytest.raises(InputError, match="big-endian"):
        layout(big)


def test_shards_with_an_unusual_index_or_coat_are_refused(tmp_path: Path) -> None:
    plain = write_index_first(tmp_path / "plain", values(), index_codecs=[BytesCodec()])
    with pytest.raises(InputError, match="index"):
        layout(plain)
    file = tmp_path / "plain" / "a" / "zarr.json"
    document = json.loads(file.read_text())
    document["codecs"][0]["configuration"]["index_codecs"].append({"name": "crc32c"})
    document["codecs"].append({"name": "gzip", "configuration": {"level": 1}})
    file.write_text(json.dumps(document))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr says that it is slow
        coated = zarr.open_array(tmp_path / "plain" / "a", mode="r")
    with pytest.raises(InputError, match="encoded again as a whole"):
        layout(coated)


# damage


def test_a_missing_inner_chunk_is_named(tmp_path: Path) -> None:
    array = write(tmp_path, values(), [ZstdCodec()], shards=(4, 8, 6), config={"write_empty_chunks": False})
    array[2:4, :4, :3] = 0  # the whole of one inner chunk equals the fill value: it is left out
    indexes = ShardIndexes(layout(array), array.store)
    with pytest.raises(IntegrityError, match=r"a: inner chunk \(1, 0, 0\) is missing from shard a/c/0/0/0"):
        indexes.locate([(0, 0, 0), (1, 0, 0)])
    assert indexes.locate([(0, 0, 0)]), "its neighbours are still read"


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    array = write(tmp_path, values(), [ZstdCodec()], shards=(4, 8, 6))
    (tmp_path / "a" / "c" / "1" / "0" / "0").unlink()
    with pytest.raises(IntegrityError, match="shard a/c/1/0/0 is missing"):
        ShardIndexes(layout(array), array.store).locate([(2, 0, 0)])


@pytest.mark.parametrize("where", ["start", "end"])
def test_every_bit_of_an_index_is_checked(tmp_path: Path, where: str) -> None:
    array = write_index_first(tmp_path, values(), index_location=where)
    file = tmp_path / "a" / "c" / "0" / "0" / "0"
    length = 16 * 8 + 4
    first = 0 if where == "start" else file.stat().st_size - length
    for offset in range(0, length, 3):
        damage(file, first + offset, 1 << offset % 8)
        with pytest.raises(IntegrityError, match="index of shard a/c/0/0/0 is damaged"):
            ShardIndexes(layout(array), array.store).locate([(0, 0, 0)])
        damage(file, first + offset, 1 << offset % 8)
    assert ShardIndexes(layout(array), array.store).locate([(0, 0, 0)])


@pytest.mark.parametrize("size", [0, 3, 40])
def test_a_cut_shard_is_damaged(tmp_path: Path, size: int) -> None:
    array = write(tmp_path, values(), [ZstdCodec()], shards=(4, 8, 6))
    file = tmp_path / "a" / "c" / "0" / "0" / "0"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(IntegrityError, match="a/c/0/0/0 is damaged"):
        ShardIndexes(layout(array), array.store).locate([(0, 0, 0)])


def encoded_chunk(tmp_path: Path, chain: Iterable[Any]) -> tuple[Any, npt.NDArray[np.uint8]]:
    """Layout of an unsharded array and the bytes of its first chunk."""
    array = write(tmp_path, values(), chain, shards=None)
    return layout(array), np.frombuffer((tmp_path / "a" / "c" / "0" / "0" / "0").read_bytes(), np.uint8)


@pytest.mark.parametrize("chain", sorted(CHECKSUMMED))
def test_every_bit_of_a_checksummed_chunk_is_checked(tmp_path: Path, chain: str) -> None:
    place, encoded = encoded_chunk(tmp_path, CHAINS[chain])
    want = values()[:2, :4, :3]
    for bit in range(8 * len(encoded)):
        bad = encoded.copy()
        bad[bit // 8] ^= 1 << bit % 8
        out = np.full(place.chunk, -1, np.int16)
        try:
            place.decode(bad, out)
        except ValueError:
            continue
        # gzip's time stamp and operating system, and reserved bits of a header, may change without harm.
        np.testing.assert_array_equal(out, want, err_msg=f"bit {bit} changed the values unnoticed")


@pytest.mark.parametrize("chain", CHAINS)
def test_a_cut_chunk_is_never_read(tmp_path: Path, chain: str) -> None:
    place, encoded = encoded_chunk(tmp_path, CHAINS[chain])
    for size in range(len(encoded)):
        with pytest.raises(ValueError, match=r"\w"):
            place.decode(encoded[:size].copy(), np.empty(place.chunk, np.int16))


@pytest.mark.parametrize("factor", [0.5, 2])
@pytest.mark.parametrize("chain", CHAINS)
def test_a_chunk_of_another_size_is_not_taken(tmp_path: Path, chain: str, factor: float) -> None:
    # What remains of the destination would be the memory of an older batch.
    _, encoded = encoded_chunk(tmp_path, CHAINS[chain])
    other = write(tmp_path / "other", values(), CHAINS[chain], shards=None, chunks=(int(2 * factor), 4, 3))
    with pytest.raises(ValueError, match=r"\w"):
        layout(other).decode(encoded, np.empty(other.chunks, np.int16))


@pytest.mark.parametrize("chain", ["none", "crc32c"])
def test_one_byte_is_not_spread_over_a_chunk(tmp_path: Path, chain: str) -> None:
    array = write(tmp_path / "a", np.full((1, 1), 7, np.uint8), CHAINS[chain], chunks=(1, 1), shards=None)
    one = np.frombuffer((tmp_path / "a" / "a" / "c" / "0" / "0").read_bytes(), np.uint8)
    assert layout(array)
    place, _ = encoded_chunk(tmp_path / "b", CHAINS[chain])
    with pytest.raises(ValueError, match="1 bytes where 48 belong"):
        place.decode(one, np.empty(place.chunk, np.int16))


# the cache of indexes


def test_an_index_is_read_once_and_forgotten_when_the_budget_is_spent(tmp_path: Path) -> None:
    array = write(tmp_path, values(), [ZstdCodec()], shards=(2, 8, 6))
    chunks = [(i, 0, 0) for i in range(5)]
    entry = 16 * 4  # four inner chunks a shard
    roomy = ShardIndexes(layout(array), array.store)
    tight = ShardIndexes(layout(array), array.store, budget_bytes=2 * entry)
    first = roomy.locate(chunks)
    assert roomy.requests == 5
    assert roomy.bytes_read == 5 * (entry + 4)
    assert roomy.locate(chunks) == first
    assert roomy.requests == 5, "a cached index was read again"
    assert tight.locate(chunks) == first, "a budget smaller than one batch's indexes must not lose any of them"
    assert tight.requests == 5
    assert tight.locate([(3, 0, 0), (4, 0, 0)]) == first[3:]
    assert tight.requests == 5, "the most recent two fit"
    tight.locate([(3, 0, 0)])
    tight.locate([(0, 0, 0)])  # 4 is the least recently used now
    assert tight.requests == 6
    tight.locate([(3, 0, 0)])
    assert tight.requests == 6
    tight.locate([(4, 0, 0)])
    assert tight.requests == 7


def test_unsharded_arrays_need_no_index(tmp_path: Path) -> None:
    array = write(tmp_path, values(), [ZstdCodec()], shards=None)
    indexes = ShardIndexes(layout(array), array.store)
    assert indexes.locate([(1, 0, 1)]) == [("a/c/1/0/1", None)]
    assert indexes.requests == 0


def test_an_absent_key_reads_as_none(tmp_path: Path) -> None:
    write(tmp_path, values(), [], shards=None)
    present, absent = read_ranges(LocalStore(tmp_path), [("a/c/0/0/0", None), ("a/c/9/9/9", None)])
    assert present is not None
    assert absent is None
