"""Stores that fail, stall, cut and lose: bounded retries, errors that name the place, and never silent zeros."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import obstore
import pytest
import zarr
from object_store import ObjectStorage
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore, WrapperStore

from gpuops.data.reading.reader import Reader
from gpuops.data.reading.transport import Files, Retry, open_transport, read_ranges
from gpuops.data.sample import Field, SampleSpec, bind
from gpuops.data.source import Source, open
from gpuops.errors import IntegrityError

WHOLE = SampleSpec({"x": [Field("a")]}, {})
IMPATIENT = Retry(attempts=3, first_wait_s=0.0, timeout_s=5.0)


class FailingStore(WrapperStore[Any]):
    """A store whose first `failures` answers for each chunk are errors; `None` never answers at all."""

    def __init__(self, store: Any, failures: int | None) -> None:
        super().__init__(store)
        self.failures, self.asked = failures, Counter[str]()

    async def get(self, key: str, *args: Any, **kwargs: Any) -> Any:
        if "/c/" in key:
            self.asked[key] += 1
            if self.failures is None:
                await asyncio.Event().wait()
            elif self.asked[key] <= self.failures:
                raise ConnectionResetError("connection reset by peer")
        return await super().get(key, *args, **kwargs)

    async def get_partial_values(self, prototype: Any, key_ranges: Any) -> Any:
        return [await self.get(key, prototype, where) for key, where in key_ranges]


def write(path: Path, **options: Any) -> npt.NDArray[np.int16]:
    """12 records in shards of 4, checksummed."""
    data = np.random.default_rng(0).integers(1, 99, (12, 5, 6)).astype(np.int16)
    root = zarr.open_group(path, mode="w")
    layout: dict[str, Any] = {"chunks": (1, 5, 6), "shards": (4, 5, 6), "compressors": [ZstdCodec(checksum=True)]}
    array = root.create_array("a", shape=data.shape, dtype="int16", dimension_names=["t", "y", "x"], **layout | options)
    array[:] = data
    return data


@contextmanager
def reading(source: Source, **options: Any) -> Iterator[Reader]:
    reader = Reader(source, bind(WHOLE, source), threads=2, **options)
    try:
        yield reader
    finally:
        reader.close()


def failing(path: Path, failures: int | None) -> Source:
    return replace(open(path), store=FailingStore(LocalStore(path, read_only=True), failures))


# a store that fails


@pytest.mark.parametrize("failures", [1, 2])
def test_a_store_that_recovers_is_read(tmp_path: Path, failures: int) -> None:
    data = write(tmp_path)
    with reading(failing(tmp_path, failures), retry=IMPATIENT) as reader:
        got = [
            slot.inputs["x"][:, 0] for slot in reader.iterate((np.arange(4) + k, np.ones(4, bool)) for k in (0, 4, 8))
        ]
        np.testing.assert_array_equal(np.concatenate(got), data)
        assert reader.counters.retries > 0
        assert reader.counters.requests == 12 + 3, "a retry is counted as one, not as a request"


def test_a_store_that_does_not_recover_is_given_up(tmp_path: Path) -> None:
    write(tmp_path)
    source = failing(tmp_path, 10**6)
    with (
        reading(source, retry=IMPATIENT) as reader,
        pytest.raises(IntegrityError, match=r"a/c/0/0/0 cannot be read after 3 attempts \(connection reset"),
    ):
        reader.read(np.arange(4))
    assert isinstance(source.store, FailingStore)
    assert source.store.asked["a/c/0/0/0"] <= 4, "tries are bounded"


def test_a_store_that_stalls_is_given_up(tmp_path: Path) -> None:
    write(tmp_path)
    patience = Retry(attempts=2, first_wait_s=0.0, timeout_s=0.05)
    with (
        reading(failing(tmp_path, None), retry=patience) as reader,
        pytest.raises(IntegrityError, match=r"cannot be read after 2 attempts .*TimeoutError"),
    ):
        list(reader.iterate([(np.arange(4), np.ones(4, bool))]))


def test_waiting_grows_and_is_spread() -> None:
    waits = [[Retry(first_wait_s=0.1).wait_s(failed) for _ in range(50)] for failed in (1, 2, 3)]
    assert all(0.05 * 2**k <= wait <= 0.1 * 2**k for k, group in enumerate(waits) for wait in group)
    assert len(set(waits[0])) > 10


# damage


@pytest.mark.parametrize("codec", [ZstdCodec(checksum=True), Crc32cCodec()], ids=["zstd", "crc32c"])
def test_every_flipped_byte_of_a_shard_is_noticed(tmp_path: Path, codec: Any) -> None:
    data = write(tmp_path, compressors=[codec])
    file = tmp_path / "a" / "c" / "1" / "0" / "0"
    whole, noticed = file.read_bytes(), 0
    for place in range(0, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x20]) + whole[place + 1 :])
        with reading(open(tmp_path)) as reader:
            np.testing.assert_array_equal(reader.read(np.arange(4)).inputs["x"][:, 0], data[:4])
            try:
                got = reader.read(np.arange(4, 8)).inputs["x"][:, 0]
            except IntegrityError as error:
                noticed += "a/c/1/0/0" in str(error)
            else:  # a reserved bit of a header: the numbers are those that were written
                np.testing.assert_array_equal(got, data[4:8])
    assert noticed > len(whole) // 7 * 0.9


def test_an_error_names_variable_chunk_shard_and_samples(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "a" / "c" / "1" / "0" / "0"
    content = bytearray(file.read_bytes())
    content[20] ^= 1
    file.write_bytes(content)
    with (
        reading(open(tmp_path)) as reader,
        pytest.raises(IntegrityError, match=r"^a: inner chunk \(4, 0, 0\) in a/c/1/0/0 \(sample 4\) is damaged"),
    ):
        reader.read(np.array([9, 4, 5]))


@pytest.mark.parametrize("kept", [0.2, 0.9])
def test_a_cut_object_is_noticed(tmp_path: Path, kept: float) -> None:
    write(tmp_path, shards=None, compressors=[Crc32cCodec()])
    file = tmp_path / "a" / "c" / "3" / "0" / "0"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole))])
    with (
        reading(open(tmp_path)) as reader,
        pytest.raises(IntegrityError, match=r"a/c/3/0/0 \(sample 3\) is damaged"),
    ):
        reader.read(np.array([2, 3]))


def test_a_batch_that_failed_does_not_spoil_the_next(tmp_path: Path) -> None:
    data = write(tmp_path, chunks=(2, 5, 6), shards=None)
    file = tmp_path / "a" / "c" / "1" / "0" / "0"
    whole = file.read_bytes()
    with reading(open(tmp_path)) as reader:
        file.write_bytes(whole[:-3])
        with pytest.raises(IntegrityError, match="is damaged"):
            list(reader.iterate((np.arange(3) + k, np.ones(3, bool)) for k in (0, 3, 6)))
        file.write_bytes(whole)
        np.testing.assert_array_equal(reader.read(np.arange(6)).inputs["x"][:, 0], data[:6])


# what is left out


@pytest.mark.parametrize("shards", [(4, 5, 6), None])
@pytest.mark.parametrize("chunks", [(1, 5, 6), (2, 5, 6)])
def test_a_missing_chunk_is_an_error_or_the_declared_fill(tmp_path: Path, shards: Any, chunks: Any) -> None:
    data = write(tmp_path, chunks=chunks, shards=shards, fill_value=-7, config={"write_empty_chunks": False})
    zarr.open_array(tmp_path / "a")[4:8] = -7
    data[4:8] = -7
    ids = np.array([3, 4, 7, 11])
    with reading(open(tmp_path)) as reader, pytest.raises(IntegrityError, match=r"sample.* is missing.*missing_chunks"):
        reader.read(ids)
    with reading(open(tmp_path, missing_chunks="fill")) as reader:
        np.testing.assert_array_equal(reader.read(ids).inputs["x"][:, 0], data[ids])
        assert reader.counters.filled_chunks == 2


# transports


def test_open_files_are_bounded_and_closed(tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / str(i)).write_bytes(bytes([i % 256] * 9))
    files = open_transport(LocalStore(tmp_path))
    assert isinstance(files, Files)
    first = files.file("0")
    assert [bytes(data) for data in files.fetch([(str(i), 2, 4) for i in range(300)])] == [
        bytes([i % 256] * 2) for i in range(300)
    ]
    assert first is not None
    assert len(files._open) <= 128
    buffer = bytearray(9)
    first.read_into([buffer], 0, 9)
    assert bytes(buffer) == bytes(9), "a file in use stays open"
    files.close()


@pytest.mark.parametrize("scheme", ["file", "s3"])
def test_spans_of_every_kind(tmp_path: Path, s3: ObjectStorage, scheme: str) -> None:
    content = bytes(range(100))
    if scheme == "file":
        (tmp_path / "key").write_bytes(content)
        store: Any = LocalStore(tmp_path)
    else:
        remote = obstore.store.from_url(s3.bucket())
        obstore.put(remote, "key", content)
        store = zarr.storage.ObjectStore(remote, read_only=True)
    transport = open_transport(store, IMPATIENT)
    spans = [("key", 0, None), ("key", 10, 20), ("key", -5, None), ("none", 0, None), ("none", 3, 5)]
    whole, middle, end, *absent = transport.fetch(spans)
    transport.close()
    assert (bytes(whole), bytes(middle), bytes(end)) == (content, content[10:20], content[-5:])
    assert absent == [None, None]
    assert read_ranges(store, [("none", None)]) == [None]


def test_an_object_store_gives_the_same_batches(tmp_path: Path, s3: ObjectStorage) -> None:
    data = write(tmp_path)
    source = open(s3.upload(tmp_path, f"{s3.bucket()}/data"))
    with reading(source) as reader:
        ids = np.random.default_rng(3).permutation(12)
        got = [
            slot.inputs["x"][:, 0] for slot in reader.iterate((ids[k : k + 3], np.ones(3, bool)) for k in (0, 3, 6, 9))
        ]
        np.testing.assert_array_equal(np.concatenate(got), data[ids])
        found = reader.counters.to_json()
    assert found["requests"] == 12 + 3
    assert found["decodes"] == 12


def test_a_lost_object_of_an_object_store_is_named(tmp_path: Path, s3: ObjectStorage) -> None:
    write(tmp_path)
    url = s3.upload(tmp_path, f"{s3.bucket()}/data")
    source = open(url)
    obstore.delete(obstore.store.from_url(url), "a/c/2/0/0")
    with (
        reading(source) as reader,
        pytest.raises(IntegrityError, match=r"a: inner chunk \(8, 0, 0\) in a/c/2/0/0 \(sample 8\) is missing"),
    ):
        reader.read(np.array([0, 8]))
