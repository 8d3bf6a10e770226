"""Ingest: what is stored is the source, proved by other readers; a failure leaves nothing behind."""

import itertools
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import h5py
import numpy as np
import numpy.typing as npt
import pytest
import xarray as xr
import zarr
from data_room import HEIGHT, SCALE, SEA, TILE, Atlas, change, make_recipe, write_series

import gpuops as go
from gpuops.data.reading.shard import Layout
from gpuops.data.source import Source
from gpuops.data.writing import ingest as ingest_module
from gpuops.data.writing.ingest import ingest
from gpuops.data.writing.quality import Rules
from gpuops.data.writing.recipe import Axis, Recipe, Tiling, VariableRecipe
from gpuops.drift import Sketch
from gpuops.errors import InputError, IntegrityError, QualityError


def heights(atlas: Atlas) -> npt.NDArray[np.float64]:
    """Physical altitude by [tile, y, x], the sea as NaN."""
    return np.where(atlas.heights == SEA, np.nan, atlas.heights * HEIGHT - 450.0)


# what is stored


def test_stored_values_equal_the_source(store: Source, atlas: Atlas) -> None:
    root = zarr.open_group(store.store, mode="r")  # zarr-python's own decoder
    np.testing.assert_array_equal(root["turbidity"][:], atlas.tiles)  # type: ignore[index]
    np.testing.assert_array_equal(root["altitude"][:], atlas.heights)  # type: ignore[index]


def test_physical_values_through_xarray(store: Source, atlas: Atlas) -> None:
    data = go.open(store.url).to_xarray()
    assert data["turbidity"].dims == ("tile", "month", "y", "x")
    assert data["altitude"].dims == ("tile", "y", "x")
    np.testing.assert_allclose(data["turbidity"].values, atlas.tiles * SCALE, atol=1e-5)
    np.testing.assert_allclose(data["altitude"].values, heights(atlas), atol=1e-3)
    assert np.isnan(data["altitude"].values).sum() == (atlas.heights == SEA).sum()
    by_hand = xr.open_zarr(store.store, consolidated=False)
    xr.testing.assert_identical(by_hand, data)


def test_layout_and_cf_attributes(store: Source) -> None:
    turbidity, altitude = store.variable("turbidity").array, store.variable("altitude").array
    assert turbidity.metadata.zarr_format == 3
    assert turbidity.chunks == (1, 12, TILE, TILE), "a record is a chunk"
    assert turbidity.shards == (1, 12, TILE, TILE), "24 tiles make as many shards as can be written in parallel"
    assert all(part["configuration"].get("checksum") for part in inner_codecs(turbidity) if part["name"] == "zstd")
    assert dict(altitude.attrs) == {
        "scale_factor": HEIGHT,
        "add_offset": -450.0,
        "units": "m",
        "_FillValue": SEA,
        "gpuops_fill": 0.0,
        "coordinates": "latitude longitude region",
    }
    assert turbidity.attrs["long_name"] == "turbidity of the air"
    assert "_FillValue" not in turbidity.attrs
    assert dict(store.group.attrs) == {"title": "an atlas", "Conventions": "CF-1.10"}


def inner_codecs(array: zarr.Array[Any]) -> list[dict[str, Any]]:
    (sharding,) = array.metadata.to_dict()["codecs"]  # type: ignore[misc]
    return sharding["configuration"]["codecs"]  # type: ignore[call-overload,index,no-any-return]


def test_coordinates_and_regions(store: Source) -> None:
    data = store.to_xarray()
    assert data["month"].values.tolist() == list(range(1, 13))
    assert set(data["turbidity"].coords) == {"month", "latitude", "longitude", "region"}
    for tile in (0, 5, 6, 23):
        row, column = divmod(tile, 6)
        # The middle of a tile lies between its fifth and sixth point.
        assert data["latitude"].values[tile] == pytest.approx(20 - 0.5 * (row * TILE + 4.5))
        assert data["longitude"].values[tile] == pytest.approx(-10 + 0.25 * (column * TILE + 4.5))
        assert data["region"].values[tile] == row // 2 * 3 + column // 2
    assert data["latitude"].attrs["units"] == "degrees_north"


def test_a_single_region_is_still_written(atlas: Atlas, tmp_path: Path) -> None:
    # All its values are the fill value, and a chunk of nothing else is what zarr leaves out.
    recipe = make_recipe(atlas, tmp_path / "store", tiling=Tiling("latitude", "longitude", TILE, region=6))
    region = ingest(recipe).variable("region").array
    assert region[:].tolist() == [0] * 24
    assert region.nchunks_initialized == region.nchunks


def test_statistics_and_histograms_are_numpy(store: Source, atlas: Atlas) -> None:
    rows = np.asarray(store.meta("stats", "altitude")[:])  # type: ignore[index]
    assert rows.shape == (24, 1, 5)
    for tile, values in enumerate(heights(atlas)):
        data = values[~np.isnan(values)]
        want = [data.size, data.mean(), ((data - data.mean()) ** 2).sum(), data.min(), data.max()]
        np.testing.assert_allclose(rows[tile, 0], want, rtol=1e-9)
    months = np.asarray(store.meta("stats", "turbidity")[:])  # type: ignore[index]
    np.testing.assert_allclose(months[..., 1], (atlas.tiles * SCALE).mean((2, 3)), rtol=1e-9)
    sketch = store.meta("sketch", "altitude")
    assert sketch is not None
    stored = atlas.heights[atlas.heights != SEA]
    np.testing.assert_array_equal(np.asarray(sketch[:]).sum(axis=0), np.bincount(stored, minlength=256))
    assert (sketch.attrs["lo"], sketch.attrs["hi"]) == (-0.5, 255.5)


def test_progress_counts_every_byte(atlas: Atlas, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    ingest(make_recipe(atlas, tmp_path / "store"), progress=lambda done, total: seen.append((done, total)))
    total = atlas.turbidity.nbytes + atlas.altitude.nbytes
    assert len(seen) == 48
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (total, total)


# untiled data


@pytest.mark.parametrize("codec", ["zstd", "none"])
@pytest.mark.parametrize("dtype", ["int16", ">i2", "uint16", "int32", "float32", ">f4"])
def test_untiled_data(tmp_path: Path, dtype: str, codec: str) -> None:
    values = np.random.default_rng(0).integers(-300 if "u" not in dtype else 0, 300, (37, 4, 5)).astype(dtype)
    if values.dtype.kind == "f":
        values[3] = np.nan
        values[:, 1, 1] = np.nan
    recipe = write_series(tmp_path, values, scale=0.5, offset=2.0, unit="hours")
    recipe = replace(recipe, codec=codec, coordinates={"time": Axis(0.0, 6.0, "hours"), "y": Axis(0.5, 1)})
    source = ingest(recipe)
    stored = source.variable("a").array
    np.testing.assert_array_equal(stored[:], values)
    assert stored.dtype == values.dtype.newbyteorder("<"), "kernels read little-endian numbers"
    assert stored.shards == (2, 4, 5)
    data = source.to_xarray()["a"]
    assert data.dims == ("time", "y", "x")
    np.testing.assert_allclose(data.values, values.astype(np.float64) * 0.5 + 2, rtol=1e-6)
    assert data["time"].values[-1] == 216
    assert data["y"].values.tolist() == [0.5, 1.5, 2.5, 3.5]
    rows = np.asarray(source.meta("stats", "a")[:])  # type: ignore[index]
    assert rows[..., 0].sum() == np.isfinite(values).sum()


def test_one_axis_alone(tmp_path: Path) -> None:
    values = np.arange(40, dtype=np.int16)
    source = ingest(write_series(tmp_path, values))
    np.testing.assert_array_equal(source.variable("a").array[:], values)
    assert np.asarray(source.meta("stats", "a")[:])[:, 0, 1].tolist() == values.tolist()  # type: ignore[index]


def test_a_missing_value_of_floats_becomes_nan(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(20, 3, 4)).astype(np.float32)
    values[2, 1, 1] = values[7] = -9999
    source = ingest(write_series(tmp_path, values, missing=-9999, quality=Rules(max_missing=0.06)))
    want = np.where(values == -9999, np.nan, values)
    np.testing.assert_array_equal(source.variable("a").array[:], want)
    np.testing.assert_array_equal(source.to_xarray()["a"].values, want)
    assert np.asarray(source.meta("stats", "a")[:])[..., 0].sum() == 19 * 12 - 1  # type: ignore[index]
    strict = write_series(tmp_path / "strict", values, missing=-9999, quality=Rules(max_missing=0.05))
    with pytest.raises(QualityError, match=r"a: 5.42% of the values are missing"):
        ingest(strict)


def test_variables_of_different_dimensions_share_coordinates(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["grid"] = np.ones((20, 3, 4), np.float32)
        file["station"] = np.ones((20, 7), np.float32)
    variables = {
        "grid": VariableRecipe(f"{tmp_path / 'a.h5'}#grid", ["time", "y", "x"]),
        "station": VariableRecipe(f"{tmp_path / 'a.h5'}#station", ["time", "station_id"]),
    }
    recipe = Recipe(str(tmp_path / "store"), variables, {"station_id": Axis(1, 1)})
    assert ingest(recipe).to_xarray()["station_id"].values.tolist() == list(range(1, 8))


@pytest.mark.parametrize(("shards", "tile"), [(1, 5), (4, 20), (7, 5), (1000, 20)])
def test_shards_are_whole_whatever_their_number(
    atlas: Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int, tile: int
) -> None:
    monkeypatch.setattr("gpuops.data.writing.shards.SHARDS", shards)
    calls: list[tuple[str, int, int]] = []
    write = ingest_module._write_shard

    def watched(block: Any, array: Any, shard: int, first: int, last: int) -> Any:
        calls.append((block.name, first, last))
        per = array.shards[0]
        assert first % per == 0, "a task wrote into a shard of another"
        assert last == min(first + per, array.shape[0])
        return write(block, array, shard, first, last)

    monkeypatch.setattr(ingest_module, "_write_shard", watched)
    recipe = make_recipe(atlas, tmp_path / "store", tiling=Tiling("latitude", "longitude", tile))
    source = ingest(recipe)
    data = xr.open_zarr(source.store, consolidated=False, mask_and_scale=False)["turbidity"].values
    columns = 60 // tile
    for i, record in enumerate(data):
        row, column = divmod(i, columns)
        part = atlas.turbidity[row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
        np.testing.assert_array_equal(record, np.moveaxis(part, 2, 0))
    covered = sorted((first, last) for name, first, last in calls if name == "turbidity")
    assert [first for first, _ in covered] == [0, *(last for _, last in covered[:-1])]
    assert covered[-1][1] == len(data)


# identity


def test_the_same_data_has_the_same_fingerprint_on_any_number_of_threads(
    store: Source, atlas: Atlas, tmp_path: Path
) -> None:
    for threads in (1, 4):
        with dask.config.set(num_workers=threads):
            again = ingest(make_recipe(atlas, tmp_path / str(threads)))
        assert again.fingerprint == store.fingerprint
        assert again.weak is False
        assert again.snapshot != store.snapshot, "snapshot ids are not an identity of the data"


@pytest.mark.parametrize("variable", ["turbidity", "altitude"])
def test_one_changed_value_changes_the_fingerprint(store: Source, atlas: Atlas, tmp_path: Path, variable: str) -> None:
    folder = tmp_path / "atlas"
    shutil.copytree(atlas.folder, folder)
    with h5py.File(folder / f"{variable}.h5", "r+") as file:
        data = file["group/turbidity" if variable == "turbidity" else "altitude"]
        data[(17, 31, *(5,) * (data.ndim - 2))] ^= 1
    other = ingest(make_recipe(replace(atlas, folder=folder), tmp_path / "store"))
    assert other.fingerprint != store.fingerprint


@pytest.mark.parametrize(
    "edit",
    [
        lambda recipe: change(recipe, "altitude", scale=28.5),
        lambda recipe: change(recipe, "altitude", missing=254),
        lambda recipe: change(recipe, "altitude", unit="ft"),
        lambda recipe: replace(recipe, tiling=Tiling("latitude", "longitude", TILE, 3)),
        lambda recipe: replace(recipe, coordinates={**recipe.coordinates, "month": Axis(2, 1, "month")}),
    ],
    ids=["scale", "missing", "unit", "region", "coordinate"],
)
def test_a_changed_meaning_changes_the_fingerprint(
    store: Source, atlas: Atlas, tmp_path: Path, edit: Callable[[Recipe], Recipe]
) -> None:
    assert ingest(edit(make_recipe(atlas, tmp_path / "store"))).fingerprint != store.fingerprint


def test_a_title_is_no_part_of_the_identity(store: Source, atlas: Atlas, tmp_path: Path) -> None:
    assert ingest(make_recipe(atlas, tmp_path / "s", title="other")).fingerprint == store.fingerprint


# failures leave nothing behind


def test_a_broken_rule_leaves_no_store(atlas: Atlas, tmp_path: Path) -> None:
    stored = np.unravel_index(int((atlas.tiles * SCALE > 8.5).argmax()), atlas.tiles.shape)
    recipe = change(make_recipe(atlas, tmp_path / "store"), "turbidity", quality=Rules(valid_max=8.5))
    with pytest.raises(QualityError, match="nothing was committed") as error:
        ingest(recipe)
    value = atlas.tiles[stored] * SCALE
    assert f"turbidity{[int(i) for i in stored]} = {value:g} breaks 'valid_max 8.5'" in str(error.value)
    assert list(tmp_path.iterdir()) == [], "a store or a temporary directory was left behind"


def test_infinity_is_reported_with_its_place(tmp_path: Path) -> None:
    values = np.ones((20, 3, 4), np.float32)
    values[13, 2, 1] = np.inf
    with pytest.raises(QualityError, match=r"a\[13, 2, 1\] = inf breaks 'finite'"):
        ingest(write_series(tmp_path, values))
    assert [path.name for path in tmp_path.iterdir()] == ["series.h5"]


def damaged_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zarr stores something else than it was given."""
    write = zarr.Array.__setitem__

    def wrong(self: Any, selection: Any, value: Any) -> None:
        write(self, selection, value ^ (np.arange(value.size).reshape(value.shape) == value.size // 2))

    monkeypatch.setattr(zarr.Array, "__setitem__", wrong)


def lost_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zarr says that it wrote, and did not."""
    monkeypatch.setattr(zarr.Array, "__setitem__", lambda *arguments: None)


def damaged_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Layout.decode

    def wrong(self: Layout, encoded: Any, out: npt.NDArray[Any]) -> None:
        decode(self, encoded, out)
        out[..., -1] += 1

    monkeypatch.setattr(Layout, "decode", wrong)


def failed_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Layout, encoded: Any, out: npt.NDArray[Any]) -> None:
        raise ValueError("checksum differs")

    monkeypatch.setattr(Layout, "decode", wrong)


@pytest.mark.parametrize("harm", [damaged_write, lost_write, damaged_decode, failed_checksum])
def test_what_does_not_read_back_is_not_committed(
    atlas: Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[pytest.MonkeyPatch], None]
) -> None:
    harm(monkeypatch)
    with pytest.raises(IntegrityError, match=r"turbidity|altitude"):
        ingest(make_recipe(atlas, tmp_path / "store"))
    assert list(tmp_path.iterdir()) == []


def test_a_failing_task_waits_for_those_that_still_write(
    atlas: Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, remove = ingest_module._write_shard, shutil.rmtree
    running, removing = threading.Event(), threading.Event()
    started = itertools.count()
    overtaken: list[bool] = []

    def watched_remove(*arguments: Any, **options: Any) -> None:
        removing.set()
        remove(*arguments, **options)

    def uneven(block: Any, array: Any, shard: int, first: int, last: int) -> Any:
        if next(started) == 0:
            assert running.wait(10)
            raise IntegrityError("the disk is gone")
        running.set()
        overtaken.append(removing.wait(1.0))  # as long as a slow disk takes
        return write(block, array, shard, first, last)

    monkeypatch.setattr(ingest_module, "_write_shard", uneven)
    monkeypatch.setattr("gpuops.atomic.shutil.rmtree", watched_remove)
    with dask.config.set(num_workers=2), pytest.raises(IntegrityError, match="the disk is gone"):
        ingest(make_recipe(atlas, tmp_path / "store"))
    assert overtaken == [False], "the directory was removed while a task was writing into it"
    assert list(tmp_path.iterdir()) == []


# overwriting


def test_an_existing_store_is_kept_unless_told_otherwise(atlas: Atlas, tmp_path: Path) -> None:
    first = ingest(make_recipe(atlas, tmp_path / "store"))
    with pytest.raises(InputError, match="exists: pass --overwrite"):
        ingest(make_recipe(atlas, tmp_path / "store"))
    scaled = change(make_recipe(atlas, tmp_path / "store"), "altitude", scale=2.0)
    second = ingest(scaled, overwrite=True)
    assert second.fingerprint != first.fingerprint
    assert go.open(tmp_path / "store").variable("altitude").scale == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("harm", ["rule", "read-back"])
def test_a_failed_overwrite_leaves_the_old_store_as_it_was(
    atlas: Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    first = ingest(make_recipe(atlas, tmp_path / "store"))
    before = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()}
    recipe = make_recipe(atlas, tmp_path / "store")
    if harm == "rule":
        recipe = change(recipe, "altitude", quality=Rules(max_missing=0.0))
    else:
        damaged_decode(monkeypatch)
    with pytest.raises((QualityError, IntegrityError)):
        ingest(recipe, overwrite=True)
    assert {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert go.open(tmp_path / "store").snapshot == first.snapshot


def test_what_is_no_store_is_never_overwritten(atlas: Atlas, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    for target in (home, home / "thesis.tex"):
        with pytest.raises(InputError, match="is not a store, so it is not overwritten"):
            ingest(make_recipe(atlas, target), overwrite=True)
    assert (home / "thesis.tex").read_text() == "years of work"
    (home / "thesis.tex").unlink()
    assert ingest(make_recipe(atlas, home), overwrite=True).kind == "icechunk", "an empty folder may be filled"


def test_remote_destinations_are_refused(atlas: Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="cannot write to ftp://bucket/store"):
        ingest(make_recipe(atlas, tmp_path), url="ftp://bucket/store")
    assert list(tmp_path.iterdir()) == [], "a folder called ftp: was made"


def test_a_destination_that_cannot_be_made_is_refused(atlas: Atlas, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    recipe = make_recipe(atlas, tmp_path / "file" / "deep" / "store")
    with pytest.raises(InputError, match=r"cannot write to .*store: .*file is no directory"):
        ingest(recipe)


def test_an_option_that_there_is_not_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no option 'shard_record': did you mean 'shard_records'"):
        ingest({"a": np.zeros((4, 3))}, url=tmp_path / "s", shard_record=3)


def test_the_url_argument_wins(atlas: Atlas, tmp_path: Path) -> None:
    source = ingest(make_recipe(atlas, tmp_path / "a"), url=str(tmp_path / "b"))
    assert source.url == str(tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_histograms_cover_the_declared_bounds(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 1000, (20, 3, 4)).astype(np.int16)
    rules = Rules(valid_min=-100.0, valid_max=0.0)
    source = ingest(write_series(tmp_path, values, scale=-0.1, quality=rules))
    sketch = source.meta("sketch", "a")
    assert sketch is not None
    assert (sketch.attrs["lo"], sketch.attrs["hi"]) == (0.0, 1000.0), "a negative scale turns the bounds round"
    merged = np.asarray(sketch[:]).sum(axis=0)
    np.testing.assert_array_equal(merged, Sketch.of(values, 0.0, 1000.0).counts)
