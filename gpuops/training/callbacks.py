"""What a run cost and what it was made of: two Lightning callbacks, each usable alone."""

from __future__ import annotations

import inspect
import json
import math
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer

from gpuops.data.datamodule import ZarrDataModule
from gpuops.energy.meter import Meter, Reading, sum_over_ranks
from gpuops.errors import InputError
from gpuops.lineage.ledger import Ledger, ledger_path
from gpuops.lineage.version import (
    RUN_FILE,
    code_identity,
    config_identity,
    environment_identity,
    kernels_identity,
    run_id,
)


class EnergyCallback(Callback):
    """Joules of a fit over all ranks, from each rank's own GPU; null with the reason where nothing counts."""

    def __init__(self) -> None:
        self.reading: Reading | None = None
        """Reading of the last fit, summed over ranks."""
        self._meter: Meter | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the window on this rank's GPU."""
        device = trainer.strategy.root_device
        self._meter = Meter([device.index or 0] if device.type == "cuda" else [])
        self._meter.begin()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the window and add up the ranks."""
        if self._meter is not None:
            self.reading = sum_over_ranks(_gather((socket.gethostname(), self._meter.end())))


class LineageCallback(Callback):
    """Writes `run.json`, the run id and all it is made of, at the start of a fit; completes it and tells the ledger."""

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        """Record a run.

        Args:
            config: the resolved configuration; the model's and data module's hyperparameters if None.
        """
        self.config = config
        self._record: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run directory that holds a run, before anything is written."""
        root = Path(trainer.default_root_dir)
        if stage == "fit" and (root / RUN_FILE).exists() and trainer.ckpt_path is None:
            raise InputError(f"{root} holds a run: give the Trainer another default_root_dir, or a ckpt_path to go on")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the identity of the run before the first step."""
        if not trainer.is_global_zero:
            return
        model_file = inspect.getsourcefile(type(pl_module))
        module = None if model_file is None else Path(model_file).resolve()
        config = self.config if self.config is not None else _own_config(trainer, pl_module)
        identity = {
            "data": _data_identity(trainer),
            "code": code_identity(module, None),
            "config": config_identity(json.loads(json.dumps(config, default=str))),
            "kernels": kernels_identity(),
            "environment": environment_identity(),
        }
        self._record = {
            "run_id": run_id(identity),
            "identity": identity,
            "status": "running",
            "started": _now(),
            "world_size": trainer.world_size,
            "model": {
                "class_path": f"{type(pl_module).__module__}.{type(pl_module).__qualname__}",
                "file": None if module is None else str(module),
                "init": (config.get("model") or {}) if self.config is not None else None,
            },
            **_data_record(trainer),
        }
        _write(trainer, self._record)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the record: metrics, checkpoint, samples seen, energy, what reading cost."""
        energy = next((c.reading for c in trainer.callbacks if isinstance(c, EnergyCallback)), None)  # type: ignore[attr-defined]
        data = getattr(trainer, "datamodule", None)
        counters = _gather(data.counters.to_json() if isinstance(data, ZarrDataModule) else None)
        if not trainer.is_global_zero:
            return
        checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "") or None
        root = Path(trainer.default_root_dir).resolve()
        self._record |= {
            "status": "interrupted" if trainer.interrupted else "finished",
            "finished": _now(),
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "samples_seen": _samples_seen(trainer),
            "metrics": {name: _finite(float(value)) for name, value in trainer.callback_metrics.items()},
            "checkpoint": None if checkpoint is None else os.path.relpath(checkpoint, root),
            "energy": None if energy is None else energy.to_json(),
            "reading": counters,
        }
        _write(trainer, self._record)
        with Ledger(ledger_path()) as ledger:
            kept = ("run_id", "status", "world_size", "epochs", "samples_seen", "metrics", "energy")
            ledger.append("run", {key: self._record[key] for key in kept} | {"data": self._record["identity"]["data"]})


def _own_config(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """What a script declared, where there is no config file."""
    kept = ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val")
    config: dict[str, Any] = {
        "model": dict(pl_module.hparams),
        "trainer": {name: getattr(trainer, name) for name in kept},
    }
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, ZarrDataModule):
        declared = {name: getattr(data, name) for name in ("global_batch", "seed", "dtype")}
        parts = {key: getattr(data, key) for key in ("holdout", "test", "train", "sampling", "lanes")}
        config["data"] = {
            "sample": data.sample.to_json(),
            "gap": data.gap,
            **{key: part and asdict(part) for key, part in parts.items()},
            **declared,
        }
    return config


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _samples_seen(trainer: Trainer) -> int | None:
    """Samples trained on by all ranks; None where the data is not ours."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, ZarrDataModule):
        return None
    return int(trainer.fit_loop.epoch_loop.total_batch_idx + 1) * data.global_batch


def _data_identity(trainer: Trainer) -> dict[str, Any]:
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, ZarrDataModule):
        return {"fingerprint": None, "snapshot": None, "reason": "trained on data that gpuops did not read"}
    source = data.source
    return {"fingerprint": source.fingerprint, "snapshot": source.snapshot, "weak": source.weak}


def _data_record(trainer: Trainer) -> dict[str, Any]:
    """What export needs to know of the data: where it is, what a sample is, how it is prepared, what was held out."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, ZarrDataModule):
        return {"data": None, "sample": None, "preprocess": None}
    return {
        "data": {
            **data.source.location,
            "fingerprint": data.source.fingerprint,
            "train_records": len(data.train_records),
            "held_out_records": data.val_records.to_json(),
            "held_out_by": None if data.holdout is None else data.holdout.by,
        },
        "sample": data.sample.to_json(),
        "preprocess": {side: preprocess.to_json() for side, preprocess in data.preprocess.items()},
    }


def _gather(value: Any) -> list[Any]:
    """The value of every rank, on every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _write(trainer: Trainer, record: Mapping[str, Any]) -> None:
    """Replace run.json in one step."""
    root = Path(trainer.default_root_dir)
    root.mkdir(parents=True, exist_ok=True)
    temporary = root / f".{RUN_FILE}"
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(root / RUN_FILE)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
