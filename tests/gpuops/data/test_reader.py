"""Slots against plain slicing of the arrays, for any layout; each chunk read and decoded once; damage reported."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from data_room import FORECAST, Atlas
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.core.sync import sync

from gpuops.data.reading import filler
from gpuops.data.reading.counters import Counters
from gpuops.data.reading.reader import Reader, wire_inputs
from gpuops.data.reading.transport import File
from gpuops.data.sample import Field, SampleSpec, Window, bind
from gpuops.data.source import Source, open
from gpuops.errors import InputError, IntegrityError


@contextmanager
def reading(source: Source, spec: SampleSpec, **options: Any) -> Iterator[Reader]:
    reader = Reader(source, bind(spec, source), **options)
    try:
        yield reader
    finally:
        reader.close()


def everything(batches: int, size: int) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]]:
    return [(np.arange(size) + i * size, np.ones(size, bool)) for i in range(batches)]


def expected(spec: SampleSpec, arrays: dict[str, npt.NDArray[Any]], field: Field, sample: tuple[int, int]) -> Any:
    """One field of one sample by plain slicing; dims are [t, m, y, x] and the sample is (t, start)."""
    array, (record, start) = arrays[field.variable], sample
    window = spec.window
    if field.at is None or window is None:
        return array[record].reshape(-1, *array.shape[-2:])
    if window.dim == "t":
        return np.concatenate([array[record + at].reshape(-1, *array.shape[-2:]) for at in field.at])
    return np.stack([array[record, (start + at) % array.shape[1]] for at in field.at])


# any layout

axis = st.integers(1, 5)


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    shape = (draw(st.integers(4, 9)), draw(st.integers(3, 4)), draw(axis), draw(axis))
    chunk = tuple(draw(st.integers(1, size + 1)) for size in shape)
    per = [draw(st.integers(1, 3)) for _ in shape]
    shards = tuple(c * n for c, n in zip(chunk, per, strict=True)) if draw(st.booleans()) else None
    where = draw(st.sampled_from(["t", "open m", "cyclic m", None]))
    return {
        "shape": shape,
        "chunks": chunk,
        "shards": shards,
        "dtype": draw(st.sampled_from(["uint8", "int16", "float32"])),
        "where": where,
        "ids": draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=9)),
        "flat_chunk": draw(st.integers(1, 4)),
    }


def spec_of(where: str | None) -> SampleSpec:
    window = {
        "t": Window("t", 3),
        "open m": Window("m", 3),
        "cyclic m": Window("m", 3, cyclic=True),
        None: None,
    }[where]
    steps = None if window is None else (2, 0)
    return SampleSpec({"x": [Field("a", at=steps)], "whole": [Field("b")]}, {"y": [Field("a", at=steps)]}, window)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(layouts())
def test_slots_are_what_slicing_gives(case: dict[str, Any]) -> None:
    shape = case["shape"]
    generator = np.random.default_rng(0)
    arrays = {
        "a": generator.integers(0, 200, shape).astype(case["dtype"]),
        "b": generator.integers(0, 200, (shape[0], *shape[2:])).astype(case["dtype"]),
    }
    spec = spec_of(case["where"])
    with TemporaryDirectory() as folder:
        root = zarr.open_group(folder, mode="w")
        kept: Any = {"config": {"write_empty_chunks": True}}
        for name, dims in (("a", "tmyx"), ("b", "tyx")):
            array = arrays[name]
            chunks = case["chunks"] if name == "a" else (case["flat_chunk"], *case["chunks"][2:])
            shards = case["shards"] if name == "a" else None
            made = root.create_array(
                name, shape=array.shape, dtype=array.dtype, chunks=chunks, shards=shards, dimension_names=dims, **kept
            )
            made[:] = array
        source = open(folder)
        with reading(source, spec, threads=2) as reader:
            sample = reader.sample
            all_ids = sample.samples(np.arange(sample.records))
            ids = all_ids[np.array(case["ids"]) % len(all_ids)]
            slot = reader.read(ids)
            records, starts = sample.split_id(ids)
            for side, tensors in ((slot.inputs, spec.inputs), (slot.targets, spec.targets)):
                for tensor, (field,) in tensors.items():
                    want = [expected(spec, arrays, field, pair) for pair in zip(records, starts, strict=True)]
                    np.testing.assert_array_equal(side[tensor], np.stack(want))
                    assert side[tensor].dtype == arrays[field.variable].dtype
            needed = {int(r) + at for r in records for at in ((0, 2) if case["where"] == "t" else (0,))}
            assert reader.counters.decodes == chunks_of(source, "a", needed) + chunks_of(source, "b", set(records))
            again = reader.read(ids)
            for side, other in ((slot.inputs, again.inputs), (slot.targets, again.targets)):
                for tensor in side:
                    np.testing.assert_array_equal(side[tensor], other[tensor], err_msg="depends on the batch before")


def chunks_of(source: Source, name: str, records: set[Any]) -> int:
    """How many inner chunks hold the given records."""
    array = source.variable(name).array
    inner = [-(-s // c) for s, c in zip(array.shape[1:], array.chunks[1:], strict=True)]
    return len({int(r) // array.chunks[0] for r in records}) * int(np.prod(inner))


def test_one_value_a_record(tmp_path: Path) -> None:
    # Chunks of one value: a record is a scalar, of which NumPy makes copies where it makes views of arrays.
    root = zarr.open_group(tmp_path, mode="w")
    values = np.arange(1, 21, dtype=np.int16)
    root.create_array("a", data=values, chunks=(1,), shards=(5,), dimension_names=["t"])
    root.create_array("b", data=values, chunks=(3,), dimension_names=["t"])
    with reading(open(tmp_path), SampleSpec({"x": [Field("a")]}, {"y": [Field("b")]})) as reader:
        slot = reader.read(np.array([19, 3, 3, 0]))
    assert slot.inputs["x"].tolist() == [[20], [4], [4], [1]]
    assert slot.targets["y"].tolist() == [[20], [4], [4], [1]]


# the store that ingest writes


def test_a_forecast_sample(store: Source, atlas: Atlas) -> None:
    ids = np.array([0, 11, 12 * 5 + 10, 287])
    with reading(store, FORECAST) as reader:
        slot = reader.read(ids, np.array([True, True, True, False]))
    for row, sample in enumerate(ids):
        tile, start = divmod(int(sample), 12)
        months = [(start + at) % 12 for at in range(4)]
        want = np.concatenate([atlas.tiles[tile, months[:3]], atlas.heights[tile][None]])
        np.testing.assert_array_equal(slot.inputs["x"][row], want)
        np.testing.assert_array_equal(slot.targets["y"][row], atlas.tiles[tile, months[3:]])
        assert slot.inputs["month"][row].tolist() == [months[3] + 1]
    assert slot.ids.tolist() == ids.tolist()
    assert slot.valid.tolist() == [True, True, True, False]
    assert slot.nbytes == sum(a.nbytes for side in (slot.inputs, slot.targets) for a in side.values())


def test_a_batch_reads_each_chunk_once_and_nothing_else(store: Source) -> None:
    with reading(store, FORECAST) as reader:
        ids = np.arange(24 * 12)
        reader.read(ids)
        counters = reader.counters
        assert counters.decodes == 48, "24 records of two variables, however many windows are cut from them"
        assert counters.requests == 48 + 48, "each chunk, and the index of each of 2 x 24 shards"
        first = counters.bytes_read
        for _ in range(9):
            reader.read(ids)
        assert counters.samples == 2880
        assert (counters.requests, counters.bytes_read, counters.decodes) == (96, first, 48), "kept within the budget"
        report = counters.to_json()
    stored = sum(shard_payload(store, name) for name in ("turbidity", "altitude"))
    assert counters.bytes_useful == stored
    assert report["decodes_per_sample"] == pytest.approx(48 / 2880)
    assert report["decodes_per_distinct_chunk"] == 1
    assert 1 < report["bytes_per_useful_byte"] < 1.1


def shard_payload(store: Source, name: str) -> int:
    """Encoded bytes of a variable's chunks: its shards less their indexes."""
    per_shard = (store.variable(name).array.shards or (0,))[0]

    async def sizes() -> list[int]:
        return [await store.store.getsize(key) async for key in store.store.list_prefix(name) if "/c/" in key]

    return sum(size - 16 * per_shard - 4 for size in sync(sizes()))


def test_wire_inputs_are_by_variable(store: Source) -> None:
    with reading(store, FORECAST) as reader:
        slot = reader.read(np.array([5, 200]))
        wire = wire_inputs(reader.sample, slot)
    assert set(wire) == {"turbidity", "altitude", "month"}
    np.testing.assert_array_equal(wire["turbidity"], slot.inputs["x"][:, :3])
    np.testing.assert_array_equal(wire["altitude"], slot.inputs["x"][:, 3:])
    np.testing.assert_array_equal(wire["month"], slot.inputs["month"])
    assert all(array.flags.c_contiguous for array in wire.values())
    for name, array in wire.items():
        spec = next(cut.spec for cuts in reader.sample.inputs.values() for cut in cuts if cut.name == name)
        spec.check(array)


# read ahead


def test_batches_come_in_order_and_read_ahead(store: Source) -> None:
    with reading(store, FORECAST, threads=2, ahead=3) as reader:
        batches = everything(12, 8)
        slots = list(reader.iterate(batches))
        assert [slot.ids.tolist() for slot in slots] == [ids.tolist() for ids, _ in batches]
        alone = [reader.read(*batch) for batch in batches]
        for one, other in zip(slots, alone, strict=True):
            np.testing.assert_array_equal(one.inputs["x"], other.inputs["x"])
        assert slots[0].nbytes < reader.counters.held_bytes <= reader.counters.budget_bytes


def test_no_more_is_planned_than_asked_for(store: Source) -> None:
    taken = []

    def batches() -> Iterator[Any]:
        for batch in everything(12, 8):
            taken.append(batch)
            yield batch

    with reading(store, FORECAST, ahead=2) as reader:
        slots = reader.iterate(batches())
        next(slots)
        assert len(taken) == 3
        next(slots)
        assert len(taken) == 4
        slots.close()  # type: ignore[attr-defined]


def reader_threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("gpuops-")}


def test_close_stops_the_threads(store: Source) -> None:
    before = reader_threads()
    reader = Reader(store, bind(FORECAST, store), threads=2)
    slots = reader.iterate(everything(12, 8))
    next(slots)
    assert reader_threads() - before
    reader.close()
    assert not reader_threads() - before
    slots.close()  # type: ignore[attr-defined]


def test_a_closed_reader_says_so(store: Source) -> None:
    reader = Reader(store, bind(FORECAST, store))
    slots = reader.iterate(everything(12, 8))
    next(slots)
    reader.close()
    for again in (lambda: next(slots), lambda: next(iter(reader.iterate(everything(3, 8)))), lambda: reader.read([0])):
        with pytest.raises(InputError, match="closed: make a new one"):
            again()


@pytest.mark.parametrize("chunk", [1, 5])
def test_what_comes_from_a_disk_is_read_by_more_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    data = write_samples(tmp_path, chunk=chunk)
    monkeypatch.setattr(filler, "_disk_bytes", partial(next, count(0, 10**9)))  # every share read a gigabyte of disk
    read_by: list[str] = []
    read_into = File.read_into

    def noted(*arguments: Any) -> None:
        read_by.append(threading.current_thread().name.rpartition("_")[0])
        read_into(*arguments)

    monkeypatch.setattr(File, "read_into", noted)
    with reading(open(tmp_path), WHOLE, threads=2, ahead=1) as reader:
        for number, slot in enumerate(reader.iterate(everything(8, 8))):
            np.testing.assert_array_equal(slot.inputs["x"][:, 0], data[8 * number : 8 * number + 8])
        assert reader.counters.decodes == reader.counters.distinct_chunks == -(-64 // chunk)
    assert set(read_by) >= {"gpuops-decode", "gpuops-disk"}, "the first batch tells what the later ones need"


def test_an_abandoned_iteration_does_not_disturb_the_next(store: Source) -> None:
    with reading(store, FORECAST) as reader:
        for _ in range(3):
            slots = reader.iterate(everything(12, 8))
            assert next(slots).ids[0] == 0
            slots.close()  # type: ignore[attr-defined]
        assert [slot.ids[0] for slot in reader.iterate(everything(3, 8))] == [0, 8, 16]


# memory


def write_samples(path: Path, count: int = 64, chunk: int = 1) -> npt.NDArray[np.int16]:
    """`count` records of 8 KiB in chunks of `chunk` of them; returns what was written."""
    data = np.random.default_rng(0).integers(0, 99, (count, 64, 64)).astype(np.int16)
    root = zarr.open_group(path, mode="w")
    root.create_array("a", data=data, chunks=(chunk, 64, 64), dimension_names=["t", "y", "x"])
    return data


WHOLE = SampleSpec({"x": [Field("a")]}, {})
SLOT_BYTES, RECORD_BYTES = 8 * 8192, 8192


def test_read_ahead_stays_inside_its_budget(tmp_path: Path) -> None:
    data = write_samples(tmp_path)
    # What is left after an eighth for shard indexes holds two slots and not three.
    with reading(open(tmp_path), WHOLE, ahead=6, budget_bytes=SLOT_BYTES * 3, threads=2) as reader:
        for number, slot in enumerate(reader.iterate(everything(8, 8))):
            np.testing.assert_array_equal(slot.inputs["x"][:, 0], data[8 * number : 8 * number + 8])
        assert reader.counters.held_bytes == 2 * SLOT_BYTES


def test_chunks_of_many_records_are_decoded_once_and_forgotten_when_others_need_the_room(tmp_path: Path) -> None:
    data = write_samples(tmp_path, chunk=16)
    budget = (SLOT_BYTES + 16 * RECORD_BYTES) * 2
    with reading(open(tmp_path), WHOLE, ahead=1, budget_bytes=budget, threads=2) as reader:
        for number, slot in enumerate(reader.iterate(everything(8, 8))):
            np.testing.assert_array_equal(slot.inputs["x"][:, 0], data[8 * number : 8 * number + 8])
        assert reader.counters.decodes == 4, "two batches are cut from each of four chunks"
        assert reader.counters.held_bytes <= budget
        reader.read(np.arange(8))
        assert reader.counters.decodes == 5, "the first chunk had to go"


def test_a_batch_that_does_not_fit_says_how_much_it_needs(tmp_path: Path) -> None:
    write_samples(tmp_path, chunk=32)
    with reading(open(tmp_path), WHOLE, budget_bytes=4 * SLOT_BYTES) as reader:
        slots = reader.iterate([(np.array([0, 40]), np.ones(2, bool))])
        with pytest.raises(InputError, match=r"one batch needs 1 MB in memory, the budget is 0 MB: raise budget_mb"):
            next(slots)
        assert reader.read(np.array([40])).inputs["x"].shape == (1, 1, 64, 64), "it can still be read by itself"


def test_a_slot_is_the_consumers_until_nobody_refers_to_it(tmp_path: Path) -> None:
    data = write_samples(tmp_path)
    with reading(open(tmp_path), WHOLE, threads=2) as reader:
        kept = [slot.inputs["x"][1:2, 0] for slot in reader.iterate(everything(8, 8))]
        for number, view in enumerate(kept):
            np.testing.assert_array_equal(view[0], data[8 * number + 1], err_msg="its memory was used again")
        places = {slot.inputs["x"].ctypes.data for _ in range(4) for slot in reader.iterate(everything(8, 8))}
        assert len(places) < 12, "memory that nobody refers to is used again"


def test_overlapping_windows_are_decoded_once(tmp_path: Path) -> None:
    data = write_samples(tmp_path)
    spec = SampleSpec({"x": [Field("a", at=(0, 1, 2))]}, {"y": [Field("a", at=(3,))]}, Window("t", 4))
    with reading(open(tmp_path), spec, threads=2) as reader:
        for number, slot in enumerate(reader.iterate(everything(7, 8))):
            want = np.stack([data[8 * number + i : 8 * number + i + 4] for i in range(8)])
            np.testing.assert_array_equal(slot.inputs["x"], want[:, :3])
            np.testing.assert_array_equal(slot.targets["y"], want[:, 3:])
        assert reader.counters.decodes == 7 * 8 + 3


@pytest.mark.parametrize("ids", [[-1], [3, 64], [10**9]])
@pytest.mark.parametrize("chunk", [1, 5])
def test_ids_that_do_not_exist_are_refused(tmp_path: Path, ids: list[int], chunk: int) -> None:
    write_samples(tmp_path, chunk=chunk)
    with reading(open(tmp_path, missing_chunks="fill"), WHOLE) as reader:
        for _ in range(2):
            with pytest.raises(InputError, match="there are 64, from 0"):
                reader.read(np.array(ids))


def test_a_batch_read_in_the_midst_of_an_iteration_waits_for_nobody(tmp_path: Path) -> None:
    data = write_samples(tmp_path, chunk=16)
    budget = (SLOT_BYTES + 16 * RECORD_BYTES) * 2
    with reading(open(tmp_path), WHOLE, ahead=3, budget_bytes=budget, threads=1) as reader:
        for _ in reader.iterate(everything(8, 8)):
            for first in (0, 20, 56):
                got = reader.read(np.arange(first, first + 8)).inputs["x"][:, 0]
                np.testing.assert_array_equal(got, data[first : first + 8])


def test_a_new_iteration_ends_the_one_before(tmp_path: Path) -> None:
    data = write_samples(tmp_path, chunk=16)
    budget = (SLOT_BYTES + 16 * RECORD_BYTES) * 2
    with reading(open(tmp_path), WHOLE, budget_bytes=budget) as reader:
        left = reader.iterate(everything(8, 8))
        next(left)
        for number, slot in enumerate(reader.iterate(everything(8, 8))):
            np.testing.assert_array_equal(slot.inputs["x"][:, 0], data[8 * number : 8 * number + 8])
        with pytest.raises(InputError, match="another iteration of this reader has begun"):
            next(left)


def test_a_forked_process_is_told_so(tmp_path: Path) -> None:
    write_samples(tmp_path)
    with reading(open(tmp_path), WHOLE) as reader:
        reader._process -= 1  # what a fork makes of it, without the danger of one in a process with threads
        with pytest.raises(InputError, match="does not survive a fork"):
            reader.read(np.array([0]))


def test_diagnosis_names_a_stage(store: Source) -> None:
    with reading(store, FORECAST) as reader:
        list(reader.iterate(everything(12, 8)))
        found = reader.counters.to_json()
    assert found["limiting_stage"] in ("consumer", "plan", "read", "decode", "gather")
    assert 0 <= found["stall_share"] <= 1
    assert "limited by the" in reader.counters.line()
    assert "decodes a distinct chunk" in reader.counters.line()
    assert Counters().to_json()["bytes_per_useful_byte"] is None, "unknown is null, never 0"
    assert "none requests a sample" in Counters().line()


# damage


def chunk_files(store: Path) -> list[Path]:
    """Objects of an Icechunk repository that hold shards, the largest last."""
    return sorted((store / "chunks").iterdir(), key=lambda file: (file.stat().st_size, file.name))


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_shard_reaches_the_consumer(store: Source, tmp_path: Path, harm: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(store.url, copy)
    for file in chunk_files(copy)[-24:]:  # the shards of turbidity; the newest snapshot holds nothing larger
        content = bytearray(file.read_bytes())
        content[len(content) // 3] ^= 0x10
        if harm == "remove":
            file.unlink()
        else:
            file.write_bytes(content if harm == "flip" else content[: len(content) // 3])
    source = open(copy)
    with (
        reading(source, FORECAST) as reader,
        pytest.raises(IntegrityError, match=r"turbidity.*(damaged|cannot be read).*ingest it again"),
    ):
        list(reader.iterate(everything(3, 8)))


def test_damage_in_a_later_batch_leaves_the_earlier_ones(tmp_path: Path) -> None:
    root = zarr.open_group(tmp_path, mode="w")
    codec: Any = zarr.codecs.ZstdCodec(checksum=True)
    data = np.random.default_rng(0).integers(0, 9, (12, 5, 5)).astype(np.int16)
    root.create_array("a", data=data, chunks=(1, 5, 5), compressors=codec, dimension_names=["t", "y", "x"])
    file = tmp_path / "a" / "c" / "6" / "0" / "0"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with reading(open(tmp_path), SampleSpec({"x": [Field("a")]}, {}), ahead=4) as reader:
        slots = reader.iterate(everything(6, 2))
        for i in range(3):
            np.testing.assert_array_equal(next(slots).inputs["x"][:, 0], data[2 * i : 2 * i + 2])
        with pytest.raises(
            IntegrityError, match=r"a: inner chunk \(6, 0, 0\) in a/c/6/0/0 \(sample 6\) is damaged .*checksum"
        ):
            next(slots)


def test_a_missing_chunk_of_an_unsharded_array(tmp_path: Path) -> None:
    root = zarr.open_group(tmp_path, mode="w")
    root.create_array("a", data=np.ones((4, 2, 2), np.uint8), chunks=(1, 2, 2), dimension_names=["t", "y", "x"])
    (tmp_path / "a" / "c" / "2" / "0" / "0").unlink()
    with reading(open(tmp_path), SampleSpec({"x": [Field("a")]}, {})) as reader:
        reader.read(np.array([0, 1, 3]))
        with pytest.raises(IntegrityError, match=r"a: inner chunk \(2, 0, 0\) in a/c/2/0/0 \(sample 2\) is missing"):
            reader.read(np.array([1, 2]))


def test_an_object_store_reads_the_same(tmp_path: Path) -> None:
    root = zarr.open_group(tmp_path, mode="w")
    data = np.random.default_rng(0).integers(0, 9, (12, 5, 5)).astype(np.int16)
    root.create_array("a", data=data, chunks=(2, 3, 3), shards=(4, 6, 6), dimension_names=["t", "y", "x"])
    with reading(open(f"file://{tmp_path}"), SampleSpec({"x": [Field("a")]}, {})) as reader:
        np.testing.assert_array_equal(reader.read(np.array([11, 0])).inputs["x"][:, 0], data[[11, 0]])
        (tmp_path / "a" / "c" / "1" / "0" / "0").unlink()
        with pytest.raises(IntegrityError, match=r"a: inner chunk \(2, 0, 0\) in a/c/1/0/0 \(sample 5\) is missing"):
            reader.read(np.array([5]))
