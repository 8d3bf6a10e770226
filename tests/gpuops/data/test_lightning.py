"""Under a real Trainer: every sample of an epoch once, also across a checkpoint in its middle."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from data_room import FORECAST
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from gpuops.data.datamodule import Holdout, ZarrDataModule
from gpuops.data.source import Source
from gpuops.errors import IntegrityError

# What Lightning says to itself in tiny runs.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*(LeafSpec|treespec).*deprecated.*"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Tiny(LightningModule):
    """Two layers; records which samples it was given, by epoch."""

    def __init__(self, *, scheduled: bool = False) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.Conv2d(4, 1, 1))
        self.scheduled = scheduled
        self.trained: list[tuple[int, list[int]]] = []
        self.validated: list[tuple[str, int, list[int]]] = []
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        self.trained.append((self.current_epoch, batch["id"].tolist()))
        loss = (self.net(batch["inputs"]["x"]) - batch["targets"]["y"]).square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        stage = "sanity" if self.trainer.sanity_checking else "validate"
        self.validated.append((stage, self.current_epoch, batch["id"][batch["valid"].cpu()].tolist()))

    def configure_optimizers(self) -> Any:
        if self.scheduled:
            # This makes Lightning build the loaders before it restores the loops, and it drops the loader's state.
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), 0.01)


def data(store: Source, **changes: Any) -> ZarrDataModule:
    return ZarrDataModule(
        **{
            "url": store.url,
            "inputs": dict(FORECAST.inputs),
            "targets": dict(FORECAST.targets),
            "window": FORECAST.window,
            "holdout": Holdout("region", 0.34),
            "global_batch": 16,
            **changes,
        }
    )


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "enable_checkpointing": False,
    }
    return Trainer(**{**quiet, **options})


def by_epoch(trained: list[tuple[int, list[int]]]) -> dict[int, list[int]]:
    epochs: dict[int, list[int]] = {}
    for epoch, samples in trained:
        epochs.setdefault(epoch, []).extend(samples)
    return epochs


def test_two_epochs_with_validation(store: Source, tmp_path: Path) -> None:
    model, module = Tiny(), data(store)
    trainer(tmp_path, max_epochs=2, num_sanity_val_steps=2, limit_val_batches=1.0).fit(model, datamodule=module)
    epochs = by_epoch(model.trained)
    assert {epoch: len(samples) for epoch, samples in epochs.items()} == {0: 192, 1: 192}
    assert sorted(epochs[0]) == sorted(epochs[1]) == module.train_ids.tolist()
    assert epochs[0] != epochs[1]
    validated = {
        epoch: [s for stage, e, samples in model.validated if (stage, e) == ("validate", epoch) for s in samples]
        for epoch in (0, 1)
    }
    assert validated == {0: module.val_ids.tolist(), 1: module.val_ids.tolist()}, (
        "the sanity check must not cost the first validation its beginning"
    )
    assert sum(stage == "sanity" for stage, _, _ in model.validated) == 2


def test_limited_batches_begin_each_epoch_anew(store: Source, tmp_path: Path) -> None:
    model, module = Tiny(), data(store)
    fit = trainer(tmp_path, max_epochs=3, limit_train_batches=4, limit_val_batches=2)
    fit.fit(model, datamodule=module)
    assert [len(samples) for samples in by_epoch(model.trained).values()] == [64] * 3
    for epoch in range(3):
        seen = [s for stage, e, samples in model.validated if (stage, e) == ("validate", epoch) for s in samples]
        assert seen == module.val_ids[:32].tolist()


@pytest.mark.parametrize(("steps", "scheduled"), [(5, False), (5, True), (12, True), (17, False)])
def test_a_checkpoint_in_the_middle_of_an_epoch(store: Source, tmp_path: Path, steps: int, scheduled: bool) -> None:
    torch.manual_seed(0)
    whole = Tiny(scheduled=scheduled)
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    trainer(tmp_path, max_epochs=2).fit(whole, datamodule=data(store))

    first = Tiny(scheduled=scheduled)
    first.load_state_dict(start)
    saving = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=1, save_last=True)
    trainer(tmp_path, max_epochs=2, max_steps=steps, enable_checkpointing=True, callbacks=[saving]).fit(
        first, datamodule=data(store)
    )
    assert len(first.trained) == steps
    second, module = Tiny(scheduled=scheduled), data(store)
    trainer(tmp_path, max_epochs=2).fit(
        second, datamodule=module, ckpt_path=tmp_path / "ckpt" / "last.ckpt", weights_only=False
    )

    both = first.trained + second.trained
    for epoch, samples in by_epoch(both).items():
        twice = [sample for sample, count in Counter(samples).items() if count > 1]
        assert not twice, f"epoch {epoch} was given {len(twice)} samples twice"
        assert sorted(samples) == module.train_ids.tolist(), f"epoch {epoch} lost samples"
    assert both == whole.trained, "the same samples in the same order as without the interruption"
    assert first.losses + second.losses == whole.losses, "and so the same losses, bit for bit"


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (2, {"accumulate_grad_batches": 3}),
        pytest.param(4, {"accumulate_grad_batches": 3}, marks=pytest.mark.slow),  # the end of an epoch
        (5, {"accumulate_grad_batches": 5}),  # 12 batches are 3 steps, the last of 2 batches
        pytest.param(5, {"limit_train_batches": 7}, marks=pytest.mark.slow),
        (7, {"limit_train_batches": 7}),
        (9, {"limit_train_batches": 7}),
        (7, {"val_check_interval": 5, "limit_val_batches": 2, "num_sanity_val_steps": 2}),
        (15, {"reload_dataloaders_every_n_epochs": 1, "limit_val_batches": 1, "num_sanity_val_steps": 1}),
    ],
)
def test_a_resumed_run_trains_as_one_that_was_not_interrupted(
    store: Source, tmp_path: Path, steps: int, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    whole = Tiny()
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    trainer(tmp_path, max_epochs=2, **options).fit(whole, datamodule=data(store))
    first = Tiny()
    first.load_state_dict(start)
    saving = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=1, save_last=True)
    stopped = {**options, "max_steps": steps, "enable_checkpointing": True, "callbacks": [saving]}
    trainer(tmp_path, max_epochs=2, **stopped).fit(first, datamodule=data(store))
    second = Tiny()
    trainer(tmp_path, max_epochs=2, **options).fit(
        second, datamodule=data(store), ckpt_path=tmp_path / "ckpt" / "last.ckpt", weights_only=False
    )
    both = first.trained + second.trained
    assert both == whole.trained
    assert first.losses + second.losses == whole.losses
    limit = options.get("limit_train_batches", 12)
    assert {epoch: len(set(samples)) for epoch, samples in by_epoch(both).items()} == dict.fromkeys(
        range(2), 16 * limit
    )


class Failing(Tiny):
    """Fails in the middle of a step."""

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        if len(self.trained) == 6:
            raise RuntimeError("the machine went away")
        return super().training_step(batch, index)


class SavingOnFailure(Callback):
    """Saves when a step fails, as Lightning's OnExceptionCheckpoint does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


def test_a_step_that_did_not_end_is_taken_again(store: Source, tmp_path: Path) -> None:
    first = Failing()
    saving = SavingOnFailure(tmp_path / "failed.ckpt")
    with pytest.raises(RuntimeError, match="went away"):
        trainer(tmp_path, max_epochs=1, callbacks=[saving]).fit(first, datamodule=data(store))
    second, module = Tiny(), data(store)
    trainer(tmp_path, max_epochs=1).fit(
        second, datamodule=module, ckpt_path=tmp_path / "failed.ckpt", weights_only=False
    )
    assert len(first.trained) == 6
    samples = by_epoch(first.trained + second.trained)[0]
    assert sorted(samples) == module.train_ids.tolist(), "the batch of the failed step was lost or taken twice"


class SavingAt(Callback):
    """Saves after a batch, whether or not the optimiser has stepped."""

    def __init__(self, batch: int, path: Path) -> None:
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(("batch", "after"), [(4, 1), (9, 2), (11, 0)])
def test_a_checkpoint_between_two_optimiser_steps_is_refused(
    store: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture, batch: int, after: int
) -> None:
    options: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 4}
    saving = SavingAt(batch, tmp_path / "saved.ckpt")
    first = Tiny()
    trainer(tmp_path, **{**options, "max_epochs": 1}, callbacks=[saving]).fit(first, datamodule=data(store))
    second, module = Tiny(), data(store)
    arguments: dict[str, Any] = {"datamodule": module, "ckpt_path": tmp_path / "saved.ckpt", "weights_only": False}
    if after:
        assert f"lies {after} batches after an optimiser step" in caplog.text
        with pytest.raises(IntegrityError, match=f"written {after} batches after an optimiser step"):
            trainer(tmp_path, **options).fit(second, **arguments)
        module.teardown()
    else:
        assert "after an optimiser step" not in caplog.text
        trainer(tmp_path, **options).fit(second, **arguments)
        samples = by_epoch(first.trained[: batch + 1] + second.trained)
        assert sorted(samples[0]) == sorted(samples[1]) == module.train_ids.tolist()


def test_a_checkpoint_of_other_data_is_refused(store: Source, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=1, save_last=True)
    module = data(store)
    trainer(tmp_path, max_steps=3, enable_checkpointing=True, callbacks=[saving]).fit(Tiny(), datamodule=module)
    other = data(store, holdout=Holdout("region", values=(5,)))
    with pytest.raises(IntegrityError, match=module.fingerprint) as error:
        trainer(tmp_path, max_epochs=1).fit(
            Tiny(), datamodule=other, ckpt_path=tmp_path / "ckpt" / "last.ckpt", weights_only=False
        )
    assert other.fingerprint in str(error.value)
    other.teardown()


def test_a_second_fit_begins_at_the_beginning(store: Source, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=1, save_last=True)
    module = data(store)
    trainer(tmp_path, max_steps=3, enable_checkpointing=True, callbacks=[saving]).fit(Tiny(), datamodule=module)
    resumed = Tiny()
    trainer(tmp_path, max_epochs=1).fit(
        resumed, datamodule=module, ckpt_path=tmp_path / "ckpt" / "last.ckpt", weights_only=False
    )
    assert len(resumed.trained) == 9
    fresh = Tiny()
    trainer(tmp_path, max_epochs=1).fit(fresh, datamodule=module)
    assert sorted(by_epoch(fresh.trained)[0]) == module.train_ids.tolist(), "the old position was taken up again"


def test_validate_alone(store: Source, tmp_path: Path) -> None:
    model, module = Tiny(), data(store)
    trainer(tmp_path, limit_val_batches=1.0).validate(model, datamodule=module, verbose=False)
    assert [s for _, _, samples in model.validated for s in samples] == module.val_ids.tolist()


def test_the_test_split_and_prediction(store: Source, tmp_path: Path) -> None:
    class Whole(Tiny):
        def test_step(self, batch: dict[str, Any], index: int) -> None:
            self.validated.append(("test", 0, batch["id"][batch["valid"]].tolist()))

        def predict_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
            return batch["id"][batch["valid"]]

    model, module = Whole(), data(store, test=Holdout("region", values=(2,)), holdout=Holdout("region", values=(5,)))
    runner = trainer(tmp_path)
    runner.test(model, datamodule=module, verbose=False)
    tested = [s for _, _, samples in model.validated for s in samples]
    assert tested == module.test_ids.tolist()
    assert len(tested) == 48
    predicted = runner.predict(model, datamodule=module)
    assert predicted is not None
    assert torch.cat(predicted).tolist() == list(range(288))  # type: ignore[arg-type]
