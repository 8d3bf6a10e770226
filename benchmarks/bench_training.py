"""What our callbacks add to a training step, and how training scales over two ranks of this machine.

Overhead: the same module and the same data in memory, fitted with and without the callbacks in turn, in one process;
the median step of each fit, and the median over pairs of their ratio. Checkpoints within the epoch are off: they are
for the disk to answer. Scaling: samples a second of two ranks against one, with as many cores in all: on two cores the
best possible is 1 for a model that uses both, and what is lost is the ranks' talk.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import harness
from harness import Row

FIT = """
import json, os, sys, time, warnings
warnings.simplefilter("ignore")
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset
import gpuops as go

asked = json.loads(sys.argv[1])
torch.set_num_threads(asked["threads"])

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        c, conv, relu = asked["width"], torch.nn.Conv2d, torch.nn.ReLU
        layers = conv(3, c, 3, padding=1), relu(), conv(c, c, 3, padding=1), relu(), conv(c, 3, 3, padding=1)
        self.net = torch.nn.Sequential(*layers)
    def training_step(self, batch, index):
        return (self.net(batch[0]) - batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)

class Watch(Callback):
    def on_train_start(self, *_):
        self.times, self.last = [], None
    def on_train_batch_start(self, *_):
        now = time.perf_counter()
        if self.last is not None:
            self.times.append(now - self.last)
        self.last = now

def fit(ours):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(asked["steps"] * asked["batch"], 3, 32, 32))
    watch = Watch()
    added = [go.EnergyCallback(), go.StepTimesCallback(), go.RecoveryCheckpoint(0), go.PreemptionCallback()]
    added = added if ours else []
    world = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = Trainer(max_epochs=1, accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto",
                      callbacks=[watch, *added], logger=False, enable_progress_bar=False, enable_model_summary=False,
                      enable_checkpointing=bool(added), default_root_dir=asked["folder"])
    trainer.fit(Net(), DataLoader(data, batch_size=asked["batch"]))
    return watch.times

times = {"with": [], "without": []}
fit(False)
for number in range(asked["rounds"]):
    for name in ("with", "without") if number % 2 else ("without", "with"):
        if name in asked["subjects"]:
            times[name].append(fit(name == "with"))
if int(os.environ.get("RANK", "0")) == 0:
    print("TIMES" + json.dumps(times))
"""


def main() -> None:
    warnings.simplefilter("ignore")
    options = harness.arguments(__doc__ or "", "training").parse_args()
    rounds, steps = (2, 40) if options.quick else (5, 100)
    rows = [*overhead(rounds, steps), *scaling(rounds, steps)]
    harness.report(options.out, packages=("torch", "lightning"), limits={}, rows=rows)


def fit(ranks: int, **asked: object) -> dict[str, list[list[float]]]:
    """Step times in seconds of every fit, by subject."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "fit.py"
        script.write_text(FIT)
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        command = [sys.executable, *launch, str(script), json.dumps({"folder": folder, **asked})]
        environment = {**os.environ, "OMP_NUM_THREADS": str(asked["threads"])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("TIMES"))
    told: dict[str, list[list[float]]] = json.loads(line.removeprefix("TIMES"))
    return told


def overhead(rounds: int, steps: int) -> list[Row]:
    """Median step with and without our callbacks, for short and long steps."""
    rows = []
    for name, width in (("short steps", 16), ("long steps", 48)):
        asked = {"steps": steps, "rounds": rounds, "batch": 16, "width": width, "subjects": ["with", "without"]}
        told = fit(1, threads=1, **asked)
        medians = {subject: [statistics.median(times) for times in fits] for subject, fits in told.items()}
        pairs = [a / b for a, b in zip(medians["with"], medians["without"], strict=True)]
        plain = statistics.median(medians["without"])
        added_us = statistics.median(a - b for a, b in zip(medians["with"], medians["without"], strict=True)) * 1e6
        note = f"{rounds} pairs of {steps} steps; ratios {harness.spread(pairs)}; {added_us:+.0f} us a step"
        ratio = {"without": statistics.median(pairs)}
        value = 1e3 * statistics.median(medians["with"])
        rows.append(Row(name, "gpuops", "step", value, "ms", vs=ratio, note=note))
        rows.append(Row(name, "without", "step", 1e3 * plain, "ms"))
    return rows


def scaling(rounds: int, steps: int) -> list[Row]:
    """Samples a second on one rank with every core, on one rank with one, and on two ranks with one each."""
    rates = {}
    for name, ranks, threads in (
        ("1 rank, 2 threads", 1, 2),
        ("1 rank, 1 thread", 1, 1),
        ("2 ranks, 1 thread each", 2, 1),
    ):
        asked = {"steps": steps, "rounds": rounds, "batch": 16, "width": 48, "subjects": ["with"]}
        medians = [statistics.median(times) for times in fit(ranks, threads=threads, **asked)["with"]]
        rates[name] = 16 * ranks / statistics.median(medians)
    return [
        Row(
            "scaling", name, "samples", rate, "1/s", vs={other: rate / rates[other] for other in rates if other != name}
        )
        for name, rate in rates.items()
    ]


if __name__ == "__main__":
    main()
