"""Joules of training over two ranks and a scripted driver: each GPU once, per epoch, per sample."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpuops.energy.conftest import environment, library  # noqa: F401  the scripted driver

# Two ranks on the CPU that take their GPUs' counters, as ranks on GPUs do; the module and the data are Lightning's own.
SCRIPT = """
import json, os, sys, time, warnings
warnings.simplefilter("ignore")
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
import gpuops as go
from gpuops.energy.nvml import open_gpus
from gpuops.training import energy as module

rank = int(os.environ["RANK"])
module.open_host = lambda: open_gpus(json.loads(sys.argv[2])[rank])

class Slow(BoringModel):
    def training_step(self, batch, index):
        time.sleep(0.02)  # the work, not a synchronisation
        return super().training_step(batch, index)

energy = go.EnergyCallback()
trainer = Trainer(max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", callbacks=[energy, go.LineageCallback()],
                  logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
                  default_root_dir=sys.argv[1], limit_train_batches=40, limit_val_batches=10)
trainer.fit(Slow())
torch.distributed.destroy_process_group()  # else gloo's threads may outlive the interpreter, which then aborts
"""


def fit(tmp_path: Path, environ: dict[str, str], devices: list[list[int]]) -> dict:
    Path(environ["FAKE_NVML"]).write_text(
        "gpu GPU-a H100 step_ms=20\npower 0 0 250000 80 4000\ngpu GPU-b H100 step_ms=20\npower 1 0 150000 40 2000\n"
    )
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(script), str(tmp_path / "run"), json.dumps(devices)],
        env=environ | {"OMP_NUM_THREADS": "1", "GPUOPS_LEDGER": str(tmp_path / "ledger")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    told: dict = json.loads((tmp_path / "run" / "run.json").read_text())
    return told | {"stderr": done.stderr}


@pytest.mark.parametrize(("devices", "watts"), [([[0], [1]], 400), ([[0], [0]], 250)])
def test_two_ranks_count_each_gpu_once(
    tmp_path: Path,
    environment: dict[str, str],  # noqa: F811
    devices: list[list[int]],
    watts: int,
) -> None:
    told = fit(tmp_path, environment, devices)
    energy = told["energy"]
    assert energy["reason"] is None
    assert len(energy["gpus"]) == len({*map(tuple, devices)})
    # The ranks' windows begin and end at their own moments.
    assert energy["joules"] == pytest.approx(watts * energy["seconds"], rel=0.05)
    assert [row["samples"] for row in energy["epochs"]] == [64, 64]
    training = energy["training"]
    assert training["samples"] == 128
    assert training["joules"] == pytest.approx(sum(row["joules"] for row in energy["epochs"]))
    assert training["joules"] < energy["joules"], "validation is not training"
    assert energy["joules_per_sample"] == pytest.approx(training["joules"] / 128)
    assert energy["epochs"][0]["usage"]["busy_share"] == 0.8
    assert "J a sample" in told["stderr"]
    lines = (tmp_path / "run" / "power-rank0.csv").read_text().splitlines()
    assert lines[0] == "time_s,gpu,power_w,busy_percent,memory_mb,temperature_c,sm_mhz"
    assert lines[1].split(",")[1:4] == ["GPU-a", "250.0", "80"]
