"""`torchrun ... -m gpuops.training.main fit --config run.yaml`: LightningCLI with our callbacks wired.

Devices, nodes and strategy come from torchrun's environment, because Lightning's own defaults silently train one model
a rank on a CPU machine; a Trainer whose world is not torchrun's is refused.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger

from gpuops.errors import GpuopsError, InputError
from gpuops.training.callbacks import EnergyCallback, LineageCallback


class GpuopsCLI(LightningCLI):
    """LightningCLI for any LightningModule and data module by class path."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to `metrics.csv` in the run directory unless the config names a logger."""
        config = self._get(self.config_init, "trainer", default={})
        if config.get("logger") in (None, True):
            kwargs["logger"] = CSVLogger(config.get("default_root_dir") or ".", name="", version="")
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Refuse a world that is not torchrun's; give lineage the config."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if self.trainer.world_size != world:
            raise InputError(
                f"the Trainer would train with {self.trainer.world_size} ranks and torchrun started {world}: leave "
                "trainer.devices, trainer.num_nodes and trainer.strategy out of the config"
            )
        config = self.config[self.subcommand].as_dict()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LineageCallback):
                callback.config = config


def main() -> None:
    """Run one LightningCLI subcommand (fit, validate, test, predict); exits with our code on our errors."""
    add_config_folder(sys.argv[1:])
    warnings.filterwarnings("ignore", module="lightning.pytorch.utilities._pytree")  # torch deprecated what it calls
    try:
        GpuopsCLI(
            trainer_defaults=_trainer_defaults(),
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
        )
    except GpuopsError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            sys.stderr.write(f"gpuops: error: {error}\n")
        raise SystemExit(error.exit_code) from None


def add_config_folder(arguments: Sequence[str]) -> None:
    """Put the folder of each `--config FILE` first on sys.path, so that its modules can be named in it."""
    given = [argument.removeprefix("--config=") for argument in arguments if argument.startswith("--config=")]
    given += [value for flag, value in pairwise(arguments) if flag in ("--config", "-c")]
    for file in given:
        sys.path.insert(0, str(Path(file).resolve().parent))


def _trainer_defaults() -> dict[str, Any]:
    world, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    defaults: dict[str, Any] = {
        "default_root_dir": "run",
        "callbacks": [EnergyCallback(), LineageCallback()],
        "use_distributed_sampler": False,
        "devices": local,
        "num_nodes": world // local,
    }
    return defaults | ({"strategy": "ddp"} if world > 1 else {})


if __name__ == "__main__":
    main()
