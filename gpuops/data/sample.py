"""What a training sample is: which variables, which steps of a window, as which tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.data.source import Source, Variable
from gpuops.errors import InputError
from gpuops.spec import TensorSpec

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Window:
    """A moving window: a sample starts at each position of one dimension."""

    dim: str
    """Dimension it moves along: the sample axis (time) or one inside a record (month)."""
    length: int
    """Steps it spans; a field's `at` counts from 0 to length - 1."""
    cyclic: bool = False
    """Whether it wraps round the end of a dimension inside a record (months of a climatology)."""


@dataclass(frozen=True, slots=True)
class Field:
    """One stored variable of a sample, and how it is prepared."""

    variable: str
    """Name in the store."""
    at: tuple[int, ...] | None = None
    """Steps of the window that are taken, in channel order; None takes the record as it is."""
    name: str | None = None
    """Name of the raw input; the variable's own if None."""
    fill: float | None = None
    """Physical value for missing data; the ingest recipe's, else the mean, if None."""
    clip: tuple[float, float] | None = None
    """Physical bounds."""
    normalize: bool = True
    """Subtract the training split's mean and divide by its standard deviation."""
    raw: bool = False
    """Pass the stored values through unchanged (indices that the model embeds)."""


Tensors = Mapping[str, list[Field]]
"""Named tensors and the fields that make them, in channel order."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How one field is cut out of a variable's records."""

    field: Field
    variable: Variable
    records: bool
    """True if the variable has the sample axis; False for a coordinate of the window alone."""
    along: str | None
    """What `at` counts: "samples" (records), "inside" (axis 1 of the array), or None."""
    size: int
    """Length of the window's dimension."""
    cyclic: bool
    """Whether positions wrap round `size`."""
    shape: tuple[int, ...]
    """[channels, *spatial] of one sample."""

    @property
    def name(self) -> str:
        """Name of the raw input."""
        return self.field.name or self.field.variable

    @property
    def spec(self) -> TensorSpec:
        """What crosses the wire."""
        v = self.variable
        return TensorSpec(self.name, str(v.array.dtype), self.shape, v.unit, v.scale, v.offset, v.missing)

    def positions(self, starts: Ids) -> Ids:
        """Positions along the window's dimension, [n, steps], of windows that begin at `starts`."""
        at = starts[:, None] + np.array(self.field.at or (0,), np.int64)
        return at % self.size if self.cyclic else at


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """A sample's declared form; `bind` joins it to a source."""

    inputs: Tensors
    """Tensors that the model takes."""
    targets: Tensors
    """Tensors that it is to predict."""
    window: Window | None = None
    """The moving window, if samples are windows."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window.length < 1:
            raise InputError(f"a window of {self.window.length} steps has none: give a length of at least 1")
        for field in self.fields():
            if field.at == ():
                raise InputError(f"variable {field.variable!r} takes no step: leave `at` out to take the whole record")
            if field.at is not None and self.window is None:
                raise InputError(f"variable {field.variable!r} takes steps {field.at} of a window: declare `window`")
            if field.at is not None and not all(0 <= step < self.window.length for step in field.at):  # type: ignore[union-attr]
                raise InputError(f"variable {field.variable!r}: steps {field.at} lie outside a window of {self.window}")

    def fields(self) -> Iterator[Field]:
        """Every field, inputs first."""
        for tensors in (self.inputs, self.targets):
            for fields in tensors.values():
                yield from fields

    def to_json(self) -> dict[str, Any]:
        """JSON form; `from_json` is its inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> SampleSpec:
        """Inverse of `to_json`."""

        def tensors(side: Mapping[str, Any]) -> dict[str, list[Field]]:
            return {name: [_field_from_json(field) for field in fields] for name, fields in side.items()}

        window = document["window"]
        moving = None if window is None else Window(**window)
        return cls(tensors(document["inputs"]), tensors(document["targets"]), moving)


def _field_from_json(document: Mapping[str, Any]) -> Field:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in document.items()}
    return Field(**values)


@dataclass(frozen=True, slots=True)
class BoundSample:
    """A sample's form on one source: its index space and how each field is cut."""

    spec: SampleSpec
    """The declared form."""
    records: int
    """Length of the sample axis."""
    starts: int
    """Windows that begin inside one record; 1 unless the window moves inside records."""
    length: int
    """Records that a sample spans; 1 unless the window moves along the sample axis."""
    inputs: Mapping[str, tuple[Cut, ...]]
    """Cuts by input tensor."""
    targets: Mapping[str, tuple[Cut, ...]]
    """Cuts by target tensor."""

    def samples(self, records: Ids) -> Ids:
        """Ids of the samples that lie wholly inside `records`: id = record * starts + start."""
        if self.length > 1:
            inside = np.zeros(self.records + self.length, bool)
            inside[records] = True
            spans = np.lib.stride_tricks.sliding_window_view(inside, self.length)
            records = np.flatnonzero(spans[: self.records].all(axis=1))
        return (records[:, None] * self.starts + np.arange(self.starts)).ravel()

    def split_id(self, ids: Ids) -> tuple[Ids, Ids]:
        """(record, start) of sample ids."""
        record, start = np.divmod(ids, self.starts)
        return record, start


def bind(spec: SampleSpec, source: Source) -> BoundSample:
    """Join a declared sample to a source.

    Raises:
        InputError: a variable or dimension that is not there, arrays whose sample axes differ, or a window
            that does not fit.
    """
    window = spec.window
    variables = [source.variable(field.variable) for field in spec.fields()]
    dims = {dim for variable in variables for dim in variable.dims}
    if window is not None and window.dim not in dims:
        raise InputError(
            f"window dimension {window.dim!r} does not exist; the variables have {', '.join(sorted(dims))}"
        )
    whole = [variable for variable in variables if not _coordinate(variable, window)]
    if not whole:
        raise InputError("no declared variable has a sample axis: declare at least one that is not a coordinate")
    sample_dim = whole[0].dims[0]
    for variable in whole:
        if variable.dims[0] != sample_dim or variable.array.shape[0] != whole[0].array.shape[0]:
            raise InputError(
                f"{variable.name!r} has sample axis {variable.dims[0]} ({variable.array.shape[0]}), "
                f"{whole[0].name!r} has {sample_dim} ({whole[0].array.shape[0]}): they must be aligned"
            )
    along_samples = window is not None and window.dim == sample_dim
    if along_samples and window is not None and window.cyclic:
        raise InputError("a window along the sample axis cannot be cyclic: its ends are not neighbours")

    def cut_all(side: Tensors) -> dict[str, tuple[Cut, ...]]:
        return {
            name: tuple(_cut(source.variable(field.variable), field, window, sample_dim) for field in fields)
            for name, fields in side.items()
        }

    inputs, targets = cut_all(spec.inputs), cut_all(spec.targets)
    starts = 1
    if window is not None and not along_samples:
        cuts = [cut for side in (inputs, targets) for fields in side.values() for cut in fields]
        sizes = {cut.name: cut.size for cut in cuts if cut.along == "inside"}
        if not sizes:
            raise InputError(f"no field takes steps of the window along {window.dim!r}: give one of them `at`")
        if len(set(sizes.values())) != 1:
            raise InputError(f"variables differ in their length along the window's {window.dim!r}: {sizes}")
        size = next(iter(sizes.values()))
        starts = size if window.cyclic else size - window.length + 1
        if window.length > size:
            raise InputError(f"a window of {window.length} does not fit in dimension {window.dim!r} of {size}")
    length = window.length if window is not None and along_samples else 1
    records = whole[0].array.shape[0]
    if length > records:
        raise InputError(f"a window of {length} does not fit in dimension {sample_dim!r} of {records}")
    return BoundSample(spec, records, starts, length, inputs, targets)


def _coordinate(variable: Variable, window: Window | None) -> bool:
    """Whether a variable belongs to the window's dimension alone."""
    return window is not None and variable.dims == (window.dim,)


def _cut(variable: Variable, field: Field, window: Window | None, sample_dim: str) -> Cut:
    cyclic = window is not None and window.cyclic
    steps = len(field.at or (0,))
    if _coordinate(variable, window):
        assert window is not None
        moved = "samples" if window.dim == sample_dim else "inside"
        return Cut(field, variable, False, moved, variable.array.shape[0], cyclic, (steps,))
    inner = variable.array.shape[1:]
    along: str | None = None
    size = variable.array.shape[0]
    if field.at is not None:
        assert window is not None
        if window.dim == sample_dim:
            along = "samples"
        elif len(variable.dims) > 1 and variable.dims[1] == window.dim:
            along, size, inner = "inside", inner[0], inner[1:]
        else:
            raise InputError(
                f"{variable.name!r} has dimensions {variable.dims}: the window's {window.dim!r} must be first or second"
            )
    spatial = inner[-2:]
    channels = steps * math.prod(inner[: -len(spatial)] if spatial else inner)
    return Cut(field, variable, True, along, size, cyclic, (channels, *spatial))
