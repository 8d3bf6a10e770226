"""Training under torchrun: what a run records, what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gpuops.data.runs import Runs
from gpuops.lineage.ledger import Ledger
from gpuops.lineage.version import run_id
from tests.conftest import DEMO, Job, run_cli, run_torchrun, training_arguments


def record(job: Job) -> dict:
    return json.loads((job.run / "run.json").read_text())


def test_a_run_on_two_ranks_is_one_run(trained: Job) -> None:
    run = record(trained)
    assert run["status"] == "finished"
    assert run["world_size"] == 2
    assert run["epochs"] == 1
    held_out, records = len(Runs.from_json(run["data"]["held_out_records"])), 32
    batches = (records - held_out) * 12 // 32
    assert run["samples_seen"] == batches * 32
    assert [rank["samples"] > 0 for rank in run["reading"]] == [True, True]
    assert (trained.run / run["checkpoint"]).is_file()


def test_the_run_id_is_the_digest_of_its_parts(trained: Job) -> None:
    run = record(trained)
    assert run["run_id"] == run_id(run["identity"])
    text = json.dumps(run["identity"])
    assert str(trained.root) not in text
    assert run["identity"]["kernels"]
    assert run["identity"]["environment"]["packages"]["torch"]


def test_skill_and_baselines_are_logged_on_the_same_samples(trained: Job) -> None:
    metrics = record(trained)["metrics"]
    assert {"val_rmse", "persistence_rmse", "extrapolation_rmse", "ar6_rmse"} <= metrics.keys()
    assert 0 < metrics["ar6_rmse"] < min(metrics["persistence_rmse"], metrics["extrapolation_rmse"])


def test_baselines_equal_numpys(trained: Job) -> None:
    import numpy as np

    import gpuops as go

    held = Runs.from_json(record(trained)["data"]["held_out_records"])
    field = np.asarray(go.open(trained.store).variables["turbidity"].array[:])[held] * 0.05
    past, last, truth = (np.roll(field, -k, axis=1) for k in (4, 5, 6))
    metrics = record(trained)["metrics"]
    assert metrics["persistence_rmse"] == pytest.approx(np.sqrt(((last - truth) ** 2).mean()), rel=1e-4)
    extrapolated = 2 * last - past
    assert metrics["extrapolation_rmse"] == pytest.approx(np.sqrt(((extrapolated - truth) ** 2).mean()), rel=1e-4)


def test_energy_is_null_with_a_reason_or_counted(trained: Job) -> None:
    energy = record(trained)["energy"]
    assert (energy["joules"] is None) == (energy["reason"] is not None)
    assert energy["joules"] != 0
    assert energy["training"]["samples"] == record(trained)["samples_seen"]
    assert energy["joules_per_sample"] == energy["training"]["joules_per_sample"]


def test_the_time_of_a_step_is_told_apart(trained: Job) -> None:
    (row,) = record(trained)["step_times"]
    shares = [row[f"{name}_share"] for name in ("data", "compute", "optimizer", "other")]
    assert sum(shares) == pytest.approx(1)
    assert all(0 <= share <= 1 for share in shares)
    assert row["steps"] == record(trained)["steps"] - 1, "every step that has one before it"
    assert row["stall_share"] + row["preprocess_share"] <= row["data_share"] * 1.05
    assert row["data_share_worst_rank"] >= row["data_share"]


def test_metrics_lie_in_the_run_directory_as_csv_and_for_tensorboard(trained: Job) -> None:
    assert "val_rmse" in (trained.run / "metrics.csv").read_text().splitlines()[0]
    assert list((trained.run / "tensorboard").glob("events.out.tfevents.*"))


def test_the_ledger_holds_the_run(trained: Job) -> None:
    with Ledger(trained.ledger) as ledger:
        runs = [event.body for event in ledger.events("run")]
        assert ledger.verify() >= 2
    assert record(trained)["run_id"] in {run["run_id"] for run in runs}


def test_a_world_that_is_not_torchruns_is_refused(stored: Job, tmp_path: Path) -> None:
    run = tmp_path / "run"
    alone = ["--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto"]
    done = run_torchrun(2, *training_arguments(stored.store, run), *alone, cwd=tmp_path)
    assert done.returncode != 0
    assert not (run / "run.json").exists()
    assert "torchrun started 2" in done.stderr


@pytest.mark.slow
def test_a_run_directory_in_use_is_refused(trained: Job, tmp_path: Path) -> None:
    before = {file: (trained.run / file).read_bytes() for file in ("run.json", "metrics.csv")}
    done = run_cli("train", *training_arguments(trained.store, trained.run), cwd=tmp_path)
    assert done.returncode == 2
    assert "holds a run" in done.stderr.splitlines()[-1]
    assert {file: (trained.run / file).read_bytes() for file in before} == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--data.init_args.url=nowhere", "nowhere does not exist"),
        pytest.param("--data.init_args.global_batch=7000", "make global_batch smaller", marks=pytest.mark.slow),
        pytest.param("--data.init_args.holdout.by=continent", "has no variable 'continent'", marks=pytest.mark.slow),
        pytest.param("--data.init_args.window.dim=week", "'week' does not exist", marks=pytest.mark.slow),
    ],
)
def test_bad_data_arguments_are_one_line(stored: Job, tmp_path: Path, override: str, message: str) -> None:
    run = tmp_path / "run"
    done = run_cli("train", *training_arguments(stored.store, run), override, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (run / "run.json").exists()


def test_callbacks_work_in_a_script_of_ones_own(stored: Job, tmp_path: Path) -> None:
    """A user's Trainer and LightningModule with nothing of ours but the data module and the callbacks."""
    script = tmp_path / "own.py"
    declared = yaml.safe_load((DEMO / "run.yaml").read_text())["data"]["init_args"]
    script.write_text(
        f"""
import torch, gpuops as go
from gpuops.data.datamodule import Holdout
from gpuops.data.sample import Field, Window
from lightning.pytorch import LightningModule, Trainer

class Mine(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Conv2d(7, 1, 1)
    def training_step(self, batch, i):
        return ((self.net(batch["inputs"]["x"]) - batch["targets"]["y"]) ** 2).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

data = go.ZarrDataModule(
    {str(stored.store)!r},
    inputs={{"x": [Field("turbidity", (0, 1, 2, 3, 4, 5)), Field("altitude")]}},
    targets={{"y": [Field("turbidity", (6,))]}},
    window=Window("month", 7, cyclic=True),
    holdout=Holdout("region"),
)
energy = go.EnergyCallback()
trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[energy, go.LineageCallback()], logger=False,
                  enable_progress_bar=False, enable_model_summary=False, default_root_dir="own-run")
trainer.fit(Mine(), data)
assert energy.reading is not None
"""
    )
    assert declared["window"] == {"dim": "month", "length": 7, "cyclic": True}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "own-run" / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["samples_seen"] > 0
