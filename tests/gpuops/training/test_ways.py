"""Ways of training: precision, accumulation, compilation, sharded models; the callbacks in others' scripts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpuops.training.test_faults import SINGLE, Room, record

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.precision=bf16-mixed"],
        ["--trainer.accumulate_grad_batches=2"],
        ["--trainer.strategy=ddp_find_unused_parameters_true", "--trainer.gradient_clip_val=0.5"],
    ],
)
def test_any_trainer_flag(room: Room, flags: list[str]) -> None:
    run = room.root / flags[0].strip("-").replace("=", "-")
    room.fit(run, *flags)
    told = record(run)
    assert told["status"] == "finished"
    assert told["samples_seen"] == 2 * 80
    assert told["energy"]["training"]["samples"] == 2 * 80


SHARDED = """
import torch
from torch.distributed.fsdp import fully_shard
import model

class Sharded(model.Model):
    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)
"""


def test_a_sharded_model_is_trained_killed_and_gone_on_with(room: Room) -> None:
    """FSDP2 by Lightning's ModelParallelStrategy: sharded checkpoints are folders, whole or not there."""
    (room.root / "sharded.py").write_text(SHARDED)
    run = room.root / "sharded"
    strategy = "--trainer.strategy.class_path=lightning.pytorch.strategies.ModelParallelStrategy"
    sizes = ["--trainer.strategy.init_args.data_parallel_size=2", "--trainer.strategy.init_args.tensor_parallel_size=1"]
    room.fit(run, "--model.class_path=sharded.Sharded", strategy, *sizes, restarts=1, KILL="7:1")
    told = record(run)
    assert told["status"] == "finished"
    assert told["attempts"][-1]["from_step"] == 6
    newest = max((run / "checkpoints").iterdir())
    assert newest.is_dir()
    assert list(newest.glob("*.distcp"))


def test_a_compiled_model_trains(room: Room) -> None:
    (room.root / "compiled.py").write_text(
        "import model, torch\n"
        "class Compiled(model.Model):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.net.compile()\n"
    )
    run = room.root / "compiled"
    room.fit(run, "--model.class_path=compiled.Compiled", "--trainer.max_epochs=1", ranks=1)
    assert record(run)["status"] == "finished"


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_other_subcommands_refuse_a_world_that_is_not_torchruns(room: Room, subcommand: str) -> None:
    command = room.command(room.root / "world", "--trainer.devices=1", "--trainer.strategy=auto")
    command[command.index("fit")] = subcommand
    done = subprocess.run(
        command, env=room.environment(room.root / "world.told"), capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "torchrun started 2" in done.stderr


def test_predict_runs_from_a_checkpoint(room: Room) -> None:
    run = room.root / "predicted"
    room.fit(run, "--trainer.max_epochs=1", ranks=1)
    checkpoint = max((run / "checkpoints").iterdir())
    done = subprocess.run(
        [
            *[*SINGLE[:-1], "predict", f"--config={room.root / 'run.yaml'}", f"--ckpt_path={checkpoint}"],
            f"--trainer.default_root_dir={room.root / 'out'}",
        ],
        env=room.environment(room.root / "predicted.told"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


# Example modules of the installed Lightning, as they are: the plainest, manual optimisation, the demo.
EXAMPLE = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from lightning.pytorch import Trainer
{imports}
import gpuops as go

if __name__ == "__main__":
    energy, steps = go.EnergyCallback(), go.StepTimesCallback()
    every = [energy, steps, go.RecoveryCheckpoint(), go.PreemptionCallback(), go.LineageCallback()]
    ours = {{"energy": every[:1], "recovery": every[2:3], "lineage": every[4:], "all": every}}[sys.argv[1]]
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=ours, logger=False, enable_progress_bar=False,
                      enable_model_summary=False, default_root_dir=sys.argv[2],
                      enable_checkpointing=any(isinstance(callback, go.RecoveryCheckpoint) for callback in ours),
                      limit_train_batches=4, limit_val_batches=2)
    {fit}
    if energy in ours:
        assert energy.reading is not None and (energy.reading.joules is None) == (energy.reading.reason is not None)
        assert energy.epochs[0]["samples"] == {samples}, energy.epochs
"""
EXAMPLES = {
    "boring": (
        "from lightning.pytorch.demos.boring_classes import BoringModel",
        "trainer.fit(BoringModel())",
        4,
    ),
    "manual": (
        "from lightning.pytorch.demos.boring_classes import ManualOptimBoringModel",
        "trainer.fit(ManualOptimBoringModel())",
        4,
    ),
    "demo": (
        "from lightning.pytorch.demos.boring_classes import DemoModel, RandomDataset\n"
        "from torch.utils.data import DataLoader",
        "trainer.fit(DemoModel(), DataLoader(RandomDataset(32, 8), batch_size=2))",
        8,
    ),
}


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("callbacks", ["energy", "lineage", "recovery", "all"])
def test_lightnings_example_modules_with_each_callback_alone(example: str, callbacks: str, tmp_path: Path) -> None:
    imports, fit, samples = EXAMPLES[example]
    (tmp_path / "script.py").write_text(EXAMPLE.format(imports=imports, fit=fit, samples=samples))
    environment = {**os.environ, "GPUOPS_LEDGER": str(tmp_path / "ledger")}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), callbacks, str(tmp_path / "run")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    if callbacks in ("lineage", "all"):
        run = json.loads((tmp_path / "run" / "run.json").read_text())
        assert run["status"] == "finished"
        assert run["identity"]["data"]["reason"] == "trained on data that gpuops did not read"
    assert (tmp_path / "run" / "checkpoints").exists() == (callbacks in ("recovery", "all"))
