"""Batches without a Trainer: their form, the split and its statistics, epochs, and a resume that loses nothing."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import pytest
import torch
import zarr
from data_room import FORECAST, HEIGHT, SCALE, SEA, Atlas, make_recipe
from jsonargparse import ArgumentParser

from gpuops.data.datamodule import Holdout, ZarrDataModule
from gpuops.data.ingest import ingest
from gpuops.data.loader import ZarrLoader
from gpuops.data.order import Lanes, Order
from gpuops.data.reader import Reader
from gpuops.data.sample import Field, Window
from gpuops.data.sampling import Foreground
from gpuops.data.source import Source
from gpuops.data.split import Period
from gpuops.errors import InputError, IntegrityError
from gpuops.preprocess.module import PreprocessModule
from gpuops.preprocess.steps import Fill, Normalize


@contextmanager
def data_module(store: Source | str, **changes: Any) -> Iterator[ZarrDataModule]:
    options: dict[str, Any] = {
        "inputs": dict(FORECAST.inputs),
        "targets": dict(FORECAST.targets),
        "window": FORECAST.window,
        "holdout": Holdout("region", 0.34),
        "global_batch": 16,
        **changes,
    }
    module = ZarrDataModule(store if isinstance(store, str) else store.url, **options)
    module.setup()
    try:
        yield module
    finally:
        module.teardown()


def ids(batches: Any) -> list[int]:
    return [sample for batch in batches for sample in batch["id"][batch["valid"]].tolist()]


def take(iterator: Iterator[Any], count: int) -> list[Any]:
    return [next(iterator) for _ in range(count)]


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


# epochs


def test_an_epoch_is_every_sample_once_and_epochs_differ(store: Source) -> None:
    with data_module(store) as module:
        loader = module.train_dataloader()
        assert len(loader) == 12
        first, second = ids(loader), ids(loader)
        assert len(first) == len(set(first)) == 192
        assert set(first) == set(second) == set(module.train_ids.tolist())
        assert first != second, "a loop without a Trainer has epochs too"
        again = ids(module.train_dataloader())
        assert again == first


def test_the_order_follows_data_samples_split_and_seed(store: Source) -> None:
    def first(**changes: Any) -> tuple[str, list[int]]:
        with data_module(store, **changes) as module:
            return module.fingerprint, next(iter(module.train_dataloader()))["id"].tolist()

    fingerprint, order = first()
    assert first() == (fingerprint, order)
    assert first(threads=1, budget_mb=64, dtype="bfloat16") == (fingerprint, order), "how it is read must not change it"
    assert first(seed=1)[1] != order
    assert first(global_batch=8)[1] != order[:8]
    assert first(holdout=None)[0] != fingerprint
    assert first(targets={"y": [Field("turbidity", at=(2,), name="other")]})[0] != fingerprint


def test_validation_is_in_stored_order_and_padded(store: Source) -> None:
    with data_module(store, global_batch=20) as module:
        loader = module.val_dataloader()
        assert isinstance(loader, ZarrLoader)
        batches = list(loader)
        assert len(batches) == len(loader) == 5
        assert ids(batches) == module.val_ids.tolist()
        assert {len(batch["id"]) for batch in batches} == {20}
        assert batches[-1]["valid"].sum() == 96 - 80
        assert ids(loader) == module.val_ids.tolist(), "every epoch validates on the same samples"


def test_an_iteration_left_early_does_not_cost_the_next_one_its_beginning(store: Source) -> None:
    # Lightning's sanity check reads two validation batches, and people look at the first batch.
    with data_module(store) as module:
        for loader, split in ((module.train_dataloader(), module.train_ids), (module.val_dataloader(), module.val_ids)):
            assert isinstance(loader, ZarrLoader)
            peeked = ids(take(iter(loader), 2))
            whole = ids(loader)
            assert whole[:32] == peeked
            assert sorted(whole) == split.tolist()


@contextmanager
def loader_of(
    module: ZarrDataModule, rank: int, ranks: int, epoch: int, last: Literal["drop", "pad"]
) -> Iterator[ZarrLoader]:
    """A loader of one of several ranks, as a Trainer's strategy would have it."""
    reader = Reader(module.source, module.bound)
    train = module.train_ids
    try:
        yield ZarrLoader(
            reader,
            train,
            lambda epoch: Order(len(train), module.seed, epoch, module.fingerprint, module.global_batch, True, last),
            rank=rank,
            ranks=ranks,
            epoch=lambda: epoch,
            inputs=PreprocessModule(module.preprocess["inputs"]),
            targets=PreprocessModule(module.preprocess["targets"]),
            device=torch.device("cpu"),
        )
    finally:
        reader.close()


@pytest.mark.parametrize("last", ["drop", "pad"])
def test_ranks_train_on_the_samples_of_one_process(store: Source, last: Any) -> None:
    with data_module(store, global_batch=36) as module:
        with loader_of(module, 0, 1, 3, last) as alone:
            whole = list(alone)
        assert len(whole) == len(alone) == (5 if last == "drop" else 6)
        for ranks in (2, 3, 4):
            shares = []
            for rank in range(ranks):
                with loader_of(module, rank, ranks, 3, last) as one:
                    shares.append(list(one))
                    assert len(one) == len(whole)
            for batch, *parts in zip(whole, *shares, strict=True):
                assert {len(part["id"]) for part in parts} == {36 // ranks}
                for key in ("id", "valid"):
                    assert torch.equal(torch.stack([part[key] for part in parts], dim=1).ravel(), batch[key])
                x = torch.stack([part["inputs"]["x"] for part in parts], dim=1).flatten(0, 1)
                assert torch.equal(x, batch["inputs"]["x"])


def test_a_position_at_the_end_of_an_epoch_does_not_empty_it(store: Source) -> None:
    with data_module(store) as module, loader_of(module, 0, 1, 2, "drop") as loader:
        loader.load_state_dict({**loader.state_dict(), "epoch": 2, "delivered": 12})
        assert len(ids(loader)) == 192


def test_a_position_of_another_epoch_is_not_taken(store: Source) -> None:
    with data_module(store) as module, loader_of(module, 0, 1, 2, "drop") as loader:
        loader.load_state_dict({**loader.state_dict(), "epoch": 1, "delivered": 5})
        assert len(ids(loader)) == 192


def test_counters_add_up_over_loaders(store: Source) -> None:
    with data_module(store) as module:
        ids(module.train_dataloader())
        ids(module.val_dataloader())
        assert module.counters.samples == 192 + 96
        assert module.counters.decodes > 0


# resume


@pytest.mark.parametrize("budget", [1, 64])
@pytest.mark.parametrize("delivered", [1, 5, 11])
def test_a_resumed_epoch_gives_exactly_the_rest(store: Source, delivered: int, budget: int) -> None:
    with data_module(store, budget_mb=budget) as module:
        loader = module.train_dataloader()
        iterator = iter(loader)
        seen = ids(take(iterator, delivered))
        state = json.loads(json.dumps(loader.state_dict()))
        assert state["delivered"] == delivered, "what is read ahead was not trained on"
        rest = ids(iterator)
    with data_module(store) as module:
        loader = module.train_dataloader()
        loader.load_state_dict(state)
        assert len(loader) == 12, "the length is a full epoch's"
        assert ids(loader) == rest
        following = ids(loader)
    assert sorted(seen + rest) == sorted(module.train_ids.tolist())
    assert len(following) == 192
    assert following != seen + rest, "then the next epoch, from its beginning"


def test_a_resume_goes_on_in_a_later_epoch(store: Source) -> None:
    with data_module(store) as module:
        loader = module.train_dataloader()
        ids(loader)
        ids(loader)
        iterator = iter(loader)
        take(iterator, 7)
        state = module.state_dict()
        assert (state["epoch"], state["delivered"]) == (2, 7)
        rest = ids(iterator)
        end = module.state_dict()
    with data_module(store) as module:
        module.load_state_dict(state)
        assert ids(module.train_dataloader()) == rest
    with data_module(store) as module, data_module(store) as reference:
        module.load_state_dict(end)
        epochs = reference.train_dataloader()
        for _ in range(3):
            ids(epochs)
        assert ids(module.train_dataloader()) == ids(epochs), "the end of an epoch is the beginning of the next"


@pytest.mark.parametrize("change", ["data", "seed", "global_batch"])
def test_another_identity_is_refused(store: Source, change: str) -> None:
    with data_module(store) as module:
        loader = module.train_dataloader()
        take(iter(loader), 3)
        state = loader.state_dict()
    changes: dict[str, Any] = {
        "data": {"holdout": None},
        "seed": {"seed": 1, "holdout": Holdout("region", 0.34)},
        "global_batch": {"global_batch": 8},
    }[change]
    with data_module(store, **changes) as other:
        key = {"data": "fingerprint"}.get(change, change)
        theirs, mine = str(state[key]), str(other.train_dataloader().state_dict()[key])
        with pytest.raises(IntegrityError, match=f"trained with {key} {theirs}, here it is {mine}: open the snapshot"):
            other.train_dataloader().load_state_dict(state)
        other.load_state_dict(state)
        with pytest.raises(IntegrityError, match=theirs):
            other.train_dataloader()


def test_a_module_that_never_trained_has_no_position(store: Source) -> None:
    with data_module(store) as module:
        assert module.state_dict() == {}
        module.load_state_dict({})
        assert len(ids(module.train_dataloader())) == 192


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
