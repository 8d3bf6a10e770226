"""The cache of a node: each range fetched once for all ranks and runs, whatever is killed, inside its budget."""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from object_store import ObjectStorage
from zarr.codecs import Crc32cCodec, ZstdCodec

from gpuops.data.reading.node_cache import CACHED, CacheLocation, NodeCache
from gpuops.data.reading.reader import Reader
from gpuops.data.reading.transport import Span
from gpuops.data.sample import Field, SampleSpec, bind
from gpuops.data.source import open as open_source
from gpuops.errors import InputError

RANGE, RANGES = 1000, 40
MB = 10**6


class Remote:
    """A store of made-up bytes that notes in a file what it was asked for; any process may hold one."""

    retries = 0

    def __init__(self, log: Path, stop_at: Span | None = None) -> None:
        self.log, self.stop_at = log, stop_at

    def fetch(self, spans: Sequence[Span]) -> list[Any]:
        with self.log.open("a") as log:
            for span in spans:
                log.write(f"{span}\n")
        if self.stop_at in spans:
            os.kill(os.getpid(), signal.SIGKILL)
        return [None if span[0] == "absent" else content(span) for span in spans]

    def close(self) -> None:
        pass

    @property
    def asked(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


def content(span: Span) -> bytes:
    """What the store holds there."""
    key, start, stop = span
    first = RANGE * RANGES + start if start < 0 else start
    last = RANGE * RANGES if stop is None else stop
    return bytes((position * 7 + len(key)) % 251 for position in range(first, last))


def spans(key: str = "a/c/0") -> list[Span]:
    return [(key, i * RANGE, (i + 1) * RANGE) for i in range(RANGES)]


def cache_of(folder: Path, remote: Any, identity: str = "data", budget: int = 10 * MB) -> NodeCache:
    return NodeCache(remote, CacheLocation(str(folder / "cache"), budget), identity)


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    return Remote(tmp_path / "log")


def test_a_range_is_fetched_once_for_every_run(tmp_path: Path, remote: Remote) -> None:
    wanted = [*spans(), ("a/c/1", 0, None), ("a/c/2", -100, None), ("absent", 3, 5)]
    for _ in range(3):
        cache = cache_of(tmp_path, remote)
        for _ in range(2):
            got = cache.fetch(wanted)
            assert got[-1] is None
            assert [bytes(data) for data in got[:-1]] == [content(span) for span in wanted[:-1]]
        cache.close()
    asked = [line for line in remote.asked if "absent" not in line]
    assert len(asked) == len(set(asked)) == RANGES + 2


def test_other_data_have_other_ranges(tmp_path: Path, remote: Remote) -> None:
    for identity in ("one", "two"):
        cache = cache_of(tmp_path, remote, identity)
        cache.fetch(spans())
        cache.close()
    assert len(remote.asked) == 2 * RANGES


def fill(folder: Path, seed: int, barrier: Any) -> None:
    cache = cache_of(folder, Remote(folder / "log"))
    order = np.random.default_rng(seed).permutation(RANGES)
    barrier.wait()
    for start in range(0, RANGES, 5):
        part = [spans()[i] for i in order[start : start + 5]]
        assert [bytes(data) for data in cache.fetch(part)] == [content(span) for span in part]
    cache.close()


def test_ranks_that_want_the_same_fetch_it_once(tmp_path: Path, remote: Remote) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(3)
    ranks = [spawn.Process(target=fill, args=(tmp_path, seed, barrier)) for seed in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    assert len(remote.asked) == len(set(remote.asked)) == RANGES


def fill_until_killed(folder: Path, place: int) -> None:
    cache = cache_of(folder, Remote(folder / "log", stop_at=spans()[place]))
    for span in spans():
        cache.fetch([span])


def test_a_killed_rank_leaves_no_lock_and_nothing_half(tmp_path: Path, remote: Remote) -> None:
    spawn = multiprocessing.get_context("spawn")
    rank = spawn.Process(target=fill_until_killed, args=(tmp_path, 25))
    rank.start()
    rank.join()
    assert rank.exitcode == -signal.SIGKILL
    cache = cache_of(tmp_path, remote)
    assert [bytes(data) for data in cache.fetch(spans())] == [content(span) for span in spans()]
    cache.close()
    assert len(remote.asked) == RANGES + 1, "only what was being fetched is fetched again"


@pytest.mark.parametrize("cut", [1, 13, 23])
def test_a_line_of_the_journal_that_was_cut_short_is_passed_over(tmp_path: Path, remote: Remote, cut: int) -> None:
    cache = cache_of(tmp_path, remote)
    cache.fetch(spans()[:10])
    cache.close()
    (journal,) = (tmp_path / "cache").glob("*/*/*.journal")
    journal.write_bytes(journal.read_bytes()[:-cut])
    for _ in range(2):
        cache = cache_of(tmp_path, remote)
        assert [bytes(data) for data in cache.fetch(spans())] == [content(span) for span in spans()]
        cache.close()
    assert len(remote.asked) == RANGES + 1


def test_what_does_not_fit_is_passed_through(tmp_path: Path, remote: Remote) -> None:
    cache = cache_of(tmp_path, remote, budget=60_000)
    for _ in range(2):
        assert [bytes(data) for data in cache.fetch(spans())] == [content(span) for span in spans()]
    kept = sum(cache.holds(span) for span in spans())
    assert 0 < kept < RANGES
    assert len(remote.asked) == 2 * RANGES - kept
    used = sum(file.stat().st_blocks * 512 for file in (tmp_path / "cache").glob("*/*/*"))
    cache.close()
    assert used <= 60_000


def test_data_that_nobody_uses_make_room(tmp_path: Path, remote: Remote) -> None:
    budget = 260_000  # one data set as it is reckoned while it is filled, and one and a half as they lie on the disk
    held = cache_of(tmp_path, remote, "in use", budget)
    held.fetch(spans())
    idle = cache_of(tmp_path, remote, "idle", budget)
    idle.fetch(spans())
    idle.close()
    third = cache_of(tmp_path, remote, "new", budget)
    third.fetch(spans())
    assert all(map(third.holds, spans()))
    assert third.fill(spans()) == [CACHED] * RANGES
    assert all(map(held.holds, spans())), "what is in use stays"
    third.close()
    held.close()
    again = cache_of(tmp_path, remote, "idle", budget)
    assert not any(map(again.holds, spans()))
    again.close()


def test_what_else_lies_in_the_directory_is_left_alone(tmp_path: Path, remote: Remote) -> None:
    (tmp_path / "cache" / "precious").mkdir(parents=True)
    (tmp_path / "cache" / "precious" / "checkpoint").write_text("weights")
    cache = cache_of(tmp_path, remote, budget=60_000)
    cache.fetch(spans())
    cache.close()
    cache.close()
    assert (tmp_path / "cache" / "precious" / "checkpoint").read_text() == "weights"


def test_damaged_ranges_of_another_run_are_fetched_again(tmp_path: Path, remote: Remote) -> None:
    cache = cache_of(tmp_path, remote)
    cache.fetch(spans())
    cache.close()
    for file in (tmp_path / "cache").glob("*/*/*"):
        if not file.suffix and file.name != "in-use":
            os.truncate(file, 100)  # as a machine that lost power may leave it
            os.truncate(file, RANGE * RANGES)
    cache = cache_of(tmp_path, remote)
    assert [bytes(data) for data in cache.fetch(spans())] == [content(span) for span in spans()]
    cache.close()
    assert len(remote.asked) == 2 * RANGES


def test_a_directory_that_disappears_is_done_without(tmp_path: Path, remote: Remote) -> None:
    cache = cache_of(tmp_path, remote)
    cache.fetch(spans()[:3])
    shutil.rmtree(tmp_path / "cache")
    assert [bytes(data) for data in cache.fetch(spans("other"))] == [content(span) for span in spans("other")]
    cache.close()


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, remote: Remote) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match=r"node cache .*cache cannot be written .*: name another directory"):
        cache_of(tmp_path, remote)


@pytest.fixture(params=[[ZstdCodec(checksum=True)], [Crc32cCodec()], []], ids=["zstd", "crc32c", "none"])
def bucket(tmp_path: Path, s3: ObjectStorage, request: Any) -> tuple[str, np.ndarray[Any, Any]]:
    data = np.random.default_rng(0).integers(1, 99, (12, 5, 6)).astype(np.int16)
    root = zarr.open_group(tmp_path / "store", mode="w")
    layout: dict[str, Any] = {"chunks": (1, 5, 6), "shards": (4, 5, 6), "compressors": request.param or None}
    root.create_array("a", data=data, dimension_names=["t", "y", "x"], **layout)
    root.create_array("b", data=data[:, 0], chunks=(5, 6), dimension_names=["t", "x"])
    return s3.upload(tmp_path / "store", f"{s3.bucket()}/data"), data


def test_the_second_epoch_asks_the_store_for_nothing(tmp_path: Path, bucket: Any) -> None:
    url, data = bucket
    source = open_source(url)
    spec = SampleSpec({"x": [Field("a")], "z": [Field("b")]}, {})
    location = CacheLocation(str(tmp_path / "cache"), 10 * MB)
    for run in range(2):
        reader = Reader(source, bind(spec, source), threads=2, cache=location)
        for _ in range(2):
            ids = np.random.default_rng(run).permutation(12)
            slots = reader.iterate((ids[k : k + 4], np.ones(4, bool)) for k in (0, 4, 8))
            for k, slot in zip((0, 4, 8), slots, strict=True):
                np.testing.assert_array_equal(slot.inputs["x"][:, 0], data[ids[k : k + 4]])
                np.testing.assert_array_equal(slot.inputs["z"][:, 0], data[ids[k : k + 4], 0])
        cache = reader._transport
        assert isinstance(cache, NodeCache)
        assert cache.misses == (0 if run else 12 + 3 + 3), "records, shard indexes and chunks of five records"
        reader.close()
