"""Runs that are killed, preempted and moved: what they go on from, and that the result is that of a run left alone."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
import yaml
import zarr

BATCH, RECORDS, EPOCHS = 8, 80, 2
STEPS = EPOCHS * RECORDS // BATCH
SINGLE = [sys.executable, "-m", "gpuops.training.main", "fit"]

# Dropout makes the weights depend on every rank's random state. A step that is asked to waits until it is let go on, so
# that signals arrive where the test wants them, whatever the machine does meanwhile.
MODEL = """
import os, signal, time
import lightning.pytorch as pl
import torch

class Model(pl.LightningModule):
    def __init__(self, width: int = 16):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Linear(6, width), torch.nn.Dropout(0.5), torch.nn.Linear(width, 1))

    def forward(self, x):
        return self.net(x.flatten(1))

    def training_step(self, batch, index):
        self.tell(batch)
        return (self(batch["inputs"]["x"]) ** 2).mean()

    def predict_step(self, batch, index):
        return self(batch["inputs"]["x"])

    def tell(self, batch):
        where = os.environ["TOLD"]
        with open(f"{where}/seen-{self.global_rank}-{os.environ.get('ATTEMPT', '0')}", "a") as file:
            ids = batch["id"].tolist()
            file.write(f"{self.trainer.global_step} {self.trainer.world_size} {ids}\\n")
        kill = os.environ.get("KILL")  # STEP:RANK,RANK... once
        if kill and not os.path.exists(f"{where}/killed-{self.global_rank}"):
            step, ranks = kill.split(":")
            if self.trainer.global_step == int(step) and str(self.global_rank) in ranks.split(","):
                open(f"{where}/killed-{self.global_rank}", "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("PAUSE") == f"{self.trainer.global_step}":
            open(f"{where}/pid-{self.global_rank}", "w").write(f"{os.getpid()}")
            os.rename(f"{where}/pid-{self.global_rank}", f"{where}/paused-{self.global_rank}")
            with open(f"{where}/go-{self.global_rank}") as fifo:  # until the test opens its end
                fifo.read()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
"""


class Room:
    """A store, a model and a config; runs of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        generator = np.random.default_rng(0)
        group = zarr.open_group(root / "store", mode="w")
        values = generator.normal(size=(RECORDS, 2, 3)).astype(np.float32)
        group.create_array("x", data=values, chunks=(1, 2, 3), dimension_names=["time", "y", "x"])
        (root / "model.py").write_text(MODEL)
        callbacks = [
            {"class_path": "gpuops.EnergyCallback"},
            {"class_path": "gpuops.RecoveryCheckpoint", "init_args": {"every_n_steps": 3}},
            {"class_path": "gpuops.PreemptionCallback"},
            {"class_path": "gpuops.LineageCallback"},
        ]
        self.config: dict[str, Any] = {
            "seed_everything": 1,
            "trainer": {
                "max_epochs": EPOCHS,
                "callbacks": callbacks,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "log_every_n_steps": 1,
            },
            "model": {"class_path": "model.Model"},
            "data": {
                "class_path": "gpuops.ZarrDataModule",
                "init_args": {
                    "url": str(root / "store"),
                    "inputs": {"x": [{"variable": "x"}]},
                    "targets": {},
                    "global_batch": BATCH,
                    "threads": 1,
                },
            },
        }
        (root / "run.yaml").write_text(yaml.safe_dump(self.config))

    def command(self, run: Path, *more: str, ranks: int = 2, restarts: int = 0, signals: str = "SIGTERM") -> list[str]:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--monitor-interval=0.1"]
        launch += [f"--max-restarts={restarts}", f"--signals-to-handle={signals}"]
        main = ["-m", "gpuops.training.main", "fit", f"--config={self.root / 'run.yaml'}"]
        return [sys.executable, *launch, *main, f"--trainer.default_root_dir={run}", *more]

    def environment(self, told: Path, **more: str) -> dict[str, str]:
        told.mkdir(exist_ok=True)
        return {**os.environ, "OMP_NUM_THREADS": "1", "TOLD": str(told), "GPUOPS_LEDGER": str(told / "ledger"), **more}

    def fit(self, run: Path, *more: str, ranks: int = 2, restarts: int = 0, **environ: str) -> str:
        done = subprocess.run(
            self.command(run, *more, ranks=ranks, restarts=restarts),
            env=self.environment(run.with_suffix(".told"), **environ),
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stderr


def record(run: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((run / "run.json").read_text())
    return told


def weights(run: Path) -> dict[str, torch.Tensor]:
    (last,) = (run / "checkpoints").glob(f"step={STEPS:09d}.ckpt")
    state: dict[str, torch.Tensor] = torch.load(last, weights_only=True)["state_dict"]
    return state


def seen(run: Path) -> dict[int, list[int]]:
    """Ids of each global batch by step; where a step was done twice, both must have had the same."""
    steps: dict[int, dict[int, list[int]]] = {}
    for file in sorted(run.with_suffix(".told").glob("seen-*")):
        rank = int(file.name.split("-")[1])
        for line in file.read_text().splitlines():
            step, _, ids = line.split(" ", 2)
            told = json.loads(ids)
            assert steps.setdefault(int(step), {}).setdefault(rank, told) == told
    return {step: np.stack([of[rank] for rank in sorted(of)], axis=1).ravel().tolist() for step, of in steps.items()}


def assert_alike(run: Path, alone: Path) -> None:
    mine, theirs = weights(run), weights(alone)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(mine[name], value), f"{name} differs"
    assert seen(run) == seen(alone)


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["7:0", "8:1", "14:0,1", "1:0,1"])
def test_a_killed_run_ends_as_one_left_alone(room: Room, alone: Path, killed: str) -> None:
    """SIGKILL to a rank or to all, in either epoch, also before there is a checkpoint: torchrun starts all again."""
    run = room.root / f"killed-{killed.replace(':', '-').replace(',', '')}"
    errors = room.fit(run, restarts=1, KILL=killed)
    assert_alike(run, alone)
    told = record(run)
    assert told["status"] == "finished"
    if killed != "1:0,1":
        assert "going on from" in errors
        assert told["resumed_from"] == {"run_id": told["run_id"], "differs": []}
        step = int(killed.split(":")[0])
        assert told["attempts"][-1]["from_step"] == max(step // 3 * 3, step // 10 * 10)


def killed(room: Room, name: str) -> Path:
    """A run that was killed at step 7 and not started again; its newest checkpoint is of step 6."""
    run = room.root / name
    told = room.environment(run.with_suffix(".told"), KILL="7:0,1")
    done = subprocess.run(room.command(run), env=told, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    assert record(run)["status"] == "running"
    return run


@pytest.mark.slow
def test_the_random_states_matter(room: Room, alone: Path) -> None:
    """Without the ranks' random states the weights would differ: the comparison above can fail."""
    run = killed(room, "unseeded")
    path = run / "checkpoints" / "step=000000006.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert len(checkpoint.pop("gpuops_random_states")) == 2
    torch.save(checkpoint, path)
    room.fit(run)
    assert any(not torch.equal(value, weights(alone)[name]) for name, value in weights(run).items())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_another_number_of_ranks_goes_on_with_the_same_samples(room: Room, alone: Path, ranks: int) -> None:
    run = killed(room, f"moved-{ranks}")
    room.fit(run, ranks=ranks, ATTEMPT="1")
    batches: dict[int, list[int]] = {}
    for rank in range(ranks):
        for line in (run.with_suffix(".told") / f"seen-{rank}-1").read_text().splitlines():
            step, world, ids = line.split(" ", 2)
            assert int(world) == ranks
            batches.setdefault(int(step), [-1] * BATCH)[rank::ranks] = json.loads(ids)
    assert batches == {step: ids for step, ids in seen(alone).items() if step >= 6}
    assert [attempt["world_size"] for attempt in record(run)["attempts"]] == [2, ranks]


def open_when_read(pipe: Path, processes: Sequence[subprocess.Popen[str]]) -> IO[str]:
    """A pipe's writing end, once a rank waits at the other; fails if a process ends before that."""
    while True:
        try:
            return os.fdopen(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK), "w")
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                pytest.fail(f"a process ended with {process.wait(timeout=0.1)} before its ranks came to the pause")


class Paused:
    """A run whose ranks wait inside a step until they are told to go on."""

    def __init__(self, room: Room, run: Path, step: int, signals: str = "SIGTERM", **environ: str) -> None:
        told = run.with_suffix(".told")
        environment = room.environment(told, PAUSE=str(step), **environ)
        self.told = told
        for rank in range(2):
            (told / f"paused-{rank}").unlink(missing_ok=True)
            os.mkfifo(told / f"go-{rank}")
        self.process = subprocess.Popen(
            room.command(run, signals=signals),
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        self.streams = [open_when_read(told / f"go-{rank}", [self.process]) for rank in range(2)]
        self.pids = [int((told / f"paused-{rank}").read_text()) for rank in range(2)]

    def go(self) -> None:
        for stream in self.streams:
            stream.close()

    def end(self) -> str:
        try:
            _, errors = self.process.communicate(timeout=120)
        finally:
            self.process.kill()
        for rank in range(2):
            (self.told / f"go-{rank}").unlink()
        return errors


@pytest.mark.slow
@pytest.mark.parametrize(("number", "which"), [(signal.SIGTERM, [0]), (signal.SIGUSR1, [1]), (signal.SIGTERM, [0, 1])])
def test_a_signal_saves_in_the_middle_of_an_epoch_and_the_same_command_goes_on(
    room: Room, alone: Path, number: signal.Signals, which: list[int]
) -> None:
    run = room.root / f"preempted-{number.name}-{len(which)}"
    paused = Paused(room, run, 4)
    for rank in which:
        os.kill(paused.pids[rank], number)
    paused.go()
    errors = paused.end()
    assert paused.process.returncode == 0, errors
    told = record(run)
    assert told["status"] == "interrupted"
    assert told["error"] is None
    saved = told["steps"]
    assert 5 <= saved <= 7, "at most two steps after the one that was under way"
    assert f"{number.name}: saved" in errors
    assert (run / "checkpoints" / f"step={saved:09d}.ckpt").is_file()
    assert "Traceback" not in errors
    room.fit(run, ATTEMPT="1")
    assert record(run)["attempts"][-1]["from_step"] == saved, "no step is done again"
    first, then = (
        {int(line.split()[0]) for line in (run.with_suffix(".told") / f"seen-0-{n}").read_text().splitlines()}
        for n in "01"
    )
    assert not first & then
    assert_alike(run, alone)


@pytest.mark.slow
def test_torchrun_hands_a_signal_on_and_slurm_is_asked_to_queue_the_job_again(
    room: Room, alone: Path, tmp_path: Path
) -> None:
    """`sbatch --signal=USR1@120` reaches torchrun; a stand-in for scontrol notes what it was asked."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "asked"}\n')
    scontrol.chmod(0o755)
    run = room.root / "requeued"
    slurm = {"SLURM_JOB_ID": "4242", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    paused = Paused(room, run, 12, signals="SIGTERM,SIGUSR1", **slurm)
    paused.process.send_signal(signal.SIGUSR1)
    errors = paused.process.stderr
    assert errors is not None
    while "closing signal SIGUSR1" not in errors.readline():  # torchrun says so for each rank that it signals
        pass
    paused.go()
    said = paused.end()
    assert (tmp_path / "asked").read_text() == "requeue 4242\n", said
    assert "job 4242 is queued again" in said
    assert record(run)["status"] == "interrupted"
    room.fit(run, SLURM_RESTART_COUNT="1")
    assert_alike(run, alone)


@pytest.mark.slow
def test_the_same_command_with_another_config_is_refused(room: Room) -> None:
    run = killed(room, "changed")
    other = room.command(run, "--trainer.gradient_clip_val=1.0")
    told = room.environment(run.with_suffix(".told"))
    done = subprocess.run(other, env=told, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "a run of another config that has not ended" in done.stderr
    assert "--ckpt_path last" in done.stderr


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(room: Room) -> None:
    """A limit on the size of files stands for the disk: it lets no checkpoint be written."""
    run = killed(room, "full")
    before = {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    size = max(len(content) for content in before.values())
    script = f'ulimit -f {size // 2048}; exec "$@"'
    done = subprocess.run(
        [
            "bash",
            "-c",
            script,
            "-",
            *SINGLE,
            f"--config={room.root / 'run.yaml'}",
            f"--trainer.default_root_dir={run}",
            "--ckpt_path=last",
        ],
        env=room.environment(run.with_suffix(".told")),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 4, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("gpuops: error")]
    assert "could not be written (File too large)" in line
    assert "step=000000006.ckpt is whole" in line
    assert "Traceback" not in done.stderr
    assert {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()} == before
    assert record(run)["status"] == "failed"


def single(room: Room, run: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SINGLE, f"--config={room.root / 'run.yaml'}", f"--trainer.default_root_dir={run}", *more],
        env=room.environment(room.root / "bad.told"),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trainer.nonsense=1"], "--trainer.nonsense"),
        (["--model.class_path=model.Nope"], "module 'model' has no attribute 'Nope'"),
        (["--model.class_path=nowhere.Model"], "No module named 'nowhere'"),
        (["--model.init_args.nope=1"], "Option 'nope' is not accepted"),
        (["--trainer.max_epochs=abc"], "trainer.max_epochs: Expected a <class 'int'>"),
        (["--ckpt_path=last"], "holds no checkpoint to go on from"),
        (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
    ],
)
def test_bad_input_is_one_line(room: Room, arguments: list[str], words: str) -> None:
    done = single(room, room.root / "bad", *arguments)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("gpuops: error")]
    assert words in line
    assert len(line) < 400


@pytest.mark.slow
def test_a_run_directory_that_cannot_be_written_is_one_line(room: Room) -> None:
    done = single(room, Path("/proc/nowhere"))
    assert done.returncode == 2
    assert "cannot be written" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_checkpoint_of_other_data_is_refused(room: Room, alone: Path, tmp_path: Path) -> None:
    other = Room(tmp_path)
    zarr.open_group(tmp_path / "store", mode="r+")["x"][0] = 7.0
    done = single(other, tmp_path / "run", f"--ckpt_path={next((alone / 'checkpoints').iterdir())}")
    assert done.returncode == 5, done.stderr
    assert "this checkpoint was trained with fingerprint" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_ranks_that_do_not_divide_the_global_batch_are_refused(room: Room, tmp_path: Path) -> None:
    done = subprocess.run(
        room.command(tmp_path / "run", ranks=3), env=room.environment(tmp_path / "told"), capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "gpuops: error: global_batch 8 is not a multiple of 3 ranks" in done.stderr
