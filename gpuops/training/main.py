"""`torchrun ... -m gpuops.training.main fit --config run.yaml`: LightningCLI with our callbacks wired.

Devices, nodes and strategy come from torchrun's environment, because Lightning's own defaults silently train one model
a rank on a CPU machine; a Trainer whose world is not torchrun's is refused. A run that did not come to its end (killed,
preempted, requeued) goes on when the same command is given again.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from gpuops.errors import GpuopsError, InputError, UnavailableError
from gpuops.training.checkpoint import FOLDER, RecoveryCheckpoint, newest_checkpoint, unfinished
from gpuops.training.energy import EnergyCallback
from gpuops.training.lineage import LineageCallback, refuse_used
from gpuops.training.preemption import PreemptionCallback
from gpuops.training.rendezvous import join_restarted
from gpuops.training.steps import StepTimesCallback

METRICS = "metrics.csv"
CALLBACKS: tuple[type[Callback], ...] = (
    EnergyCallback,
    StepTimesCallback,
    RecoveryCheckpoint,
    PreemptionCallback,
    LineageCallback,
)
"""Callbacks that every run has; one that the config names is taken as it is configured there."""


class GpuopsCLI(LightningCLI):
    """LightningCLI for any LightningModule and data module by class path."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Wire our callbacks, and log to `metrics.csv` and TensorBoard, unless the config names its own."""
        config = self._get(self.config_init, "trainer", default={})
        if config.get("logger") in (None, True):
            root = config.get("default_root_dir") or "."
            board = TensorBoardLogger(root, name="", version="", sub_dir="tensorboard")
            kwargs["logger"] = [CSVLogger(root, name="", version=""), board]
        named = config.get("callbacks") or []
        named = named if isinstance(named, list) else [named]
        missing = [kind() for kind in CALLBACKS if not any(isinstance(callback, kind) for callback in named)]
        kwargs["callbacks"] = [*missing, *named]
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Refuse what cannot work; go on with a run that has not ended; give lineage the config."""
        self._check_world()
        root = Path(self.trainer.default_root_dir)
        _check_writable(root)
        options = self.config_init[self.subcommand]
        named = options.get("ckpt_path")
        if named in (None, "last") and (newest := newest_checkpoint(root)) and (named or unfinished(root)):
            rank_zero_info(f"going on from {newest}")
            options["ckpt_path"] = str(newest)
            options["weights_only"] = False  # it is ours
        elif named == "last":
            raise InputError(f"{root} holds no checkpoint to go on from: leave ckpt_path out")
        self._check_checkpoint()
        if options.get("ckpt_path") is None:
            refuse_used(root)  # before a logger deletes what is there
        else:
            _set_aside(root / METRICS)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LineageCallback):
                callback.config = self.config[self.subcommand].as_dict()
                callback.same_run = named is None
        join_restarted(self.trainer)

    def before_validate(self) -> None:
        """Refuse what cannot work."""
        self._check_world()
        self._check_checkpoint()

    before_test = before_predict = before_validate

    def _check_checkpoint(self) -> None:
        path = self.config_init[self.subcommand].get("ckpt_path")
        if path and path not in ("best", "last", "hpc") and "://" not in str(path) and not Path(path).exists():
            raise InputError(f"the checkpoint {path} does not exist: see {FOLDER}/ in the run directory")

    def _check_world(self) -> None:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if self.trainer.world_size != world:
            raise InputError(
                f"the Trainer would train with {self.trainer.world_size} ranks and torchrun started {world}: leave "
                "trainer.devices and trainer.num_nodes out of the config, and name a strategy of several processes, or "
                "none"
            )


def main() -> None:
    """Run one LightningCLI subcommand (fit, validate, test, predict); exits with our code on our errors."""
    add_config_folder(sys.argv[1:])
    warnings.filterwarnings("ignore", module="lightning.pytorch.utilities._pytree")  # torch deprecated what it calls
    try:
        GpuopsCLI(
            trainer_defaults=_trainer_defaults(),
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={"exit_on_error": False},
        )
    except GpuopsError as error:
        _fail(str(error), error.exit_code)
    except ArgumentError as error:
        _fail(f"{_first_cause(str(error))} (--help lists what there is)", InputError.exit_code)
    except MisconfigurationException as error:
        _fail(" ".join(str(error).split()), InputError.exit_code)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        _fail(f"{error}; earlier checkpoints are as they were", UnavailableError.exit_code)


def add_config_folder(arguments: Sequence[str]) -> None:
    """Put the folder of each `--config FILE` first on sys.path, so that its modules can be named in it."""
    given = [argument.removeprefix("--config=") for argument in arguments if argument.startswith("--config=")]
    given += [value for flag, value in pairwise(arguments) if flag in ("--config", "-c")]
    for file in given:
        sys.path.insert(0, str(Path(file).resolve().parent))


def _fail(message: str, code: int) -> None:
    """One line, from one rank."""
    if int(os.environ.get("RANK", "0")) == 0:
        sys.stderr.write(f"gpuops: error: {message}\n")
    raise SystemExit(code) from None


def _first_cause(message: str) -> str:
    """What went wrong, out of jsonargparse's account of every type that it tried."""
    lines = [line.strip(" -") for line in message.splitlines()]
    if "Errors:" not in lines:
        return " ".join(line for line in lines if line)
    tried = [line.removesuffix(":") for line in lines[lines.index("Errors:") + 1 :]]
    causes = [line for line in tried if line and "'NoneType'" not in line and not line.startswith("Given value type")]
    key = lines[0].partition('"')[2].partition('"')[0]
    return f"{key}: {'; '.join(dict.fromkeys(causes))}"


def _check_writable(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise InputError(
            f"the run directory {root} cannot be written ({error.strerror}): set trainer.default_root_dir"
        ) from None


def _set_aside(metrics: Path) -> None:
    """Keep the metrics of the attempts before, which Lightning's logger would delete."""
    if int(os.environ.get("RANK", "0")) == 0 and metrics.is_file():
        number = len(list(metrics.parent.glob(f"{metrics.stem}.*{metrics.suffix}")))
        metrics.replace(metrics.with_name(f"{metrics.stem}.{number}{metrics.suffix}"))


def _trainer_defaults() -> dict[str, Any]:
    world, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    defaults: dict[str, Any] = {
        "default_root_dir": "run",
        "use_distributed_sampler": False,
        "devices": local,
        "num_nodes": world // local,
    }
    return defaults | ({"strategy": "ddp"} if world > 1 else {})


if __name__ == "__main__":
    main()
