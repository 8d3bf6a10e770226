"""Samples with missing values in them: what a held-out sample may lack, and a served model must answer for.

A bundle keeps them with the eager graph's answers (patterns.npz), beside the golden samples, which seldom lack much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from gpuops.bundle import Golden
from gpuops.spec import Arrays, Signature, TensorSpec

NAMES = ("all missing", "checkerboard missing", "first sample missing")
"""Patterns, in the order in which their samples follow each other."""
SAMPLES = 2
"""Samples a pattern."""


def with_missing(golden: Golden, signature: Signature) -> dict[str, npt.NDArray[np.generic]] | None:
    """Golden samples with stored values replaced by "no data", as `NAMES` say; None if no input has such a value.

    Where a float32 input has a stored value for it, that and NaN stand in turn: both mean "no data".

    Returns:
        Stored samples by input name, each [len(NAMES) * SAMPLES, *shape], or None.
    """
    marks = {spec.name: found for spec in signature.inputs if (found := _marks(spec))}
    if not marks:
        return None
    good = golden.batch(SAMPLES).inputs
    made = {}
    for name, array in good.items():
        odd = np.indices(array.shape[1:]).sum(axis=0) % 2 == 1
        lost = (np.full(array.shape, True), np.broadcast_to(odd, array.shape), _first(array))
        in_turn = np.resize(np.array(marks[name], array.dtype), array.shape) if name in marks else array
        made[name] = np.concatenate([np.where(where, in_turn, array) for where in lost])
    return made


def answered(inputs: Arrays, infer: Callable[[Arrays], Arrays], size: int) -> Golden:
    """`inputs` with the answers of `infer`, asked in batches of at most `size`."""
    count = len(next(iter(inputs.values())))
    parts = [infer({k: v[at : at + size] for k, v in inputs.items()}) for at in range(0, count, size)]
    return Golden(dict(inputs), {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def by_name(patterns: Golden) -> Iterator[tuple[str, Golden]]:
    """Each pattern's name, with its samples and their answers."""
    for place, name in enumerate(NAMES):
        yield name, patterns.take(place * SAMPLES + np.arange(SAMPLES))


def declared(signature: Signature) -> bool:
    """Whether an input says which stored value is missing; a float32 that does not has NaN, which may never occur."""
    return any(spec.missing is not None for spec in signature.inputs)


def _marks(spec: TensorSpec) -> list[float]:
    """Stored values that mean "no data", of those that the dtype can hold."""
    if spec.dtype == "float32":
        return [float("nan")] if spec.missing is None else [float(spec.missing), float("nan")]
    if spec.missing is None:
        return []
    limits = np.iinfo(spec.dtype)
    return [spec.missing] if limits.min <= spec.missing <= limits.max and spec.missing == int(spec.missing) else []


def _first(array: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
    where = np.full(array.shape, False)
    where[0] = True
    return where
