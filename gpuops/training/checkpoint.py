"""Checkpoints that a run goes on from: whole or not there, with the random state of every rank."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from gpuops.errors import InputError, UnavailableError
from gpuops.lineage.version import RUN_FILE
from gpuops.training.ranks import gather

FOLDER = "checkpoints"
"""Folder of a run directory that holds them."""
_NAME = re.compile(r"step=(\d+)\.ckpt")
_KEY = "gpuops_random_states"


class RecoveryCheckpoint(Checkpoint):
    """Saves `RUN/checkpoints/step=N.ckpt` every few optimiser steps and after each epoch, and keeps the newest ones.

    A checkpoint appears under its name only when it is whole, and older ones go only then: whatever kills a run, or
    fills its disk, the newest one can be resumed from. It holds the random state of every rank (Python, NumPy, torch,
    the rank's CUDA device), which is set again when as many ranks go on; Lightning and the data module add the rest:
    weights, optimisers, schedulers, loops, position in the data.
    """

    def __init__(self, every_n_steps: int = 500, keep: int = 2) -> None:
        """Choose how often.

        Args:
            every_n_steps: optimiser steps between two checkpoints within an epoch; 0 saves after epochs only.
            keep: how many of the newest are kept.
        """
        if every_n_steps < 0 or keep < 1:
            raise InputError("every_n_steps is at least 0 and keep at least 1: a run without checkpoints cannot go on")
        self.every_n_steps, self.keep = every_n_steps, keep
        self._saved_step = 0
        self._states: list[dict[str, Any]] | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save within an epoch; its last batch leaves it to the epoch's end, which comes after validation."""
        step = trainer.global_step
        due = self.every_n_steps and step % self.every_n_steps == 0 and step != self._saved_step
        if due and not trainer.is_last_batch:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after an epoch."""
        self.save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add every rank's random state, to whoever's checkpoint it is."""
        checkpoint[_KEY] = gather(random_state(trainer.strategy.root_device))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the random states until training starts."""
        self._states = checkpoint.get(_KEY)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the random state of the checkpoint; on another number of ranks there is none to go on with."""
        self._saved_step = trainer.global_step
        if self._states is not None and len(self._states) == trainer.world_size:
            set_random_state(self._states[trainer.global_rank], trainer.strategy.root_device)
        self._states = None

    def save(self, trainer: Trainer) -> Path:
        """Save now, on all ranks; the path.

        Raises:
            UnavailableError: it could not be written (a full disk, say); earlier ones are as they were.
        """
        folder = Path(trainer.default_root_dir) / FOLDER
        path = folder / f"step={trainer.global_step:09d}.ckpt"
        partial = folder / f".{path.name}.partial"
        try:
            if trainer.is_global_zero:
                folder.mkdir(parents=True, exist_ok=True)
                _remove(partial)
            trainer.save_checkpoint(partial)
            if trainer.is_global_zero:
                _flush(partial)
                _remove(path)
                partial.replace(path)
                for old in _all(folder)[: -self.keep]:
                    _remove(old)
        except OSError as error:
            with contextlib.suppress(OSError):
                _remove(partial)
            newest = newest_checkpoint(trainer.default_root_dir)
            kept = "there is none before it" if newest is None else f"{newest} is whole"
            raise UnavailableError(f"{path} could not be written ({error.strerror or error}); {kept}") from error
        trainer.strategy.barrier("RecoveryCheckpoint.save")
        self._saved_step = trainer.global_step
        return path


def newest_checkpoint(run: str | os.PathLike[str]) -> Path | None:
    """The newest whole checkpoint of a run directory, for `Trainer.fit(ckpt_path=...)`; None if there is none."""
    return next(reversed(_all(Path(run) / FOLDER)), None)


def unfinished(run: Path) -> bool:
    """Whether a run directory holds a run that did not come to its end."""
    file = run / RUN_FILE
    return file.is_file() and json.loads(file.read_text()).get("status") != "finished"


def random_state(device: torch.device) -> dict[str, Any]:
    """State of the generators that a rank draws from, in plain types."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(kind), np.asarray(keys).tobytes(), int(rest[0]), int(rest[1]), float(rest[2])),
        "torch": torch.get_rng_state().numpy().tobytes(),
        "cuda": torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else None,
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Go on drawing where `random_state` was taken."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.frombuffer(keys, np.uint32), *rest))
    torch.set_rng_state(torch.frombuffer(bytearray(state["torch"]), dtype=torch.uint8))
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(state["cuda"]), dtype=torch.uint8), device)


def _all(folder: Path) -> list[Path]:
    """Whole checkpoints, the newest last."""
    found = [(int(match[1]), path) for path in folder.glob("step=*.ckpt") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Onto the disk, before it gets its name; a sharded checkpoint is a folder."""
    for file in [path] if path.is_file() else [part for part in path.rglob("*") if part.is_file()]:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
