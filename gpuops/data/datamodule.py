"""Zarr for Lightning: a data module that any LightningModule and any Trainer can use."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from gpuops.data.join import open
from gpuops.data.loader import ZarrLoader, pinned
from gpuops.data.order import Lanes, Order, Strata
from gpuops.data.patches import Patch as Patch
from gpuops.data.prepare import crop_alike, freeze, missing_targets, uneven_windows
from gpuops.data.reading.counters import Counters
from gpuops.data.reading.node_cache import CacheLocation
from gpuops.data.reading.reader import Reader
from gpuops.data.runs import Runs
from gpuops.data.sample import BoundSample, Field, SampleSpec, Window, bind
from gpuops.data.sampling import Foreground, Stratified, Weighted, stratify
from gpuops.data.source import Source
from gpuops.data.split import Holdout as Holdout
from gpuops.data.split import Period, make_split, sample_runs
from gpuops.errors import InputError
from gpuops.lineage.version import digest
from gpuops.preprocess.geometry import Augment as Augment
from gpuops.preprocess.geometry import Resize as Resize
from gpuops.preprocess.module import PreprocessModule

LANES = 48
"""Lanes are at most this many: all that divide `global_batch` and this, so that 1, 2, 3, 4, 6, 8, 12, ... ranks fit."""
LANE_BYTES = 256 << 20
"""Decoded chunks in use at one time, over all lanes, that the choice of a window aims at."""

_log = logging.getLogger(__name__)


class ZarrDataModule(LightningDataModule):
    """Random samples straight from Zarr, packed up to the device, prepared there by one kernel a tensor."""

    def __init__(
        self,
        url: str | dict[str, str],
        inputs: dict[str, list[Field]],
        targets: dict[str, list[Field]],
        window: Window | None = None,
        holdout: Holdout | Period | None = None,
        global_batch: int = 32,
        seed: int = 0,
        snapshot: str | dict[str, str | None] | None = None,
        dtype: str = "float32",
        threads: int | None = None,
        budget_mb: int = 512,
        test: Holdout | Period | None = None,
        train: Period | None = None,
        gap: int | str = 0,
        sampling: Weighted | Stratified | Foreground | None = None,
        lanes: Lanes | Literal["auto"] | None = "auto",
        missing_chunks: Literal["error", "fill"] = "error",
        cache_dir: str | None = None,
        cache_gb: float = 100.0,
        patch: Patch | None = None,
        align: str | None = None,
        augment: Augment | None = None,
        resize: Resize | None = None,
    ) -> None:
        """Declare what a sample is.

        Args:
            url: a Zarr group or an Icechunk repository, or several by name, aligned on a coordinate (see
                `gpuops.open`).
            inputs: tensors the model takes, each a list of fields in channel order.
            targets: tensors it is to predict.
            window: the moving window, if samples are windows.
            holdout: records kept for validation; None trains on everything.
            global_batch: samples a step over all data-parallel ranks; a multiple of their number.
            seed: seed of the order and of the holdout.
            snapshot: Icechunk snapshot id, of several stores by name; the newest if None.
            dtype: dtype of prepared batches: float32, bfloat16 or float16.
            threads: decoding threads of a rank; its share of the cores if None.
            budget_mb: MiB that a rank holds of batches and chunks read ahead.
            test: records kept for the last test (`Trainer.test`); None keeps none.
            train: the period that may be trained on; all that is not held out if None.
            gap: what lies between two splits and belongs to none: a number of records, or a span of the sample axis'
                coordinate such as "10D", "6h" or, in its own units, "0.5".
            sampling: draws samples by weight, stratum or foreground; None reads each sample once an epoch.
            lanes: how chunks that hold several records are shuffled so that each is decoded once; "auto" chooses lanes
                from the stored chunks and `global_batch` where there are such chunks, None shuffles over everything.
            missing_chunks: "error", or "fill" to read a chunk that is not there as the array's fill value.
            cache_dir: a directory on a disk of the node, or under /dev/shm, that keeps what its ranks fetched from an
                object store or an Icechunk repository, for later epochs and runs; None keeps nothing.
            cache_gb: most gigabytes (10^9 bytes) kept there, over all data sets.
            patch: the patches, if samples are parts of records.
            align: dimension whose coordinate aligns several stores; the one that they share if None.
            augment: what training does to samples at random: crop, mirror, turn; inputs and targets alike, the same for
                a sample and epoch on any number of ranks. Validation, test and prediction take the middle of a crop.
            resize: height and width that samples are resampled to after that, in evaluation and serving too.
        """
        super().__init__()
        self.url, self.snapshot, self.align, self.holdout, self.test = url, snapshot, align, holdout, test
        self.train, self.gap, self.sampling, self.missing_chunks = train, gap, sampling, missing_chunks
        self.sample, self.augment = SampleSpec(inputs, targets, window, patch), augment
        self.resize = resize
        self.global_batch, self.seed, self.threads, self.budget_mb = global_batch, seed, threads, budget_mb
        self.dtype = _dtype(dtype)
        self._cache = None if cache_dir is None else CacheLocation(cache_dir, int(cache_gb * 1e9))
        if budget_mb < 1:
            raise InputError(f"a budget of {budget_mb} MiB holds no batch: give at least 1")
        if sampling is not None and isinstance(lanes, Lanes):
            raise InputError("a sampled epoch has no lanes: leave `sampling` or `lanes` out")
        self._declared_lanes = lanes if sampling is None else None
        self._resume: Mapping[str, Any] | None = None
        self._train: ZarrLoader | None = None
        self._readers: list[Reader] = []

    def setup(self, stage: str | None = None) -> None:
        """Open the source, split it, and freeze the preprocessing with the training split's statistics."""
        if hasattr(self, "source"):
            return
        source = open(self.url, self.snapshot, missing_chunks=self.missing_chunks, align=self.align)
        self.bound: BoundSample = bind(self.sample, source)
        split = make_split(
            source, self.bound, val=self.holdout, test=self.test, train=self.train, gap=self.gap, seed=self.seed
        )
        self.train_ids, self.val_ids, self.test_ids = (
            sample_runs(self.bound, records) for records in (split.train, split.val, split.test)
        )
        if any(
            not len(ids)
            for ids, records in ((self.train_ids, split.train), (self.val_ids, split.val), (self.test_ids, split.test))
            if len(records)
        ):
            tests = f" and {len(self.test_ids)} to test on" if self.test is not None else ""
            raise InputError(
                f"the split leaves {len(self.train_ids)} samples to train on and {len(self.val_ids)} to validate on"
                f"{tests}: hold out longer runs of records than the window"
            )
        absent = Runs.of(self.bound.absent, self.bound.absent + 1)
        self.train_records, self.val_records, self.test_records = (
            records - absent for records in (split.train, split.val, split.test)
        )
        self.lanes = _lanes(self.bound, self.global_batch) if self._declared_lanes == "auto" else self._declared_lanes
        self._strata: Strata | None = None
        self._train_order = self.train_ids
        if self.sampling is not None:
            self._train_order, self._strata = stratify(source, self.bound, self.train_ids, self.sampling)
        elif self.lanes is not None:
            self._train_order = self.train_ids.aligned(self.lanes.block)
        sides = {"inputs": self.bound.inputs, "targets": self.bound.targets}
        self.preprocess = {
            side: freeze(
                source, cuts, self.train_records, fill=side == "inputs", augment=self.augment, resize=self.resize
            )
            for side, cuts in sides.items()
        }
        self._back = PreprocessModule(self.preprocess["targets"])
        if self.augment is not None:
            crop_alike(self.augment, self.bound)
        if missing := missing_targets(source, self.bound, self.train_records):
            rank_zero_only(_log.warning)(
                "target %s holds missing data, which stays NaN: leave it out of the loss, or give the field a `fill`",
                ", ".join(missing),
            )
        crossing, first = uneven_windows(source, self.bound)
        if crossing:
            rank_zero_only(_log.warning)(
                "%d windows span a gap or disorder in %r, the first behind %s: their steps are not equally far apart; "
                "leave those records out with a Period, or mend the archive",
                crossing,
                self.bound.dim,
                first,
            )
        self.source: Source = source

    @property
    def fingerprint(self) -> str:
        """Identity of the data together with the declared samples, split, sampling and lanes: the key of the order."""
        declared: dict[str, Any] = {
            "data": self.source.fingerprint,
            "sample": self.sample.to_json(),
            "holdout": None if self.holdout is None else asdict(self.holdout),
        }
        # Only what is declared, so that a release that can declare more keeps the orders of those before it.
        if self.test is not None or self.train is not None or self.gap:
            named = {"test": self.test, "train": self.train}
            declared["split"] = {"gap": self.gap} | {k: v and asdict(v) for k, v in named.items()}
        if self._strata is not None:
            declared["sampling"] = self._strata.digest
        if self.lanes is not None:
            declared["lanes"] = asdict(self.lanes)
        return digest(declared)

    def train_dataloader(self) -> ZarrLoader:
        """Shuffled batches of the training split; an incomplete last batch is dropped."""
        self._train = self._loader(self._train_order, training=True)
        if self._resume is not None:
            self._train.load_state_dict(self._resume)
        return self._train

    def val_dataloader(self) -> ZarrLoader | list[Any]:
        """Batches of the held-out split in stored order; the last is padded, with `valid` false."""
        return self._loader(self.val_ids) if len(self.val_ids) else []

    def test_dataloader(self) -> ZarrLoader | list[Any]:
        """Batches of the test split in stored order; the last is padded, with `valid` false."""
        return self._loader(self.test_ids) if len(self.test_ids) else []

    def predict_dataloader(self) -> ZarrLoader:
        """Batches of every sample of the source in stored order, whatever its split; the last is padded."""
        return self._loader(sample_runs(self.bound, Runs.up_to(self.bound.records)))

    def physical(self, tensor: str, values: torch.Tensor) -> torch.Tensor:
        """Normalised values of a target tensor, [n, channels, ...], in physical units."""
        return self._back.physical(tensor, values)

    @property
    def counters(self) -> Counters:
        """What reading cost so far, over the loaders of this rank."""
        total = Counters()
        for reader in self._readers:
            total.add(reader.counters)
        return total

    @property
    def fetched_s(self) -> float:
        """Seconds that training has spent in getting batches on this rank, by the clock."""
        return 0.0 if self._train is None else self._train.fetched_s

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that the training loader has spent on this rank: stall, copy (on CUDA) and preprocess."""
        if self._train is None:
            return {}
        return {"stall": self._train.reader.counters.stall_s, **self._train.watch.seconds()}

    def state_dict(self) -> dict[str, Any]:
        """The training loader's position, kept here too because Lightning may drop the loader's own."""
        if self._train is None:
            return {}
        state = self._train.state_dict()
        if state["unstepped"]:
            rank_zero_only(_log.warning)(
                "this checkpoint lies %d batches after an optimiser step and cannot be resumed from: save after a "
                "multiple of accumulate_grad_batches, as ModelCheckpoint(every_n_train_steps=...) does",
                state["unstepped"],
            )
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume the training loader from a checkpoint; refuses a checkpoint of other data."""
        self._resume = state_dict or None

    def teardown(self, stage: str | None = None) -> None:
        """Stop the reading threads and say what reading cost; a resumed position does not outlive its fit."""
        self._resume = None
        if stage == "fit" and self._readers:
            rank_zero_info(self.counters.line())
        for reader in self._readers:
            reader.close()

    def _loader(self, ids: Runs, *, training: bool = False) -> ZarrLoader:
        trainer = self.trainer
        sampler = None if trainer is None else trainer.distributed_sampler_kwargs
        rank, ranks = (0, 1) if sampler is None else (sampler["rank"], sampler["num_replicas"])
        device = torch.device("cpu") if trainer is None else trainer.strategy.root_device
        if self.global_batch % ranks:
            raise InputError(f"global_batch {self.global_batch} is not a multiple of {ranks} ranks: change one of them")
        share = len(os.sched_getaffinity(0)) // (1 if trainer is None else trainer.num_devices)
        reader = Reader(
            self.source,
            self.bound,
            threads=self.threads or max(1, share),
            budget_bytes=self.budget_mb << 20,
            cache=self._cache,
            allocate=pinned if device.type == "cuda" else None,
        )
        self._readers.append(reader)
        fingerprint = self.fingerprint
        lanes, strata = (self.lanes, self._strata) if training else (None, None)
        size = len(ids)
        if training and self.sampling is not None:
            size = self.sampling.draws or len(self.train_ids)
        last = "drop" if training else "pad"

        prepare = {
            side: PreprocessModule(declared if training else declared.eval(), self.dtype)
            for side, declared in self.preprocess.items()
        }

        def order(epoch: int) -> Order:
            return Order(size, self.seed, epoch, fingerprint, self.global_batch, training, last, lanes, strata)

        return ZarrLoader(
            reader,
            ids,
            order,
            rank=rank,
            ranks=ranks,
            epoch=None if trainer is None else lambda: trainer.current_epoch,
            inputs=prepare["inputs"],
            targets=prepare["targets"],
            device=device,
            seed=self.seed,
            identity=self._identity() if training else {},
            progress=self._progress if training else None,
        )

    def _identity(self) -> dict[str, str]:
        """What makes the fingerprint and the order, part by part: a refused resume says which differ."""
        split = [self.holdout, self.test, self.train]
        return {
            "data": self.source.fingerprint,
            "sample": digest(self.sample.to_json()),
            "split": digest([self.gap, *(part and [type(part).__name__, asdict(part)] for part in split)]),
            "sampling": "none" if self._strata is None else self._strata.digest,
            "lanes": "none" if self.lanes is None else str(asdict(self.lanes)),
        }

    def _progress(self) -> tuple[int, int]:
        """(batches in a step that has not ended, batches since the last optimiser step before it)."""
        trainer = self.trainer
        if trainer is None or not trainer.fit_loop.epoch_loop.batch_progress.current.ready:
            return 0, 0
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        in_flight = batches.ready - batches.processed
        stepped = batches.processed == trainer.num_training_batches
        return in_flight, 0 if stepped else batches.processed % trainer.accumulate_grad_batches


def _dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise InputError(f"dtype {name!r} is not one of {', '.join(known)}")
    return known[name]


def _lanes(bound: BoundSample, global_batch: int) -> Lanes | None:
    """Lanes for the variable with the largest records, if its chunks hold several samples.

    A function of store and batch. Patches of a record are neighbours in the numbering, so that a block is what the
    chunks of some records hold.
    """
    cuts = [cut for side in (bound.inputs, bound.targets) for cuts in side.values() for cut in cuts if cut.records]
    cut = max(cuts, key=lambda c: math.prod(c.variable.array.shape[1:]) * c.variable.array.dtype.itemsize)
    array = cut.variable.array
    records = min(array.chunks[0], bound.records)
    axes = () if cut.patch is None else cut.patch.axes
    patches = any(
        min(chunk, axis.length) >= axis.size + axis.stride
        for chunk, axis in zip(array.chunks[array.ndim - len(axes) :], axes, strict=True)
    )
    if records == 1 and not patches:
        return None
    count = math.gcd(global_batch, LANES)
    chunk_bytes = records * math.prod(array.shape[1:]) * array.dtype.itemsize
    return Lanes(count, min(max(LANE_BYTES // (count * chunk_bytes), 1), 4), records * bound.per_record)
