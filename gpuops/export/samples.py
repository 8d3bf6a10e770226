"""Samples of a run, read as training read them: those it was validated on and those it learnt from."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gpuops.bundle import Golden
from gpuops.data.reading.plan import Slot
from gpuops.data.reading.reader import Reader, wire_inputs
from gpuops.data.runs import Runs
from gpuops.data.sample import Ids
from gpuops.data.split import sample_runs
from gpuops.errors import InputError
from gpuops.export.graph import Run, ServedGraph, one_thread, signature

GOLDEN_SAMPLES = 8


def held_out(run: Run) -> Runs:
    """Ids of the samples that were held out; of all where none was."""
    records = run.record["data"]["held_out_records"] or [[0, run.sample.records]]
    return sample_runs(run.sample, Runs.from_json(records))


def trained_on(run: Run) -> Runs:
    """Ids of the samples of the training split.

    Raises:
        InputError: the run's record does not tell which records that are.
    """
    data = run.record["data"]
    if "trained_records" in data:
        return sample_runs(run.sample, Runs.from_json(data["trained_records"]))
    absent = Runs.of(run.sample.absent, run.sample.absent + 1)
    rest = Runs.up_to(run.sample.records) - Runs.from_json(data["held_out_records"]) - absent
    if len(rest) != data["train_records"]:  # a test split, a gap or a period took the others
        raise InputError(f"{run.path} does not say which records it was trained on: train it again with this gpuops")
    return sample_runs(run.sample, rest)


def drawn(ids: Runs, count: int) -> Ids:
    """At most `count` of some ids, ascending, the same at every call.

    Drawn, not evenly spaced: a step that is a multiple of a day or a year would take the same hour or month each time.
    """
    places = np.random.default_rng(0).choice(len(ids), min(count, len(ids)), replace=False, shuffle=False)
    return ids[np.sort(places)]


def batches(run: Run, ids: Ids, size: int) -> Iterator[Slot]:
    """Slots of `size` samples, the last may be smaller."""
    reader = Reader(run.source, run.sample)
    try:
        for start in range(0, len(ids), size):
            yield reader.read(ids[start : start + size])
    finally:
        reader.close()


def golden(run: Run, graph: ServedGraph) -> tuple[Golden, list[int]]:
    """Raw held-out samples with the training pipeline's answers, and the samples' ids.

    The answers come from the slot that training reads and from `packed`, not from the served graph's `forward`.
    """
    held = held_out(run)
    ids = held[np.unique(np.linspace(0, len(held) - 1, GOLDEN_SAMPLES).astype(np.int64))]
    (slot,) = batches(run, ids, len(ids))
    with torch.no_grad(), one_thread():
        ready = graph.inputs.packed({name: torch.from_numpy(array) for name, array in slot.inputs.items()})
        answer = _call(graph.model, ready)
        by_name = answer if isinstance(answer, Mapping) else {graph.output_names[0]: answer}
        if missing := set(graph.output_names) - by_name.keys():
            raise InputError(f"forward did not answer {', '.join(sorted(missing))}: return a tensor for each target")
        for spec in signature(run, 1).outputs:
            if tuple(by_name[spec.name].shape[1:]) != spec.shape:
                raise InputError(
                    f"forward answered {spec.name!r} as {list(by_name[spec.name].shape[1:])} a sample, its target is "
                    f"{list(spec.shape)}: return that shape"
                )
        outputs = {name: graph.targets.physical(name, by_name[name]).numpy() for name in graph.output_names}
    return Golden(wire_inputs(run.sample, slot), outputs), [int(i) for i in ids]


def truth(graph: ServedGraph, slot: Slot) -> dict[str, npt.NDArray[np.float32]]:
    """A slot's targets in physical units, after the steps that validation compares with; NaN where nothing is known."""
    with torch.no_grad():
        ready = graph.targets.packed({name: torch.from_numpy(array) for name, array in slot.targets.items()})
        return {name: graph.targets.physical(name, ready[name]).numpy() for name in graph.output_names}


def _call(model: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    takes = inspect.signature(model.forward).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    if not anything and not tensors.keys() <= takes.keys():
        raise InputError(
            f"forward takes {', '.join(takes)}, the declared input tensors are {', '.join(tensors)}: "
            "give its arguments the tensors' names"
        )
    return model(**tensors)
