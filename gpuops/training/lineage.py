"""What a run is made of and what became of it: `run.json` and the ledger."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from gpuops.data.datamodule import ZarrDataModule
from gpuops.errors import GpuopsError, InputError
from gpuops.lineage.ledger import Ledger, ledger_path
from gpuops.lineage.version import (
    RUN_FILE,
    RUN_PARTS,
    code_identity,
    config_identity,
    environment_identity,
    kernels_identity,
    run_id,
)
from gpuops.training.checkpoint import newest_checkpoint, unfinished
from gpuops.training.energy import EnergyCallback
from gpuops.training.ranks import gather
from gpuops.training.steps import StepTimesCallback

_KEY = "gpuops_run"


class LineageCallback(Callback):
    """Writes `run.json`, the run id and all it is made of, at the start of a fit; completes it and tells the ledger.

    The same goes into every checkpoint, so that a run that goes on from one says what differs.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        """Record a run.

        Args:
            config: the resolved configuration; the model's and data module's hyperparameters if None.
        """
        self.config = config
        self.same_run = False
        """Whether a checkpoint of another config is refused: set where nobody named the checkpoint to go on from."""
        self._record: dict[str, Any] = {}
        self._resumed: Mapping[str, Any] | None = None

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
            "attempts": [*_attempts(trainer), {"started": _now(), "world_size": trainer.world_size}],
            "model": {
                "class_path": f"{type(pl_module).__module__}.{type(pl_module).__qualname__}",
                "file": None if module is None else str(module),
                "init": (config.get("model") or {}) if self.config is not None else None,
            },
            **_data_record(trainer),
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a run directory that holds a run; say what one that goes on does differently; write the record."""
        if trainer.ckpt_path is None:
            refuse_used(Path(trainer.default_root_dir))
        if not trainer.is_global_zero:
            return
        if self._resumed is not None:
            theirs, mine = self._resumed["identity"], self._record["identity"]
            differ = [part for part in RUN_PARTS if theirs.get(part) != mine[part]]
            if self.same_run and "config" in differ:
                raise InputError(
                    f"{trainer.default_root_dir} holds a run of another config that has not ended: give the Trainer "
                    "another default_root_dir, or --ckpt_path last to go on with this config"
                )
            if differ:
                rank_zero_warn(
                    f"this run goes on from run {self._resumed['run_id'][:12]} with other {', '.join(differ)}"
                )
            self._record["resumed_from"] = {"run_id": self._resumed["run_id"], "differs": differ}
            self._record["attempts"][-1]["from_step"] = trainer.global_step
        _write(trainer, self._record)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the identity beside the weights."""
        if self._record:
            checkpoint[_KEY] = {"run_id": self._record["run_id"], "identity": self._record["identity"]}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the identity of the run that is gone on with."""
        self._resumed = checkpoint.get(_KEY) if trainer.state.fn == "fit" else None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the record: metrics, checkpoint, samples seen, energy, what reading cost."""
        data = getattr(trainer, "datamodule", None)
        counters = gather(data.counters.to_json() if isinstance(data, ZarrDataModule) else None)
        if trainer.is_global_zero:
            self._complete(trainer, "interrupted" if trainer.interrupted else "finished", {"reading": counters})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep what is known of a run that ends early; the other ranks may be gone and are not asked."""
        if not trainer.is_global_zero or not (Path(trainer.default_root_dir) / RUN_FILE).exists() or not self._record:
            return
        stopped = isinstance(exception, SystemExit | KeyboardInterrupt)
        error = None if stopped else f"{type(exception).__name__}: {exception}".splitlines()[0]
        with contextlib.suppress(OSError, GpuopsError):  # a full disk is what ended it, and what the caller is told
            self._complete(trainer, "interrupted" if stopped else "failed", {"error": error})

    def _complete(self, trainer: Trainer, status: str, more: Mapping[str, Any]) -> None:
        energy = next((c.to_json() for c in _callbacks(trainer) if isinstance(c, EnergyCallback)), None)
        times = next((c.epochs for c in _callbacks(trainer) if isinstance(c, StepTimesCallback)), None)
        checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "") or newest_checkpoint(
            trainer.default_root_dir
        )
        root = Path(trainer.default_root_dir).resolve()
        self._record |= {
            "status": status,
            "finished": _now(),
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "samples_seen": _samples_seen(trainer),
            "metrics": {name: _finite(float(value)) for name, value in trainer.callback_metrics.items()},
            "checkpoint": None if checkpoint is None else os.path.relpath(checkpoint, root),
            "energy": energy,
            "step_times": times,
            **more,
        }
        _write(trainer, self._record)
        with Ledger(ledger_path()) as ledger:
            kept = ("run_id", "status", "world_size", "epochs", "samples_seen", "metrics", "energy")
            ledger.append("run", {key: self._record[key] for key in kept} | {"data": self._record["identity"]["data"]})


def refuse_used(root: Path) -> None:
    """Refuse to begin a run in a directory that holds one.

    Raises:
        InputError: a run that ended, or one that can be gone on with.
    """
    if not (root / RUN_FILE).exists():
        return
    if not unfinished(root):
        raise InputError(f"{root} holds a run: give the Trainer another default_root_dir, or a ckpt_path to go on")
    if newest_checkpoint(root) is not None:
        raise InputError(
            f"{root} holds a run that has not ended: go on with it, "
            "fit(..., ckpt_path=gpuops.newest_checkpoint(run_directory)), or give the Trainer another default_root_dir"
        )


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _attempts(trainer: Trainer) -> list[dict[str, Any]]:
    """Attempts that this run directory has seen, if this one goes on with them."""
    file = Path(trainer.default_root_dir) / RUN_FILE
    if not file.is_file():
        return []
    attempts: list[dict[str, Any]] = json.loads(file.read_text()).get("attempts", [])
    return attempts


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
            "trained_records": data.train_records.to_json(),
            "held_out_records": data.val_records.to_json(),
            "held_out_by": None if data.holdout is None else data.holdout.by,
        },
        "sample": data.sample.to_json(),
        "preprocess": {side: preprocess.to_json() for side, preprocess in data.preprocess.items()},
    }


def _write(trainer: Trainer, record: Mapping[str, Any]) -> None:
    """Replace run.json in one step."""
    root = Path(trainer.default_root_dir)
    root.mkdir(parents=True, exist_ok=True)
    temporary = root / f".{RUN_FILE}"
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(root / RUN_FILE)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
