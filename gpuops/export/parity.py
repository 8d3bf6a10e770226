"""Whether an exported model answers as the training pipeline does; knows no server and no format, only `infer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.bundle import RTOL, Golden
from gpuops.errors import InputError, IntegrityError
from gpuops.export.patterns import SAMPLES, answered, by_name, declared, with_missing
from gpuops.spec import Arrays, Signature

NOT_COMPARED = "not compared"
"""Parity.missing where samples with missing values were answered, and nothing says what is right."""
NOISY = 0.1
"""Root mean square difference, as a share of what differs between samples, above which the parity carries a warning."""
_ALIKE = {
    "uint8": ("int8", "float32"),
    "int8": ("uint8", "float32"),
    "int16": ("uint16", "float32"),
    "uint16": ("int16", "float32"),
    "int32": ("float32", "int64"),
    "float32": ("int32", "float64"),
}
"""Dtypes that a model could take for its own: of the same width, and what a careless caller sends."""


@dataclass(frozen=True, slots=True)
class Parity:
    """What a sweep over every served batch size found."""

    tolerance: float
    """Absolute part of what an answer may differ by, in physical units."""
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
    """Signal to (quantisation) noise by output, in dB, over all batches: variance of the golden answers over the mean
    squared difference from them; None where one of them is 0."""
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
    missing_tolerance: float | None = None,
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
        missing_tolerance: `tolerance` for those; the same if None.
        splits: `infer` sends more than the largest batch in parts, as a client does, so it must answer that too.

    Raises:
        IntegrityError: an answer differs, or a bad input was answered.
    """
    spread = {name: _spread(answer) for name, answer in golden.outputs.items()}
    several = len(next(iter(golden.inputs.values()))) > 1
    same = [name for name, spread_of in spread.items() if several and spread_of.between == 0.0]
    warnings = [f"{name}: all golden answers are the same, so equal answers prove little" for name in same]
    worst, where, found = 0.0, 1, dict.fromkeys(golden.outputs, _Difference())
    for size in range(1, signature.max_batch + 1):
        differences = _differences(golden.batch(size), infer, tolerance)
        largest = max(difference.largest for difference in differences.values())
        if any(difference.excess > 0 for difference in differences.values()):
            raise IntegrityError(
                f"answers differ from the training pipeline's by {largest:.3g} at batch {size}, allowed is "
                f"{tolerance:g}: do not serve it (or export with a larger --tolerance, if that is rounding)"
            )
        if largest > worst:
            worst, where = largest, size
        found = {name: found[name].joined(difference) for name, difference in differences.items()}
        if progress is not None:
            progress(size, signature.max_batch)
    for name, spread_of in spread.items():
        if several and found[name].noise > (NOISY * spread_of.between) ** 2 > 0:
            warnings.append(f"{name}: answers differ by more than {NOISY:.0%} of what differs between samples")
    missing = _missing(
        infer, golden, signature, tolerance if missing_tolerance is None else missing_tolerance, patterns, warnings
    )
    return Parity(
        tolerance=tolerance,
        max_abs_diff=worst,
        worst_batch=where,
        batches=signature.max_batch,
        refused=_refused(infer, golden, signature, splits),
        answered=_answered(infer, golden, signature, tolerance, splits),
        sqnr_db={name: _decibels(spread_of.variance, found[name].noise) for name, spread_of in spread.items()},
        diversity={name: spread_of.between for name, spread_of in spread.items()},
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
    squares: float = 0.0
    """Sum of squared differences where the right answer is finite."""
    count: int = 0
    """Answers there."""

    @property
    def noise(self) -> float:
        """Mean squared difference."""
        return self.squares / self.count if self.count else 0.0

    def joined(self, other: _Difference) -> _Difference:
        """Both as one."""
        return _Difference(
            max(self.largest, other.largest),
            max(self.excess, other.excess),
            self.squares + other.squares,
            self.count + other.count,
        )


@dataclass(frozen=True, slots=True)
class _Spread:
    """How much the golden answers of one output vary; missing ones left out."""

    variance: float
    """Variance over samples and positions."""
    between: float
    """Standard deviation between samples, averaged over positions."""


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
        float((difference[finite] ** 2).sum()),
        int(finite.sum()),
    )


def _differences(want: Golden, infer: Callable[[Arrays], Arrays], tolerance: float) -> dict[str, _Difference]:
    answers = infer(want.inputs)
    return {name: _difference(right, answers.get(name), tolerance) for name, right in want.outputs.items()}


def _spread(answers: npt.NDArray[Any]) -> _Spread:
    finite = np.ma.masked_invalid(answers.astype(np.float64))
    if not finite.count():
        return _Spread(0.0, 0.0)
    return _Spread(float(finite.var()), float(finite.std(axis=0).mean()))


def _decibels(signal: float, noise: float) -> float | None:
    return float(10 * np.log10(signal / noise)) if signal > 0 and noise > 0 else None


def _refused(infer: Callable[[Arrays], Arrays], golden: Golden, signature: Signature, splits: bool) -> tuple[str, ...]:
    """Kinds of inputs that are wrong in one way each; IntegrityError at the first that is answered."""
    good = golden.batch(min(2, signature.max_batch)).inputs
    longer = golden.batch(len(next(iter(good.values()))) + 1).inputs
    bad: list[tuple[str, str, Arrays]] = [("batch 0", "0 samples", {name: array[:0] for name, array in good.items()})]
    for spec in signature.inputs:
        name, array = spec.name, good[spec.name]
        with np.errstate(invalid="ignore"):  # NaN as an integer
            alike = {dtype: array.astype(dtype) for dtype in _ALIKE[spec.dtype]}
        bad += [("dtype", f"{name} as {dtype}", {**good, name: other}) for dtype, other in alike.items()]
        wide = np.concatenate([array, array], axis=1) if spec.shape else array[:, None]
        bad.append(("shape", f"{name} as {list(wide.shape)}", {**good, name: wide}))
        last = np.ascontiguousarray(np.moveaxis(array, 1, -1)) if spec.shape else array
        if last.shape != array.shape:
            bad.append(("layout (channels last)", f"{name} as {list(last.shape)}", {**good, name: last}))
        bad.append(("missing input", f"no {name}", {key: value for key, value in good.items() if key != name}))
        if len(good) > 1:
            bad.append(("batch sizes that differ", f"one more of {name}", {**good, name: longer[name]}))
    bad.append(("extra input", "not_an_input", {**good, "not_an_input": next(iter(good.values()))}))
    if not splits:
        most = signature.max_batch + 1
        bad.append((f"batch {most}", f"{most} samples", golden.batch(most).inputs))
    for kind, what, inputs in bad:
        try:
            infer(inputs)
        except InputError:
            continue
        raise IntegrityError(f"an input of wrong {kind} ({what}) was answered instead of refused: do not serve it")
    return tuple(dict.fromkeys(kind for kind, _, _ in bad))


def _answered(
    infer: Callable[[Arrays], Arrays], golden: Golden, signature: Signature, tolerance: float, splits: bool
) -> tuple[str, ...]:
    """Unusual inputs that are right; IntegrityError at the first that is answered wrongly."""
    good = golden.batch(signature.max_batch)
    strided = {name: np.repeat(array, 2, axis=-1)[..., ::2] for name, array in good.inputs.items()}
    unusual = {
        "strided views": Golden(strided, good.outputs),
        "column-major arrays": Golden({k: np.asfortranarray(v) for k, v in good.inputs.items()}, good.outputs),
        "read-only arrays": Golden({k: _frozen(v) for k, v in good.inputs.items()}, good.outputs),
    }
    if splits:
        unusual[f"batch {signature.max_batch + 1} in parts"] = golden.batch(signature.max_batch + 1)
    for what, batch in unusual.items():
        checked(what, batch, infer, tolerance)
    return tuple(unusual)


def _frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array = array.copy()
    array.flags.writeable = False
    return array


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
