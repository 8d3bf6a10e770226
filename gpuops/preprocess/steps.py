"""Declared preprocessing: what happens to each stored variable, as data that can be read, compared and kept.

A `Preprocess` maps stored variables to named tensors. All steps of a tensor fold, in float64, into one table of
coefficients a channel, so that a tensor costs one launch of `torch.ops.gpuops.transform`:

    y = fill                              where the stored value is missing
    y = clip(a * stored + b, low, high)   elsewhere

Missing values are replaced before clipping; without a `Fill` they become NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gpuops.errors import InputError

Values = tuple[float, ...]
"""One value for all channels of a variable, or one a channel."""


@dataclass(frozen=True, slots=True)
class Unpack:
    """Stored to physical: stored * scale + offset (the CF conventions' packing)."""

    step: ClassVar[str] = "unpack"
    scale: float = 1.0
    """Physical units per stored step."""
    offset: float = 0.0
    """Physical value of stored 0."""
    missing: int | float | None = None
    """Stored value that means "no data"; in a float array NaN does as well."""


@dataclass(frozen=True, slots=True)
class Fill:
    """Missing values become `value`, in the units at this point."""

    step: ClassVar[str] = "fill"
    value: float


@dataclass(frozen=True, slots=True)
class Clip:
    """Values outside [low, high] become the nearer bound; None leaves that side open."""

    step: ClassVar[str] = "clip"
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.low is not None and self.high is not None and not self.low <= self.high:
            raise InputError(f"clip to [{self.low}, {self.high}] leaves nothing: give the smaller bound first")


@dataclass(frozen=True, slots=True)
class Normalize:
    """(value - mean) / std, with one mean and std, or one a channel."""

    step: ClassVar[str] = "normalize"
    mean: Values
    std: Values

    def __post_init__(self) -> None:
        if not all(math.isfinite(s) and s > 0 for s in self.std) or not all(map(math.isfinite, self.mean)):
            raise InputError(
                f"normalize needs finite means and positive standard deviations, got {self.mean} and {self.std}: "
                "a constant or empty variable cannot be normalised (normalize: false keeps it as it is)"
            )


Step = Unpack | Fill | Clip | Normalize
_STEPS: dict[str, type[Step]] = {kind.step: kind for kind in (Unpack, Fill, Clip, Normalize)}


@dataclass(frozen=True, slots=True)
class Coefficients:
    """The folded steps of one tensor, as `torch.ops.gpuops.transform` takes them."""

    table: npt.NDArray[np.float32]
    """float32 [6, channels]; rows a, b, low, high, fill, absent (a float32 stored value that is missing, or NaN)."""
    missing: npt.NDArray[np.int32]
    """int32 [2, channels]; rows value, flag (0: the channel has no missing value)."""


@dataclass(frozen=True, slots=True)
class Part:
    """The channels that one stored variable contributes to a tensor."""

    name: str
    """Name of the raw input, on the wire and in the reader's slot."""
    channels: int
    """Number of channels."""
    dtype: str
    """Stored dtype, by its NumPy name."""
    steps: tuple[Step, ...] = ()
    """Steps in order; none passes the stored values through, for indices that a model embeds."""

    def __post_init__(self) -> None:
        if any(isinstance(step, Unpack) for step in self.steps[1:]):
            raise InputError(f"variable {self.name!r}: unpack takes stored values, so it can only be the first step")
        for step in self.steps:
            if isinstance(step, Normalize) and {len(step.mean), len(step.std)} - {1, self.channels}:
                raise InputError(
                    f"variable {self.name!r} has {self.channels} channels, its normalize step {len(step.mean)} means "
                    f"and {len(step.std)} standard deviations: give one, or one a channel"
                )

    def fold(self) -> Coefficients:
        """Coefficients of these channels; folded in float64, rounded once to float32."""
        ones = np.ones(self.channels)
        a, b, low, high, fill = ones, 0 * ones, -np.inf * ones, np.inf * ones, np.nan * ones
        is_float = self.dtype == "float32"
        value, flag, absent = 0, is_float, np.nan * ones
        for step in self.steps:
            match step:
                case Unpack():
                    a, b = a * step.scale, b * step.scale + step.offset
                    if step.missing is not None and is_float:
                        absent = step.missing * ones
                    elif step.missing is not None:
                        value, flag = int(step.missing), True
                case Fill():
                    fill = np.where(np.isnan(fill), step.value, fill)  # an earlier Fill left nothing missing
                case Clip():
                    bounds = (-np.inf if step.low is None else step.low, np.inf if step.high is None else step.high)
                    low, high, fill = (np.clip(v, *bounds) for v in (low, high, fill))
                case Normalize():
                    mean, std = (np.broadcast_to(v, self.channels) for v in (step.mean, step.std))
                    a = a / std
                    b, low, high, fill = ((v - mean) / std for v in (b, low, high, fill))
        table = np.stack([a, b, low, high, fill, absent]).astype(np.float32)
        missing = np.tile(np.array([[value], [flag]], np.int32), (1, self.channels))
        return Coefficients(table, missing)

    def inverse(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(scale, offset), float64 [channels]: physical = normalised * scale + offset."""
        scale, offset = np.ones(self.channels), np.zeros(self.channels)
        for step in reversed(self.steps):
            if isinstance(step, Normalize):
                scale, offset = scale * step.std, offset * step.std + np.asarray(step.mean)
        return np.broadcast_to(scale, self.channels), np.broadcast_to(offset, self.channels)


@dataclass(frozen=True, slots=True)
class Preprocess:
    """Named tensors and the stored variables each is made of, in channel order."""

    tensors: Mapping[str, tuple[Part, ...]]

    def __post_init__(self) -> None:
        names = [part.name for parts in self.tensors.values() for part in parts]
        if len(set(names)) != len(names):
            raise InputError(f"raw inputs must have different names, got {names}: give one of them a `name`")
        for tensor, parts in self.tensors.items():
            if len({part.dtype for part in parts}) != 1:
                stored = {part.name: part.dtype for part in parts}
                raise InputError(
                    f"tensor {tensor!r} mixes stored dtypes {stored}: declare two tensors, and take both in forward"
                )
            if any(part.steps for part in parts) and not all(part.steps for part in parts):
                raise InputError(f"tensor {tensor!r} mixes raw and preprocessed variables: declare two tensors")

    def fold(self, tensor: str) -> Coefficients | None:
        """Coefficients of one tensor; None if its stored values pass through unchanged."""
        parts = self.tensors[tensor]
        if not parts[0].steps:
            return None
        folded = [part.fold() for part in parts]
        return Coefficients(
            np.concatenate([f.table for f in folded], axis=1), np.concatenate([f.missing for f in folded], axis=1)
        )

    def inverse(self, tensor: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(scale, offset), float64 [channels]: physical = tensor * scale + offset."""
        sides = [part.inverse() for part in self.tensors[tensor]]
        return np.concatenate([s for s, _ in sides]), np.concatenate([o for _, o in sides])

    def explain(self, sample_shape: Mapping[str, Sequence[int]], out_bytes: int = 4) -> str:
        """What one sample costs: launches and bytes moved, by tensor.

        Args:
            sample_shape: shape of one sample of each tensor, channels first.
            out_bytes: bytes of an output element (4 float32, 2 bf16).
        """
        lines = []
        for tensor, parts in self.tensors.items():
            elements, stored = math.prod(sample_shape[tensor]), np.dtype(parts[0].dtype).itemsize
            cost = (
                f"{elements * stored:,} B read, {elements * out_bytes:,} B written" if parts[0].steps else "as stored"
            )
            lines.append(f"{tensor}: {1 if parts[0].steps else 0} launch, {cost}")
            lines += [
                f"  {p.name} [{p.channels}] {p.dtype}: {' -> '.join(map(_brief, p.steps)) or 'raw'}" for p in parts
            ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """JSON form; `from_json` is its inverse."""
        return {
            tensor: [
                {
                    "name": part.name,
                    "channels": part.channels,
                    "dtype": part.dtype,
                    "steps": [{"step": step.step, **_listed(asdict(step))} for step in part.steps],
                }
                for part in parts
            ]
            for tensor, parts in self.tensors.items()
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Preprocess:
        """Inverse of `to_json`; InputError names a step that this gpuops does not know."""
        return cls(
            {
                tensor: tuple(
                    Part(p["name"], p["channels"], p["dtype"], tuple(_step_from_json(s) for s in p["steps"]))
                    for p in parts
                )
                for tensor, parts in document.items()
            }
        )


def _step_from_json(document: Mapping[str, Any]) -> Step:
    kind = _STEPS.get(document["step"])
    if kind is None:
        raise InputError(f"unknown step {document['step']!r}; this gpuops knows {', '.join(_STEPS)}")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in document.items() if k != "step"}
    unknown = given.keys() - {f.name for f in fields(kind)}
    if unknown:
        raise InputError(f"step {document['step']!r} has {', '.join(sorted(unknown))}, which this gpuops does not know")
    values: dict[str, Any] = given
    return kind(**values)


def _listed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _brief(step: Step) -> str:
    values = (f"{value:.6g}" if isinstance(value, float) else str(value) for value in asdict(step).values())
    return f"{step.step}({', '.join(values)})"
