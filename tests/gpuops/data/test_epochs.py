"""Epochs without a Trainer: every sample once, on any number of ranks, and a resume that loses nothing."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch
from data_room import data_module, ids, take

from gpuops.data.datamodule import Holdout, ZarrDataModule
from gpuops.data.loader import ZarrLoader
from gpuops.data.order import Order
from gpuops.data.reading.reader import Reader
from gpuops.data.sample import Field
from gpuops.data.source import Source
from gpuops.errors import IntegrityError
from gpuops.preprocess.module import PreprocessModule

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
