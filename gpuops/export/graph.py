"""The served graph: stored samples in, physical answers out, with the training pipeline's own preprocessing inside."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpuops.bundle import file_sha256
from gpuops.data.join import reopen
from gpuops.data.sample import BoundSample, SampleSpec, bind
from gpuops.data.source import Source
from gpuops.errors import InputError, IntegrityError
from gpuops.lineage.version import RUN_FILE
from gpuops.preprocess.module import PreprocessModule
from gpuops.preprocess.steps import Preprocess
from gpuops.spec import Signature, TensorSpec


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run, loaded for export."""

    path: Path
    """Run directory."""
    record: Mapping[str, Any]
    """Its run.json."""
    source: Source
    """The data it was trained on, at its snapshot."""
    sample: BoundSample
    """What a sample is."""
    model: nn.Module
    """The trained module in eval mode, on the CPU."""


class ServedGraph(nn.Module):
    """Preprocess the raw inputs, run the model, undo the targets' normalisation."""

    def __init__(self, model: nn.Module, inputs: Preprocess, targets: Preprocess) -> None:
        """Join the three; the model is called with the input tensors by name."""
        super().__init__()
        self.model = model
        self.inputs = PreprocessModule(inputs)
        self.targets = PreprocessModule(targets)
        self.input_names = [part.name for parts in inputs.tensors.values() for part in parts]
        self.output_names = list(targets.tensors)

    def forward(self, *raw: Tensor) -> tuple[Tensor, ...]:
        """Answers in physical units, float32, in the order of `output_names`; `raw` in that of `input_names`."""
        answer = self.model(**self.inputs(dict(zip(self.input_names, raw, strict=True))))
        by_name = answer if isinstance(answer, Mapping) else {self.output_names[0]: answer}
        return tuple(self.targets.physical(name, by_name[name]) for name in self.output_names)


def load_run(path: str | Path) -> Run:
    """Load a finished run: its record, its data at its snapshot and its best weights.

    Raises:
        InputError: no finished run there, or one without data that gpuops reads.
        IntegrityError: the model's file or the data changed since the run.
    """
    root = Path(path)
    file = root / RUN_FILE
    if not file.is_file():
        raise InputError(f"{root} holds no {RUN_FILE}: give the run directory (trainer.default_root_dir) of a fit")
    record = json.loads(file.read_text())
    if record["status"] == "running":
        raise InputError(f"{root} holds no finished fit: train it to the end first")
    if not record["checkpoint"]:
        raise InputError(f"{root} saved no checkpoint (does its `monitor` exist? it needs a holdout): train it again")
    if record["sample"] is None:
        raise InputError(f"{root} was trained on data that gpuops did not read: its raw inputs are unknown")
    source = reopen(record["data"])
    if source.fingerprint != record["data"]["fingerprint"]:
        raise IntegrityError(
            f"{source.url} has fingerprint {source.fingerprint}, the run was trained on "
            f"{record['data']['fingerprint']}: open the data it was trained on"
        )
    model = _load_model(root, record)
    return Run(root, record, source, bind(SampleSpec.from_json(record["sample"]), source), model)


def served_graph(run: Run) -> ServedGraph:
    """The graph of a run, in eval mode."""
    return ServedGraph(run.model, _preprocess(run, "inputs"), _preprocess(run, "targets")).eval()


def signature(run: Run, max_batch: int) -> Signature:
    """What crosses the wire: raw variables in, one float32 tensor a target out, in the unit of its variable."""
    inputs = tuple(cut.spec for cuts in run.sample.inputs.values() for cut in cuts)
    targets = _preprocess(run, "targets")
    outputs = tuple(
        TensorSpec(
            name,
            "float32",
            targets.shape((sum(cut.shape[0] for cut in cuts), *cuts[0].shape[1:])),
            cuts[0].variable.unit,
        )
        for name, cuts in run.sample.targets.items()
    )
    return Signature(inputs, outputs, max_batch)


def _preprocess(run: Run, side: str) -> Preprocess:
    """What a served sample goes through: the twins of what training drew at random."""
    return Preprocess.from_json(run.record["preprocess"][side]).eval()


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums whose order, and so whose last bit, does not depend on the number of cores or on OMP_NUM_THREADS."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load_model(root: Path, record: Mapping[str, Any]) -> nn.Module:
    described = record["model"]
    module_name, _, class_name = described["class_path"].rpartition(".")
    if described["file"] is not None:
        file = Path(described["file"])
        if not file.is_file() or file_sha256(file) != record["identity"]["code"]["module"]:
            raise IntegrityError(f"{file} changed since the run: restore it (git) or train again")
        folder = file.parents[module_name.count(".")]
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    kind = getattr(importlib.import_module(module_name), class_name)
    checkpoint = root / record["checkpoint"]
    if not checkpoint.is_file():
        raise InputError(f"checkpoint {checkpoint} does not exist: train again, or restore it")
    saved = torch.load(checkpoint, map_location="cpu", weights_only=False)
    # A module that does not save its hyperparameters is built from the config it was trained with.
    arguments = {} if saved.get("hyper_parameters") else (described["init"] or {}).get("init_args") or {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning calls what jsonargparse deprecates
            model: nn.Module = kind.load_from_checkpoint(
                checkpoint, map_location="cpu", weights_only=False, **arguments
            )
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{class_name} cannot be built again from {checkpoint} ({reason}): call self.save_hyperparameters() in its "
            "__init__ and train again"
        ) from error
    return model.eval()
