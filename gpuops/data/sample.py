"""What a training sample is: which variables, which steps of a window, which patch, as which tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gpuops.data.patches import Patch, PatchCut, PatchGrid, beyond, patch_grid
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
    """Name in the store: an array's, or a channel's where the archive names its channels (anemoi: "2t")."""
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
    channels: tuple[int | str, ...] | None = None
    """What is taken along axis 1 of the array, in order: positions, or values of that axis's coordinate; None: all."""
    function: Literal["log", "asinh"] | None = None
    """ln(1 + value / scale) or asinh(value / scale), before normalising; statistics are then those of its values."""
    scale: float = 1.0
    """Physical value around which that curve bends."""


Tensors = Mapping[str, list[Field]]
"""Named tensors and the fields that make them, in channel order."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How one field is cut out of a variable's records."""

    field: Field
    variable: Variable
    records: bool
    """True if the variable has the sample axis; False for a coordinate of the window alone and for a static field."""
    along: str | None
    """What `at` counts: "samples" (records), "inside" (axis 1 of the array), or None (a static field too)."""
    size: int
    """Length of the window's dimension."""
    cyclic: bool
    """Whether positions wrap round `size`."""
    shape: tuple[int, ...]
    """[channels, *spatial] of one sample: channels are steps x axis 1 x further axes before the spatial ones."""
    channels: tuple[int, ...] | None = None
    """Positions taken along axis 1 of the stored array, in order; None takes all."""
    patch: PatchCut | None = None
    """How its last axes are cut into patches; None takes them whole."""

    @property
    def static(self) -> bool:
        """Whether the array belongs to every record, whole or by patches (a land-sea mask)."""
        return not self.records and self.along is None

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
    patch: Patch | None = None
    """The patches, if samples are parts of records."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window.length < 1:
            raise InputError(f"a window of {self.window.length} steps has none: give a length of at least 1")
        for field in self.fields():
            if field.at == ():
                raise InputError(f"variable {field.variable!r} takes no step: leave `at` out to take the whole record")
            if field.function not in (None, "log", "asinh"):
                raise InputError(f"variable {field.variable!r}: function {field.function!r} is not log or asinh")
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
        document = asdict(self)
        for side in (document["inputs"], document["targets"]):
            for field in (field for fields in side.values() for field in fields):
                # What is not declared is left out, so that a sample keeps its digest from before one could.
                if field["channels"] is None:
                    del field["channels"]
                if field["function"] is None:
                    del field["function"], field["scale"]
        if self.patch is None:
            del document["patch"]
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> SampleSpec:
        """Inverse of `to_json`."""

        def tensors(side: Mapping[str, Any]) -> dict[str, list[Field]]:
            return {name: [_field_from_json(field) for field in fields] for name, fields in side.items()}

        window, patch = document["window"], document.get("patch")
        moving = None if window is None else Window(**window)
        cut = None if patch is None else Patch(**patch)
        return cls(tensors(document["inputs"]), tensors(document["targets"]), moving, cut)


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
    dim: str
    """Name of the sample axis; `source.coordinate(bound.dim)` are its values."""
    steps: tuple[int, ...]
    """Records that a sample reads, counted from its first one."""
    absent: Ids
    """Records that the source declares to hold no data, sorted."""
    grid: PatchGrid | None = None
    """The patches of a record; None if samples are whole records."""

    @property
    def patches(self) -> int:
        """Patches of a record, 1 without a grid."""
        return 1 if self.grid is None else self.grid.count

    @property
    def per_record(self) -> int:
        """Samples that begin in one record, next to each other in the numbering."""
        return self.starts * self.patches

    def samples(self, records: Ids) -> Ids:
        """Ids of the samples that lie wholly inside `records` and read no absent one.

        id = (record * starts + start) * patches + patch.
        """
        first = self._first(records)
        return self._ids(first[~self._reads_absent(first)])

    def left_out(self, records: Ids) -> int:
        """How many samples inside `records` are left out because they read an absent one."""
        return int(self._reads_absent(self._first(records)).sum()) * self.per_record

    def _first(self, records: Ids) -> Ids:
        """First records of the samples that lie wholly inside `records`."""
        if self.length > 1:
            inside = np.zeros(self.records + self.length, bool)
            inside[records] = True
            spans = np.lib.stride_tricks.sliding_window_view(inside, self.length)
            records = np.flatnonzero(spans[: self.records].all(axis=1))
        return records

    def _reads_absent(self, first: Ids) -> npt.NDArray[np.bool_]:
        return np.isin(first, self.unreadable)

    @property
    def unreadable(self) -> Ids:
        """First records of the samples that read an absent one, sorted: as many as absent records times steps."""
        first = np.unique(self.absent[:, None] - np.array(self.steps, np.int64))
        return first[first >= 0]

    def _ids(self, first: Ids) -> Ids:
        return (first[:, None] * self.per_record + np.arange(self.per_record)).ravel()

    def split_id(self, ids: Ids) -> tuple[Ids, Ids]:
        """(record, start) of sample ids."""
        if self.per_record == 1:
            return ids, np.zeros_like(ids)
        record, start = np.divmod(ids // self.patches, self.starts)
        return record, start

    def patch_of(self, ids: Ids) -> Ids:
        """Patch of sample ids, counted from 0 in their record."""
        return ids % self.patches


def bind(spec: SampleSpec, source: Source) -> BoundSample:
    """Join a declared sample to a source.

    A variable without the sample axis, all of whose dimensions are inner ones of the others, is static: it is part of
    every sample. A patch is cut along those of its dimensions that a variable has; without any it is taken whole.

    Raises:
        InputError: a variable, channel or dimension that is not there, arrays whose sample axes differ, or a window,
            patch or halo that does not fit.
    """
    window = spec.window
    variables = [source.resolve(field.variable)[0] for field in spec.fields()]
    for variable in variables:
        if str(variable.array.attrs.get("_Unsigned", "")).lower() == "true" and variable.array.dtype.kind == "i":
            raise InputError(
                f"{variable.name!r} keeps unsigned values in {variable.array.dtype} (_Unsigned), which would be read "
                "as negative: re-ingest it"
            )
    dims = {dim for variable in variables for dim in variable.dims}
    if window is not None and window.dim not in dims:
        raise InputError(
            f"window dimension {window.dim!r} does not exist; the variables have {', '.join(sorted(dims))}"
        )
    whole = [variable for variable in variables if not _coordinate(variable, window)]
    if not whole:
        raise InputError("no declared variable has a sample axis: declare at least one that is not a coordinate")
    sample_dim, records = _sample_axis(whole)
    along_samples = window is not None and window.dim == sample_dim
    if along_samples and window is not None and window.cyclic:
        raise InputError("a window along the sample axis cannot be cyclic: its ends are not neighbours")

    grid = None
    if spec.patch is not None:
        lengths = {dim: {_sizes(v)[dim] for v in variables if dim in v.dims} for dim in dims}
        fixed = {} if window is None else {window.dim: "the window's dimension"}
        grid = patch_grid(spec.patch, lengths, fixed | {sample_dim: "the sample axis"})

    def cut_all(side: Tensors, halo: bool) -> dict[str, tuple[Cut, ...]]:
        cuts = {name: [_cut(source, field, window, sample_dim) for field in fields] for name, fields in side.items()}
        if grid is None:
            return {name: tuple(fields) for name, fields in cuts.items()}
        return {name: _patched(name, fields, grid, halo) for name, fields in cuts.items()}

    inputs, targets = cut_all(spec.inputs, True), cut_all(spec.targets, False)
    cuts = [cut for side in (inputs, targets) for fields in side.values() for cut in fields]
    starts = 1 if window is None or along_samples else _starts(window, cuts)
    length = window.length if window is not None and along_samples else 1
    if length > records:
        raise InputError(f"a window of {length} does not fit in dimension {sample_dim!r} of {records}")
    steps = {step for cut in cuts if cut.records for step in (cut.field.at or (0,) if cut.along == "samples" else (0,))}
    absent = source.absent.get(sample_dim, np.empty(0, np.int64))
    return BoundSample(spec, records, starts, length, inputs, targets, sample_dim, tuple(sorted(steps)), absent, grid)


def _sample_axis(whole: list[Variable]) -> tuple[str, int]:
    """Name and length of the axis that the variables, static ones left out, have first."""
    for sample_dim in dict.fromkeys(variable.dims[0] for variable in whole if variable.dims):
        moving = [variable for variable in whole if variable.dims and variable.dims[0] == sample_dim]
        inner = {axis for variable in moving for axis in zip(variable.dims[1:], variable.array.shape[1:], strict=True)}
        static = [variable for variable in whole if variable not in moving]
        if sample_dim in dict(inner) or not all(_sizes(variable).items() <= inner for variable in static):
            continue
        if len({variable.records for variable in moving}) == 1:
            return sample_dim, moving[0].records
    first, *others = whole
    other = next(v for v in others if _axis(v) != _axis(first))
    raise InputError(
        f"{other.name!r} has sample axis {_axis(other)}, {first.name!r} has {_axis(first)}: they must be aligned; a "
        "static field has no other dimensions than those behind the sample axis, of the same sizes"
    )


def _axis(variable: Variable) -> str:
    return f"{variable.dims[0]} ({variable.records})" if variable.dims else "none"


def _sizes(variable: Variable) -> dict[str, int]:
    return dict(zip(variable.dims, variable.array.shape, strict=True))


def _coordinate(variable: Variable, window: Window | None) -> bool:
    """Whether a variable belongs to the window's dimension alone."""
    return window is not None and variable.dims == (window.dim,)


def _starts(window: Window, cuts: list[Cut]) -> int:
    """Windows that begin inside one record."""
    sizes = {cut.name: cut.size for cut in cuts if cut.along == "inside"}
    if not sizes:
        raise InputError(f"no field takes steps of the window along {window.dim!r}: give one of them `at`")
    if len(set(sizes.values())) != 1:
        raise InputError(f"variables differ in their length along the window's {window.dim!r}: {sizes}")
    size = next(iter(sizes.values()))
    if window.length > size:
        raise InputError(f"a window of {window.length} does not fit in dimension {window.dim!r} of {size}")
    return size if window.cyclic else size - window.length + 1


def _cut(source: Source, field: Field, window: Window | None, sample_dim: str) -> Cut:
    variable, channel = source.resolve(field.variable)
    cyclic = window is not None and window.cyclic
    steps = len(field.at or (0,))
    if _coordinate(variable, window):
        assert window is not None
        moved = "samples" if window.dim == sample_dim else "inside"
        return Cut(field, variable, False, moved, variable.records, cyclic, (steps,))
    static = variable.dims[:1] != (sample_dim,)
    if static and (field.at is not None or field.channels is not None):
        raise InputError(f"{variable.name!r} has no axis {sample_dim!r}: it is static, leave `at` and `channels` out")
    inner = variable.array.shape if static else variable.array.shape[1:]
    along: str | None = None
    size = variable.records if inner or not static else 1
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
    channels = _channels(source, variable, field, channel)
    if channels is not None:
        if along == "inside":
            raise InputError(f"{variable.name!r}: the window moves along axis 1, so `channels` cannot be taken from it")
        inner = (len(channels), *inner[1:])
    spatial = inner[-variable.spatial :] if len(inner) > variable.spatial or channels is None else inner[1:]
    leading = math.prod(inner[: len(inner) - len(spatial)])
    return Cut(field, variable, not static, along, size, cyclic, (steps * leading, *spatial), channels)


def _patched(tensor: str, cuts: list[Cut], grid: PatchGrid, halo: bool) -> tuple[Cut, ...]:
    """A tensor's fields, cut into patches along those dimensions of the grid that each of them has."""
    patched = tuple(_patch(cut, grid, halo) for cut in cuts)
    for cut in patched:
        if cut.shape[1:] != patched[0].shape[1:]:
            raise InputError(
                f"tensor {tensor!r}: a patch of {patched[0].name!r} is {patched[0].shape[1:]}, of {cut.name!r} "
                f"{cut.shape[1:]}: make them tensors of their own"
            )
    return patched


def _patch(cut: Cut, grid: PatchGrid, halo: bool) -> Cut:
    variable, dims = cut.variable, [axis.dim for axis in grid.axes]
    places = tuple(dims.index(dim) for dim in variable.dims if dim in dims)
    if not places:
        return cut
    count = len(places)
    if not set(variable.dims[-count:]) <= set(dims):
        raise InputError(
            f"{variable.name!r} has dimensions {variable.dims}: patches are cut from the last ones, so `patch` must "
            f"name all behind {next(dim for dim in variable.dims if dim in dims)!r} too, at full length if need be"
        )
    if cut.channels is not None and variable.dims[1] in dims:
        raise InputError(f"{variable.name!r}: patches are cut along {variable.dims[1]!r}: leave `channels` out")
    axes = tuple(grid.axes[place] if halo else replace(grid.axes[place], halo=0) for place in places)
    edge = None
    if grid.edge == "missing" and any(axis.halo for axis in axes):
        edge = beyond(variable.name, variable.array.dtype, variable.missing)
    patch = PatchCut(axes, places, grid, edge)
    leading = cut.shape[:-count]
    if len(cut.shape) <= count:  # what is cut is space: a patch of [z, y, x] is a volume, not a picture of z channels
        leading = (math.prod(cut.shape) // math.prod(axis.length for axis in axes),)
    spatial = max(variable.spatial, count)
    return replace(cut, variable=replace(variable, spatial=spatial), shape=(*leading, *patch.shape), patch=patch)


def _channels(source: Source, variable: Variable, field: Field, named: int | None) -> tuple[int, ...] | None:
    """Positions along axis 1 that a field takes."""
    if named is not None:
        if field.channels is not None:
            raise InputError(
                f"{field.variable!r} is a channel of {variable.name!r}: leave `channels` out, or name that"
            )
        return (named,)
    if field.channels is None:
        return None
    if variable.array.ndim < 2 or not field.channels:
        raise InputError(f"{variable.name!r} has dimensions {variable.dims}: it has no channels {field.channels}")
    count = variable.array.shape[1]
    names = source.channel_names(variable) if any(isinstance(c, str) for c in field.channels) else ()
    positions = []
    for wanted in field.channels:
        if isinstance(wanted, str) and wanted in names:
            positions.append(names.index(wanted))
        elif isinstance(wanted, int) and 0 <= wanted < count:
            positions.append(wanted)
        else:
            listed = ", ".join(names) or f"positions 0 to {count - 1}"
            raise InputError(f"{variable.name!r} has no channel {wanted!r} along {variable.dims[1]!r}; it has {listed}")
    return tuple(positions)
