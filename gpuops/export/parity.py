"""Whether an exported model answers as the training pipeline does; knows no server and no format, only `infer`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gpuops.bundle import Golden
from gpuops.errors import InputError, IntegrityError
from gpuops.spec import Arrays, Signature


@dataclass(frozen=True, slots=True)
class Parity:
    """What a sweep over every served batch size found."""

    max_abs_diff: float
    """Largest absolute difference from the golden answers, in physical units."""
    worst_batch: int
    """Batch size where it was found."""
    batches: int
    """Batch sizes swept, 1 to this."""
    refused: tuple[str, ...]
    """Bad inputs that were refused, as they must be."""

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "refused": list(self.refused)}


def sweep(
    infer: Callable[[Arrays], Arrays],
    golden: Golden,
    signature: Signature,
    tolerance: float,
    progress: Callable[[int, int], None] | None = None,
) -> Parity:
    """Compare `infer` with the golden answers at every served batch size, and give it inputs that it must refuse.

    Args:
        infer: stored samples by name to physical answers by name; raises InputError for bad inputs.
        golden: raw samples and the training pipeline's answers.
        signature: what crosses the wire.
        tolerance: largest absolute difference allowed, physical units.
        progress: called with (batch sizes done, batch sizes in all).

    Raises:
        IntegrityError: an answer differs, or a bad input was answered.
    """
    worst, where = 0.0, 1
    for size in range(1, signature.max_batch + 1):
        batch = golden.batch(size)
        difference = batch.max_abs_diff(infer(batch.inputs))
        if difference > worst:
            worst, where = difference, size
        if progress is not None:
            progress(size, signature.max_batch)
    if worst > tolerance:
        raise IntegrityError(
            f"answers differ from the training pipeline's by {worst:.3g} at batch {where}, allowed is {tolerance:g}: "
            "do not serve it (or export with a larger --tolerance, if that is rounding)"
        )
    return Parity(worst, where, signature.max_batch, _refusals(infer, golden, signature))


def _refusals(infer: Callable[[Arrays], Arrays], golden: Golden, signature: Signature) -> tuple[str, ...]:
    first = signature.inputs[0]
    good = golden.batch(2).inputs
    other = np.float32 if first.dtype != "float32" else np.float64
    bad = {
        "batch 0": {name: array[:0] for name, array in good.items()},
        f"batch {signature.max_batch + 1}": golden.batch(signature.max_batch + 1).inputs,
        f"dtype {np.dtype(other)}": {**good, first.name: good[first.name].astype(other)},
        "shape": {**good, first.name: np.repeat(good[first.name], 2, axis=1)},
        "missing input": {name: array for name, array in good.items() if name != first.name},
    }
    for what, inputs in bad.items():
        try:
            infer(inputs)
        except InputError:
            continue
        raise IntegrityError(f"an input of wrong {what} was answered instead of refused: do not serve it")
    return tuple(bad)
