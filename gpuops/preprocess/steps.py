"""Declared preprocessing: what happens to each stored variable, as data that can be read, compared and kept.

A `Preprocess` maps stored variables to named tensors. All steps of a tensor fold, in float64, into one table of
coefficients a channel (see `gpuops.preprocess.fold`), so that a tensor costs one launch, whatever is declared. Missing
values are replaced before clipping; without a `Fill` they become NaN. Crops, mirrors and turns are declared once for
all tensors (see `gpuops.preprocess.geometry`) and are part of that launch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import numpy as np

from gpuops.errors import InputError
from gpuops.preprocess import geometry
from gpuops.preprocess.geometry import GeometryStep

_Known = TypeVar("_Known")

COPY_BYTES_S = 3.0e12
"""Bytes a second, read and written, of a device copy on an H100: what `explain` counts a floor with."""

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

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale and math.isfinite(self.offset)):
            raise InputError(f"unpack by scale {self.scale} and offset {self.offset}: both finite, scale not 0")


@dataclass(frozen=True, slots=True)
class Fill:
    """Missing values become `value`, in the units at this point."""

    step: ClassVar[str] = "fill"
    value: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise InputError(f"fill with {self.value}: give a finite value, or leave the step out to keep NaN")


@dataclass(frozen=True, slots=True)
class Clip:
    """Values outside [low, high] become the nearer bound; None leaves that side open."""

    step: ClassVar[str] = "clip"
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if not (-math.inf if self.low is None else self.low) <= (math.inf if self.high is None else self.high):
            raise InputError(f"clip to [{self.low}, {self.high}] leaves nothing: give the smaller bound first")


@dataclass(frozen=True, slots=True)
class Log:
    """Natural logarithm of value / scale + offset; ln(1 + value / scale) by default, for what is 0 or more.

    What is not positive there becomes NaN (-inf at 0): clip before, or choose the offset.
    """

    step: ClassVar[str] = "log"
    scale: float = 1.0
    """Values around it are where the curve bends."""
    offset: float = 1.0
    """Added after the division."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0 and math.isfinite(self.offset)):
            raise InputError(f"log by scale {self.scale} and offset {self.offset}: both finite, scale positive")


@dataclass(frozen=True, slots=True)
class Asinh:
    """asinh(value / scale): linear for small values, logarithmic for large ones of either sign."""

    step: ClassVar[str] = "asinh"
    scale: float = 1.0
    """Values around it are where the curve bends."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise InputError(f"asinh by scale {self.scale}: give a positive number")


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


Step = Unpack | Fill | Clip | Log | Asinh | Normalize
_STEPS: dict[str, type[Step]] = {kind.step: kind for kind in (Unpack, Fill, Clip, Log, Asinh, Normalize)}


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
            missing = step.missing if isinstance(step, Unpack) else None
            if missing is not None and self.dtype != "float32" and not float(missing).is_integer():
                raise InputError(f"variable {self.name!r} is {self.dtype} and cannot hold {missing} as missing")
            if isinstance(step, Normalize) and {len(step.mean), len(step.std)} - {1, self.channels}:
                raise InputError(
                    f"variable {self.name!r} has {self.channels} channels, its normalize step {len(step.mean)} means "
                    f"and {len(step.std)} standard deviations: give one, or one a channel"
                )


@dataclass(frozen=True, slots=True)
class Preprocess:
    """Named tensors and the stored variables each is made of, in channel order."""

    tensors: Mapping[str, tuple[Part, ...]]
    """Parts by tensor name."""
    geometry: tuple[GeometryStep, ...] = ()
    """What is cut out of every tensor that has two spatial axes or more, and how it is mirrored and turned."""

    def __post_init__(self) -> None:
        geometry.check_order(self.geometry)
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

    @property
    def random(self) -> bool:
        """Whether a sample's values depend on where its id and the epoch put them."""
        return self.eval() != self

    def eval(self) -> Preprocess:
        """What evaluation and serving do: every random step replaced by its twin."""
        return replace(self, geometry=geometry.twins(self.geometry))

    def shape(self, stored: Sequence[int]) -> tuple[int, ...]:
        """Shape of one prepared sample [channels, *spatial] of a stored one; crops need two spatial axes."""
        if len(stored) < 3:
            return tuple(stored)
        return (stored[0], *geometry.out_shape(self.geometry, stored[1:]))

    def explain(self, sample_shape: Mapping[str, Sequence[int]], out_bytes: int = 4) -> str:
        """What one sample costs: launches, and the bytes that no kernel could save, by tensor.

        Args:
            sample_shape: shape of one stored sample of each tensor, channels first.
            out_bytes: bytes of an output element (4 float32, 2 bf16).
        """
        if absent := self.tensors.keys() - sample_shape.keys():
            raise InputError(f"no shape of {', '.join(sorted(absent))}: give one for each tensor, channels first")
        lines = []
        for tensor, parts in self.tensors.items():
            shape = tuple(sample_shape[tensor])
            resize = self.geometry[-1] if self.geometry and len(shape) > 2 else None
            moved = len(shape) > 2 and len(self.geometry) > isinstance(resize, geometry.Resize)
            out = self.shape(shape)
            shape = (shape[0], *geometry.window_shape(self.geometry, shape[1:])) if moved else shape
            elements, stored = math.prod(shape), np.dtype(parts[0].dtype).itemsize
            if parts[0].steps:
                read, written = elements * stored, elements * (4 if out != shape else out_bytes)
                launch = "1 launch (window)" if moved else "1 launch (transform)"
                floor = (read + written) / COPY_BYTES_S * 1e6
                lines.append(f"{tensor}: {launch}, {read:,} B read, {written:,} B written, floor {floor:.2f} us")
                if out != shape:
                    last = math.prod(out) * out_bytes
                    lines.append(f"  then resize by torch, not fused: {written:,} B read, {last:,} B written")
            elif moved:
                lines.append(f"{tensor}: 1 gather by torch (raw values keep their dtype), {2 * elements * stored:,} B")
            else:
                lines.append(f"{tensor}: 0 launch, as stored")
            lines += [
                f"  {p.name} [{p.channels}] {p.dtype}: {' -> '.join(map(_brief, p.steps)) or 'raw'}" for p in parts
            ]
        for step in self.geometry:
            if isinstance(step, geometry.Resize):
                lines.append(f"geometry, as a second op: {_brief(step)}")
                continue
            twin = geometry.twins((step,))
            instead = "" if twin == (step,) else f" (evaluation: {_brief(twin[0]) if twin else 'nothing'})"
            lines.append(f"geometry, in the same launches: {_brief(step)}{instead}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """JSON form; `from_json` is its inverse."""
        tensors = {
            tensor: [
                {
                    "name": part.name,
                    "channels": part.channels,
                    "dtype": part.dtype,
                    "steps": [_step_to_json(step) for step in part.steps],
                }
                for part in parts
            ]
            for tensor, parts in self.tensors.items()
        }
        if not self.geometry:
            return tensors
        return {"tensors": tensors, "geometry": [_step_to_json(step) for step in self.geometry]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Preprocess:
        """Inverse of `to_json`; InputError names a step that this gpuops does not know."""
        moved = isinstance(document.get("tensors"), Mapping)
        tensors = document["tensors"] if moved else document
        return cls(
            {
                tensor: tuple(
                    Part(p["name"], p["channels"], p["dtype"], tuple(_step_from_json(s, _STEPS) for s in p["steps"]))
                    for p in parts
                )
                for tensor, parts in tensors.items()
            },
            tuple(_step_from_json(s, geometry.STEPS) for s in document["geometry"]) if moved else (),
        )


def _step_to_json(step: Any) -> dict[str, Any]:
    return {"step": step.step, **_listed(asdict(step))}


def _step_from_json(document: Mapping[str, Any], known: Mapping[str, type[_Known]]) -> _Known:
    kind = known.get(document.get("step", "none"))
    if kind is None:
        raise InputError(f"unknown step {document.get('step')!r}; this gpuops knows {', '.join(known)}")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in document.items() if k != "step"}
    unknown = given.keys() - {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown:
        raise InputError(f"step {document['step']!r} has {', '.join(sorted(unknown))}, which this gpuops does not know")
    values: dict[str, Any] = given
    try:
        return kind(**values)
    except TypeError as error:
        raise InputError(f"step {document['step']!r} cannot be read from {dict(document)}: {error}") from error


def _listed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _brief(step: Any) -> str:
    values = (f"{value:.6g}" if isinstance(value, float) else str(value) for value in asdict(step).values())
    return f"{step.step}({', '.join(values)})"
