"""Archives as others wrote them, read in place: WeatherBench, anemoi, what xarray makes of CF; files, S3 and http."""

import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import pytest
import zarr
from archives import HOURS, NAMES, write_anemoi, write_weather
from hypothesis import given, settings
from hypothesis import strategies as st
from object_store import ObjectStorage, running_web

from gpuops.data import anemoi
from gpuops.data.icechunk_store import storage
from gpuops.data.reading.reader import Reader
from gpuops.data.sample import BoundSample, Cut, Field, SampleSpec, Window, bind
from gpuops.data.source import Source, open, snapshots
from gpuops.data.variable import decoded, read_variable
from gpuops.errors import InputError


def bound(source: Source, *fields: Field, window: Window | None = None) -> BoundSample:
    return bind(SampleSpec({"x": list(fields)}, {}, window), source)


def delivered(cut: Cut, record: int, start: int) -> Any:
    """What a cut means, in numpy: stored values [*cut.shape] of the sample that begins at (record, start)."""
    stored = np.asarray(cut.variable.array[...])
    if cut.static:
        return stored.reshape(cut.shape)
    origin = np.array([record if cut.along == "samples" else start])
    at = cut.positions(origin)[0]
    if not cut.records:
        return stored[at]
    if cut.along == "inside":
        return stored[record][at].reshape(cut.shape)
    values = stored[at] if cut.along == "samples" else stored[[record]]
    return (values if cut.channels is None else values[:, list(cut.channels)]).reshape(cut.shape)


# the WeatherBench layout


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_weather_archive_with_static_fields(tmp_path: Path, zarr_format: Any) -> None:
    data = write_weather(tmp_path / "era5", zarr_format)
    source = open(tmp_path / "era5")
    fields = (Field("land_sea_mask"), Field("2m_temperature", at=(0, 2)), Field("geopotential", channels=("850", 0)))
    sample = bound(source, *fields, window=Window("time", 3))
    mask, temperature, height = sample.inputs["x"]
    assert (sample.dim, sample.records, sample.length, sample.steps) == ("time", HOURS, 3, (0, 2))
    assert (mask.static, mask.records, mask.along, mask.shape) == (True, False, None, (1, 6, 8))
    assert not temperature.static
    assert (height.channels, height.shape) == ((2, 0), (2, 6, 8))
    np.testing.assert_array_equal(delivered(mask, 5, 0)[0], data["land_sea_mask"].values)
    np.testing.assert_array_equal(delivered(temperature, 5, 0), data["2m_temperature"].values[[5, 7]])
    np.testing.assert_array_equal(delivered(height, 5, 0), data["geopotential"].values[5, [2, 0]])
    np.testing.assert_array_equal(source.coordinate("time"), data["time"].values)
    assert source.coordinate("time").dtype == "datetime64[ns]"
    assert source.variable("2m_temperature").unit == "K"
    assert source.variable("2m_temperature").missing is None, "xarray's NaN is no number to compare with"


def test_a_static_field_alone_is_a_sample_axis_of_its_own(tmp_path: Path) -> None:
    write_weather(tmp_path / "era5")
    alone = bound(open(tmp_path / "era5"), Field("land_sea_mask"))
    assert (alone.dim, alone.records) == ("latitude", 6)


@pytest.mark.parametrize(
    ("fields", "window", "words"),
    [
        ((Field("2m_temperature"), Field("land_sea_mask", at=(0,))), Window("time", 2), "it is static, leave `at`"),
        ((Field("2m_temperature"), Field("land_sea_mask", channels=(0,))), None, "it is static"),
        ((Field("geopotential", channels=("925",)),), None, r"no channel '925' along 'level'; it has 500, 700, 850"),
        ((Field("geopotential", channels=(3,)),), None, "no channel 3 along"),
        ((Field("geopotential", channels=(-1,)),), None, "no channel -1 along"),
        ((Field("geopotential", channels=()),), None, r"it has no channels \(\)"),
        ((Field("geopotential", at=(0,), channels=(0,)),), Window("level", 2), "the window moves along axis 1"),
    ],
)
def test_what_channels_and_static_fields_cannot_be(
    tmp_path: Path, fields: tuple[Field, ...], window: Window | None, words: str
) -> None:
    write_weather(tmp_path / "era5")
    with pytest.raises(InputError, match=words):
        bound(open(tmp_path / "era5"), *fields, window=window)


def test_a_static_field_of_another_grid_is_refused(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "z", mode="w")
    group.create_array("t", data=np.zeros((5, 4, 3), "f4"), dimension_names=["time", "y", "x"])
    group.create_array("mask", data=np.zeros((4, 2), "f4"), dimension_names=["y", "x"])
    with pytest.raises(InputError, match=r"'mask' has sample axis y .*must be aligned; a static field"):
        bound(open(tmp_path / "z"), Field("t"), Field("mask"))


def test_names_with_dots_and_slashes_and_files_in_between(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "z", mode="w", zarr_format=2)
    for name in ("t.2m", "surface/t.2m", ".hidden/t", "_build/t"):
        array = group.create_array(name, data=np.arange(6, dtype="f4").reshape(3, 2))
        array.attrs["_ARRAY_DIMENSIONS"] = ["time", "x"]
    (tmp_path / "z" / "README.md").write_text("not Zarr")
    source = open(tmp_path / "z")
    assert sorted(source.variables) == ["surface/t.2m", "t.2m"]
    assert bound(source, Field("surface/t.2m")).inputs["x"][0].shape == (1, 2)


# the reader


def read_as_declared(source: Source, sample: BoundSample) -> None:
    """Every sample, against numpy slices of the stored arrays."""
    ids = sample.samples(np.arange(sample.records))
    reader = Reader(source, sample, threads=1)
    try:
        slot = reader.read(ids[::-1].copy())
    finally:
        reader.close()
    for row, number in enumerate(ids[::-1]):
        record, start = divmod(int(number), sample.starts)
        expected = np.concatenate([delivered(cut, record, start) for cut in sample.inputs["x"]])
        np.testing.assert_array_equal(slot.inputs["x"][row], expected)


def test_the_reader_delivers_weather_with_static_fields_and_levels(tmp_path: Path) -> None:
    write_weather(tmp_path / "era5")
    source = open(tmp_path / "era5")
    fields = (
        Field("2m_temperature", at=(2, 0)),
        Field("land_sea_mask"),
        Field("geopotential", at=(1,), channels=("850", 0)),
    )
    read_as_declared(source, bound(source, *fields, window=Window("time", 3)))


@pytest.mark.parametrize("ensembles", [1, 2])
def test_the_reader_delivers_anemoi_channels(tmp_path: Path, ensembles: int) -> None:
    write_anemoi(tmp_path / "an.zarr", ensembles=ensembles)
    source = open(tmp_path / "an.zarr")
    fields = (Field("msl", at=(0, 1)), Field("data", at=(1,), channels=("10u", "2t")), Field("latitudes"))
    read_as_declared(source, bound(source, *fields, window=Window("time", 2)))


def test_several_channels_of_one_array_decode_its_chunk_once(tmp_path: Path) -> None:
    write_anemoi(tmp_path / "an.zarr")
    source = open(tmp_path / "an.zarr")
    reader = Reader(source, bound(source, Field("msl"), Field("2t"), Field("10u")), threads=1)
    try:
        reader.read(np.array([5, 6, 5]))
        assert reader.counters.decodes == 2
    finally:
        reader.close()


# CF


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(
    ("dtype", "encoding", "missing"),
    [
        ("f4", {"_FillValue": 1e20}, float(np.float32(1e20))),
        ("f4", {"_FillValue": np.nan}, None),
        ("f8", {"missing_value": -999.25}, -999.25),
        ("i2", {"_FillValue": -1}, -1),
        ("f4", {"dtype": "i2", "scale_factor": 0.5, "_FillValue": -9}, -9),
        ("f4", {}, None),
    ],
)
def test_missing_values_as_xarray_writes_them(
    tmp_path: Path, zarr_format: Any, dtype: str, encoding: dict[str, Any], missing: float | None
) -> None:
    import xarray as xr

    data = xr.Dataset({"a": (("time", "x"), np.ones((4, 3), dtype))})
    data["a"].encoding = encoding
    data.to_zarr(tmp_path / "z", zarr_format=zarr_format)
    found = open(tmp_path / "z").variable("a").missing
    assert found == missing
    assert type(found) is type(missing)


def test_the_fill_value_that_a_library_chose_is_no_missing_value(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "z", mode="w", zarr_format=2)
    group.create_array("counts", data=np.zeros((4, 3), "i2"))
    group.create_array("rain", data=np.zeros((4, 3), "f4"))
    source = open(tmp_path / "z")
    assert source.variable("counts").missing is None
    assert source.variable("rain").missing is None


def test_a_missing_value_is_compared_as_the_array_holds_it(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "z", mode="w")
    group.create_array("a", data=np.zeros((4, 3), "f4")).attrs["missing_value"] = 1e20
    group.create_array("b", data=np.zeros((4, 3), "u1")).attrs["missing_value"] = [-1]
    source = open(tmp_path / "z")
    assert source.variable("a").missing == float(np.float32(1e20)) != 1e20
    assert source.variable("b").missing is None, "no byte is -1"


def test_unsigned_values_in_signed_bytes_are_refused(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "z", mode="w")
    group.create_array("a", data=np.zeros((4, 3), "i1")).attrs["_Unsigned"] = "true"
    with pytest.raises(InputError, match="would be read as negative"):
        bound(open(tmp_path / "z"), Field("a"))


def times(path: Path, values: Any, **attributes: Any) -> Source:
    group = zarr.open_group(path, mode="w")
    group.create_array("time", data=values, dimension_names=["time"]).attrs.update(attributes)
    return open(path)


@settings(deadline=None)
@given(
    hours=st.lists(st.integers(0, 10**6), min_size=1, max_size=8),
    first=st.dates(datetime.date(1700, 1, 1), datetime.date(2100, 1, 1)),
)
def test_hours_since_any_day(hours: list[int], first: datetime.date) -> None:
    array = zarr.create_array({}, data=np.array(hours), attributes={"units": f"hours since {first} 00:00:00"})
    expected = np.datetime64(first, "h") + np.array(hours).astype("m8[h]")
    np.testing.assert_array_equal(decoded(read_variable("time", array)), expected.astype("M8[ns]"))


def test_times_by_their_dimension(tmp_path: Path) -> None:
    source = times(tmp_path / "z", np.array([0, 6]), units="hours since 2001-01-01")
    assert source.coordinate("time").tolist() == np.array(["2001-01-01T00", "2001-01-01T06"], "M8[ns]").tolist()


def test_calendars_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    source = times(tmp_path / "z", np.arange(3), units="days since 2001-01-01", calendar="360_day")
    with pytest.raises(InputError, match="360_day"):
        source.coordinate("time")
    broken = times(tmp_path / "y", np.arange(3), units="days since the flood")
    with pytest.raises(InputError, match="the flood"):
        broken.coordinate("time")
    with pytest.raises(InputError, match="no coordinate 'day'; variables on that dimension alone: none"):
        source.coordinate("day")


# anemoi


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """An anemoi data set."""
    path = tmp_path_factory.mktemp("anemoi") / "an.zarr"
    write_anemoi(path)
    return open(path)


@pytest.mark.filterwarnings("ignore:The data type:zarr.errors.UnstableSpecificationWarning")
@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("ensembles", [1, 2])
def test_an_anemoi_data_set(tmp_path: Path, zarr_format: Any, ensembles: int) -> None:
    values = write_anemoi(tmp_path / "an.zarr", zarr_format, ensembles)
    source = open(tmp_path / "an.zarr")
    assert source.channels == {"data": NAMES}
    assert source.absent["time"].tolist() == [3, 11]
    assert source.coordinate("time")[1] == np.datetime64("2021-03-01T06")
    fields = (Field("msl", at=(0, 1)), Field("data", at=(1,), channels=("10u", "2t"), name="both"), Field("latitudes"))
    sample = bound(source, *fields, window=Window("time", 2))
    msl, both, latitude = sample.inputs["x"]
    assert (msl.name, msl.channels, msl.shape) == ("msl", (1,), (2 * ensembles, 10))
    assert (both.channels, both.shape) == ((2, 0), (2 * ensembles, 10))
    assert msl.variable is both.variable, "one stored array, so that its chunk is decoded once"
    assert (latitude.static, latitude.shape) == (True, (1, 10))
    np.testing.assert_array_equal(delivered(msl, 5, 0), values[5:7, 1].reshape(-1, 10))
    np.testing.assert_array_equal(delivered(both, 5, 0), values[6, [2, 0]].reshape(-1, 10))
    whole = bound(source, Field("data")).inputs["x"][0]
    assert (whole.channels, whole.shape) == (None, (3 * ensembles, 10))


def test_samples_that_read_a_missing_date_are_left_out(tmp_path: Path) -> None:
    write_anemoi(tmp_path / "an.zarr", missing=(3, 11))
    source = open(tmp_path / "an.zarr")
    sample = bound(source, Field("2t", at=(0, 2)), Field("msl", at=(0,)), window=Window("time", 3))
    assert sample.unreadable.tolist() == [1, 3, 9, 11]
    ids = sample.samples(np.arange(HOURS))
    assert ids.tolist() == [i for i in range(HOURS - 2) if i not in (1, 3, 9, 11)]
    assert sample.left_out(np.arange(HOURS)) == 4
    assert sample.left_out(np.arange(4, 9)) == 0


@settings(deadline=None)
@given(st.sets(st.integers(0, HOURS - 1)), st.sets(st.integers(0, 4), min_size=1), st.sets(st.integers(0, HOURS - 1)))
def test_no_sample_reads_a_missing_date_and_no_other_is_lost(
    series: Source, missing: set[int], at: set[int], split: set[int]
) -> None:
    source = replace(series, absent={"time": np.array(sorted(missing), np.int64)})
    sample = bound(source, Field("2t", at=tuple(sorted(at))), window=Window("time", 5))
    records = np.array(sorted(split), np.int64)
    inside = [i for i in range(HOURS - 4) if set(range(i, i + 5)) <= split]
    good = [i for i in inside if not {i + step for step in at} & missing]
    assert sample.samples(records).tolist() == good
    assert sample.left_out(records) == len(inside) - len(good)


def test_anemoi_statistics_are_shown_as_theirs(tmp_path: Path) -> None:
    values = write_anemoi(tmp_path / "an.zarr")
    declared = anemoi.statistics(open(tmp_path / "an.zarr").group)
    assert declared is not None
    assert declared["variables"]["msl"]["mean"] == pytest.approx(float(np.nanmean(values[:, 1].astype(float))))
    assert declared["period"] == ["2021-03-01T00:00:00", "2021-03-05T18:00:00"]
    write_weather(tmp_path / "era5")
    assert anemoi.statistics(open(tmp_path / "era5").group) is None


def test_anemoi_names_are_listed_and_early_versions_refused(tmp_path: Path) -> None:
    write_anemoi(tmp_path / "an.zarr")
    source = open(tmp_path / "an.zarr")
    with pytest.raises(InputError, match=r"no variable 'q'; it has data, .*2t, msl, 10u"):
        bound(source, Field("q"))
    with pytest.raises(InputError, match="'2t' is a channel of 'data'"):
        bound(source, Field("2t", channels=(0,)))
    group = zarr.open_group(tmp_path / "an.zarr")
    del group["dates"]
    group.create_array("dates", data=np.arange(HOURS + 1).astype("M8[s]"))
    with pytest.raises(InputError, match="`dates` has 21 dates and `data` 20"):
        open(tmp_path / "an.zarr")


# object stores


def test_a_bucket_reads_as_the_folder_does(s3: ObjectStorage, tmp_path: Path) -> None:
    write_weather(tmp_path / "era5")
    url = s3.upload(tmp_path / "era5", f"{s3.bucket()}/some/era5.zarr")
    source, local = open(url), open(tmp_path / "era5")
    assert (source.kind, source.snapshot, source.weak) == ("zarr", None, True)
    assert source.rests_on == "names, sizes and etags"
    assert local.rests_on == "names and sizes"
    np.testing.assert_array_equal(
        np.asarray(source.variable("geopotential").array[:]), np.asarray(local.variable("geopotential").array[:])
    )
    np.testing.assert_array_equal(source.coordinate("time"), local.coordinate("time"))


def test_changed_bytes_of_the_same_size_change_the_identity_of_a_bucket(s3: ObjectStorage, tmp_path: Path) -> None:
    write_weather(tmp_path / "era5")
    chunk = next(path for path in (tmp_path / "era5" / "geopotential").iterdir() if path.name[0] != ".")
    first = open(s3.upload(tmp_path / "era5", f"{s3.bucket()}/a")).fingerprint
    assert open(s3.upload(tmp_path / "era5", f"{s3.bucket()}/b")).fingerprint == first
    chunk.write_bytes(bytes(len(chunk.read_bytes())))
    assert open(s3.upload(tmp_path / "era5", f"{s3.bucket()}/c")).fingerprint != first


def test_icechunk_in_a_bucket_by_snapshot_tag_branch_and_time(s3: ObjectStorage) -> None:
    url = f"{s3.bucket()}/deep/repo"
    repository = icechunk.Repository.create(storage(url))
    ids = []
    for step in range(3):
        session = repository.writable_session("main")
        group = zarr.open_group(session.store)
        group.require_array("a", shape=(4, 3), dtype="i2")[:] = step
        ids.append(session.commit(f"step {step}"))
    repository.create_tag("v1", ids[0])
    repository.create_branch("trial", ids[1])
    written = {info.id: info.written_at for info in repository.ancestry(branch="main")}

    def read(reference: str | None) -> tuple[str | None, int]:
        source = open(url, reference)
        assert source.kind == "icechunk"
        return source.snapshot, int(np.asarray(source.variable("a").array[0, 0]))

    assert read(None) == (ids[2], 2)
    assert read("v1") == read(ids[0]) == (ids[0], 0)
    assert read("trial") == read(written[ids[1]].isoformat()) == (ids[1], 1)
    assert read(written[ids[1]].replace(tzinfo=None).isoformat()) == (ids[1], 1), "UTC where no zone is named"
    history = snapshots(open(url))
    assert [entry["message"] for entry in history[:3]] == ["step 2", "step 1", "step 0"]
    assert [entry["tags"] for entry in history[:3]] == [[], [], ["v1"]]
    assert [entry["branches"] for entry in history[:3]] == [["main"], ["trial"], []]
    assert open(url).rests_on == "snapshot id"
    with pytest.raises(InputError, match="no Icechunk repository with that snapshot"):
        open(url, "v2")


def test_icechunk_behind_a_file_url(tmp_path: Path) -> None:
    repository = icechunk.Repository.create(storage(tmp_path / "a repo"))
    session = repository.writable_session("main")
    zarr.open_group(session.store).create_array("a", data=np.zeros((2, 2)))
    snapshot = session.commit("one")
    source = open((tmp_path / "a repo").as_uri())
    assert (source.kind, source.snapshot) == ("icechunk", snapshot)
    assert snapshots(source)[0]["id"] == snapshot


def test_icechunk_of_a_later_format_says_what_to_install(tmp_path: Path) -> None:
    if int(icechunk.__version__.partition(".")[0]) >= 2:
        pytest.skip("this Icechunk reads it")
    icechunk.Repository.create(storage(tmp_path / "repo"))
    (tmp_path / "repo" / "repo").write_bytes(b"ICE\xf0\x9f\xa7\x8aCHUNK" + bytes(20))
    with pytest.raises(InputError, match=r"format 2.*icechunk>=2"):
        open(tmp_path / "repo")


def test_storage_of_other_clouds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "gcs" in repr(storage("gs://bucket/a/b")).lower()
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(InputError, match="set AZURE_STORAGE_ACCOUNT_NAME"):
        storage("az://container/a")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    assert "az" in repr(storage("az://container/a")).lower()
    with pytest.raises(InputError, match="no storage for https://x/y"):
        storage("https://x/y")


def test_nothing_in_a_bucket(s3: ObjectStorage) -> None:
    with pytest.raises(InputError, match="is not a Zarr group"):
        open(f"{s3.bucket()}/nothing")
    with pytest.raises(InputError, match=r"is not a Zarr group|cannot be opened"):
        open("s3://no-such-bucket-here/x")


def test_a_web_server_with_consolidated_metadata(tmp_path: Path) -> None:
    data = write_weather(tmp_path / "era5")
    with running_web(tmp_path) as root:
        source = open(f"{root}/era5")
        assert source.rests_on == "metadata alone"
        read = np.asarray(source.variable("2m_temperature").array[:])
    np.testing.assert_array_equal(read, data["2m_temperature"].values)


def test_missing_chunks_is_recorded_and_checked(tmp_path: Path) -> None:
    write_weather(tmp_path / "era5")
    assert open(tmp_path / "era5").missing_chunks == "error"
    assert open(tmp_path / "era5", missing_chunks="fill").missing_chunks == "fill"
    with pytest.raises(InputError, match="neither 'error' nor 'fill'"):
        open(tmp_path / "era5", missing_chunks="zero")
