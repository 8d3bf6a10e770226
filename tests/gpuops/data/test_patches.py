"""Patches against plain slicing and np.pad, for any layout; only their chunks decoded; order, resume, split."""

import shutil
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuops.data.datamodule import ZarrDataModule
from gpuops.data.patches import Patch
from gpuops.data.reading.reader import Reader
from gpuops.data.sample import Field, SampleSpec, Window, bind
from gpuops.data.source import open
from gpuops.data.split import Holdout
from gpuops.errors import InputError, IntegrityError
from gpuops.lineage.version import digest

Array = npt.NDArray[Any]


def write(
    folder: Any,
    name: str,
    values: Array,
    dims: Any,
    chunks: tuple[int, ...],
    shards: tuple[int, ...] | None = None,
    **attributes: Any,
) -> None:
    root = zarr.open_group(folder, mode="a")
    kept: Any = {"config": {"write_empty_chunks": True}}
    array = root.create_array(
        name, shape=values.shape, dtype=values.dtype, chunks=chunks, shards=shards, dimension_names=dims, **kept
    )
    array[...] = values
    array.attrs.update(attributes)


def origins(length: int, size: int, stride: int) -> list[int]:
    """First points of the patches along an axis, the plain way."""
    found = list(range(0, length - size + 1, stride))
    return found if found[-1] + size == length else [*found, length - size]


def cut(whole: Array, at: tuple[int, ...], size: tuple[int, ...], halo: tuple[int, ...], fill: Any) -> Array:
    """A patch and its halo of the last axes, out of a padded copy of everything."""
    lead = [(0, 0)] * (whole.ndim - len(at))
    edges = lead + [(h, h) for h in halo]
    padded = np.pad(whole, edges, "reflect") if fill is None else np.pad(whole, edges, constant_values=fill)
    return padded[(..., *(slice(a, a + s + 2 * h) for a, s, h in zip(at, size, halo, strict=True)))]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    dims = draw(st.sampled_from(["yx", "zyx"]))
    where = draw(st.sampled_from([None, "t", "m", "cyclic m", "channels"]))
    space = tuple(draw(st.integers(2, 7)) for _ in dims)
    shape = (draw(st.integers(3, 5)), 4, *space)
    chunks = tuple(draw(st.integers(1, n)) for n in shape)
    size = tuple(draw(st.integers(1, n)) for n in space)
    edge = draw(st.sampled_from(["reflect", "missing"]))
    return {
        "dims": dims,
        "where": where,
        "shape": shape,
        "chunks": chunks,
        "shards": tuple(c * draw(st.integers(1, 2)) for c in chunks) if draw(st.booleans()) else None,
        "dtype": draw(st.sampled_from(["uint8", "float32"])),
        "size": size,
        "stride": tuple(draw(st.integers(1, n)) for n in size) if draw(st.booleans()) else size,
        "halo": tuple(draw(st.integers(0, n - 1 if edge == "reflect" else 9)) for n in space),
        "edge": edge,
        "picks": draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=7)),
    }


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_patches_are_what_slicing_and_padding_give(case: dict[str, Any]) -> None:
    dims, where, shape, size, halo = (case[k] for k in ("dims", "where", "shape", "size", "halo"))
    count, space = len(dims), shape[2:]
    generator = np.random.default_rng(0)
    a, label, mask = (generator.integers(1, 200, s).astype(case["dtype"]) for s in (shape, (shape[0], *space), space))
    rain = generator.random(shape[0]).astype(np.float32)
    steps = {None: None, "channels": None}.get(where, (2, 0))
    window = {"t": Window("t", 3), "m": Window("m", 3), "cyclic m": Window("m", 3, cyclic=True)}.get(where)
    patch = Patch(*(dict(zip(dims, case[k], strict=True)) for k in ("size", "halo", "stride")), edge=case["edge"])
    taken = (3, 1) if where == "channels" else None
    spec = SampleSpec(
        {"x": [Field("a", at=steps, channels=taken)], "mask": [Field("mask")], "rain": [Field("rain")]},
        {"a": [Field("a", at=steps, channels=taken)], "y": [Field("label")]},
        window,
        patch,
    )
    assert SampleSpec.from_json(spec.to_json()) == spec
    with TemporaryDirectory() as folder:
        write(folder, "a", a, ["t", "m", *dims], case["chunks"], case["shards"], _FillValue=0)
        write(folder, "label", label, ["t", *dims], (case["chunks"][0], *case["chunks"][2:]), _FillValue=0)
        write(folder, "mask", mask, dims, space, _FillValue=0)
        write(folder, "rain", rain, ["t"], (2,))
        source = open(folder)
        bound = bind(spec, source)
        ids = bound.samples(np.arange(shape[0]))
        grid = [np.array(o) for o in np.meshgrid(*map(origins, space, size, case["stride"]), indexing="ij")]
        corners = list(zip(*(o.ravel().tolist() for o in grid), strict=True))
        starts = {"m": 2, "cyclic m": 4}.get(where, 1)
        records = shape[0] - 2 if where == "t" else shape[0]
        assert ids.tolist() == list(range(records * starts * len(corners)))
        chosen = ids[np.array(case["picks"]) % len(ids)]
        with closing(Reader(source, bound, threads=2)) as reader:
            slot = reader.read(chosen)
            decodes = reader.counters.decodes
        fill = 0 if case["edge"] == "missing" else None
        none = (0,) * count
        chunks_a: set[tuple[int, ...]] = set()
        chunks_label: set[tuple[int, ...]] = set()
        for row, sample in enumerate(chosen.tolist()):
            first, at = divmod(sample, len(corners))
            record, start = divmod(first, starts)
            corner = corners[at]
            if where == "t":
                whole = a[[record + 2, record]]
            elif window is not None:
                whole = a[record][[(start + 2) % 4, start % 4]]
            else:
                whole = a[record][list(taken)] if taken else a[record]
            # Axes before those of space are one axis of channels.
            whole = whole.reshape(-1, *space)
            expected = {
                "x": cut(whole, corner, size, halo, fill),
                "mask": cut(mask[None], corner, size, halo, fill),
                "rain": rain[record : record + 1],
            }
            for name, want in expected.items():
                np.testing.assert_array_equal(slot.inputs[name][row], want)
            np.testing.assert_array_equal(slot.targets["a"][row], cut(whole, corner, size, none, None))
            np.testing.assert_array_equal(slot.targets["y"][row], cut(label[record][None], corner, size, none, None))
            for found, width, used in (
                (chunks_a, halo, [record, record + 2] if where == "t" else [record]),
                (chunks_label, none, [record]),
            ):
                touched = [
                    {p // c for p in range(max(o - h, 0), min(o + s + h, n))}
                    for o, s, h, n, c in zip(corner, size, width, space, case["chunks"][2:], strict=True)
                ]
                for place in np.ndindex(*(max(t) + 1 for t in touched)):
                    if all(p in t for p, t in zip(place, touched, strict=True)):
                        found.update((r // case["chunks"][0], *place) for r in used)
        along_m = -(-4 // case["chunks"][1])
        # Of the window's own dimension, rain is a coordinate, which is held and not read.
        rain_chunks = set() if where == "t" else {s // len(corners) // starts // 2 for s in chosen.tolist()}
        assert decodes == len(chunks_a) * along_m + len(chunks_label) + len(rain_chunks)
        for name, tensor in (("x", bound.inputs["x"]), ("mask", bound.inputs["mask"])):
            assert tensor[0].spec.shape == slot.inputs[name].shape[1:]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 images of 32 x 48 in chunks of 8 x 8, labels and regions; read-only."""
    tmp_path = tmp_path_factory.mktemp("images")
    values = np.arange(12 * 32 * 48, dtype=np.float32).reshape(12, 32, 48)
    write(tmp_path, "image", values, "tyx", (1, 8, 8))
    write(tmp_path, "label", (values % 7).astype(np.uint8), "tyx", (1, 8, 8))
    write(tmp_path, "volume", values.reshape(12, 4, 8, 48), "tzvx", (4, 2, 8, 48))
    write(tmp_path, "region", np.arange(12) // 3, "t", (12,))
    return tmp_path


SIZE = {"y": 16, "x": 16}
PAIR: Any = {"inputs": {"x": [Field("image")]}, "targets": {"y": [Field("label", raw=True)]}}


def module(images: Path, **options: Any) -> ZarrDataModule:
    declared = {"global_batch": 6, "threads": 1, "patch": Patch(SIZE, {"y": 2, "x": 2}), **options}
    data = ZarrDataModule(str(images), **PAIR, **declared)
    data.setup()
    return data


def test_a_patch_of_a_large_image_decodes_its_chunks_only(images: Path) -> None:
    source = open(images)
    spec = SampleSpec(**PAIR, patch=Patch(SIZE))
    with closing(Reader(source, bind(spec, source), threads=1)) as reader:
        reader.read(np.array([8]))
        assert reader.counters.decodes == 2 * 4  # of 2 * 24
        for _ in reader.iterate([(np.array([0, 0, 1]), np.ones(3, bool))]):
            pass
        assert reader.counters.decodes == 2 * 4 + 2 * 8  # the same patch twice is decoded once


def test_the_order_covers_each_patch_once_and_resumes(images: Path) -> None:
    data = module(images, holdout=Holdout("region", 0.25))
    loader = data.train_dataloader()
    batches = iter(loader)
    seen = [i for _ in range(3) for i in next(batches)["id"].tolist()]
    state = loader.state_dict()
    rest = [i for batch in batches for i in batch["id"].tolist()]
    held = {i // 6 for i in data.val_ids}
    assert len(held) == 3
    assert len(data.val_ids) == 3 * 6
    # All patches of a record are on one side.
    assert sorted(seen + rest) == [i for i in range(72) if i // 6 not in held]
    assert seen + rest != sorted(seen + rest)
    other = module(images, holdout=Holdout("region", 0.25)).train_dataloader()
    other.load_state_dict(state)
    assert [i for batch in other for i in batch["id"].tolist()] == rest


def test_chunks_that_hold_several_patches_are_shuffled_in_lanes(tmp_path: Path, images: Path) -> None:
    assert module(images).lanes is None
    values = np.random.default_rng(0).random((12, 32, 48)).astype(np.float32)
    for name in ("image", "label"):
        write(tmp_path / "big", name, values, "tyx", (1, 32, 48))
    data = module(tmp_path / "big")
    assert data.lanes is not None
    assert data.lanes.block == 6
    drawn = sorted(i for batch in data.train_dataloader() for i in batch["id"].tolist())
    assert drawn == list(range(72))


def test_a_volume_is_one_channel_a_step_with_one_mean(images: Path) -> None:
    patch = Patch({"z": 2, "v": 4, "x": 48})
    fields = {"x": [Field("volume", at=(0, 1, 2, 3))]}, {"y": [Field("volume", at=(0,))]}
    data = ZarrDataModule(str(images), *fields, Window("t", 4), patch=patch, threads=1)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["inputs"]["x"].shape == (32, 4, 2, 4, 48)
    ids = batch["id"].numpy()
    whole = np.arange(12 * 32 * 48, dtype=np.float64).reshape(12, 4, 8, 48)
    for row, sample in enumerate(ids):
        record, at = divmod(int(sample), 4)
        z, v = 2 * (at // 2), 4 * (at % 2)
        want = (whole[record : record + 4, z : z + 2, v : v + 4] - whole.mean()) / whole.std()
        np.testing.assert_allclose(batch["inputs"]["x"][row].numpy(), want, atol=1e-4)


def test_a_damaged_chunk_names_the_samples_that_need_it(images: Path, tmp_path: Path) -> None:
    images = Path(shutil.copytree(images, tmp_path / "images"))
    (images / "image" / "c" / "3" / "0" / "2").unlink()  # x 16 to 24 of the top row, in record 3
    source = open(images)
    bound = bind(SampleSpec(**PAIR, patch=Patch(SIZE, {"y": 0, "x": 2})), source)
    with closing(Reader(source, bound, threads=1)) as reader:
        with pytest.raises(IntegrityError, match=r"\b18, 19\b") as error:
            reader.read(np.array([12, 18, 19, 20, 21, 22]))
        assert "20" not in str(error.value).split("18, 19")[1]


def test_a_sample_without_patches_keeps_its_digest() -> None:
    document = SampleSpec(**PAIR).to_json()
    assert set(document) == {"inputs", "targets", "window"}
    assert digest(document) != digest(SampleSpec(**PAIR, patch=Patch(SIZE)).to_json())


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        (Patch({"y": 33, "x": 16}), "larger than the array's 32: make it smaller"),
        (Patch({"t": 1, "y": 16, "x": 16}), "is the sample axis"),
        (Patch({"q": 1}), "'q' does not exist; the variables have t, x, y"),
        (Patch({"y": 16}), "name all behind 'y'"),
        (Patch(SIZE, {"y": 32}), "at most 31, or declare edge='missing'"),
    ],
)
def test_patches_that_do_not_fit_are_refused(images: Path, patch: Patch, said: str) -> None:
    with pytest.raises(InputError, match=said):
        bind(SampleSpec(**PAIR, patch=patch), open(images))


def test_missing_data_beyond_the_edge_needs_a_value(images: Path) -> None:
    spec = SampleSpec({"x": [Field("label")]}, {"y": [Field("image")]}, patch=Patch(SIZE, {"y": 1}, edge="missing"))
    with pytest.raises(InputError, match="no value for missing data"):
        bind(spec, open(images))
    other = SampleSpec(**PAIR, patch=Patch(SIZE, {"y": 1}, edge="missing"))  # floats have NaN, targets no halo
    source = open(images)
    with closing(Reader(source, bind(other, source), threads=1)) as reader:
        assert np.isnan(reader.read(np.array([0])).inputs["x"][0, 0, :, 0]).tolist() == [True] + [False] * 17


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": {}},
        {"size": {"y": 0}},
        {"size": SIZE, "halo": {"y": -1}},
        {"size": SIZE, "stride": {"y": 17}},
        {"size": SIZE, "stride": {"y": 0}},
        {"size": SIZE, "halo": {"z": 1}},
        {"size": SIZE, "edge": "wrap"},
    ],
)
def test_patches_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="patch"):
        Patch(**wrong)
