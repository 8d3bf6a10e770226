"""Where the time of a training step goes: waiting for data, computing, the optimiser."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from gpuops.data.datamodule import ZarrDataModule
from gpuops.training.ranks import gather

Moment = float | torch.cuda.Event


PARTS = ("other", "data", "compute", "optimizer")
"""What a step's time is told apart into, in the order in which it passes."""


@dataclass(slots=True)
class _Sums:
    """Seconds of some steps."""

    steps: int = 0
    wall_s: float = 0.0
    device_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def shares(self) -> dict[str, float]:
        """Shares of the wall time, which add up to 1."""
        if not self.wall_s:
            return {}
        shares = {f"{name}_share": seconds / self.wall_s for name, seconds in self.device_s.items()}
        rest = 1 - sum(shares.values())  # a CUDA stream's time may be less than the wall's
        return {**shares, "other_share": max(shares["other_share"] + rest, 0.0)}


class StepTimesCallback(Callback):
    """Step time and its shares, every few steps in the log and every epoch on the screen and in `run.json`.

    `data` is the time that a batch takes: stall (waiting for the reader), host to device copy, preprocessing; where
    gpuops does not read the data, all that lies between two steps. `compute` is forward and backward, `optimizer` from
    there to the end of the step, `other` hooks, logging and Lightning's own loop. On a CUDA device the times are those
    of its stream, by events that no step waits for; copies run beside the computation and are told apart.
    """

    def __init__(self) -> None:
        self.epochs: list[dict[str, Any]] = []
        """One row an epoch."""
        self._interval, self._epoch = _Sums(), _Sums()
        self._under_way: deque[tuple[Moment, ...]] = deque()
        self._last: Moment | None = None
        self._start: Moment = 0.0
        self._asked: Moment = 0.0
        self._fetched_s = 0.0
        self._step: Moment | None = None
        self._last_host = 0.0
        self._loader: dict[str, float] = {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the epoch's sums."""
        self._epoch, self._interval, self._last = _Sums(), _Sums(), None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is here."""
        if self._last is None and not self._epoch.steps:
            self._loader = _loader_seconds(trainer)  # without what the first batch took
        self._start, self._step = _now(trainer), None
        self._asked = self._start if self._last is None else self._last
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, ZarrDataModule):
            if isinstance(self._start, float):
                self._asked = self._start - (data.fetched_s - self._fetched_s)
            self._fetched_s = data.fetched_s

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Forward and backward are done."""
        if self._step is None:
            self._step = _now(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step is done; the first of an epoch, which has no step before it, is not counted."""
        end = _now(trainer)
        host = end if isinstance(end, float) else time.perf_counter()
        if self._last is not None:
            step = end if self._step is None else self._step
            self._under_way.append((self._last, self._asked, self._start, step, end))
            for sums in (self._interval, self._epoch):
                sums.wall_s += host - self._last_host
                sums.steps += 1
        self._last, self._last_host = end, host
        self._settle()
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % every == 0 and self._interval.steps >= every:
            measured = {"step_ms": 1e3 * self._interval.wall_s / self._interval.steps, **self._interval.shares()}
            for logger in trainer.loggers:
                logger.log_metrics(measured, step=trainer.global_step)
            self._interval = _Sums()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is not the waiting of the next step."""
        self._last = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and keep the epoch's row."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self._settle()
        sums = self._epoch
        if not sums.steps:
            return
        before, now = self._loader, _loader_seconds(trainer)
        spent = {f"{name}_share": (now[name] - before.get(name, 0.0)) / sums.wall_s for name in now}
        shares = {**sums.shares(), **spent}
        worst = max(row["data_share"] for row in gather(shares))
        row = {"epoch": trainer.current_epoch, "steps": sums.steps, "step_ms": 1e3 * sums.wall_s / sums.steps, **shares}
        self.epochs.append({**row, "data_share_worst_rank": worst})
        rank_zero_info(_line(self.epochs[-1]))

    def state_dict(self) -> dict[str, Any]:
        """Rows so far, so that a run that goes on has them all."""
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep the rows of before."""
        self.epochs = list(state_dict["epochs"])

    def _settle(self) -> None:
        """Add up the steps that the device has finished."""
        while self._under_way and _reached(self._under_way[0][-1]):
            moments = self._under_way.popleft()
            for name, (first, last) in zip(PARTS, pairwise(moments), strict=True):
                for sums in (self._interval, self._epoch):
                    sums.device_s[name] += _between(first, last)


def _now(trainer: Trainer) -> Moment:
    if trainer.strategy.root_device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _reached(moment: Moment) -> bool:
    return isinstance(moment, float) or moment.query()


def _between(first: Moment, last: Moment) -> float:
    if isinstance(first, float) or isinstance(last, float):
        assert isinstance(first, float)
        assert isinstance(last, float)
        return last - first
    return float(first.elapsed_time(last)) / 1e3


def _loader_seconds(trainer: Trainer) -> dict[str, float]:
    """What our own loader knows of its time; nothing of other data."""
    data = getattr(trainer, "datamodule", None)
    return data.seconds if isinstance(data, ZarrDataModule) else {}


def _line(row: Mapping[str, Any]) -> str:
    ours = [f"{name} {row[f'{name}_share']:.1%}" for name in ("stall", "copy", "preprocess") if f"{name}_share" in row]
    data = f"data {row['data_share']:.1%}" + (f" ({', '.join(ours)})" if ours else "")
    return (
        f"epoch {row['epoch']}: {row['steps']} steps of {row['step_ms']:.1f} ms: {data}, forward and backward "
        f"{row['compute_share']:.1%}, optimiser {row['optimizer_share']:.1%}, other {row['other_share']:.1%}; "
        f"data on the worst rank {row['data_share_worst_rank']:.1%}"
    )
