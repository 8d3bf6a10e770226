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

from gpuops.data.datamodule import Holdout, ZarrDataModule
from gpuops.data.ingest import ingest
from gpuops.data.loader import ZarrLoader
from gpuops.data.order import Order
from gpuops.data.reader import Reader
from gpuops.data.sample import Field, Window
from gpuops.data.source import Source
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
    assert first(threads=1, ahead=5, dtype="bfloat16") == (fingerprint, order), "how it is read must not change it"
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


@pytest.mark.parametrize("ahead", [0, 2, 5])
@pytest.mark.parametrize("delivered", [1, 5, 11])
def test_a_resumed_epoch_gives_exactly_the_rest(store: Source, delivered: int, ahead: int) -> None:
    with data_module(store, ahead=ahead) as module:
        loader = module.train_dataloader()
        iterator = iter(loader)
        seen = ids(take(iterator, delivered))
        state = json.loads(json.dumps(loader.state_dict()))
        assert state["delivered"] == delivered, "what is read ahead was not trained on"
        rest = ids(iterator)
    with data_module(store, ahead=2) as module:
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
