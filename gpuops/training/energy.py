"""Joules of training: per epoch, per run and per sample, over all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.data import extract_batch_size

from gpuops.energy.meter import Meter, Usage
from gpuops.energy.nvml import open_gpus
from gpuops.energy.rapl import open_host
from gpuops.energy.reading import Reading, elect, sum_over_ranks
from gpuops.energy.sensor import Found
from gpuops.training.ranks import gather, host

SERIES_FILE = "power-rank{rank}.csv"
"""File of a run directory with what a rank's GPU said of itself twice a second."""
_COLUMNS = "time_s,gpu,power_w,busy_percent,memory_mb,temperature_c,sm_mhz\n"
Windows = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Spent:
    """Energy and samples of a stretch of training, over all ranks."""

    joules: float | None
    """Without validation; None if unknown."""
    samples: int
    """Samples trained on."""
    seconds: float
    """Wall time, without validation."""
    reason: str | None = None
    """Why the energy is unknown."""

    @property
    def joules_per_sample(self) -> float | None:
        """None if unknown, and for no samples."""
        return None if self.joules is None or not self.samples else self.joules / self.samples

    def __add__(self, other: Spent) -> Spent:
        known = self.joules is not None and other.joules is not None
        return Spent(
            (self.joules or 0.0) + (other.joules or 0.0) if known else None,
            self.samples + other.samples,
            self.seconds + other.seconds,
            None if known else self.reason or other.reason,
        )

    def to_json(self) -> dict[str, Any]:
        """JSON form, with `joules_per_sample`."""
        return {**asdict(self), "joules_per_sample": self.joules_per_sample}


class EnergyCallback(Callback):
    """Joules of a fit over all ranks, each GPU once; null with the reason where nothing counts.

    On a CPU the processors' own counters (RAPL) are read, by one rank a host. No step waits for it: a thread reads the
    counters, and edges of windows are set where epochs and validations begin and end.
    """

    def __init__(self) -> None:
        self.reading: Reading | None = None
        """Reading of the last fit in this process, validation included, summed over ranks."""
        self.epochs: list[dict[str, Any]] = []
        """One row an epoch: energy without validation, samples, joules a sample, use of rank 0's GPU."""
        self._spent = self._before = Spent(0.0, 0, 0.0)
        self._attempts = 1
        self._meter: Meter | None = None
        self._counted = True  # False where another rank of this host counts the same GPU
        self._begun = 0
        self._pieces: Windows = []
        self._since: int | None = None
        self._samples = 0
        self._written = 0

    def to_json(self) -> dict[str, Any] | None:
        """What `run.json` says of it: the reading of this process, training alone, and every epoch."""
        if self.reading is None:
            return None
        spent = self._before + self._spent
        return {
            **self.reading.to_json(),
            "training": {**spent.to_json(), "attempts": self._attempts},
            "joules_per_sample": spent.joules_per_sample,
            "epochs": self.epochs,
        }

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open this rank's counters, unless a rank before it has them."""
        device = trainer.strategy.root_device
        found = open_gpus([device.index or 0]) if device.type == "cuda" else open_host()
        rows = gather((host(), tuple(sensor.id for sensor in found.sensors)))
        share = elect(rows)[trainer.global_rank]
        self._counted = not found.sensors or bool(share)
        mine = [sensor for sensor in found.sensors if sensor.id in share]
        self._meter = Meter(found=Found(mine, found.reason or (None if mine else "another rank counts this GPU")))
        self._begun = self._meter.mark()
        self._spent, self._written = Spent(0.0, 0, 0.0), 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here also where an epoch goes on that was begun before a restart."""
        self._open()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the epoch's window."""
        self._open()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count samples."""
        ours = isinstance(batch, dict) and isinstance(batch.get("id"), torch.Tensor)
        self._samples += len(batch["id"]) if ours else extract_batch_size(batch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is not training."""
        if self._since is not None and self._meter is not None:
            self._pieces.append((self._since, self._meter.mark()))
            self._since = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training goes on."""
        if self._pieces and self._since is None and self._meter is not None and trainer.state.fn == "fit":
            self._since = self._meter.mark()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum the epoch up over ranks, print it and log it."""
        spent, usage, reading = self._close(trainer)
        row = {"epoch": trainer.current_epoch, **spent.to_json(), "usage": usage and asdict(usage)}
        self.epochs.append(row)
        measured = {"train_joules": spent.joules, "joules_per_sample": spent.joules_per_sample}
        if usage is not None:
            measured |= {f"gpu_{name}": value for name, value in asdict(usage).items()}
        if known := {name: value for name, value in measured.items() if value is not None}:
            for logger in trainer.loggers:
                logger.log_metrics(known, step=trainer.global_step)
        if spent.joules is not None or len(self.epochs) == 1:
            rank_zero_info(f"epoch {trainer.current_epoch}: {_line(spent, usage, reading)}")
        self._write_series(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the run's window and add up the ranks."""
        if self._meter is None:
            return
        if self._since is not None:  # an epoch that ended early
            self._close(trainer)
        self.reading = self._summed(self._meter.between(self._begun, self._meter.mark()))
        self._meter.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop reading; what was counted since the last checkpoint is not known to anybody."""
        if self._meter is not None:
            self._write_series(trainer)
            self._meter.close()

    def state_dict(self) -> dict[str, Any]:
        """What was spent up to the last epoch's end, so that a run that goes on has the whole."""
        return {"spent": asdict(self._before + self._spent), "epochs": self.epochs, "attempts": self._attempts}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what was spent before."""
        self._before = Spent(**state_dict["spent"])
        self.epochs, self._attempts = list(state_dict["epochs"]), state_dict["attempts"] + 1

    def _open(self) -> None:
        if self._meter is not None and self._since is None:
            self._since, self._pieces, self._samples = self._meter.mark(), [], 0

    def _close(self, trainer: Trainer) -> tuple[Spent, Usage | None, Reading]:
        """What the open stretch of training took over all ranks, and how rank 0's GPU was used."""
        assert self._meter is not None, "on_fit_start"
        if self._since is not None:
            self._pieces.append((self._since, self._meter.mark()))
        pieces, self._since, self._pieces = self._pieces, None, []
        reading = self._summed(self._meter.over(pieces))
        shards = trainer.distributed_sampler_kwargs or {"num_replicas": 1}
        replicas = trainer.world_size // shards["num_replicas"]  # ranks that train on the same samples
        samples = sum(gather(self._samples)) // replicas
        self._samples = 0
        spent = Spent(reading.joules, samples, reading.seconds, reading.reason)
        self._spent += spent
        usage = self._meter.usage(pieces)
        return spent, next(iter(usage.values()), None), reading

    def _summed(self, mine: Reading) -> Reading:
        """Over ranks; one whose GPU another counts adds nothing."""
        rows = gather((host(), mine) if self._counted else None)
        return sum_over_ranks(row for row in rows if row is not None)

    def _write_series(self, trainer: Trainer) -> None:
        """Append what was seen since the last time to the rank's file, for the report."""
        assert self._meter is not None, "on_fit_start"
        now, lines = self._written, []
        for sensor, looks in self._meter.sampler.looks.items():
            for at, look in looks:
                if at > self._written:
                    memory = None if look.memory_bytes is None else look.memory_bytes / 1e6
                    power = None if look.power_mw is None else look.power_mw / 1e3
                    values = ((at - self._begun) / 1e9, sensor, power, look.busy_percent, memory)
                    cells = (*values, look.temperature_c, look.sm_mhz)
                    lines.append(",".join("" if value is None else str(value) for value in cells) + "\n")
                    now = max(now, at)
        if not any(",," not in line for line in lines):  # a host's counters say nothing but energy
            return
        file = Path(trainer.default_root_dir) / SERIES_FILE.format(rank=trainer.global_rank)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as stream:
            stream.write(("" if stream.tell() else _COLUMNS) + "".join(lines))
        self._written = now


def _line(spent: Spent, usage: Usage | None, reading: Reading) -> str:
    if spent.joules is None:
        return f"joules null ({spent.reason})"
    each = "" if spent.joules_per_sample is None else f", {spent.joules_per_sample:.4g} J a sample"
    bound = "" if reading.bound_mj is None else f" (counter steps +-{reading.bound_mj / 1000:.3g})"
    text = f"{spent.joules:,.1f} J{bound}{each}, {spent.joules / spent.seconds:.0f} W"
    if usage is not None and usage.busy_share is not None:
        text += f"; rank 0's GPU {usage.busy_share:.0%} busy"
    return f"{text} ({reading.method}, {reading.tenancy})"
