"""The end of the wall time: a signal, a checkpoint in the middle of the epoch, a clean exit."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from gpuops.training.checkpoint import RecoveryCheckpoint
from gpuops.training.ranks import distributed

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """The run was asked to stop, saved a checkpoint and ends with exit code 0; the same command goes on."""

    def __init__(self) -> None:
        super().__init__(0)


class PreemptionCallback(Callback):
    """On SIGTERM or SIGUSR1 to any rank: all save after the step under way and exit with 0.

    Ranks agree by a reduction of one byte a step that is started at the end of a step and looked at after the next, so
    that no step waits for it; a run stops at most two steps after the signal, and no step is lost. Under Slurm,
    SIGUSR1 (`sbatch --signal=USR1@120`) also asks for the job to be queued again (`scontrol requeue`).
    """

    def __init__(self) -> None:
        self._asked: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._group: Any = None
        self._vote: torch.Tensor | None = None
        self._work: Any = None
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals; Lightning's own handlers would talk to the other ranks from inside a handler."""
        self._asked, self._work, self._step = None, None, trainer.global_step
        self._group = dist.new_group(backend="gloo") if distributed() else None
        for number in SIGNALS:
            try:
                self._handlers[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread: whoever runs us there handles signals
                self._handlers.clear()
                return

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimiser step: stop if the ranks agreed to."""
        if trainer.global_step == self._step:
            return  # gradients are being accumulated: a checkpoint here would lose them
        self._step = trainer.global_step
        asked = self._agreed()
        if asked:
            self._stop(trainer, signal.Signals(asked))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back; every rank is here, so that the group can go."""
        self._restore()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back; a peer may be gone, so nothing is waited for."""
        self._work = None
        self._restore()

    def _ask(self, number: int, frame: object) -> None:
        self._asked = signal.Signals(number)

    def _agreed(self) -> int:
        """The signal that any rank had got by the end of the step before; 0 if none."""
        mine = 0 if self._asked is None else int(self._asked)
        if self._group is None:
            return mine
        agreed = 0
        if self._work is not None and self._vote is not None:
            self._work.wait()
            agreed = int(self._vote.item())
        self._vote = torch.tensor([mine], dtype=torch.uint8)
        self._work = dist.all_reduce(self._vote, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def _stop(self, trainer: Trainer, number: signal.Signals) -> None:
        saver = next((c for c in trainer.callbacks if isinstance(c, RecoveryCheckpoint)), None)  # type: ignore[attr-defined]
        path = (saver or RecoveryCheckpoint()).save(trainer)
        rank_zero_info(f"{number.name}: saved {path} after step {trainer.global_step}; the same command goes on")
        if number is signal.SIGUSR1 and trainer.is_global_zero and "SLURM_JOB_ID" in os.environ:
            _requeue()
        if self._work is not None:
            self._work.wait()
        raise Preempted

    def _restore(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()


def _requeue() -> None:
    """Ask Slurm to run this job again; a job that cannot be requeued ends as it is, with its checkpoint."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        said = done.stderr.strip() if done.returncode else ""
    except OSError as error:
        said = str(error)
    rank_zero_info(f"job {job} could not be requeued: {said}" if said else f"job {job} is queued again")
