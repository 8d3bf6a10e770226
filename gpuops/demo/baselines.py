"""What a forecast must beat, computed on the same held-out samples in the same run."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

MONTHS = 6
"""Channels of x that hold past months, oldest first."""


class Baselines(Callback):
    """Logs the held-out RMSE, in physical units, of three forecasts that need no network.

    - `persistence_rmse`: next month is this month.
    - `extrapolation_rmse`: the change from last month to this one goes on.
    - `ar6_rmse`: the best linear combination of the six months and a constant, fitted by least squares on the training
      samples of the first epoch.
    """

    def __init__(self) -> None:
        self._gram = torch.zeros(MONTHS + 1, MONTHS + 1, dtype=torch.float64)
        self._moment = torch.zeros(MONTHS + 1, dtype=torch.float64)
        self._weights: Tensor | None = None
        self._squares = torch.zeros(4, dtype=torch.float64)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Add a training batch to the normal equations."""
        if trainer.current_epoch == 0:
            past, truth = _past(batch), batch["targets"]["y"].flatten().double()
            design = torch.cat([past, torch.ones_like(past[:1])])
            self._gram += (design @ design.T).cpu()
            self._moment += (design @ truth).cpu()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Solve for the linear combination once every rank has seen its share."""
        self._squares.zero_()
        if self._weights is None and self._gram.any():
            gram, moment = (_sum(trainer, value) for value in (self._gram, self._moment))
            self._weights = torch.linalg.solve(gram, moment)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add up squared errors of the valid samples."""
        physical = trainer.datamodule.physical  # type: ignore[attr-defined]
        scale = float(physical("y", torch.ones(1, 1)) - physical("y", torch.zeros(1, 1)))
        valid = batch["valid"]
        past, truth = _past(batch, valid), batch["targets"]["y"][valid].flatten().double()
        linear = torch.full_like(truth, torch.nan)
        if self._weights is not None:
            weights = self._weights.to(past.device)
            linear = weights[:MONTHS] @ past + weights[MONTHS]
        forecasts = (past[-1], 2 * past[-1] - past[-2], linear)
        errors = [float(((forecast - truth) ** 2).sum()) * scale**2 for forecast in forecasts]
        self._squares += torch.tensor([*errors, truth.numel()], dtype=torch.float64)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the three errors, the same on every rank."""
        if trainer.sanity_checking:
            return
        total = _sum(trainer, self._squares)
        for name, square in zip(("persistence_rmse", "extrapolation_rmse", "ar6_rmse"), total[:3], strict=True):
            pl_module.log(name, (square / total[3]).sqrt().float(), sync_dist=True)


def _past(batch: dict[str, Any], valid: Tensor | None = None) -> Tensor:
    """Past months, float64 [6, points]."""
    x: Tensor = batch["inputs"]["x"][:, :MONTHS]
    return (x if valid is None else x[valid]).transpose(0, 1).flatten(1).double()


def _sum(trainer: Trainer, value: Tensor) -> Tensor:
    """Sum over ranks, on the CPU."""
    total: Tensor = trainer.strategy.reduce(value.to(trainer.strategy.root_device), reduce_op="sum")
    return total.cpu()
