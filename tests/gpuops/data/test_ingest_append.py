"""Appending: data added in pieces is the data ingested at once, bit for bit, under the same fingerprint."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from object_store import ObjectStorage
from series_room import RECORDS, independent, series

import gpuops as go
from gpuops.data.source import snapshots
from gpuops.data.writing import ingest as ingest_module
from gpuops.errors import InputError, IntegrityError, QualityError

SHARD = 4


def once(path: Path, **options: Any) -> Any:
    return go.ingest(series(), url=path, shard_records=SHARD, **options)


@pytest.mark.parametrize("format", ["icechunk", "zarr"])
@pytest.mark.parametrize("cuts", [(16,), (13, 14, 27)], ids=["at a shard's edge", "inside shards"])
def test_pieces_are_the_whole(tmp_path: Path, format: str, cuts: tuple[int, ...]) -> None:
    whole = once(tmp_path / "whole", format=format)
    ends = (*cuts, RECORDS)
    go.ingest(series(0, ends[0]), url=tmp_path / "pieces", shard_records=SHARD, format=format)
    for first, last in itertools.pairwise(ends):
        pieces = go.ingest(series(first, last), url=tmp_path / "pieces", append=True)
        assert pieces.variable("rain").array.shape[0] == last
    assert pieces.fingerprint == whole.fingerprint
    xr.testing.assert_identical(independent(tmp_path / "pieces"), independent(tmp_path / "whole"))
    np.testing.assert_array_equal(independent(tmp_path / "pieces")["rain"], series()["rain"])
    np.testing.assert_array_equal(independent(tmp_path / "pieces")["time"], series()["time"])
    for kind in ("stats", "sketch", "digests", "records", "quality"):
        for name in ("rain", "temperature"):
            np.testing.assert_array_equal(pieces.meta(kind, name)[:], whole.meta(kind, name)[:])
    report = [dict(source.group[".gpuops/quality"].attrs) for source in (pieces, whole)]
    assert report[0] == report[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pieces", "whole"]


def test_one_commit_an_ingest_and_older_snapshots_stay(tmp_path: Path) -> None:
    first = go.ingest(series(0, 10), url=tmp_path / "s", shard_records=SHARD)
    second = go.ingest(series(10, 40), url=tmp_path / "s", append=True)
    assert [entry["id"] for entry in snapshots(second)][:2] == [second.snapshot, first.snapshot]
    assert len(snapshots(second)) == 3, "Icechunk's own first snapshot, and one for each ingest"
    before = go.open(tmp_path / "s", first.snapshot)
    assert before.fingerprint == first.fingerprint
    np.testing.assert_array_equal(before.to_xarray()["rain"], series(0, 10)["rain"])


def test_a_packed_series_goes_on_in_its_packing(tmp_path: Path) -> None:
    low, high = series()["temperature"].values.min(), series()["temperature"].values.max()
    part = {"temperature": go_pack(0.01, float(low), float(high))}
    go.ingest(packed(series(0, 10), part), url=tmp_path / "s", shard_records=SHARD)
    source = go.ingest(packed(series(10, 40), part), url=tmp_path / "s", append=True)
    whole = go.ingest(packed(series(), part), url=tmp_path / "w", shard_records=SHARD)
    assert source.variable("temperature").array.dtype == np.int16
    assert source.fingerprint == whole.fingerprint
    assert source.group[".gpuops/quality"].attrs["variables"] == whole.group[".gpuops/quality"].attrs["variables"]


def test_an_append_keeps_the_tolerance_of_the_store(tmp_path: Path) -> None:
    def kelvin(first: int, last: int) -> xr.Dataset:
        return series(first, last).drop_vars("rain")

    go.ingest(kelvin(0, 10), url=tmp_path / "s", tolerance=0.01)
    for tolerance in (0.1, 0.001):
        with pytest.raises(
            InputError, match=rf"packed within 0.01 in the store, not {tolerance}: leave the tolerance out"
        ):
            go.ingest(kelvin(10, 20), url=tmp_path / "s", append=True, tolerance=tolerance)
    source = go.ingest(kelvin(10, 20), url=tmp_path / "s", append=True)
    assert source.variable("temperature").array.dtype == np.int16
    assert float(np.abs(source.to_xarray().temperature - kelvin(0, 20).temperature).max()) <= 0.01
    far = kelvin(20, 30)
    with pytest.raises(QualityError, match=r"pack within 0.01"):
        go.ingest(far.assign(temperature=far.temperature + 1e4), url=tmp_path / "s", append=True)
    go.ingest(kelvin(0, 10), url=tmp_path / "f")
    with pytest.raises(InputError, match="is stored as float32, not packed: append it without pack"):
        go.ingest(kelvin(10, 20), url=tmp_path / "f", append=True, tolerance=0.01)


def go_pack(tolerance: float, low: float, high: float) -> Any:
    from gpuops.data.writing.packing import Pack

    return Pack(tolerance, low, high)


def packed(data: xr.Dataset, packs: dict[str, Any]) -> dict[str, Any]:
    from gpuops.data.writing.recipe import VariableRecipe

    return {name: VariableRecipe(data[name], pack=pack) for name, pack in packs.items()}


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda data: data.drop_vars("rain"), "also has rain"),
        (lambda data: data.rename(rain="snow"), "has no variable 'snow'"),
        (lambda data: data.assign(rain=data.rain.astype("f8")), "dtype"),
        (lambda data: data.isel(x=slice(3)), "record"),
        (lambda data: data.assign(rain=data.rain.assign_attrs(units="m")), "units"),
        (lambda data: data.assign_coords(y=np.arange(6) + 1), "coordinate 'y' differs"),
        (lambda data: data.drop_vars("time"), "coordinates"),
        (lambda data: series(8, 20), "time 48 is in the store already"),
    ],
    ids=["fewer", "other name", "dtype", "shape", "unit", "place", "no time", "again"],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path, harm: Any, words: str) -> None:
    before = go.ingest(series(0, 10), url=tmp_path / "s")
    with pytest.raises(InputError, match=words):
        go.ingest(harm(series(10, 20)), url=tmp_path / "s", append=True)
    assert go.open(tmp_path / "s").snapshot == before.snapshot
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_appending_to_nothing_or_to_a_foreign_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist, so nothing can be appended"):
        go.ingest(series(), url=tmp_path / "s", append=True)
    series().to_zarr(tmp_path / "foreign", zarr_format=3, consolidated=False)
    with pytest.raises(InputError, match="was not written by gpuops"):
        go.ingest(series(), url=tmp_path / "foreign", append=True)
    with pytest.raises(InputError, match="pass one of them"):
        go.ingest(series(), url=tmp_path / "s", append=True, overwrite=True)


@pytest.mark.parametrize("format", ["icechunk", "zarr"])
def test_a_failed_append_leaves_the_store_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    before = go.ingest(series(0, 10), url=tmp_path / "s", shard_records=SHARD, format=format)
    write = ingest_module._write_shard

    def failing(block: Any, array: Any, shard: int, first: int, last: int) -> Any:
        done = write(block, array, shard, first, last)
        if shard == 5:
            raise IntegrityError("the disk is gone")
        return done

    monkeypatch.setattr(ingest_module, "_write_shard", failing)
    with pytest.raises(IntegrityError, match="the disk is gone"):
        go.ingest(series(10, 40), url=tmp_path / "s", append=True)
    assert go.open(tmp_path / "s").fingerprint == before.fingerprint
    np.testing.assert_array_equal(independent(tmp_path / "s")["rain"], series(0, 10)["rain"])
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_bucket(tmp_path: Path, s3: ObjectStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = f"{s3.bucket()}/series/one"
    first = go.ingest(series(0, 10), url=url, shard_records=SHARD)
    second = go.ingest(series(10, 40), url=url, append=True)
    assert second.fingerprint == once(tmp_path / "local").fingerprint
    np.testing.assert_array_equal(second.to_xarray()["rain"], series()["rain"])
    with pytest.raises(InputError, match="exists: pass --overwrite"):
        go.ingest(series(), url=url)
    third = go.ingest(series(0, 10), url=url, shard_records=SHARD, overwrite=True)
    assert third.fingerprint == first.fingerprint
    assert len(snapshots(third)) == 4
    assert list((tmp_path / "cache").rglob("*.pickle")) == []
