"""Zarr for Lightning: a data module that any LightningModule and any Trainer can use."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule

from gpuops.data.loader import ZarrLoader
from gpuops.data.order import Order
from gpuops.data.reader import Counters, Reader
from gpuops.data.sample import BoundSample, Cut, Field, Ids, SampleSpec, Window, bind
from gpuops.data.source import Source, open
from gpuops.data.statistics import mean_std
from gpuops.errors import InputError
from gpuops.lineage.version import digest
from gpuops.preprocess.module import PreprocessModule
from gpuops.preprocess.steps import Clip, Fill, Normalize, Part, Preprocess, Step, Unpack
from gpuops.spec import DTYPES


@dataclass(frozen=True)  # no slots: jsonargparse reads a default instance through vars()
class Holdout:
    """Which records are kept for validation: whole groups that share a value, so that no neighbour leaks."""

    by: str
    """A one-dimensional variable on the sample axis (region, year, patient)."""
    share: float = 0.25
    """Share of its distinct values that are held out, chosen by the seed."""
    values: tuple[int, ...] | None = None
    """The held-out values themselves, in place of a share."""

    def choose(self, labels: npt.NDArray[Any], seed: int) -> npt.NDArray[np.bool_]:
        """Mask of held-out records, from the label of each record."""
        distinct = np.unique(labels)
        if self.values is None:
            count = max(1, round(self.share * len(distinct)))
            ranked = sorted(distinct, key=lambda value: hashlib.sha256(f"{seed}:{value}".encode()).digest())
            chosen = ranked[:count]
        else:
            chosen = list(self.values)
        mask = np.isin(labels, chosen)
        if mask.all() or not mask.any():
            raise InputError(
                f"holding out {chosen} of {self.by} leaves {(~mask).sum()} to train on, {mask.sum()} to validate"
            )
        return mask


class ZarrDataModule(LightningDataModule):
    """Random samples straight from Zarr, packed up to the device, prepared there by one kernel a tensor."""

    def __init__(
        self,
        url: str,
        inputs: dict[str, list[Field]],
        targets: dict[str, list[Field]],
        window: Window | None = None,
        holdout: Holdout | None = None,
        global_batch: int = 32,
        seed: int = 0,
        snapshot: str | None = None,
        dtype: str = "float32",
        threads: int | None = None,
        ahead: int = 2,
    ) -> None:
        """Declare what a sample is.

        Args:
            url: a Zarr group or an Icechunk repository (see `gpuops.open`).
            inputs: tensors the model takes, each a list of fields in channel order.
            targets: tensors it is to predict.
            window: the moving window, if samples are windows.
            holdout: records kept for validation; None trains on everything.
            global_batch: samples a step over all data-parallel ranks; a multiple of their number.
            seed: seed of the order and of the holdout.
            snapshot: Icechunk snapshot id; the newest if None.
            dtype: dtype of prepared batches: float32, bfloat16 or float16.
            threads: decoding threads of a rank; its share of the cores if None.
            ahead: batches read ahead.
        """
        super().__init__()
        self.url, self.snapshot, self.holdout = url, snapshot, holdout
        self.sample = SampleSpec(inputs, targets, window)
        self.global_batch, self.seed, self.threads, self.ahead = global_batch, seed, threads, ahead
        self.dtype = _dtype(dtype)
        self._resume: Mapping[str, Any] | None = None
        self._train: ZarrLoader | None = None
        self._readers: list[Reader] = []

    def setup(self, stage: str | None = None) -> None:
        """Open the source, split it, and freeze the preprocessing with the training split's statistics."""
        if hasattr(self, "source"):
            return
        self.source: Source = open(self.url, self.snapshot)
        self.bound: BoundSample = bind(self.sample, self.source)
        held = np.zeros(self.bound.records, bool)
        if self.holdout is not None:
            labels = self.source.variable(self.holdout.by)
            if labels.array.shape != (self.bound.records,):
                raise InputError(
                    f"holdout by {self.holdout.by!r}: it must have one value a record, it has {labels.dims}"
                )
            held = self.holdout.choose(np.asarray(labels.array[:]), self.seed)
        self.train_records, self.val_records = np.flatnonzero(~held), np.flatnonzero(held)
        self.train_ids, self.val_ids = (self.bound.samples(r) for r in (self.train_records, self.val_records))
        if not len(self.train_ids) or (not len(self.val_ids) and self.holdout is not None):
            raise InputError(
                f"the split leaves {len(self.train_ids)} samples to train on and {len(self.val_ids)} to validate on: "
                "hold out longer runs of records than the window"
            )
        self.preprocess = {
            "inputs": _preprocess(self.source, self.bound.inputs, self.train_records, fill=True),
            "targets": _preprocess(self.source, self.bound.targets, self.train_records, fill=False),
        }
        self._modules = {side: PreprocessModule(p, self.dtype) for side, p in self.preprocess.items()}

    @property
    def fingerprint(self) -> str:
        """Identity of the data together with the declared samples and split: what the order is keyed by."""
        split = None if self.holdout is None else asdict(self.holdout)
        return digest({"data": self.source.fingerprint, "sample": self.sample.to_json(), "holdout": split})

    def train_dataloader(self) -> ZarrLoader:
        """Shuffled batches of the training split; an incomplete last batch is dropped."""
        self._train = self._loader(self.train_ids, shuffle=True, last="drop")
        if self._resume is not None:
            self._train.load_state_dict(self._resume)
        return self._train

    def val_dataloader(self) -> ZarrLoader | list[Any]:
        """Batches of the held-out split in stored order; the last is padded, with `valid` false."""
        return self._loader(self.val_ids, shuffle=False, last="pad") if len(self.val_ids) else []

    def physical(self, tensor: str, values: torch.Tensor) -> torch.Tensor:
        """Normalised values of a target tensor, [n, channels, ...], in physical units."""
        return self._modules["targets"].physical(tensor, values)

    @property
    def counters(self) -> Counters:
        """What reading cost so far, over the loaders of this rank."""
        total = Counters()
        for reader in self._readers:
            for key, value in asdict(reader.counters).items():
                setattr(total, key, getattr(total, key) + value)
        return total

    def state_dict(self) -> dict[str, Any]:
        """The training loader's position, kept here too because Lightning may drop the loader's own."""
        return {} if self._train is None else self._train.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume the training loader from a checkpoint; refuses a checkpoint of other data."""
        self._resume = state_dict or None

    def teardown(self, stage: str | None = None) -> None:
        """Stop the reading threads; a resumed position does not outlive its fit."""
        self._resume = None
        for reader in self._readers:
            reader.close()

    def _loader(self, ids: Ids, *, shuffle: bool, last: str) -> ZarrLoader:
        trainer = self.trainer
        sampler = None if trainer is None else trainer.distributed_sampler_kwargs
        rank, ranks = (0, 1) if sampler is None else (sampler["rank"], sampler["num_replicas"])
        device = torch.device("cpu") if trainer is None else trainer.strategy.root_device
        if self.global_batch % ranks:
            raise InputError(f"global_batch {self.global_batch} is not a multiple of {ranks} ranks: change one of them")
        share = len(os.sched_getaffinity(0)) // (1 if trainer is None else trainer.num_devices)
        reader = Reader(self.source, self.bound, threads=self.threads or max(1, share), ahead=self.ahead)
        self._readers.append(reader)
        fingerprint = self.fingerprint
        return ZarrLoader(
            reader,
            ids,
            lambda epoch: Order(len(ids), self.seed, epoch, fingerprint, self.global_batch, shuffle, last),
            rank=rank,
            ranks=ranks,
            epoch=None if trainer is None else lambda: trainer.current_epoch,
            inputs=self._modules["inputs"],
            targets=self._modules["targets"],
            device=device,
        )


def _dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise InputError(f"dtype {name!r} is not one of {', '.join(known)}")
    return known[name]


def _preprocess(source: Source, tensors: Mapping[str, tuple[Cut, ...]], records: Ids, *, fill: bool) -> Preprocess:
    """Freeze the declared steps with the statistics of `records`; targets keep missing data as NaN."""
    return Preprocess(
        {name: tuple(_part(source, cut, records, fill) for cut in cuts) for name, cuts in tensors.items()}
    )


def _part(source: Source, cut: Cut, records: Ids, fill: bool) -> Part:
    field, variable = cut.field, cut.variable
    dtype = str(variable.array.dtype)
    if field.raw or (not cut.records and cut.along == "inside"):
        return Part(cut.name, cut.shape[0], dtype)
    if dtype not in DTYPES:
        raise InputError(
            f"{variable.name!r} is stored as {dtype}, which no kernel reads: store it as one of {', '.join(DTYPES)}, "
            "or declare the field raw"
        )
    mean, std = mean_std(source, cut, records)
    steps: list[Step] = [Unpack(variable.scale, variable.offset, variable.missing)]
    declared = field.fill if field.fill is not None else variable.fill
    if declared is None and fill and (variable.missing is not None or variable.array.dtype.kind == "f"):
        declared = float(np.mean(mean))
    if declared is not None:
        steps.append(Fill(declared))
    if field.clip is not None:
        steps.append(Clip(*field.clip))
    if field.normalize:
        steps.append(Normalize(mean, std))
    return Part(cut.name, cut.shape[0], dtype, tuple(steps))
