"""Several stores as one: records are the values of the coordinate that all of them have, whatever their order."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuops.data.datamodule import ZarrDataModule
from gpuops.data.join import open, reopen
from gpuops.data.patches import Patch
from gpuops.data.reading.reader import Reader
from gpuops.data.runs import Runs
from gpuops.data.sample import Field, SampleSpec, Window, bind
from gpuops.data.sampling import Foreground, Stratified
from gpuops.data.source import Source
from gpuops.data.split import Holdout, Period
from gpuops.data.statistics import mean_std
from gpuops.data.writing.ingest import ingest
from gpuops.errors import InputError

ORIGIN = np.datetime64("2020-01-01", "ns")
HOUR = np.timedelta64(1, "h")


def values(hours: Any, name: str, size: tuple[int, ...] = (4, 6)) -> npt.NDArray[np.float32]:
    """What a store holds at some hours: other numbers for each hour, name and grid point."""
    points = np.arange(np.prod(size), dtype=np.float32).reshape(size) / 100
    return np.asarray(np.asarray(hours, np.float32).reshape(-1, *(1,) * len(size)) + points + len(name) * 1000)


def dataset(hours: Any, name: str, size: tuple[int, ...] = (4, 6), **labels: Any) -> xr.Dataset:
    dims = ("time", "y", "x")
    times = ORIGIN + np.asarray(hours, np.int64) * HOUR
    variables: dict[str, Any] = {name: (dims, values(hours, name, size))}
    variables |= {label: ("time", np.asarray(given)) for label, given in labels.items()}
    return xr.Dataset(variables, coords={"time": times})


def write(path: Path, hours: Any, name: str, chunk: int = 1, zarr_format: Any = 3, **changes: Any) -> str:
    made = dataset(hours, name, **changes)
    made.to_zarr(path, zarr_format=zarr_format, consolidated=False, encoding={name: {"chunks": (chunk, 4, 6)}})
    return str(path)


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, str]:
    """Hourly weather in stored order, and a satellite every three hours, written backwards, with a hole."""
    return {
        "era": write(tmp_path / "era", range(24), "t", region=np.arange(24, dtype=np.int32) // 12),
        "sat": write(tmp_path / "sat", [21, 18, 15, 9, 6, 3, -3], "cloud", zarr_format=2),
    }


COMMON = np.array([3, 6, 9, 15, 18, 21])


def fields(*names: str, **options: Any) -> dict[str, list[Field]]:
    return {name.replace("/", "_"): [Field(name, **options)] for name in names}


def read_all(source: Source, spec: SampleSpec) -> Any:
    bound = bind(spec, source)
    with closing(Reader(source, bound, threads=2)) as reader:
        return reader.read(bound.samples(np.arange(bound.records)))


def test_records_are_the_common_times(pair: dict[str, str]) -> None:
    source = open(pair)
    assert source.align == "time"
    np.testing.assert_array_equal(source.coordinate("time"), ORIGIN + COMMON * HOUR)
    slot = read_all(source, SampleSpec(fields("era/t"), fields("sat/cloud")))
    np.testing.assert_array_equal(slot.inputs["era_t"], values(COMMON, "t")[:, None])
    np.testing.assert_array_equal(slot.targets["sat_cloud"], values(COMMON, "cloud")[:, None])


@settings(max_examples=25, deadline=None)
@given(
    hours=st.lists(st.lists(st.integers(0, 30), min_size=3, max_size=20, unique=True), min_size=2, max_size=3).filter(
        lambda every: len(set.intersection(*map(set, every))) >= 2
    ),
    chunks=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    window=st.integers(1, 2),
)
def test_any_stores_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, hours: list[list[int]], chunks: list[int], window: int
) -> None:
    folder = tmp_path_factory.mktemp("join")
    names = ["a", "bb", "ccc"][: len(hours)]
    urls = {n: write(folder / n, h, n, chunk) for n, h, chunk in zip(names, hours, chunks, strict=False)}
    common = np.array(sorted(set.intersection(*map(set, hours))))
    at = tuple(range(window))
    slot = read_all(open(urls), SampleSpec(fields(*(f"{n}/{n}" for n in names), at=at), {}, Window("time", window)))
    for name in names:
        windows = np.lib.stride_tricks.sliding_window_view(common, window)
        expected = np.stack([values(hours, name) for hours in windows])
        np.testing.assert_array_equal(slot.inputs[f"{name}_{name}"], expected)


def test_statistics_split_and_sampling_follow_the_records(pair: dict[str, str]) -> None:
    source = open(pair)
    bound = bind(SampleSpec(fields("era/t"), fields("sat/cloud")), source)
    (mean,), (std,) = mean_std(source, bound.inputs["era_t"][0], Runs.of(np.array([0]), np.array([3])))
    assert mean == pytest.approx(values(COMMON[:3], "t").mean(), rel=1e-6)
    assert std == pytest.approx(values(COMMON[:3], "t").std(dtype=np.float64), rel=1e-4)
    data = ZarrDataModule(
        pair, fields("era/t"), fields("sat/cloud"), holdout=Holdout("era/region", values=[1]), global_batch=1
    )
    data.setup()
    assert data.val_records[:].tolist() == [3, 4, 5]
    late = ZarrDataModule(
        pair, fields("era/t"), fields("sat/cloud"), holdout=Period(start="2020-01-01T12"), global_batch=1
    )
    late.setup()
    assert late.val_records[:].tolist() == [3, 4, 5]
    for sampling in (Stratified("era/region"), Foreground("era/t", above=float(values([9], "t").max()))):
        drawn = ZarrDataModule(pair, fields("era/t"), fields("sat/cloud"), global_batch=2, sampling=sampling)
        drawn.setup()
        ids = np.concatenate([batch["id"].numpy() for batch in drawn.train_dataloader()])
        assert np.isin(ids, [3, 4, 5]).sum() == 3  # half of the draws
        drawn.teardown()


def test_recorded_statistics_are_those_of_the_records(tmp_path: Path) -> None:
    era = dataset(range(12), "t")
    ingest({"t": era["t"]}, url=str(tmp_path / "era"))
    other = write(tmp_path / "other", [2, 3, 11], "o")
    source = open({"era": str(tmp_path / "era"), "other": other})
    assert source.meta("stats", "era/t") is not None
    bound = bind(SampleSpec(fields("era/t"), fields("other/o")), source)
    (mean,), _ = mean_std(source, bound.inputs["era_t"][0], Runs.up_to(3))
    assert mean == pytest.approx(values([2, 3, 11], "t").mean(), rel=1e-6)


def test_a_store_without_the_dimension_is_static(pair: dict[str, str], tmp_path: Path) -> None:
    height = np.arange(24, dtype=np.float32).reshape(4, 6)
    xr.Dataset({"height": (("y", "x"), height)}).to_zarr(tmp_path / "land", zarr_format=3, consolidated=False)
    source = open({**pair, "land": str(tmp_path / "land")})
    patch = Patch({"y": 2, "x": 3}, {"x": 1})
    slot = read_all(source, SampleSpec(fields("era/t", "land/height"), fields("sat/cloud"), patch=patch))
    padded = np.pad(height, [(0, 0), (1, 1)], "reflect")
    np.testing.assert_array_equal(slot.inputs["land_height"][0, 0], padded[:2, :5])
    np.testing.assert_array_equal(slot.targets["sat_cloud"][-1, 0], values([21], "cloud")[0, 2:, 3:])


def test_identity_names_every_store(pair: dict[str, str], tmp_path: Path) -> None:
    source = open(pair)
    changed = write(tmp_path / "more", [21, 18, 15, 9, 6, 3, -3, -6], "cloud", zarr_format=2)
    renamed = {"era": pair["era"], "radar": pair["sat"]}
    prints = {s.fingerprint for s in (source, open(pair | {"sat": changed}), open(renamed), open(pair["era"]))}
    assert len(prints) == 4
    again = reopen(json.loads(json.dumps(source.location)))
    assert again.fingerprint == source.fingerprint
    assert again.location == source.location


def test_as_one_xarray_dataset(pair: dict[str, str]) -> None:
    found = open(pair).to_xarray()
    np.testing.assert_array_equal(found["era/t"].values, values(COMMON, "t"))
    np.testing.assert_array_equal(found["sat/cloud"].values, values(COMMON, "cloud"))
    np.testing.assert_array_equal(found["time"].values, ORIGIN + COMMON * HOUR)


def test_versions_are_pinned_by_name(tmp_path: Path) -> None:
    url = str(tmp_path / "era")
    first = ingest({"t": dataset(range(4), "t")["t"]}, url=url)
    ingest({"t": dataset(range(4, 8), "t")["t"]}, url=url, append=True)
    urls = {"era": url, "other": write(tmp_path / "other", range(8), "o")}
    assert len(open(urls).coordinate("time")) == 8
    pinned = open(urls, {"era": first.snapshot})
    assert len(pinned.coordinate("time")) == 4
    assert reopen(pinned.location).fingerprint == pinned.fingerprint


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"sat": {"hours": [30, 33]}}, {}, "no common value of 'time'"),
        ({"sat": {"hours": [3, 6, 3]}}, {}, "more than once"),
        ({}, {"align": "month"}, "no store has a sample axis 'month'"),
        ({}, {"snapshot": "abc"}, "by name"),
        ({}, {"snapshot": {"other": "abc"}}, "by name"),
    ],
)
def test_stores_that_cannot_be_joined(tmp_path: Path, changes: Any, options: Any, words: str) -> None:
    given: dict[str, dict[str, Any]] = {"era": {"hours": range(6)}, "sat": {"hours": [3, 4]}}
    urls = {name: write(tmp_path / name, name="v", **(told | changes.get(name, {}))) for name, told in given.items()}
    with pytest.raises(InputError, match=words):
        open(urls, **options)


def test_names_and_dimensions_must_be_plain(pair: dict[str, str], tmp_path: Path) -> None:
    for name in ("a/b", "", ".x", "_x"):
        with pytest.raises(InputError, match="no name for a store"):
            open({name: pair["era"]})
    with pytest.raises(InputError, match="at least one"):
        open({})
    with pytest.raises(InputError, match="several stores"):
        open(pair["era"], align="time")
    numbered = dataset(range(24), "t").assign_coords(time=np.arange(24.0))
    numbered.to_zarr(tmp_path / "numbered", zarr_format=3, consolidated=False)
    with pytest.raises(InputError, match="time in some stores and numbers in others"):
        open({"era": pair["era"], "numbered": str(tmp_path / "numbered")})
    with pytest.raises(InputError, match="`align`"):
        open({"era": pair["era"], "other": write(tmp_path / "o", [1], "v").replace("o", "o")} | {}, align="y")
