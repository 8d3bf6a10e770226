"""Declared steps as the numbers that kernels take, and the way back to physical values.

    v = clip(a * stored + b, low, high)
    v = clip(a * f(v) + b, low, high)           for each function f, in order
    y = fill where the stored value is missing, else v

Everything between two functions is affine, so that it folds, in float64, into one a, b and one clip a channel; what a
missing value becomes is computed through all steps here. The numbers are rounded once, to float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gpuops.errors import InputError
from gpuops.preprocess.steps import Asinh, Clip, Fill, Log, Normalize, Part, Preprocess, Unpack

Floats = npt.NDArray[np.float64]

KINDS = {"": 0, "log": 1, "asinh": 2}
"""Numbers of functions in a row of kinds."""


@dataclass(frozen=True, slots=True)
class Coefficients:
    """The folded steps of one tensor, as `torch.ops.gpuops.transform` takes them."""

    table: npt.NDArray[np.float32]
    """float32 [5 * functions + 6, channels]; rows a, b, low, high; for each function kind, a, b, low, high; then fill
    and absent (a float32 stored value that is missing, or NaN)."""
    missing: npt.NDArray[np.int32]
    """int32 [2, channels]; rows value, flag (0: the channel has no missing value)."""
    functions: str = ""
    """Functions in order, separated by commas; "each" where channels differ."""


@dataclass(frozen=True, slots=True)
class Inverse:
    """One stage of the way back: value = undo(value * scale + offset), by channel."""

    scale: Floats
    """float64 [channels]."""
    offset: Floats
    """float64 [channels]."""
    undo: tuple[str, ...]
    """Per channel the function to undo: "log", "asinh" or "" for none."""


@dataclass(frozen=True, slots=True)
class _Stage:
    """What is done to the channels of a part after one function, or before the first."""

    function: str
    a: Floats
    b: Floats
    low: Floats
    high: Floats

    @classmethod
    def after(cls, function: str, channels: int) -> _Stage:
        """A stage that only applies its function."""
        ones = np.ones(channels)
        return cls(function, ones, 0 * ones, -np.inf * ones, np.inf * ones)

    def scaled(self, factor: float | Floats, shift: float | Floats) -> _Stage:
        """With value * factor + shift behind it."""
        bounds = np.sort(np.stack([self.low * factor + shift, self.high * factor + shift]), axis=0)
        return replace(self, a=self.a * factor, b=self.b * factor + shift, low=bounds[0], high=bounds[1])


def fold(preprocess: Preprocess, tensor: str) -> Coefficients | None:
    """Coefficients of one tensor; None if its stored values pass through unchanged.

    Raises:
        InputError: steps whose numbers do not fit float32, or a fill value that a later step has no answer for.
    """
    parts = preprocess.tensors[tensor]
    if not parts[0].steps:
        return None
    folded = [_stages(part) for part in parts]
    depth = max(len(stages) for stages, _ in folded)
    rows: list[Floats] = []
    functions = []
    for number in range(depth):
        level = [
            stages[number] if number < len(stages) else _Stage.after("", part.channels)
            for part, (stages, _) in zip(parts, folded, strict=True)
        ]
        if number:
            used = {stage.function for stage in level}
            functions.append(used.pop() if len(used) == 1 else "each")
            rows.append(np.concatenate([np.full(len(stage.a), KINDS[stage.function]) for stage in level]))
        rows += [np.concatenate([getattr(stage, name) for stage in level]) for name in ("a", "b", "low", "high")]
    markers = [_missing(part) for part in parts]
    fill = np.concatenate([fill for _, fill in folded])
    absent = np.concatenate([np.full(part.channels, gone) for part, (_, _, gone) in zip(parts, markers, strict=True)])
    with np.errstate(over="ignore"):
        table = np.stack([*rows, fill, absent]).astype(np.float32)
    if not np.isfinite(table[_affine_rows(depth)]).all():
        raise InputError(f"tensor {tensor!r}: its steps need numbers beyond float32 (a standard deviation near 0?)")
    missing = np.concatenate(
        [np.tile([[value], [flag]], (1, part.channels)) for part, (value, flag, _) in zip(parts, markers, strict=True)],
        axis=1,
    )
    return Coefficients(table, missing.astype(np.int32), ",".join(functions))


def inverse(preprocess: Preprocess, tensor: str) -> tuple[Inverse, ...]:
    """The stages that make physical values of a tensor's, in order; clips and fills have no way back."""
    sides = [list(_inverse(part)) for part in preprocess.tensors[tensor]]
    depth = max(map(len, sides))
    for side in sides:  # functions are aligned at the physical end, where all have the last stage
        channels = len(side[0].scale)
        side[:0] = [Inverse(np.ones(channels), np.zeros(channels), ("",) * channels)] * (depth - len(side))
    return tuple(
        Inverse(
            np.concatenate([stage.scale for stage in level]),
            np.concatenate([stage.offset for stage in level]),
            sum((stage.undo for stage in level), ()),
        )
        for level in zip(*sides, strict=True)
    )


def _affine_rows(depth: int) -> list[int]:
    return [row for stage in range(depth) for row in (5 * stage, 5 * stage + 1)]


def _stages(part: Part) -> tuple[list[_Stage], Floats]:
    """(stages, what a missing value becomes) of one part."""
    stages, fill = [_Stage.after("", part.channels)], np.full(part.channels, np.nan)
    filled = False
    for step in part.steps:
        match step:
            case Unpack():
                stages[-1] = stages[-1].scaled(step.scale, step.offset)
            case Fill():
                fill, filled = (fill if filled else np.full(part.channels, float(step.value))), True
            case Clip():
                bounds = (-np.inf if step.low is None else step.low, np.inf if step.high is None else step.high)
                low, high, fill = (np.clip(v, *bounds) for v in (stages[-1].low, stages[-1].high, fill))
                stages[-1] = replace(stages[-1], low=low, high=high)
            case Normalize():
                mean, std = (np.broadcast_to(v, part.channels).astype(np.float64) for v in (step.mean, step.std))
                stages[-1] = _normalized(stages[-1], mean, std)
                fill = (fill - mean) / std
            case Log() | Asinh():
                offset = step.offset if isinstance(step, Log) else 0.0
                stages[-1] = stages[-1].scaled(1 / step.scale, offset)
                stages.append(_Stage.after(step.step, part.channels))
                with np.errstate(all="ignore"):
                    moved = fill / step.scale + offset
                    fill = np.log(moved) if isinstance(step, Log) else np.arcsinh(moved)
                if filled and not np.isfinite(fill).all():
                    raise InputError(f"variable {part.name!r}: its fill value has no logarithm: fill with another")
    return stages, fill


def _normalized(stage: _Stage, mean: Floats, std: Floats) -> _Stage:
    """(value - mean) / std, subtracted before the division: a mean that cancels must cancel exactly."""
    b, low, high = ((v - mean) / std for v in (stage.b, stage.low, stage.high))
    return replace(stage, a=stage.a / std, b=b, low=low, high=high)


def _missing(part: Part) -> tuple[int, bool, float]:
    """(integer value, flag, float32 value) that mark missing data."""
    is_float = part.dtype == "float32"
    value, flag, absent = 0, is_float, float("nan")
    for step in part.steps:
        if isinstance(step, Unpack) and step.missing is not None:
            if is_float:
                absent = step.missing
            elif abs(step.missing) < 2**31:  # no stored number is beyond
                value, flag = int(step.missing), True
    return value, flag, absent


def _inverse(part: Part) -> Iterator[Inverse]:
    scale, offset = np.ones(part.channels), np.zeros(part.channels)
    for step in reversed(part.steps):
        match step:
            case Normalize():
                scale, offset = scale * step.std, offset * step.std + np.asarray(step.mean)
            case Log() | Asinh():
                yield Inverse(
                    np.broadcast_to(scale, part.channels),
                    np.broadcast_to(offset, part.channels),
                    (step.step,) * part.channels,
                )
                shift = step.offset if isinstance(step, Log) else 0.0
                scale = np.full(part.channels, step.scale)
                offset = np.full(part.channels, -shift * step.scale)
    yield Inverse(np.broadcast_to(scale, part.channels), np.broadcast_to(offset, part.channels), ("",) * part.channels)
