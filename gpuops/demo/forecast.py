"""Next month's field from the six months before it, the altitude and the month: a small residual convolutional net."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanSquaredError


class Forecast(LightningModule):
    """Adds a learned change to the last month it sees; works on 4 x 4 blocks of points, for speed."""

    def __init__(self, lr: float = 2e-3, width: int = 48, depth: int = 2) -> None:
        """Build the net.

        Args:
            lr: peak learning rate of AdamW, with warm-up and cosine decay.
            width: channels of the hidden layers.
            depth: number of residual blocks.
        """
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.enter = nn.Conv2d(7 * 16, width, 1)
        self.month = nn.Embedding(12, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(depth)
        )
        self.leave = nn.Conv2d(width, 16, 1)
        nn.init.zeros_(self.leave.weight)
        self.val_rmse = MeanSquaredError(squared=False)

    def forward(self, x: Tensor, month: Tensor) -> Tensor:
        """Normalised forecast [n, 1, 120, 120].

        Args:
            x: float [n, 7, 120, 120]: six months of turbidity, oldest first, and the altitude, all normalised.
            month: int [n, 1]: month of the year that is forecast, 1 to 12.
        """
        hidden = self.enter(F.pixel_unshuffle(x, 4)) + self.month(month.long() - 1)[:, 0, :, None, None]
        for block in self.blocks:
            hidden = hidden + block(F.gelu(hidden))
        return x[:, 5:6] + F.pixel_shuffle(self.leave(F.gelu(hidden)), 4)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean squared error in normalised units."""
        loss = F.mse_loss(self(**batch["inputs"]), batch["targets"]["y"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Root mean squared error in physical units, over the samples that do not merely fill up the last batch."""
        physical, valid = self.trainer.datamodule.physical, batch["valid"]  # type: ignore[attr-defined]
        forecast = physical("y", self(**batch["inputs"])[valid])
        self.val_rmse.update(forecast, physical("y", batch["targets"]["y"][valid]))
        self.log("val_rmse", self.val_rmse, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW; warm-up over a tenth of the steps, then cosine decay."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
