"""Whether an exported model answers as the training pipeline does; knows no server and no format, only `infer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.bundle import Golden
from gpuops.errors import InputError, IntegrityError
from gpuops.export.patterns import SAMPLES, answered, by_name, declared, with_missing
from gpuops.spec import Arrays, Signature

RTOL = {"float32": 1e-5}
"""What an answer may differ by, as a share of its size and on top of the bundle's tolerance, by the output's dtype:
about 84 roundings of float32, which is what sums of some thousand terms in another order come to. 0 for others."""
NOT_COMPARED = "not compared"
"""Parity.missing where samples with missing values were answered, and nothing says what is right."""


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
    answered: tuple[str, ...]
    """Unusual inputs that were answered right, as they must be."""
    sqnr_db: Mapping[str, float | None]
    """Signal to (quantisation) noise by output, in dB, over all batches; None where nothing differs or all is 0."""
    diversity: Mapping[str, float]
    """Standard deviation of the golden answers between samples, by output, averaged over positions, physical units."""
    missing: Mapping[str, float | None] | str | None
    """Largest absolute difference by pattern of missing values, None where NaN stands on one side only;
    `NOT_COMPARED`; None if no input can lack a value."""
    warnings: tuple[str, ...]
    """What makes this parity prove less than it seems to."""

    def to_json(self) -> dict[str, Any]:
        """JSON form, without NaN or infinity."""
        document: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in document.items()}


def sweep(
    infer: Callable[[Arrays], Arrays],
    golden: Golden,
    signature: Signature,
    tolerance: float,
    progress: Callable[[int, int], None] | None = None,
    *,
    patterns: Golden | None = None,
    splits: bool = False,
) -> Parity:
    """Compare `infer` with the golden answers at every served batch size, and give it inputs that it must refuse.

    An answer passes if it differs by no more than `tolerance` + `RTOL` x |golden answer|, and is NaN where, and only
    where, the golden answer is.

    Args:
        infer: stored samples by name to physical answers by name; raises InputError for bad inputs.
        golden: raw samples and the training pipeline's answers.
        signature: what crosses the wire.
        tolerance: absolute part of the difference allowed, physical units.
        progress: called with (batch sizes done, batch sizes in all).
        patterns: samples with missing values (gpuops.export.patterns) and the answers they must get; None if unknown.
        splits: `infer` sends more than the largest batch in parts, as a client does, so it must answer that too.

    Raises:
        IntegrityError: an answer differs, or a bad input was answered.
    """
    diversity = {name: _diversity(answer) for name, answer in golden.outputs.items()}
    several = len(next(iter(golden.inputs.values()))) > 1
    same = [name for name, spread in diversity.items() if several and spread == 0.0]
    warnings = [f"{name}: all golden answers are the same, so equal answers prove little" for name in same]
    worst, where, found = 0.0, 1, dict.fromkeys(golden.outputs, _Difference())
    for size in range(1, signature.max_batch + 1):
        differences = _differences(golden.batch(size), infer, tolerance)
        largest = max(difference.largest for difference in differences.values())
        if largest > worst:
            worst, where = largest, size
        found = {name: found[name].joined(difference) for name, difference in differences.items()}
        if progress is not None:
            progress(size, signature.max_batch)
    if any(difference.excess > 0 for difference in found.values()):
        raise IntegrityError(
            f"answers differ from the training pipeline's by {worst:.3g} at batch {where}, allowed is {tolerance:g}: "
            "do not serve it (or export with a larger --tolerance, if that is rounding)"
        )
    missing = _missing(infer, golden, signature, tolerance, patterns, warnings)
    return Parity(
        max_abs_diff=worst,
        worst_batch=where,
        batches=signature.max_batch,
        refused=_refused(infer, golden, signature, splits),
        answered=_answered(infer, golden, signature, tolerance, splits),
        sqnr_db={name: difference.sqnr_db for name, difference in found.items()},
        diversity=diversity,
        missing=missing,
        warnings=tuple(warnings),
    )


def checked(what: str, want: Golden, infer: Callable[[Arrays], Arrays], tolerance: float) -> float:
    """Largest absolute difference from the answers in `want`, physical units; more than `sweep` allows is an error.

    Raises:
        IntegrityError: an answer differs by more; the message begins with `what`.
    """
    differences = _differences(want, infer, tolerance).values()
    largest = max(difference.largest for difference in differences)
    if any(difference.excess > 0 for difference in differences):
        raise IntegrityError(f"{what}: answers differ from the training pipeline's by {largest:.3g}: do not serve it")
    return largest


@dataclass(frozen=True, slots=True)
class _Difference:
    """How some answers of one output differ from what they should be."""

    largest: float = 0.0
    """Largest absolute difference, physical units; infinite if NaN stands on one side only, or the output lacks."""
    excess: float = 0.0
    """By how much the worst answer goes beyond what it may differ by; 0 if all are right."""
    signal: float = 0.0
    """Sum of squares of what the finite answers should be."""
    noise: float = 0.0
    """Sum of squared differences there."""

    @property
    def sqnr_db(self) -> float | None:
        """10 log10(signal / noise); None if either is 0."""
        return float(10 * np.log10(self.signal / self.noise)) if self.signal > 0 and self.noise > 0 else None

    def joined(self, other: _Difference) -> _Difference:
        """Both as one."""
        return _Difference(
            max(self.largest, other.largest),
            max(self.excess, other.excess),
            self.signal + other.signal,
            self.noise + other.noise,
        )


def _difference(want: npt.NDArray[Any], got: npt.NDArray[Any] | None, tolerance: float) -> _Difference:
    if got is None or got.shape != want.shape or got.dtype != want.dtype:
        return _Difference(np.inf, np.inf)
    finite = np.isfinite(want)
    size = np.where(finite, np.abs(want.astype(np.float64)), 0.0)
    with np.errstate(invalid="ignore"):  # infinite on both sides
        difference = np.abs(got.astype(np.float64) - want)
    difference[(got == want) | (np.isnan(got) & np.isnan(want))] = 0.0
    difference[np.isnan(difference)] = np.inf
    excess = difference - (tolerance + RTOL.get(want.dtype.name, 0.0) * size)
    return _Difference(
        float(difference.max(initial=0.0)),
        float(excess.max(initial=0.0)),
        float((size**2).sum()),
        float((difference[finite] ** 2).sum()),
    )


def _differences(want: Golden, infer: Callable[[Arrays], Arrays], tolerance: float) -> dict[str, _Difference]:
    answers = infer(want.inputs)
    return {name: _difference(right, answers.get(name), tolerance) for name, right in want.outputs.items()}


def _diversity(answers: npt.NDArray[Any]) -> float:
    """Standard deviation between samples, averaged over the positions of a sample; missing answers left out."""
    spread = np.ma.masked_invalid(answers.astype(np.float64)).std(axis=0).mean()
    return 0.0 if spread is np.ma.masked else float(spread)


def _refused(infer: Callable[[Arrays], Arrays], golden: Golden, signature: Signature, splits: bool) -> tuple[str, ...]:
    """Inputs that are wrong in one way each; IntegrityError at the first that is answered."""
    first = signature.inputs[0]
    good = golden.batch(min(2, signature.max_batch)).inputs
    array = good[first.name]
    other = np.float32 if first.dtype != "float32" else np.float64
    bad = {
        "batch 0": {name: array[:0] for name, array in good.items()},
        f"dtype {np.dtype(other)}": {**good, first.name: array.astype(other)},
        "shape": {**good, first.name: np.concatenate([array, array], axis=1) if first.shape else array[:, None]},
        "missing input": {name: array for name, array in good.items() if name != first.name},
        "extra input": {**good, "not_an_input": array},
    }
    if not splits:
        bad[f"batch {signature.max_batch + 1}"] = golden.batch(signature.max_batch + 1).inputs
    for spec in signature.inputs:
        last = np.ascontiguousarray(np.moveaxis(good[spec.name], 1, -1)) if spec.shape else good[spec.name]
        if last.shape != good[spec.name].shape:
            bad["layout (channels last)"] = {**good, spec.name: last}
    for what, inputs in bad.items():
        try:
            infer(inputs)
        except InputError:
            continue
        raise IntegrityError(f"an input of wrong {what} was answered instead of refused: do not serve it")
    return tuple(bad)


def _answered(
    infer: Callable[[Arrays], Arrays], golden: Golden, signature: Signature, tolerance: float, splits: bool
) -> tuple[str, ...]:
    """Unusual inputs that are right; IntegrityError at the first that is answered wrongly."""
    good = golden.batch(signature.max_batch)
    strided = {name: np.repeat(array, 2, axis=-1)[..., ::2] for name, array in good.inputs.items()}
    unusual = {
        "strided views": Golden(strided, good.outputs),
        "column-major arrays": Golden({k: np.asfortranarray(v) for k, v in good.inputs.items()}, good.outputs),
    }
    if splits:
        unusual[f"batch {signature.max_batch + 1} in parts"] = golden.batch(signature.max_batch + 1)
    for what, batch in unusual.items():
        checked(what, batch, infer, tolerance)
    return tuple(unusual)


def _missing(
    infer: Callable[[Arrays], Arrays],
    golden: Golden,
    signature: Signature,
    tolerance: float,
    patterns: Golden | None,
    warnings: list[str],
) -> dict[str, float | None] | str | None:
    """Largest difference by pattern of missing values; IntegrityError if a declared one is answered wrongly."""
    size = min(SAMPLES, signature.max_batch)
    if patterns is None:
        inputs = with_missing(golden, signature)
        if inputs is None:
            return None
        answered(inputs, infer, size)  # whatever it answers, it does not fail
        return NOT_COMPARED
    found = {}
    for name, pattern in by_name(patterns):
        differences = _differences(pattern.batch(size), infer, tolerance).values()
        found[name] = max(difference.largest for difference in differences)
        if any(difference.excess > 0 for difference in differences):
            what = f"{name}: answers differ from the training graph's by {found[name]:.3g}"
            if declared(signature):
                raise IntegrityError(f"{what}: fill missing values in `preprocess`, or do not serve it")
            warnings.append(f"{what}: fill NaN in `preprocess` if it can occur")
    return {name: value if np.isfinite(value) else None for name, value in found.items()}
