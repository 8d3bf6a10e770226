"""Opening: what is not there or not Zarr is one clear error and leaves no trace; identity follows the content."""

from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import pytest
import xarray as xr
import zarr
from data_room import Atlas, make_recipe

from gpuops.data.source import Source, local_storage, open, snapshots
from gpuops.data.writing.ingest import ingest
from gpuops.errors import InputError


def dataset(values: Any = None) -> xr.Dataset:
    """A packed variable in hours and a float one, as a colleague would write them."""
    generator = np.random.default_rng(0)
    rain = generator.normal(10, 2, (6, 4, 5)) if values is None else values
    rain = np.round(rain, 1)
    rain[0, 0, 0] = np.nan
    packed: dict[str, Any] = {"scale_factor": 0.1, "add_offset": 5.0, "_FillValue": -999, "dtype": "int16"}
    data = xr.Dataset({"rain": (("time", "y", "x"), rain)}, {"y": np.arange(4.0)})
    data["wind"] = (("time", "y", "x"), generator.normal(size=(6, 4, 5)).astype(np.float32))
    data["rain"].attrs["units"] = "hours"
    data["rain"].encoding = packed
    return data


# what cannot be opened


@pytest.mark.parametrize("prefix", ["", "file://"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "does not exist|cannot be opened"),
        ("folder", "is not a Zarr group"),
        ("file", "is not a Zarr group|cannot be opened"),
        ("empty group", "holds no arrays"),
        ("broken", "is not a Zarr group"),
        ("array", "is not a Zarr group"),
    ],
)
def test_what_cannot_be_opened(tmp_path: Path, kind: str, words: str, prefix: str) -> None:
    path = tmp_path / "it"
    match kind:
        case "folder":
            path.mkdir()
            (path / "notes.txt").write_text("not Zarr")
        case "file":
            path.write_text("not Zarr")
        case "empty group":
            zarr.open_group(path, mode="w")
        case "broken":
            path.mkdir()
            (path / "zarr.json").write_text('{"zarr_format": 3, "node')
        case "array":
            zarr.create_array(path, data=np.zeros(3))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=words) as error:
        open(prefix + str(path))
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before, "a failed open must create nothing"


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "s3://"])
def test_unknown_urls(url: str) -> None:
    with pytest.raises(InputError, match="cannot be opened"):
        open(url)


def test_unknown_snapshots(store: Source, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no Icechunk repository with that snapshot"):
        open(store.url, "VY76P925PRY57WFEK410")
    with pytest.raises(InputError, match="is not a Zarr group"):
        open(store.url, "1CECHNKREP0F1RSTCMT0")  # every repository begins with this empty one
    with pytest.raises(InputError, match="no Icechunk repository with that snapshot"):
        open(store.url, "not an id")
    dataset().to_zarr(tmp_path / "z", consolidated=False)
    with pytest.raises(InputError, match="plain Zarr, which has no snapshots"):
        open(tmp_path / "z", "1CECHNKREP0F1RSTCMT0")
    (tmp_path / "half" / "snapshots").mkdir(parents=True)
    with pytest.raises(InputError, match="half is no Icechunk repository"):
        open(tmp_path / "half")


def test_unknown_variables_are_answered_with_a_list(store: Source) -> None:
    with pytest.raises(InputError, match="no variable 'rain'; it has altitude, latitude"):
        store.variable("rain")


# what can


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("prefix", ["", "file://"])
def test_plain_zarr_written_by_xarray(tmp_path: Path, zarr_format: Any, prefix: str) -> None:
    dataset().to_zarr(tmp_path / "z", zarr_format=zarr_format, consolidated=False)
    source = open(f"{prefix}{tmp_path / 'z'}")
    assert (source.kind, source.snapshot, source.weak) == ("zarr", None, True)
    rain = source.variable("rain")
    assert rain.dims == ("time", "y", "x")
    assert (rain.scale, rain.offset, rain.missing, rain.unit) == (0.1, 5.0, -999, "hours")
    wind = source.variable("wind")
    assert (wind.scale, wind.offset, wind.missing) == (1.0, 0.0, None)
    again = source.to_xarray()
    np.testing.assert_allclose(again["rain"].values, dataset()["rain"].values, atol=1e-6)
    assert np.isnan(again["rain"].values[0, 0, 0])
    assert again["rain"].dtype.kind == "f", "hours must not become time differences"
    assert source.meta("stats", "rain") is None
    assert snapshots(source) == []


def test_a_weak_fingerprint_follows_sizes_and_metadata(tmp_path: Path) -> None:
    def fingerprint(name: str, data: xr.Dataset) -> str:
        data.to_zarr(tmp_path / name, consolidated=False)
        return open(tmp_path / name).fingerprint

    first = fingerprint("a", dataset())
    assert fingerprint("b", dataset()) == first, "the place is no part of the identity"
    assert open(f"file://{tmp_path / 'a'}").fingerprint == first
    assert fingerprint("c", dataset(np.zeros((6, 4, 5)))) != first
    scaled = dataset()
    scaled["rain"].encoding["scale_factor"] = 0.2
    assert fingerprint("d", scaled) != first
    renamed = dataset().rename(wind="gust")
    assert fingerprint("e", renamed) != first


def test_every_source_is_read_only(store: Source, tmp_path: Path) -> None:
    dataset().to_zarr(tmp_path / "z", consolidated=False)
    for source in (store, open(tmp_path / "z"), open(f"file://{tmp_path / 'z'}")):
        assert source.store.read_only
        with pytest.raises(Exception, match=r"(?i)read.?only"):
            source.group.create_group("more")
        with pytest.raises(Exception, match=r"(?i)read.?only"):
            next(iter(source.variables.values())).array[0] = 1


def test_snapshots_newest_first_and_each_can_be_opened(atlas: Atlas, tmp_path: Path) -> None:
    first = ingest(make_recipe(atlas, tmp_path / "store"))
    repository = icechunk.Repository.open(local_storage(tmp_path / "store"))
    session = repository.writable_session("main")
    zarr.open_group(session.store)["altitude"].attrs["note"] = "second"
    second = session.commit("a note")
    newest = open(tmp_path / "store")
    assert newest.snapshot == second != first.snapshot
    assert [entry["message"] for entry in snapshots(newest)][:2] == ["a note", "an atlas"]
    assert [entry["id"] for entry in snapshots(newest)][:2] == [second, first.snapshot]
    old = open(tmp_path / "store", first.snapshot)
    assert old.snapshot == first.snapshot
    assert "note" not in old.variable("altitude").array.attrs
    assert snapshots(old)[0]["id"] == first.snapshot
