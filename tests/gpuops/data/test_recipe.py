"""A recipe that cannot be carried out: one clear InputError each, and nothing left behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml
import zarr
from data_room import Atlas, make_recipe, write_series

from gpuops.data.writing.ingest import ingest
from gpuops.data.writing.inputs import open_input
from gpuops.data.writing.recipe import Axis, axis_values, load_recipe
from gpuops.errors import InputError


def document(atlas: Atlas, url: Path) -> dict[str, Any]:
    return {
        "url": str(url),
        "variables": {
            "turbidity": {
                "source": f"{atlas.folder / 'turbidity.h5'}#group/turbidity",
                "dims": ["latitude", "longitude", "month"],
                "scale": 0.05,
                "quality": {"valid_min": 1},
            },
            "altitude": {
                "source": f"{atlas.folder / 'altitude.h5'}#/altitude",
                "dims": ["latitude", "longitude"],
                "missing": 255,
            },
        },
        "coordinates": {"month": {"first": 1, "step": 1}},
        "tiling": {"rows": "latitude", "columns": "longitude", "size": 10, "region": 2},
    }


def edit(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets a dotted key; None removes it."""

    def change(whole: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            whole = whole[parent]
        if value is None:
            del whole[last]
        else:
            whole[last] = value

    return change


def test_a_recipe_in_yaml(atlas: Atlas, tmp_path: Path) -> None:
    file = tmp_path / "ingest.yaml"
    file.write_text(yaml.safe_dump(document(atlas, tmp_path / "store")))
    recipe = load_recipe(file)
    assert recipe.variables["turbidity"].scale == 0.05
    assert recipe.variables["turbidity"].quality.valid_min == 1
    assert recipe.tiling is not None
    assert recipe.tiling.size == 10
    assert recipe.codec == "zstd"
    assert load_recipe(file, str(tmp_path / "other")).url == str(tmp_path / "other")
    source = ingest(file)
    assert source.variable("altitude").missing == 255


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edit("tilling", {"size": 10}), "yaml has no key 'tilling': did you mean 'tiling'. There are url, "),
        (edit("variables.altitude.scal", 1.0), "yaml: variables: altitude has no key 'scal': did you mean 'scale'"),
        (edit("variables.altitude.pack", {"tolerence": 1}), "altitude: pack has no key 'tolerence'.*'tolerance'"),
        (edit("variables.altitude.quality", {"valid_mni": 1}), "quality has no key 'valid_mni'.*'valid_min'"),
        (edit("variables.altitude.scale", "steep"), "scale.*steep"),
        (edit("variables.altitude.dims", 3), "dims"),
        (edit("variables", 3), "variables"),
        (edit("variables", {}), "no variables"),
        (edit("url", None), "url"),
        (edit("codec", "lzma"), "codec .lzma. is not one of zstd, blosc-lz4"),
        (edit("variables.altitude.scale", 0.0), "scale 0.0"),
        (edit("tiling.size", 0), "sizes of at least 1"),
        (edit("tiling.region", 0), "sizes of at least 1"),
        (edit("tiling.columns", "latitude"), "two dimensions"),
        (edit("variables.altitude.source", "/nowhere/a.h5#altitude"), "/nowhere/a.h5 does not exist"),
        (edit("variables.altitude.source", "package://no_such_package/a.h5#x"), "pip install no_such_package"),
        (edit("variables.altitude.source", "package://no.such.package/a.h5#x"), "pip install no.such.package"),
        (edit("variables.altitude.source", "package://numpy/a.h5#x"), "numpy/a.h5 does not exist"),
        (edit("variables.altitude.dims", ["latitude"]), r"altitude: .* has 2 dimensions, the recipe names \['lat"),
        (edit("variables.altitude.dims", ["latitude", "latitude"]), "altitude"),
        (edit("variables.altitude.missing", 256), "missing 256 is no value of uint8"),
        (edit("tiling.size", 20), None),
        (edit("tiling.size", 40), "longitude has 60 points, not a multiple of tiles of 40"),
        (edit("tiling.rows", "height"), "tiling cuts dimension 'height'"),
        (edit("tiling", None), "differ in"),
        (edit("coordinates.day", {"first": 1, "step": 1}), "dimension 'day'; the variables have latitude"),
    ],
    ids=[str(i) for i in range(26)],
)
def test_each_mistake_is_named(
    atlas: Atlas, tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str | None
) -> None:
    whole = document(atlas, tmp_path / "store")
    if words == "differ in":
        whole["variables"]["altitude"]["dims"] = ["longitude", "latitude"]
    change(whole)
    file = tmp_path / "ingest.yaml"
    file.write_text(yaml.safe_dump(whole))
    if words is None:
        ingest(file)
        return
    with pytest.raises(InputError, match=words) as error:
        ingest(file)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["ingest.yaml"], "something was left behind"


@pytest.mark.parametrize("text", ["", "[", "- 1", "word"])
def test_what_is_no_recipe_at_all(tmp_path: Path, text: str) -> None:
    file = tmp_path / "ingest.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=r"ingest.yaml"):
        load_recipe(file)
    with pytest.raises(InputError, match=r"none.yaml does not exist"):
        load_recipe(tmp_path / "none.yaml")


def test_a_truncated_file_is_told_from_another_dataset(atlas: Atlas, tmp_path: Path) -> None:
    whole = (atlas.folder / "turbidity.h5").read_bytes()
    cut = tmp_path / "cut.h5"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cut.h5 is truncated or not HDF5"):
        open_input(f"{cut}#group/turbidity")
    cut.write_text("not HDF5")
    with pytest.raises(InputError, match=r"cut.h5 is truncated or not HDF5"):
        open_input(f"{cut}#group/turbidity")
    file = atlas.folder / "turbidity.h5"
    for dataset in ("turbidity", "group", ""):
        with pytest.raises(InputError, match=f"no dataset '{dataset}'; it has group/turbidity: mend"):
            open_input(f"{file}#{dataset}")
    assert open_input(f"{file}#/group/turbidity").shape == (40, 60, 12)


def test_a_zarr_array_is_a_source_too(tmp_path: Path) -> None:
    root = zarr.open_group(tmp_path / "z", mode="w")
    root.create_array("a", data=np.arange(6, dtype=np.int16))
    assert open_input(f"{tmp_path / 'z'}#a")[2] == 2
    for missing in ("#b", ""):
        with pytest.raises(InputError, match="is not a Zarr array"):
            open_input(f"{tmp_path / 'z'}{missing}")


def test_the_same_number_of_tiles_of_other_places_is_refused(tmp_path: Path) -> None:
    # 40 x 60 and 60 x 40 points are 24 tiles each, but tile 3 of the one is not where tile 3 of the other is.
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a"], file["b"] = np.zeros((40, 60), np.uint8), np.zeros((60, 40), np.uint8)
    variables = {name: {"source": f"{tmp_path / 'a.h5'}#{name}", "dims": ["lat", "lon"]} for name in "ab"}
    file = tmp_path / "ingest.yaml"
    tiling = {"rows": "lat", "columns": "lon", "size": 10}
    file.write_text(yaml.safe_dump({"url": str(tmp_path / "s"), "variables": variables, "tiling": tiling}))
    with pytest.raises(InputError, match=r"differ in their length along 'lat': \{'a': 40, 'b': 60\}"):
        ingest(file)
    variables["b"]["dims"] = ["other", "lon"]
    file.write_text(yaml.safe_dump({"url": str(tmp_path / "s"), "variables": variables}))
    with pytest.raises(InputError, match=r"differ in their number of samples: \{'a': 40, 'b': 60\}"):
        ingest(file)


@pytest.mark.parametrize("values", [np.zeros((0, 2, 2), np.uint8), np.zeros((3, 2), "S2"), np.zeros(3, "c8")])
def test_sources_that_hold_no_numbers(tmp_path: Path, values: Any) -> None:
    with pytest.raises(InputError, match=r"a: .*give numbers"):
        ingest(write_series(tmp_path, values))
    assert [path.name for path in tmp_path.iterdir()] == ["series.h5"]


def test_a_variable_named_like_a_coordinate(atlas: Atlas, tmp_path: Path) -> None:
    recipe = make_recipe(atlas, tmp_path / "store")
    recipe.variables["region"] = recipe.variables["altitude"]
    with pytest.raises(InputError, match="both called 'region'"):
        ingest(recipe)
    assert not list(tmp_path.iterdir())


def test_axis_values() -> None:
    whole = axis_values(Axis(1, 1), 12)
    assert whole.dtype == np.int32
    assert whole.tolist() == list(range(1, 13))
    parts = axis_values(Axis(20.0, -0.5), 3)
    assert parts.dtype == np.float64
    assert parts.tolist() == [20, 19.5, 19]
