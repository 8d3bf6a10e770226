"""Fields without the sample axis at ingest: stored whole, part of the identity, equal on append, read with samples."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import yaml

import gpuops as go
from gpuops.data.sample import Field
from gpuops.data.writing import ingest as ingest_module
from gpuops.data.writing.recipe import Recipe, StaticRecipe, Tiling, VariableRecipe
from gpuops.errors import InputError, IntegrityError
from tests.conftest import run_cli
from tests.gpuops.data.series_room import independent, series


def with_static(first: int = 0, last: int = 40) -> xr.Dataset:
    """The series with an elevation, a mask of booleans, and the width of each cell."""
    generator = np.random.default_rng(1)
    height = generator.normal(500, 100, (6, 5)).astype(np.float32)
    height[0, 0] = np.nan
    return series(first, last).assign(
        height=(("y", "x"), height, {"units": "m", "long_name": "elevation"}),
        land=(("y", "x"), generator.random((6, 5)) > 0.5),
        wet=(("time", "y", "x"), generator.random((40, 6, 5))[first:last] > 0.5),
        width=(("x",), np.arange(5, dtype=np.int16), {"scale_factor": 0.5}),
    )


@pytest.mark.parametrize("form", ["xarray", "netcdf", "hdf5", "zarr", "glob"])
def test_they_are_stored_whole_and_given_to_every_sample(tmp_path: Path, form: str) -> None:
    data: Any = with_static()
    source: Any = data
    if form == "zarr":
        data.to_zarr(tmp_path / "in.zarr", consolidated=False)
        source = str(tmp_path / "in.zarr")
    elif form == "glob":
        for part in range(2):
            with_static(part * 20, part * 20 + 20).to_netcdf(tmp_path / f"{part}.nc", engine="h5netcdf")
        source = str(tmp_path / "*.nc")
    elif form != "xarray":
        engine: Any = {"netcdf": "scipy", "hdf5": "h5netcdf"}[form]
        source = str(tmp_path / "in.nc")
        data.to_netcdf(source, engine=engine)
    stored = go.ingest(source, url=tmp_path / "s", tolerance=0.01)
    height = stored.variable("height")
    assert height.dims == ("y", "x")
    assert height.unit == "m"
    np.testing.assert_array_equal(height.array[...], data.height)
    report = stored.group[".gpuops/quality"].attrs["static"]
    assert report["height"] == {"values": 30, "missing_share": 1 / 30}  # type: ignore[index,call-overload]
    # An independent reader sees booleans as booleans.
    read = independent(tmp_path / "s")
    assert read.land.dtype == read.wet.dtype == bool
    np.testing.assert_array_equal(read.land, data.land)
    np.testing.assert_array_equal(read.wet, data.wet)
    assert stored.variable("wet").array.dtype.itemsize == 1
    np.testing.assert_array_equal(read.width, np.arange(5) * 0.5)
    module = go.ZarrDataModule(
        str(tmp_path / "s"), inputs={"x": [Field("height", raw=True)]}, targets={"y": [Field("wet", raw=True)]}
    )
    module.setup()
    batch = next(iter(module.train_dataloader()))
    np.testing.assert_array_equal(batch["inputs"]["x"][3, 0], data.height)
    np.testing.assert_array_equal(batch["targets"]["y"][3, 0], data.wet[int(batch["id"][3])])


def test_they_are_part_of_the_identity(tmp_path: Path) -> None:
    first = go.ingest(with_static(), url=tmp_path / "a")
    assert go.ingest(with_static(), url=tmp_path / "b").fingerprint == first.fingerprint
    changed = with_static()
    changed.height[3, 3] += 1
    assert go.ingest(changed, url=tmp_path / "c").fingerprint != first.fingerprint


def test_what_is_appended_brings_the_same_or_none(tmp_path: Path) -> None:
    whole = go.ingest(with_static(), url=tmp_path / "w")
    go.ingest(with_static(0, 10), url=tmp_path / "s", shard_records=40)
    go.ingest(with_static(10, 20), url=tmp_path / "s", append=True)
    static = ["height", "land", "width"]
    joined = go.ingest(with_static(20, 40).drop_vars(static), url=tmp_path / "s", append=True)
    np.testing.assert_array_equal(joined.to_xarray().wet, whole.to_xarray().wet)
    assert list(joined.group[".gpuops/quality"].attrs["static"]) == static  # type: ignore[arg-type]
    last = with_static(0, 10).assign_coords(time=with_static().time[:10] + np.timedelta64(365, "D"))
    for wrong, words in (
        (last.assign(height=last.height + 1), "static field 'height' differs"),
        (last.assign(slope=last.height), "no static field 'slope'"),
    ):
        with pytest.raises(InputError, match=words):
            go.ingest(wrong, url=tmp_path / "s", append=True)
    assert go.open(tmp_path / "s").fingerprint == joined.fingerprint


def test_a_recipe_names_them(tmp_path: Path) -> None:
    with_static().to_netcdf(tmp_path / "in.nc", engine="h5netcdf")
    recipe = {
        "url": str(tmp_path / "s"),
        "variables": {"t": {"source": f"{tmp_path}/in.nc#temperature"}},
        "static": {"z": {"source": f"{tmp_path}/in.nc#height", "unit": "metre", "fill": 0.0}},
    }
    (tmp_path / "ingest.yaml").write_text(yaml.safe_dump(recipe))
    done = run_cli("ingest", str(tmp_path / "ingest.yaml"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "static        z" in done.stdout
    z = go.open(tmp_path / "s").variable("z")
    assert (z.unit, z.fill) == ("metre", 0.0)


@pytest.mark.parametrize(
    ("static", "tiling", "words"),
    [
        ({"z": np.zeros((6, 4))}, None, "give `dims`"),
        ({"z": xr.DataArray(np.zeros((6, 4)), dims=("y", "x"))}, None, "z lies on {'y': 6, 'x': 4}, records on"),
        ({"t": xr.DataArray(np.zeros((6, 5)), dims=("y", "x"))}, None, "both called 't'"),
        ({".gpuops": xr.DataArray(np.zeros((6, 5)), dims=("y", "x"))}, None, "'.gpuops' is no name"),
        ({"z": xr.DataArray(np.zeros((6, 5), "M8[s]"), dims=("y", "x"))}, None, "give numbers"),
        ({"z": xr.DataArray(np.zeros((6, 5)), dims=("y", "x"))}, Tiling("time", "y", 2), "declare it a variable"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, static: dict[str, Any], tiling: Tiling | None, words: str
) -> None:
    variables = {"t": VariableRecipe(series().temperature)}
    fields = {name: StaticRecipe(array) for name, array in static.items()}
    with pytest.raises(InputError, match=words):
        go.ingest(Recipe(str(tmp_path / "s"), variables, static=fields, tiling=tiling))
    assert not list(tmp_path.iterdir())


def test_files_that_differ_are_refused(tmp_path: Path) -> None:
    for part in range(2):
        data = with_static(part * 20, part * 20 + 20)
        data.assign(height=data.height + part).to_netcdf(tmp_path / f"{part}.nc", engine="h5netcdf")
    with pytest.raises(InputError, match=r"height has no sample axis, but the files of .*\*.nc#height differ"):
        go.ingest(f"{tmp_path}/*.nc", url=tmp_path / "s")


def test_what_does_not_read_back_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuops.data.writing.static.StaticField.same", lambda self, array: False)
    with pytest.raises(IntegrityError, match="height did not read back"):
        go.ingest(with_static(), url=tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_what_is_left_out_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = with_static().assign(
        station=(("y",), np.array(list("abcdef"), object)),
        lone=(("band",), np.arange(3)),
        wave=("time", np.ones(40) * 1j),
    )
    data.drop_vars("wave").to_netcdf(tmp_path / "in.nc", engine="h5netcdf")
    stored = go.ingest(tmp_path / "in.nc", url=tmp_path / "s")
    assert not {"station", "lone"} & set(stored.variables)
    assert "neither on 'time' nor inside its records: lone" in caplog.text
    caplog.clear()
    again = go.ingest(data.assign(crs=((), 7)), url=tmp_path / "d")
    assert set(again.variables) == set(stored.variables)
    assert "no array of numbers: crs (int64), station (object), wave (complex128)" in caplog.text
    assert "station (object)" in caplog.text or "station (|S" in caplog.text or "station (<U" in caplog.text


@pytest.mark.parametrize("format", ["icechunk", "zarr"])
def test_an_ingest_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    whole = go.ingest(with_static(), url=tmp_path / "w", format=format, shard_records=10)
    write, calls = ingest_module._write_shard, itertools.count()

    def failing(*arguments: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return write(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(ingest_module, "_write_shard", failing)
        with pytest.raises(KeyboardInterrupt):
            go.ingest(with_static(), url=tmp_path / "s", format=format, shard_records=10)
    source = go.ingest(with_static(), url=tmp_path / "s", format=format, shard_records=10)
    assert source.fingerprint == whole.fingerprint
    np.testing.assert_array_equal(source.variable("height").array[...], with_static().height)
