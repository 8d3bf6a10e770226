"""What can be ingested: files, stores, globs and arrays; what they say about themselves is kept."""

import json
import shutil
from pathlib import Path
from typing import Any

import dask.array
import h5py
import numpy as np
import pytest
import xarray as xr
import zarr
from object_store import ObjectStorage
from series_room import independent, series

import gpuops as go
from gpuops.cli import main
from gpuops.data.census import count_chunks
from gpuops.data.writing.inputs import open_input, variables_of
from gpuops.data.writing.quality import AxisRules, Rules
from gpuops.data.writing.recipe import Axis, Recipe, VariableRecipe
from gpuops.errors import InputError, QualityError

PACKED = {"temperature": {"dtype": "i2", "scale_factor": 0.01, "add_offset": 280.0, "_FillValue": -32767}}


def netcdf(path: Path, first: int = 0, last: int = 40, **encoding: Any) -> Path:
    series(first, last).to_netcdf(path, engine="h5netcdf", encoding={**PACKED, **encoding})
    return path


def test_a_netcdf_file_needs_no_recipe(tmp_path: Path) -> None:
    file = netcdf(tmp_path / "a.nc")
    source = go.ingest(file, url=tmp_path / "s")
    temperature = source.variable("temperature")
    assert (temperature.array.dtype, temperature.scale, temperature.offset) == (np.int16, 0.01, 280.0)
    assert (temperature.missing, temperature.unit) == (-32767, "K")
    assert temperature.array.attrs["long_name"] == "air temperature"
    with xr.open_dataset(file, engine="h5netcdf") as want:
        xr.testing.assert_allclose(independent(tmp_path / "s"), want.load())
    with h5py.File(file) as raw:
        np.testing.assert_array_equal(temperature.array[:], raw["temperature"][:])


def test_a_recipe_goes_before_the_file(tmp_path: Path) -> None:
    file = netcdf(tmp_path / "a.nc")
    variable = VariableRecipe(f"{file}#temperature", ["t", "lat", "lon"], unit="degC", offset=6.85)
    source = go.ingest(Recipe(str(tmp_path / "s"), {"air": variable}))
    assert source.variable("air").dims == ("t", "lat", "lon")
    assert (source.variable("air").unit, source.variable("air").offset) == ("degC", 6.85)
    assert source.variable("air").scale == 0.01
    np.testing.assert_array_equal(independent(tmp_path / "s")["t"], series()["time"])


@pytest.mark.parametrize("engine", ["scipy", "h5netcdf"])
def test_both_kinds_of_netcdf(tmp_path: Path, engine: Any) -> None:
    series().to_netcdf(tmp_path / "a.nc", engine=engine)
    go.ingest(str(tmp_path / "a.nc"), url=tmp_path / "s")
    xr.testing.assert_equal(independent(tmp_path / "s"), series())
    with pytest.raises(InputError, match=r"no dataset 'snow'; it has .*rain"):
        open_input(f"{tmp_path / 'a.nc'}#snow")


def test_truncated_netcdf3(tmp_path: Path) -> None:
    (tmp_path / "a.nc").write_bytes(b"CDF\x01\x00")
    with pytest.raises(InputError, match="truncated or not NetCDF"):
        open_input(f"{tmp_path / 'a.nc'}#a")


def test_files_follow_one_another_whatever_date_each_counts_from(tmp_path: Path) -> None:
    netcdf(tmp_path / "a2.nc", 25, 40, time={"units": "days since 2000-01-05", "dtype": "f8"})
    netcdf(tmp_path / "a1.nc", 0, 25, time={"units": "hours since 2000-01-01"})
    source = go.ingest(tmp_path / "a*.nc", url=tmp_path / "s")
    stored = independent(tmp_path / "s")
    np.testing.assert_array_equal(stored["time"], series()["time"])
    np.testing.assert_array_equal(stored["rain"], series()["rain"])
    assert source.group[".gpuops/quality"].attrs["coordinates"] == {
        "time": {"step": 6.0, "repeated": 0, "disordered": 0, "gaps": 0}
    }
    netcdf(tmp_path / "a3.nc", 25, 40, temperature={**PACKED["temperature"], "scale_factor": 0.02})
    with pytest.raises(InputError, match=r"a3.nc and .*a1.nc differ in shape, dtype, dimensions or packing"):
        go.ingest(tmp_path / "a*.nc", url=tmp_path / "t")
    with pytest.raises(InputError, match=r"no file matches"):
        open_input(f"{tmp_path}/b*.nc#rain")


def test_unsigned_netcdf_bytes(tmp_path: Path) -> None:
    values = np.arange(250, dtype=np.uint8).reshape(50, 5)
    raw = xr.Dataset({"a": (("t", "x"), values.view(np.int8), {"_Unsigned": "true", "_FillValue": np.int8(-1)})})
    raw.to_netcdf(tmp_path / "a.nc", engine="h5netcdf")
    source = go.ingest(tmp_path / "a.nc", url=tmp_path / "s")
    np.testing.assert_array_equal(source.variable("a").array[:], values)
    assert source.variable("a").missing == 255


def test_two_values_that_mean_missing_become_one(tmp_path: Path) -> None:
    values = np.array([[1, -9, 3], [-8, 5, 6]], np.int16)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a"] = values
        file["a"].attrs.update({"_FillValue": np.int16(-9), "missing_value": np.int16(-8)})
    source = go.ingest({"a": f"{tmp_path / 'a.h5'}#a"}, url=tmp_path / "s")
    assert source.variable("a").array[:].tolist() == [[1, -9, 3], [-9, 5, 6]]


@pytest.mark.parametrize("format", ["icechunk", "zarr"])
def test_a_store_is_a_source(tmp_path: Path, format: str) -> None:
    go.ingest(series(), url=tmp_path / "s", format=format, tolerance=0.01)
    go.ingest(tmp_path / "s", url=tmp_path / "again", shard_records=7)
    xr.testing.assert_equal(independent(tmp_path / "again"), independent(tmp_path / "s"))
    assert set(variables_of(str(tmp_path / "s"))[0]) == {"rain", "temperature"}


def test_a_store_in_a_bucket_is_a_source(tmp_path: Path, s3: ObjectStorage) -> None:
    series().to_zarr(tmp_path / "z", zarr_format=3, consolidated=False)
    url = s3.upload(tmp_path / "z", f"{s3.bucket()}/z")
    go.ingest(url, url=tmp_path / "s")
    xr.testing.assert_equal(independent(tmp_path / "s"), series())


def test_arrays_of_any_kind(tmp_path: Path) -> None:
    values = series()["temperature"].to_numpy()
    lazy = dask.array.from_array(values, chunks=(7, 4, 2))
    one = go.ingest({"a": values}, url=tmp_path / "numpy")
    two = go.ingest({"a": lazy}, url=tmp_path / "dask")
    three = go.ingest(xr.DataArray(lazy, name="a", dims=("sample", "dim_1", "dim_2")), url=tmp_path / "xarray")
    assert one.fingerprint == two.fingerprint == three.fingerprint
    netcdf(tmp_path / "a.nc")
    with xr.open_dataset(tmp_path / "a.nc", engine="h5netcdf") as opened:  # read when it is indexed, not before
        go.ingest(opened[["rain"]], url=tmp_path / "lazy")
    np.testing.assert_array_equal(independent(tmp_path / "lazy")["rain"], series()["rain"])
    with pytest.raises(InputError, match="list is no source"):
        go.ingest({"a": [1, 2]}, url=tmp_path / "s")
    with pytest.raises(InputError, match="nothing says where to write"):
        go.ingest({"a": values})
    with pytest.raises(InputError, match="int cannot be ingested"):
        go.ingest(3, url=tmp_path / "s")


# missing chunks


def holed(tmp_path: Path, **options: Any) -> zarr.Array[Any]:
    """[20, 6], chunks of [2, 3]; nothing is written at rows 6 to 8, columns 3 to 6."""
    root = zarr.open_group(tmp_path / "z", mode="w")
    array = root.create_array(
        "a", shape=(20, 6), chunks=(2, 3), dtype="f4", config={"write_empty_chunks": False}, **options
    )
    values = np.arange(1, 121, dtype=np.float32).reshape(20, 6)
    values[6:8, 3:6] = array.fill_value
    array[:] = values
    return array


@pytest.mark.parametrize("shards", [None, (4, 6)])
def test_a_source_without_all_its_chunks_is_refused(tmp_path: Path, shards: Any) -> None:
    found = count_chunks(holed(tmp_path, shards=shards))
    assert (found.expected, found.absent, found.first) == (20, 1, (6, 3))
    source = {"a": f"{tmp_path / 'z'}#a"}
    with pytest.raises(QualityError, match=r"a: 1 of 20 chunks are missing from the source, the first at \[6, 3\]"):
        go.ingest(source, url=tmp_path / "s")
    assert [path.name for path in tmp_path.iterdir()] == ["z"]
    allowed = {"a": VariableRecipe(source["a"], quality=Rules(allow_missing_chunks=True))}
    stored = go.ingest(allowed, url=tmp_path / "s")
    assert stored.variable("a").array[6:8, 3:6].tolist() == [[0] * 3] * 2
    report: Any = stored.group[".gpuops/quality"].attrs["variables"]
    assert report["a"]["source_chunks"] == {"expected": 20, "absent": 1}


def test_missing_chunks_that_mean_no_data_are_missing_data(tmp_path: Path) -> None:
    holed(tmp_path, fill_value=np.nan)
    report: Any = go.ingest(tmp_path / "z", url=tmp_path / "s").group[".gpuops/quality"].attrs["variables"]
    assert report["a"]["missing_share"] == pytest.approx(0.05)
    assert report["a"]["nan_share"] == 0.05


# rules over whole variables and coordinates


def refused(tmp_path: Path, data: xr.Dataset, words: str, axis: AxisRules | None = None, **rules: Any) -> None:
    parts = {name: VariableRecipe(data[name], quality=Rules(**rules)) for name in data.data_vars}
    coordinates = {} if axis is None else {"time": Axis(quality=axis)}
    with pytest.raises(QualityError, match=words):
        go.ingest(Recipe(str(tmp_path / "s"), {str(k): v for k, v in parts.items()}, coordinates))
    assert not list(tmp_path.iterdir())


def test_duplicate_records(tmp_path: Path) -> None:
    data = series()[["temperature"]]
    data["temperature"][31] = data["temperature"][4]
    refused(tmp_path, data, r"temperature\[31\] = .*allow_duplicates false: equal to record 4", allow_duplicates=False)
    report: Any = go.ingest(data, url=tmp_path / "s").group[".gpuops/quality"].attrs["variables"]
    assert report["temperature"]["duplicate_records"] == 1


def test_nan_and_missing_are_told_apart(tmp_path: Path) -> None:
    values = np.ones((10, 10), np.float32)
    values[0, :4], values[1, :3] = np.nan, -9
    recipe = {"a": VariableRecipe(values, missing=-9)}
    report: Any = go.ingest(recipe, url=tmp_path / "s").group[".gpuops/quality"].attrs["variables"]
    assert report["a"]["nan_share"] == 0.04
    assert report["a"]["missing_share"] == pytest.approx(0.07)
    shutil.rmtree(tmp_path / "s")
    data = xr.Dataset({"a": (("time", "x"), values)})
    refused(tmp_path, data, "a: 4.00% of the source's values are NaN, max_nan allows 3.00%", max_nan=0.03)


@pytest.mark.parametrize(
    ("order", "rules", "words"),
    [
        ([0, 1, 3, 2], AxisRules(monotonic=True), r"time\[3\] = 12 breaks 'monotonic' \(1 "),
        ([0, 1, 1, 2], AxisRules(monotonic=True), r"time\[2\] = 6 breaks 'monotonic'"),
        ([0, 1, 2, 5], AxisRules(max_gap=6.0), r"time\[3\] = 30 breaks 'max_gap 6'"),
        ([0, 1, 2, 5], AxisRules(step=6.0), r"time\[3\] = 30 breaks 'step 6'"),
    ],
)
def test_gaps_disorder_and_repeated_times(tmp_path: Path, order: list[int], rules: AxisRules, words: str) -> None:
    refused(tmp_path, series().isel(time=order), words, rules)


def test_what_the_report_says_of_a_time_axis(tmp_path: Path) -> None:
    data = series().isel(time=[0, 1, 2, 3, 3, 9, 10, 8, 11, 12])
    report: Any = go.ingest(data, url=tmp_path / "s").group[".gpuops/quality"].attrs["coordinates"]
    assert report["time"] == {"step": 6.0, "repeated": 1, "disordered": 1, "gaps": 3}


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GPUOPS_LEDGER", str(tmp_path / "ledger.sqlite"))
    monkeypatch.setattr("gpuops.cli.signal.signal", lambda *arguments: None)  # this process keeps its own handlers
    for first, last, more in ((0, 20, ["--tolerance", "0.01", "--codec", "blosc-zstd"]), (20, 40, ["--append"])):
        file = netcdf(tmp_path / f"{first}.nc", first, last)
        main(["ingest", str(file), "--url", str(tmp_path / "s"), "--json", *more])
        found = json.loads(capsys.readouterr().out)
        if more == ["--append"]:
            break
        assert 0 < found["max_abs_error"]["rain"] <= 0.01
        shutil.rmtree(tmp_path / "s")
        go.ingest(file, url=tmp_path / "s")
    assert (found["records"], found["quality"]) == (40, "passed")
    np.testing.assert_array_equal(independent(tmp_path / "s")["rain"], series()["rain"])
