"""OME-NGFF images against the numbers they were written from: values, patches, labels, plates, odd metadata."""

import copy
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer

from gpuops.data.datamodule import ZarrDataModule
from gpuops.data.join import open
from gpuops.data.patches import Patch
from gpuops.data.reading.reader import Reader
from gpuops.data.sample import Field, SampleSpec, bind
from gpuops.data.split import Holdout, Period
from gpuops.errors import InputError
from tests.conftest import run_cli
from tests.gpuops.data.ngff_images import group, image, plate

VERSIONS = ["0.4", "0.5"]
Array = Any


def numbers(*shape: int, seed: int = 0, high: int = 4000, dtype: Any = np.uint16) -> Array:
    return np.random.default_rng(seed).integers(1, high, shape).astype(dtype)


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("axes", "shape", "dims", "spatial"),
    [
        ("yx", (20, 17), "yx", 2),
        ("cyx", (3, 20, 17), "cyx", 2),
        ("zyx", (5, 20, 17), "zyx", 3),
        ("zyx", (1, 20, 17), "zyx", 2),
        ("czyx", (2, 5, 20, 17), "czyx", 3),
        ("tczyx", (1, 2, 5, 20, 17), "czyx", 3),
        ("tcyx", (4, 2, 20, 17), None, 2),
    ],
)
def test_an_image_and_its_levels(
    tmp_path: Path, version: str, axes: str, shape: tuple[int, ...], dims: str | None, spatial: int, shard: bool
) -> None:
    if shard and version == "0.4":
        version = "0.5"  # Zarr v2 has no shards: the case again, with other numbers
    values = numbers(*shape, seed=shard)
    image(tmp_path, values, axes, version=version, spacing={"y": 0.5, "x": 0.25, "z": 2, "t": 30}, shard=shard)
    source = open(tmp_path)
    first, second = source.variable("0"), source.variable("1")
    movie = dims is None
    assert first.dims == (tuple(axes) if dims is None else ("image", *dims))
    assert first.spatial == second.spatial == spatial
    shown = values if movie else values.reshape(1, *shape[axes.startswith("t") :])
    np.testing.assert_array_equal(first.read(), shown)
    np.testing.assert_array_equal(second.read(), shown[..., ::2, ::2])
    assert source.spacing["1"]["x"] == (0.5, "micrometer")
    assert source.spacing["0"].keys() == set(first.dims) - {"image", "c"}
    spec = SampleSpec({"x": [Field("0", raw=True)]}, {})
    with closing(Reader(source, bind(spec, source), threads=1)) as reader:
        read = reader.read(np.arange(len(shown))).inputs["x"]
    np.testing.assert_array_equal(read.reshape(shown.shape), shown)
    if movie:
        assert source.coordinate("t").tolist() == [0, 30, 60, 90]
        assert source.variable("t").unit == "second"
    else:
        assert source.coordinate("image").tolist() == [0]


@pytest.mark.parametrize("version", VERSIONS)
def test_channels_and_labels_pair_in_patches(tmp_path: Path, version: str) -> None:
    values = numbers(3, 24, 32)
    cells = numbers(24, 32, seed=1, high=5, dtype=np.int32)
    labels = {"cells": (cells, "yx"), "deep/nuclei": (cells[None] % 2, "cyx")}
    image(tmp_path, values, "cyx", version=version, channels=["DAPI", "GFP", "TRITC"], labels=labels)
    source = open(tmp_path)
    assert list(source.variables) == [
        "0",
        "1",
        "labels/cells/0",
        "labels/cells/1",
        "labels/deep/nuclei/0",
        "labels/deep/nuclei/1",
        "image",
    ]
    assert source.channels == {"0": ("DAPI", "GFP", "TRITC"), "1": ("DAPI", "GFP", "TRITC")}
    data = ZarrDataModule(
        str(tmp_path),
        inputs={"x": [Field("0", channels=("TRITC", "DAPI"), raw=True), Field("GFP", raw=True)]},
        targets={"y": [Field("labels/cells/0", raw=True)], "n": [Field("labels/deep/nuclei/0", raw=True)]},
        patch=Patch({"y": 8, "x": 16}, {"y": 2, "x": 2}),
        global_batch=6,
        threads=1,
    )
    data.setup()
    (batch,) = data.train_dataloader()
    around = np.pad(values, ((0, 0), (2, 2), (2, 2)), mode="reflect")
    for row, sample in enumerate(batch["id"].tolist()):
        y, x = 8 * (sample // 2), 16 * (sample % 2)
        np.testing.assert_array_equal(batch["inputs"]["x"][row], around[[2, 0, 1], y : y + 12, x : x + 20])
        np.testing.assert_array_equal(batch["targets"]["y"][row][0], cells[y : y + 8, x : x + 16])
        np.testing.assert_array_equal(batch["targets"]["n"][row][0], cells[y : y + 8, x : x + 16] % 2)


def test_volumes_with_labels_train(tmp_path: Path) -> None:
    values = numbers(1, 2, 8, 16, 16)
    cells = (values[0, :1] > 2000).astype(np.uint8)
    image(tmp_path, values, "tczyx", version="0.5", labels={"cells": (cells, "czyx")})

    class Segment(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Conv3d(2, 1, 3)
            self.shapes: set[tuple[int, ...]] = set()

        def training_step(self, batch: Any, index: int) -> Any:
            inside = self.net(batch["inputs"]["x"])
            self.shapes.add(tuple(inside.shape))
            return torch.nn.functional.binary_cross_entropy_with_logits(inside, batch["targets"]["y"].float())

        def validation_step(self, batch: Any, index: int) -> None: ...

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    data = ZarrDataModule(
        str(tmp_path),
        inputs={"x": [Field("0")]},
        targets={"y": [Field("labels/cells/0", raw=True)]},
        patch=Patch({"z": 4, "y": 8, "x": 8}, {"z": 1, "y": 1, "x": 1}),
        global_batch=4,
        threads=1,
    )
    model = Segment()
    quiet: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, limit_val_batches=0, **quiet).fit(model, data)
    assert model.shapes == {(4, 1, 4, 8, 8)}


FIELDS = {"B/3": 2, "A/10": 1, "A/2": 2, "C/1": 2}


@pytest.fixture(scope="module", params=VERSIONS)
def plates(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Array]]:
    """A plate of four wells with one or two fields of [1, 2, 1, 16, 16], and its images by path; read-only."""
    path = tmp_path_factory.mktemp("plate")
    fields = {
        well: [numbers(1, 2, 1, 16, 16, seed=100 * place + field) for field in range(count)]
        for place, (well, count) in enumerate(FIELDS.items())
    }
    plate(path, fields, "tczyx", version=request.param, channels=["DNA", "actin"])
    return path, {f"{well}/{i}": values for well, found in fields.items() for i, values in enumerate(found)}


def test_a_plate_is_its_fields_by_row_and_column(plates: tuple[Path, dict[str, Array]]) -> None:
    path, values = plates
    source = open(path)
    order = ["A/2/0", "A/2/1", "A/10/0", "B/3/0", "B/3/1", "C/1/0", "C/1/1"]
    assert source.variable("0").dims == ("image", "c", "z", "y", "x")
    np.testing.assert_array_equal(source.variable("0").read(), np.concatenate([values[at] for at in order]))
    assert source.variable("image").array.attrs["paths"] == order
    assert source.variable("well").array.attrs["names"] == ["A/2", "A/10", "B/3", "C/1"]
    assert source.variable("well").read().tolist() == [0, 0, 1, 2, 2, 3, 3]
    assert source.variable("field").read().tolist() == [0, 1, 0, 0, 1, 0, 1]
    assert source.channels["1"] == ("DNA", "actin")
    # What lies beside the files is read by the reader as well, in a batch.
    spec = SampleSpec({"x": [Field("actin", raw=True)]}, {"w": [Field("well", raw=True)]})
    with closing(Reader(source, bind(spec, source), threads=1)) as reader:
        slot = reader.read(np.array([5, 2]))
        assert slot.targets["w"].ravel().tolist() == [3, 1]
        np.testing.assert_array_equal(slot.inputs["x"][0], values["C/1/0"][0, 1])


def test_a_well_and_a_field_open_alone(plates: tuple[Path, dict[str, Array]]) -> None:
    path, values = plates
    well = open(path / "B" / "3")
    np.testing.assert_array_equal(well.variable("0").read(), np.concatenate([values["B/3/0"], values["B/3/1"]]))
    assert "well" not in well.variables
    assert well.variable("field").read().tolist() == [0, 1]
    np.testing.assert_array_equal(open(path / "B" / "3" / "1").variable("0").read(), values["B/3/1"])


def test_a_well_lies_in_one_split(plates: tuple[Path, dict[str, Array]]) -> None:
    path, _ = plates
    data = ZarrDataModule(
        str(path),
        inputs={"x": [Field("DNA")]},
        targets={"y": [Field("actin")]},
        holdout=Holdout("well", 0.25),
        test=Holdout("well", 0.25),
        patch=Patch({"y": 8, "x": 8}),
        global_batch=4,
        threads=1,
    )
    data.setup()
    wells = open(path).variable("well").read()
    sides = [set(wells[np.array(list(ids)) // 4].tolist()) for ids in (data.train_ids, data.val_ids, data.test_ids)]
    assert [len(side) for side in sides] == [2, 1, 1]
    assert set.union(*sides) == {0, 1, 2, 3}


def test_labels_that_not_all_images_have_are_left_out(tmp_path: Path) -> None:
    fields = {"A/1": [numbers(8, 8)], "A/2": [numbers(8, 8, seed=1)]}
    plate(tmp_path, fields, "yx", levels=1)
    image(tmp_path / "A/1/0", fields["A/1"][0], "yx", levels=1, labels={"cells": (fields["A/1"][0], "yx")})
    assert "labels/cells/0" not in open(tmp_path).variables
    image(tmp_path / "A/2/0", fields["A/2"][0], "yx", levels=1, labels={"cells": (fields["A/2"][0], "yx")})
    source = open(tmp_path)
    np.testing.assert_array_equal(source.variable("labels/cells/0").read(), source.variable("0").read())


def test_images_that_differ_are_named(tmp_path: Path) -> None:
    plate(tmp_path / "shape", {"A/1": [numbers(8, 8)], "A/2": [numbers(8, 9)]}, "yx", levels=1)
    with pytest.raises(
        InputError, match=r"A/1/0/0 and A/2/0/0 .* \[8, 8\] and \[8, 9\].*open them one by one, as .*A/1"
    ):
        open(tmp_path / "shape")
    plate(tmp_path / "names", {"A/1": [numbers(2, 8, 8)] * 2}, "cyx", levels=1, channels=["a", "b"])
    image(tmp_path / "names/A/1/1", numbers(2, 8, 8), "cyx", levels=1, channels=["b", "a"])
    with pytest.raises(InputError, match="A/1/0 has the channels a, b and A/1/1 has b, a"):
        open(tmp_path / "names")


@pytest.mark.parametrize("listed", [True, False])
def test_a_collection(tmp_path: Path, listed: bool) -> None:
    group(tmp_path, "0.5", {"bioformats2raw.layout": 3})
    values = [numbers(2, 8, 8, seed=i) for i in range(3)]
    for i, shown in enumerate(values):
        image(tmp_path / str(i), shown, "cyx", version="0.5", levels=1)
    if listed:
        group(tmp_path / "OME", "0.5", {"series": ["2", "0"]})
    source = open(tmp_path)
    order = [2, 0] if listed else [0, 1, 2]
    np.testing.assert_array_equal(source.variable("0").read(), np.stack([values[i] for i in order]))
    assert source.variable("image").array.attrs["paths"] == [str(i) for i in order]


def test_movies(tmp_path: Path) -> None:
    values, mask = numbers(6, 8, 8), numbers(8, 8, high=2)
    image(tmp_path / "one", values, "tyx", labels={"dish": (mask, "yx")}, spacing={"t": 0.5})
    data = ZarrDataModule(
        str(tmp_path / "one"),
        inputs={"x": [Field("0", raw=True), Field("labels/dish/0", raw=True)]},
        targets={},
        holdout=Period(2.0),
        global_batch=4,
        threads=1,
    )
    data.setup()
    assert list(data.val_ids) == [4, 5]
    (batch,) = data.train_dataloader()
    for row, frame in enumerate(batch["id"].tolist()):
        np.testing.assert_array_equal(batch["inputs"]["x"][row], np.stack([values[frame], mask]))
    plate(tmp_path / "many", {"A/1": [values, values + 1]}, "tyx")
    source = open(tmp_path / "many")
    assert source.variable("0").dims == ("image", "t", "y", "x")
    np.testing.assert_array_equal(source.variable("0").read(), np.stack([values, values + 1]))


def test_early_versions(tmp_path: Path) -> None:
    values = numbers(1, 2, 1, 8, 8)
    for version, axes in (("0.1", None), ("0.3", list("tczyx"))):
        path = tmp_path / version
        image(path, values, "tczyx", levels=1)
        block = {"version": version, "datasets": [{"path": "0"}], **({} if axes is None else {"axes": axes})}
        group(path, "0.4", {"multiscales": [block]})
        source = open(path)
        np.testing.assert_array_equal(source.variable("0").read(), values)
        assert source.variable("0").dims == ("image", "c", "z", "y", "x")
        assert source.spacing["0"] == {}


def test_other_conventions_that_say_multiscales_are_plain_zarr(tmp_path: Path) -> None:
    for level in "01":
        zarr.create_array(tmp_path, name=f"{level}/air", data=numbers(3, 4))
    zarr.open_group(tmp_path).attrs["multiscales"] = [{"datasets": [{"path": "0"}, {"path": "1"}], "type": "reduce"}]
    assert sorted(open(tmp_path).variables) == ["0/air", "1/air"]


def test_the_fingerprint_follows_the_files(tmp_path: Path) -> None:
    image(tmp_path, numbers(8, 8), "yx", labels={"cells": (numbers(8, 8), "yx")})
    before = open(tmp_path)
    assert before.weak
    assert before.fingerprint == open(tmp_path).fingerprint
    chunk = tmp_path / "labels/cells/0/0/0"
    chunk.write_bytes(chunk.read_bytes() + b"x")
    assert open(tmp_path).fingerprint != before.fingerprint


def test_inspect_shows_spacing_wells_and_channels(plates: tuple[Path, dict[str, Array]], tmp_path: Path) -> None:
    image(tmp_path, numbers(3, 16, 16), "zyx", spacing={"z": 1.5, "y": 0.25, "x": 0.25})
    done = run_cli("inspect", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "spacing   z 1.5 micrometer, y 0.5 micrometer, x 0.5 micrometer" in done.stdout
    document = json.loads(run_cli("inspect", str(tmp_path), "--json").stdout)
    assert document["variables"]["0"]["spacing"] == {
        "z": [1.5, "micrometer"],
        "y": [0.25, "micrometer"],
        "x": [0.25, "micrometer"],
    }
    shown = run_cli("inspect", str(plates[0])).stdout
    assert "channels of 0: DNA, actin" in shown
    assert "wells: 0 A/2, 1 A/10, 2 B/3, 3 C/1" in shown
    done = run_cli("doctor", str(plates[0]))
    assert "missing" not in done.stdout.lower() or "none" in done.stdout.lower(), done.stdout


def whole() -> dict[str, Any]:
    return {
        "multiscales": [
            {
                "version": "0.4",
                "axes": [{"name": a, "type": "space", "unit": "micrometer"} for a in "yx"],
                "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1.0, 1.0]}]}],
                "coordinateTransformations": [{"type": "scale", "scale": [2.0, 2.0]}],
            }
        ],
        "omero": {"channels": [{"label": "DAPI"}]},
    }


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (["axes"], None, "axes is None"),
        (["axes"], [{"name": "x", "type": "space"}], r"its axes are x \(space\): time comes first"),
        (["axes"], [{"name": "y", "type": "space"}, {"name": "c", "type": "channel"}], "two or three of space last"),
        (["axes"], [{"name": "x", "type": "space"}] * 2, "two have one name"),
        (["axes"], [{"name": a} for a in "zyx"], "has 2 axes, its metadata declares 3"),
        (["axes", 0, "name"], 7, "the name of an axis is 7"),
        (["datasets"], [], "datasets is .*, not a list"),
        (["datasets", 0, "path"], "9", "declares a level '9', but there is no such array"),
        (["datasets", 0, "path"], "../0", r"is '\.\./0'"),
        (["datasets", 0, "coordinateTransformations", 0, "scale"], [1.0], "not 2 numbers"),
        (["coordinateTransformations"], {}, "is {}, not a list"),
    ],
)
def test_metadata_that_is_wrong_is_named(tmp_path: Path, where: list[Any], value: Any, said: str) -> None:
    image(tmp_path, numbers(8, 8), "yx", levels=1)
    document = whole()
    holder: Any = document["multiscales"][0]
    if value == [{"name": a} for a in "zyx"]:
        holder.pop("coordinateTransformations")
        holder["datasets"] = [{"path": "0"}]
    for key in where[:-1]:
        holder = holder[key]
    holder[where[-1]] = value
    (tmp_path / ".zattrs").write_text(json.dumps(document))
    with pytest.raises(InputError, match=said):
        open(tmp_path)


def places(document: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything in a JSON document."""
    inside = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [at, *(found for key, value in inside for found in places(value, (*at, key)))]


ODD = [None, "", "x", 0, -1, 1.5, True, [], {}, [[]], [None], {"path": 3}, "..", "/", [1, 2], "labels", {"version": []}]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plate with labels, whose metadata files are changed and put back."""
    path = tmp_path_factory.mktemp("odd")
    plate(path, {"A/1": [numbers(8, 8)] * 2}, "yx", levels=1, labels={"cells": (numbers(8, 8), "yx")})
    (path / "A/1/0/.zattrs").write_text(json.dumps(whole()))
    (path / "A/1/1/.zattrs").write_text(json.dumps(whole()))
    return path


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_the_metadata_says_it_opens_or_is_refused(documents: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([".zattrs", "A/1/.zattrs", "A/1/0/.zattrs", "A/1/1/labels/.zattrs"]))
    file = documents / name
    text = file.read_text()
    document = copy.deepcopy(json.loads(text))
    at = data.draw(st.sampled_from(places(document)[1:]))
    holder = document
    for key in at[:-1]:
        holder = holder[key]
    if data.draw(st.booleans()):
        holder[at[-1]] = data.draw(st.sampled_from(ODD))
    else:
        del holder[at[-1]]
    try:
        file.write_text(json.dumps(document))
        for url in (documents, documents / "A/1", documents / "A/1/0", documents / "A/1/1"):
            try:
                source = open(url)
            except InputError as error:
                assert str(documents) in str(error)  # noqa: PT017 - either outcome is right
            else:
                assert source.variables
    finally:
        file.write_text(text)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', '{"labels": 3}'])
def test_files_that_are_not_json_objects_are_refused(tmp_path: Path, text: str) -> None:
    image(tmp_path, numbers(8, 8), "yx", levels=1, labels={"cells": (numbers(8, 8), "yx")})
    (tmp_path / "labels/.zattrs").write_text(text)
    with pytest.raises(InputError, match="labels is not readable OME-NGFF"):
        open(tmp_path)
