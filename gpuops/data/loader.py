"""The iterable that training takes batches from: an order, a reader and the declared preprocessing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpuops.data.order import Order
from gpuops.data.reading.plan import Slot
from gpuops.data.reading.reader import Reader
from gpuops.data.runs import Runs
from gpuops.data.sample import Ids
from gpuops.data.stopwatch import Stopwatch
from gpuops.errors import IntegrityError
from gpuops.preprocess.module import Draw, PreprocessModule

Batch = dict[str, Any]
"""`{"inputs": {name: Tensor}, "targets": {name: Tensor}, "id": int64 [n], "valid": bool [n]}`."""


class ZarrLoader:
    """Batches of one data-parallel rank, epoch after epoch.

    An iterable with the length of a full epoch. Its state counts the batches delivered, not those read ahead, so that a
    resumed epoch goes on with the sample after the last one that was trained on.
    """

    def __init__(
        self,
        reader: Reader,
        ids: Ids | Runs,
        order: Callable[[int], Order],
        *,
        rank: int,
        ranks: int,
        epoch: Callable[[], int] | None,
        inputs: PreprocessModule,
        targets: PreprocessModule,
        device: torch.device,
        seed: int = 0,
        identity: Mapping[str, str] | None = None,
        progress: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        """Join an order to a reader.

        Args:
            reader: reads the samples.
            ids: sample ids of the split; the order permutes positions in it.
            order: the order of an epoch.
            rank: data-parallel rank, from 0.
            ranks: number of data-parallel ranks.
            epoch: tells the current epoch when an iteration begins; None counts the epochs read to their end.
            inputs: prepares the input tensors.
            targets: prepares the target tensors.
            device: where batches are delivered.
            seed: seed of random steps.
            identity: what the order's fingerprint is made of, by name, so that a refusal says which part differs.
            progress: tells (batches delivered whose step has not ended, batches since the last optimiser step before
                those); None where every delivered batch is a finished step.
        """
        self.reader = reader
        self._ids, self._order, self._rank, self._ranks, self._epoch = ids, order, rank, ranks, epoch
        self._inputs, self._targets, self._seed = inputs.to(device), targets.to(device), seed
        self.watch = Stopwatch(device)
        self.fetched_s = 0.0
        """Seconds that the consumer has spent in getting batches, by the clock."""
        self._upload = _Upload(device, self.watch) if device.type == "cuda" else None
        self._identity, self._progress = dict(identity or {}), progress or _always_finished
        self._position = (0, 0)
        self._resume: tuple[int, int] | None = None

    def __len__(self) -> int:
        return self._order(0).batches

    def __iter__(self) -> Iterator[Batch]:
        # Only a loaded position skips batches: an iteration that was left early (Lightning's sanity check, a look at
        # the first batch) must not cost the next one its beginning.
        resume, self._resume = self._resume, None
        epoch = self._own_epoch() if self._epoch is None else self._epoch()
        order = self._order(epoch)
        done = resume[1] if resume is not None and resume[0] == epoch and resume[1] < order.batches else 0
        self._position = (epoch, done)
        shares = order.shares(done, self._rank, self._ranks)
        begun = time.perf_counter()
        for slot in self.reader.iterate((self._ids[positions], valid) for positions, valid in shares):
            done += 1
            self._position = (epoch, done)
            batch = self._batch(slot, epoch)
            del slot  # what the batch does not share goes back to the reader now, the rest with the batch
            self.fetched_s += time.perf_counter() - begun
            yield batch
            del batch
            begun = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Position (epoch, batches delivered to finished steps) and the identity that it belongs to."""
        in_flight, unstepped = self._progress()
        epoch, delivered = self._position
        return {"epoch": epoch, "delivered": max(delivered - in_flight, 0), "unstepped": unstepped, **self._key()}

    def _key(self) -> dict[str, Any]:
        order = self._order(0)
        key = {"fingerprint": order.fingerprint, "seed": order.seed, "global_batch": order.global_batch}
        return {**key, "identity": self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved position.

        Raises:
            IntegrityError: the position belongs to other data, samples, split, sampling or lanes, to another seed or
                global batch, or lies between two optimiser steps.
        """
        mine = self._key()
        theirs = state.get("identity", mine["identity"])
        differ = [name for name, value in mine["identity"].items() if theirs.get(name) != value]
        keys = ("fingerprint", "seed", "global_batch")
        wrong = [key for key in keys if state[key] != mine[key]] or (["fingerprint"] if differ else [])
        if wrong:
            key = wrong[0]
            parts = "".join(
                f"; {name}: {theirs.get(name, 'none')} there, {mine['identity'][name]} here" for name in differ
            )
            raise IntegrityError(
                f"this checkpoint was trained with {key} {state[key]}, here it is {mine[key]}: open the snapshot it "
                f"was trained on with the samples, split, sampling and lanes of then, or start a new run{parts}"
            )
        if state.get("unstepped"):
            raise IntegrityError(
                f"this checkpoint was written {state['unstepped']} batches after an optimiser step, and their "
                "gradients are not in it: resume from one that was saved after a multiple of accumulate_grad_batches, "
                "as ModelCheckpoint(every_n_train_steps=...) does"
            )
        self._position = self._resume = (int(state["epoch"]), int(state["delivered"]))

    def _own_epoch(self) -> int:
        """The epoch after the last one that was read to its end."""
        epoch, delivered = self._position
        return epoch + 1 if delivered == len(self) else epoch

    @torch.no_grad()
    def _batch(self, slot: Slot, epoch: int) -> Batch:
        inputs, targets = ({k: torch.from_numpy(a) for k, a in side.items()} for side in (slot.inputs, slot.targets))
        valid = torch.from_numpy(slot.valid)
        if self._upload is not None:
            inputs, targets, valid = self._upload.copy(inputs, targets, valid)
        draw = Draw(slot.ids, self._seed, epoch)
        with self.watch.lap("preprocess"):
            inputs, targets = self._inputs.packed(inputs, draw), self._targets.packed(targets, draw)
        return {
            "inputs": inputs,
            "targets": targets,
            "id": torch.from_numpy(slot.ids),
            "valid": valid,
        }


class _Upload:
    """Copies slots to a CUDA device on a stream of its own, beside the computation of the step before."""

    def __init__(self, device: torch.device, watch: Stopwatch) -> None:
        self._device, self._watch = device, watch
        self._stream = torch.cuda.Stream(device)
        self._under_way: deque[tuple[torch.cuda.Event, tuple[Any, ...]]] = deque()

    def copy(
        self, inputs: dict[str, Tensor], targets: dict[str, Tensor], valid: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """The same tensors on the device, ready for its current stream; pinned ones without waiting for the copy."""
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream), self._watch.lap("copy"):
            moved = tuple(
                {k: t.to(self._device, non_blocking=True) for k, t in side.items()} for side in (inputs, targets)
            )
            mask = valid.to(self._device)
            done = torch.cuda.Event()
            done.record(self._stream)
        current.wait_event(done)
        for tensor in (*moved[0].values(), *moved[1].values(), mask):
            tensor.record_stream(current)  # allocated on the copying stream, freed after use on this one
        # A slot's memory may be filled again once nobody refers to it, so refer to it until it is copied.
        self._under_way.append((done, (inputs, targets)))
        while self._under_way and self._under_way[0][0].query():
            self._under_way.popleft()
        return moved[0], moved[1], mask


def pinned(nbytes: int) -> npt.NDArray[np.uint8]:
    """Page-locked memory, which a CUDA device copies from while it computes."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()


def _always_finished() -> tuple[int, int]:
    return 0, 0
