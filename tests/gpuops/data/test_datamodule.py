"""Batches without a Trainer: their form, the split and its statistics, lanes, and what a user is told."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import zarr
from data_room import HEIGHT, SCALE, SEA, Atlas, data_module, ids, make_recipe
from jsonargparse import ArgumentParser

from gpuops.data.datamodule import Holdout, ZarrDataModule
from gpuops.data.order import Lanes
from gpuops.data.sample import Field, Window
from gpuops.data.sampling import Foreground
from gpuops.data.source import Source
from gpuops.data.split import Period
from gpuops.data.writing.ingest import ingest
from gpuops.errors import InputError, IntegrityError
from gpuops.preprocess.steps import Fill, Normalize

# a batch


def test_a_batch(store: Source, atlas: Atlas) -> None:
    with data_module(store) as module:
        batch = next(iter(module.train_dataloader()))
        assert set(batch) == {"inputs", "targets", "id", "valid"}
        assert {name: tuple(t.shape) for name, t in batch["inputs"].items()} == {"x": (16, 4, 10, 10), "month": (16, 1)}
        assert {name: tuple(t.shape) for name, t in batch["targets"].items()} == {"y": (16, 1, 10, 10)}
        assert batch["inputs"]["x"].dtype == torch.float32
        assert batch["inputs"]["month"].dtype == torch.int32, "raw: as it is stored"
        assert batch["id"].dtype == torch.int64
        assert batch["valid"].tolist() == [True] * 16
        physical = module.physical("y", batch["targets"]["y"])
        for row, sample in enumerate(batch["id"].tolist()):
            tile, month = divmod(sample, 12)
            want = atlas.tiles[tile, (month + 3) % 12] * SCALE
            np.testing.assert_allclose(physical[row, 0].numpy(), want, atol=1e-5)
            assert batch["inputs"]["month"][row].item() == (month + 3) % 12 + 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_batches(store: Source, dtype: str) -> None:
    with data_module(store, dtype=dtype) as narrow, data_module(store) as wide:
        one, other = (next(iter(m.train_dataloader())) for m in (narrow, wide))
        assert one["inputs"]["x"].dtype == one["targets"]["y"].dtype == getattr(torch, dtype)
        assert one["id"].tolist() == other["id"].tolist()
        assert torch.equal(one["inputs"]["x"], other["inputs"]["x"].to(getattr(torch, dtype)))


def test_prepared_values_have_mean_0_and_deviation_1_over_the_training_split(store: Source) -> None:
    with data_module(store, global_batch=1, inputs={"x": [Field("turbidity")]}, targets={}, window=None) as module:
        x = torch.cat([batch["inputs"]["x"] for batch in module.train_dataloader()]).double()
        assert x.shape == (16, 12, 10, 10)
        # One mean and deviation a channel.
        torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(12).double(), atol=1e-5, rtol=0)
        torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(12).double(), atol=1e-5, rtol=0)
    with data_module(store) as module:
        y = torch.cat([batch["targets"]["y"] for batch in module.train_dataloader()]).double()
        assert abs(y.mean()) < 1e-5, "a window round the year visits every month of every tile equally"
        assert abs(y.std(correction=0) - 1) < 1e-5


def test_missing_inputs_are_filled_and_missing_targets_stay(store: Source, atlas: Atlas) -> None:
    fields = {"x": [Field("altitude", name="filled", fill=100.0)]}
    with data_module(store, inputs=fields, targets={}, window=None, global_batch=1) as module:
        steps = module.preprocess["inputs"].tensors["x"][0].steps
        assert Fill(100.0) in steps
        normalize = next(step for step in steps if isinstance(step, Normalize))
        batch = next(iter(module.train_dataloader()))
        sea = atlas.heights[batch["id"].item()] == SEA
        want = np.where(sea, 100.0, atlas.heights[batch["id"].item()] * HEIGHT - 450)
        got = batch["inputs"]["x"][0, 0].numpy() * normalize.std[0] + normalize.mean[0]
        np.testing.assert_allclose(got, want, atol=1e-2)


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A foreign store of [time, y, x] with NaN, a series and labels that count half days."""
    path = tmp_path_factory.mktemp("floats") / "store"
    root = zarr.open_group(path, mode="w")
    generator = np.random.default_rng(0)
    rain = generator.normal(20, 4, (40, 3, 5)).astype(np.float32)
    rain[generator.random(rain.shape) < 0.1] = np.nan
    series = generator.normal(-7, 3, 40).astype(np.float32)
    root.create_array("rain", data=rain, chunks=(1, 3, 5), dimension_names=["time", "y", "x"])
    root.create_array("power", data=series, dimension_names=["time"])
    root.create_array("double", data=rain.astype(np.float64), chunks=(1, 3, 5), dimension_names=["time", "y", "x"])
    root.create_array("week", data=np.arange(40) // 10, dimension_names=["time"], chunks=(4,))
    root.create_array("day", data=np.arange(40) // 2, dimension_names=["time"], chunks=(4,))
    return str(path)


def test_float_targets_keep_nan_and_inputs_take_the_mean(floats: str) -> None:
    fields: dict[str, Any] = {"inputs": {"x": [Field("rain", name="past")]}, "targets": {"y": [Field("rain")]}}
    with data_module(floats, **fields, window=None, holdout=None, global_batch=8) as module:
        batch = next(iter(module.train_dataloader()))
        x, y = batch["inputs"]["x"], batch["targets"]["y"]
        assert y.isnan().any()
        assert not x.isnan().any()
        torch.testing.assert_close(torch.where(y.isnan(), 0.0, y), x, atol=1e-5, rtol=0)


def test_windows_along_the_sample_axis_stay_in_their_split(floats: str) -> None:
    with data_module(
        floats,
        inputs={"x": [Field("rain", at=(0, 1))], "power": [Field("power", at=(0, 1))]},
        targets={"y": [Field("power", at=(2,), name="next")]},
        window=Window("time", 3),
        holdout=Holdout("week", values=(1,)),
        global_batch=4,
    ) as module:
        assert module.val_ids.tolist() == list(range(10, 18))
        assert module.train_ids.tolist() == [*range(8), *range(20, 38)]
        # A series is as much data as an image: it is normalised unless it is declared raw.
        power = module.source.variable("power").array[:]
        train = power[np.r_[0:10, 20:40]].astype(np.float64)
        batch = next(iter(module.train_dataloader()))
        for row, start in enumerate(batch["id"].tolist()):
            want = (power[start : start + 2] - train.mean()) / train.std()
            np.testing.assert_allclose(batch["inputs"]["power"][row].numpy(), want, atol=1e-5)
        np.testing.assert_allclose(
            module.physical("y", batch["targets"]["y"])[:, 0].numpy(), power[batch["id"].numpy() + 2], atol=1e-5
        )


# the split


@pytest.mark.parametrize("seed", range(5))
def test_a_group_is_never_in_both_splits(store: Source, seed: int) -> None:
    with data_module(store, seed=seed) as module:
        region = store.variable("region").array[:]
        train, held = set(region[module.train_records].tolist()), set(region[module.val_records].tolist())
        assert not train & held
        assert train | held == set(range(6))
        assert len(held) == 2
        seen = {sample // 12 for sample in ids(module.train_dataloader())}
        assert seen <= set(module.train_records.tolist())
        assert {sample // 12 for sample in ids(module.val_dataloader())} == set(module.val_records.tolist())


def test_the_split_follows_the_seed_and_values_can_be_named(store: Source) -> None:
    splits = set()
    for seed in range(8):
        with data_module(store, seed=seed) as module:
            splits.add(tuple(module.val_records))
    assert len(splits) > 1
    with data_module(store, holdout=Holdout("region", values=(0, 4))) as module:
        assert set(store.variable("region").array[:][module.val_records].tolist()) == {0, 4}
    with data_module(store, holdout=None) as module:
        assert module.val_dataloader() == []
        assert len(module.train_ids) == 288


def test_statistics_come_from_the_training_split_alone(atlas: Atlas, tmp_path: Path) -> None:
    holdout = Holdout("region", values=(1,))

    def preprocess(name: str, region: int | None) -> Any:
        turbidity, altitude = atlas.turbidity.copy(), atlas.altitude.copy()
        if region is not None:
            row, column = divmod(region, 3)
            place = (slice(row * 20, row * 20 + 20), slice(column * 20, column * 20 + 20))
            turbidity[place], altitude[place] = 180, 199
        folder = tmp_path / name
        folder.mkdir()
        with h5py.File(folder / "turbidity.h5", "w") as file:
            file["group/turbidity"] = turbidity
        with h5py.File(folder / "altitude.h5", "w") as file:
            file["altitude"] = altitude
        source = ingest(make_recipe(Atlas(folder, turbidity, altitude), folder / "store"))
        with data_module(source, holdout=holdout) as module:
            return {side: p.to_json() for side, p in module.preprocess.items()}

    original = preprocess("original", None)
    assert preprocess("held-out", 1) == original, "held-out records leaked into the statistics"
    assert preprocess("training", 2) != original


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"holdout": Holdout("basin")}, "no variable 'basin'"),
        ({"holdout": Holdout("altitude")}, "one value a record, it has .'tile', 'y', 'x'"),
        ({"holdout": Holdout("region", values=(99,))}, "leaves 24 to train on, 0 to validate"),
        ({"holdout": Holdout("region", values=tuple(range(6)))}, "leaves 0 to train on, 24 to validate"),
        ({"dtype": "float64"}, "'float64' is not one of float32, bfloat16, float16"),
        ({"inputs": {"x": [Field("turbidity", at=(0,)), Field("month", at=(3,), raw=True)]}}, "mixes"),
        ({"inputs": {"x": [Field("turbidity", at=(0,)), Field("turbidity", at=(1,))]}}, "different names"),
    ],
)
def test_impossible_declarations(store: Source, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words), data_module(store, **changes):
        pass


def test_a_holdout_shorter_than_the_window_is_refused(floats: str) -> None:
    fields: dict[str, Any] = {"inputs": {"x": [Field("rain", at=(0,))]}, "targets": {}}
    with (
        pytest.raises(InputError, match="0 to validate on: hold out longer runs"),
        data_module(floats, **fields, window=Window("time", 3), holdout=Holdout("day", values=(4, 9))),
    ):
        pass


def test_stored_dtypes_without_a_kernel_are_refused_before_the_first_batch(floats: str) -> None:
    fields: dict[str, Any] = {"targets": {}, "window": None, "holdout": None}
    with (
        pytest.raises(InputError, match="'double' is stored as float64, which no kernel reads"),
        data_module(floats, inputs={"x": [Field("double")]}, **fields),
    ):
        pass
    with data_module(floats, inputs={"x": [Field("double", raw=True)]}, **fields) as module:
        assert next(iter(module.train_dataloader()))["inputs"]["x"].dtype == torch.float64


# periods, gaps, the test split


def dated(path: Path, chunk: int = 1, days: int = 120) -> str:
    """A foreign store of [time, y, x] with daily times; `chunk` records a chunk."""
    root = zarr.open_group(path, mode="w")
    values = np.random.default_rng(0).normal(20, 4, (days, 2, 3)).astype(np.float32)
    root.create_array("t2m", data=values, chunks=(chunk, 2, 3), dimension_names=["time", "y", "x"])
    time = root.create_array("time", data=np.arange(days), chunks=(days,), dimension_names=["time"])
    time.attrs.update({"units": "days since 2020-01-01", "calendar": "proleptic_gregorian"})
    return str(path)


PAIRS: dict[str, Any] = {
    "inputs": {"x": [Field("t2m", at=(0, 1))]},
    "targets": {"y": [Field("t2m", at=(2,), name="next")]},
    "window": Window("time", 3),
    "global_batch": 4,
    "holdout": None,
}


def test_periods_with_an_embargo(tmp_path: Path) -> None:
    split: dict[str, Any] = {
        "holdout": Period("2020-03-01", "2020-03-21"),
        "test": Period("2020-04-01"),
        "gap": "5D",
    }
    with data_module(dated(tmp_path / "store"), **{**PAIRS, **split}) as module:
        # 1 March is day 60, 21 March day 80, 1 April day 91.
        assert module.val_ids.tolist() == list(range(60, 78))
        assert module.test_ids.tolist() == list(range(91, 118))
        assert module.train_ids.tolist() == [*range(54), 84]
        assert module.train_records.tolist() == [*range(56), 84, 85, 86]
        train, val, test = (
            {s + step for s in ids(loader) for step in range(3)}
            for loader in (module.train_dataloader(), module.val_dataloader(), module.test_dataloader())
        )
        assert max(train & set(range(60))) <= 55
        assert val == set(range(60, 80))
        assert test == set(range(91, 120))
        assert not train & (val | test)
        assert ids(module.predict_dataloader()) == list(range(118))
        normalize = next(s for s in module.preprocess["inputs"].tensors["x"][0].steps if isinstance(s, Normalize))
        values = module.source.variable("t2m").array[:][module.train_records]
        assert normalize.mean[0] == pytest.approx(float(values.mean()))
    with data_module(dated(tmp_path / "store"), **PAIRS) as module:
        assert module.test_dataloader() == []


def test_a_split_declared_in_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ZarrDataModule, "data")
    config = parser.parse_string(
        """
data:
  url: nowhere
  inputs: {x: [{variable: t2m}]}
  targets: {}
  holdout: {start: 2019-01-01, stop: 2020}
  test: {by: region, share: 0.1}
  gap: 10D
  sampling: {foreground: rain, share: 0.3, above: 0.1}
"""
    )
    module = parser.instantiate(config).data
    assert isinstance(module, ZarrDataModule)
    assert module.holdout == Period("2019-01-01", 2020)
    assert module.test == Holdout("region", 0.1)
    assert (module.gap, module.sampling) == ("10D", Foreground("rain", 0.3, 0.1))
    config.data.sampling, config.data.lanes = None, {"count": 8, "window": 2, "block": 24}
    text = parser.dump(config)
    module = parser.instantiate(parser.parse_string(text)).data
    assert module._declared_lanes == Lanes(8, 2, 24)


# lanes


def test_lanes_follow_the_stored_chunks(tmp_path: Path, store: Source) -> None:
    fat = dated(tmp_path / "fat", chunk=5)
    with data_module(fat, **PAIRS) as module:
        assert module.lanes == Lanes(4, 4, 5)
        epoch = ids(module.train_dataloader())
        assert len(epoch) == len(set(epoch)) == 118 // 4 * 4
    with data_module(fat, **{**PAIRS, "global_batch": 36}, lanes=Lanes(2, 1, 10)) as module:
        assert module.lanes == Lanes(2, 1, 10)
    with data_module(fat, **PAIRS, lanes=None) as module:
        assert module.lanes is None
    with data_module(dated(tmp_path / "thin"), **PAIRS) as module:
        assert module.lanes is None, "one record a chunk is already the best case"
    with data_module(store) as module:
        assert module.lanes is None


def test_lanes_decode_each_chunk_once_though_a_split_begins_inside_one(tmp_path: Path) -> None:
    fat = dated(tmp_path / "fat", chunk=6)
    fields: dict[str, Any] = {"inputs": {"x": [Field("t2m")]}, "targets": {}, "window": None}
    split: dict[str, Any] = {"holdout": Period("2020-01-01", "2020-01-10"), "lanes": Lanes(3, 2, 6), "global_batch": 6}
    with data_module(fat, **fields, **split) as module:
        loader = module.train_dataloader()
        order = loader._order(0)
        places = module._train_order[order.permute(np.arange(order.size))]
        assert sorted(places) == list(range(9, 120))
        # 18 whole chunks are 3 rounds of 36 places: a lane's 12 places of a round lie in 2 chunks.
        starts = [at for at in (0, 3, 36, 39, 72, 75) if len(np.unique(places[at : at + 36] // 6)) == 6]
        assert len(starts) == 3
        for at in starts:
            for lane in range(3):
                chunks, counts = np.unique(places[at + lane : at + 36 : 3] // 6, return_counts=True)
                assert counts.tolist() == [6, 6]
                assert not {0, 1} & set(chunks.tolist())


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("split", {"gap": 1}),
        ("split", {"test": Period("2020-04-20")}),
        ("split", {"train": Period(None, "2020-04-20")}),
        ("lanes", {"lanes": None}),
        ("sample", {"targets": {}}),
    ],
)
def test_a_refusal_names_both_fingerprints_and_what_differs(tmp_path: Path, part: str, changes: dict[str, Any]) -> None:
    fat = dated(tmp_path / "fat", chunk=5)
    options = {**PAIRS, "holdout": Period("2020-03-01", "2020-03-21")}
    with data_module(fat, **options) as module:
        module.train_dataloader()
        state, fingerprint = json.loads(json.dumps(module.state_dict())), module.fingerprint
    with data_module(fat, **{**options, **changes}) as other:
        other.load_state_dict(state)
        words = f"fingerprint {fingerprint}, here it is {other.fingerprint}: .*; {part}: "
        assert other.fingerprint != fingerprint
        with pytest.raises(IntegrityError, match=words):
            other.train_dataloader()


def test_every_part_of_a_split_is_in_the_fingerprint(tmp_path: Path) -> None:
    url = dated(tmp_path / "store")
    splits: list[dict[str, Any]] = [
        {},
        {"holdout": Period("2020-03-01")},
        {"holdout": Period("2020-03-02")},
        {"test": Period("2020-03-01")},
        {"test": Period("2020-03-02")},
        {"train": Period(None, "2020-03-01")},
        {"test": Period("2020-03-01"), "gap": 1},
        {"test": Period("2020-03-01"), "gap": 2},
        {"test": Period("2020-03-01"), "gap": "2D"},
    ]
    found = set()
    for split in splits:
        with data_module(url, **{**PAIRS, **split}) as module:
            found.add(module.fingerprint)
    assert len(found) == len(splits)


# what a user is told


def test_targets_that_keep_missing_data_are_named_once(
    store: Source, floats: str, caplog: pytest.LogCaptureFixture
) -> None:
    with data_module(store):
        assert "missing data" not in caplog.text
    fields: dict[str, Any] = {"inputs": {"x": [Field("rain")]}, "window": None, "holdout": None}
    with data_module(floats, **fields, targets={"y": [Field("rain", fill=0.0)], "z": [Field("power")]}):
        assert "missing data" not in caplog.text
    with data_module(floats, **fields, targets={"y": [Field("rain")]}) as module:
        module.setup()
    assert caplog.text.count("target rain holds missing data, which stays NaN") == 1
    caplog.clear()
    with data_module(store, targets={"y": [Field("altitude")]}, inputs={"x": [Field("turbidity")]}, window=None):
        assert "missing data" not in caplog.text, "ingest declares a fill for it"


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="give at least 1"):
        ZarrDataModule("nowhere", {"x": [Field("a")]}, {}, budget_mb=0)


def test_missing_chunks_are_an_error_or_the_declared_fill(tmp_path: Path) -> None:
    url = dated(tmp_path / "store")
    (tmp_path / "store" / "t2m" / "c" / "7" / "0" / "0").unlink()
    fields: dict[str, Any] = {"inputs": {"x": [Field("t2m", raw=True)]}, "targets": {}, "window": None}
    options: dict[str, Any] = {**fields, "holdout": None, "global_batch": 4}
    with data_module(url, **options) as module, pytest.raises(IntegrityError, match="t2m"):
        ids(module.train_dataloader())
    with data_module(url, **options, missing_chunks="fill") as module:
        found = {
            s: x for b in module.train_dataloader() for s, x in zip(b["id"].tolist(), b["inputs"]["x"], strict=True)
        }
        assert (found[7] == 0).all()
        assert (found[8] != 0).all()
