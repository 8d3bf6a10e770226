"""Declared samples bound to a source: index space, cuts, coordinates, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from data_room import FORECAST, SCALE
from hypothesis import given
from hypothesis import strategies as st

from gpuops.data.sample import BoundSample, Field, SampleSpec, Window, bind
from gpuops.data.source import Source, open
from gpuops.errors import InputError


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A foreign store: [time, level, y, x], [time, y, x], [time] and coordinates, and some that do not fit."""
    path = tmp_path_factory.mktemp("archive") / "store"
    root = zarr.open_group(path, mode="w")

    def put(name: str, dims: str, shape: tuple[int, ...]) -> None:
        root.create_array(name, data=np.zeros(shape, np.int16), dimension_names=dims.split())

    put("wind", "time level y x", (20, 3, 4, 5))
    put("rain", "time y x", (20, 4, 5))
    put("power", "time", (20,))
    put("hour", "time", (20,))
    put("height", "level", (3,))
    put("deep", "time y level", (20, 4, 3))
    put("short", "time y x", (19, 4, 5))
    put("tall", "time level", (20, 7))
    put("stations", "station time", (20, 20))
    return open(path)


def bound(source: Source, *fields: Field, window: Window | None = None) -> BoundSample:
    return bind(SampleSpec({"x": list(fields)}, {}, window), source)


def shapes(sample: BoundSample) -> list[tuple[int, ...]]:
    return [cut.shape for cut in sample.inputs["x"]]


# index spaces and shapes


def test_a_cyclic_window_inside_records_starts_everywhere(store: Source) -> None:
    sample = bind(FORECAST, store)
    assert (sample.records, sample.starts, sample.length) == (24, 12, 1)
    assert sample.samples(np.array([0, 5])).tolist() == [*range(12), *range(60, 72)]
    turbidity, altitude = sample.inputs["x"]
    assert turbidity.shape == (3, 10, 10)
    assert altitude.shape == (1, 10, 10)
    assert sample.inputs["month"][0].shape == (1,)
    assert turbidity.positions(np.array([10])).tolist() == [[10, 11, 0]]
    record, start = sample.split_id(np.array([0, 11, 12, 287]))
    assert record.tolist() == [0, 0, 1, 23]
    assert start.tolist() == [0, 11, 0, 11]


def test_an_open_window_inside_records_stops_before_the_end(store: Source) -> None:
    sample = bind(replace(FORECAST, window=Window("month", 4)), store)
    assert sample.starts == 9
    _, start = sample.split_id(sample.samples(np.arange(24)))
    assert sample.targets["y"][0].positions(start).max() == 11


def test_a_window_along_the_sample_axis_counts_records(archive: Source) -> None:
    sample = bound(archive, Field("rain", at=(0, 2)), Field("hour", at=(2,)), window=Window("time", 3))
    assert (sample.records, sample.starts, sample.length) == (20, 1, 3)
    assert sample.samples(np.arange(20)).tolist() == list(range(18))
    rain, hour = sample.inputs["x"]
    assert (rain.records, rain.along, rain.shape) == (True, "samples", (2, 4, 5))
    assert (hour.records, hour.along, hour.shape) == (False, "samples", (1,))


def test_records_without_a_window(archive: Source) -> None:
    sample = bound(archive, Field("wind"), Field("rain"), Field("power"))
    assert shapes(sample) == [(3, 4, 5), (1, 4, 5), (1,)]
    assert all(cut.records for cut in sample.inputs["x"])
    assert (sample.starts, sample.length) == (1, 1)
    assert sample.samples(np.array([3, 1])).tolist() == [3, 1]


def test_channels_are_steps_times_the_leading_axes(archive: Source) -> None:
    along = bound(archive, Field("wind", at=(0, 1)), window=Window("time", 2))
    assert shapes(along) == [(6, 4, 5)]
    inside = bound(archive, Field("wind", at=(0, 1)), Field("height", at=(0, 1)), window=Window("level", 2))
    assert shapes(inside) == [(2, 4, 5), (2,)]
    assert inside.inputs["x"][1].records is False
    assert inside.starts == 2


def test_the_wire_names_dtype_and_packing(store: Source) -> None:
    turbidity, altitude = bind(FORECAST, store).inputs["x"]
    assert turbidity.name == "turbidity"
    spec = turbidity.spec
    assert (spec.dtype, spec.shape, spec.scale, spec.offset, spec.missing) == ("uint8", (3, 10, 10), SCALE, 0.0, None)
    assert (altitude.spec.missing, altitude.spec.unit, altitude.spec.offset) == (255, "m", -450.0)
    renamed = bind(replace(FORECAST, inputs={"x": [Field("turbidity", at=(0,), name="past")]}), store)
    assert renamed.inputs["x"][0].spec.name == "past"


@given(st.sets(st.integers(0, 19)), st.integers(1, 6))
def test_no_window_leaves_its_split(archive: Source, split: set[int], length: int) -> None:
    sample = bound(archive, Field("rain", at=tuple(range(length))), window=Window("time", length))
    records = np.array(sorted(split), np.int64)
    ids = sample.samples(records)
    touched = sample.inputs["x"][0].positions(sample.split_id(ids)[0])
    assert set(touched.ravel().tolist()) <= split
    whole = [start for start in range(20) if set(range(start, start + length)) <= split]
    assert ids.tolist() == whole, "every window that lies inside must be there"


# JSON


@pytest.mark.parametrize(
    "spec",
    [
        FORECAST,
        SampleSpec({"x": [Field("a", fill=1.5, clip=(0.0, 2.0), normalize=False, name="b")]}, {}),
        SampleSpec({"x": [Field("a", channels=("2t", 3))]}, {"y": [Field("a")]}),
    ],
)
def test_json_round_trip(spec: SampleSpec) -> None:
    again = SampleSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert again.to_json() == spec.to_json()


def test_fields_without_channels_keep_their_json() -> None:
    """So that a sample has the digest that older checkpoints recorded."""
    (field,) = SampleSpec({"x": [Field("a")]}, {}).to_json()["inputs"]["x"]
    assert sorted(field) == ["at", "clip", "fill", "name", "normalize", "raw", "variable"]


# refusals


@pytest.mark.parametrize(
    ("fields", "window", "words"),
    [
        ([Field("snow")], None, r"no variable 'snow'; it has deep, height, hour"),
        ([Field("rain", at=(0,))], Window("day", 2), "'day' does not exist; the variables have time, x, y"),
        ([Field("rain", at=(0, 1))], Window("time", 2, cyclic=True), "cannot be cyclic"),
        ([Field("deep", at=(0,))], Window("level", 2), "must be first or second"),
        ([Field("wind", at=(0,))], Window("level", 4), "window of 4 does not fit in dimension 'level' of 3"),
        ([Field("wind", at=(0,))], Window("level", 4, cyclic=True), "window of 4 does not fit"),
        ([Field("rain", at=(0,))], Window("time", 21), "window of 21 does not fit in dimension 'time' of 20"),
        ([Field("rain"), Field("short")], None, r"'short' has sample axis time \(19\), 'rain' has time \(20\)"),
        ([Field("rain"), Field("stations")], None, "'stations' has sample axis station"),
        ([Field("hour", at=(0,))], Window("time", 2), "no declared variable has a sample axis"),
        ([Field("wind")], Window("level", 2), "no field takes steps of the window along 'level'"),
        ([Field("wind", at=(0,)), Field("tall", at=(0,))], Window("level", 2), "differ in their length along"),
    ],
)
def test_what_does_not_fit_the_source_is_refused(
    archive: Source, fields: list[Field], window: Window | None, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        bound(archive, *fields, window=window)


@pytest.mark.parametrize(
    ("field", "window", "words"),
    [
        (Field("a", at=(0,)), None, r"'a' takes steps \(0,\) of a window: declare `window`"),
        (Field("a", at=(0, 3)), Window("t", 3), "lie outside a window"),
        (Field("a", at=(-1,)), Window("t", 3), "lie outside a window"),
        (Field("a", at=()), Window("t", 3), "takes no step"),
        (Field("a"), Window("t", 0), "at least 1"),
    ],
)
def test_what_does_not_fit_the_window_is_refused(field: Field, window: Window | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        SampleSpec({"x": [field]}, {}, window)


def test_dimensions_without_names_get_numbers(tmp_path: Path) -> None:
    zarr.open_group(tmp_path / "z", mode="w").create_array("a", data=np.zeros((4, 2), "u1"))
    sample: Any = bound(open(tmp_path / "z"), Field("a", at=(1,)), window=Window("dim_1", 2))
    assert sample.starts == 1
