"""One stored array and what its values mean: dimensions, CF packing, missing data, times.

CF conventions 1.11, sections 2.5.1 (missing data), 4.4 (time coordinate) and 8.1 (packed data),
https://cfconventions.org/; how xarray spells them in Zarr: https://docs.xarray.dev/en/stable/internals/zarr-encoding-spec.html
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpuops.errors import InputError

if TYPE_CHECKING:
    import zarr


@dataclass(frozen=True, slots=True)
class Variable:
    """One array of a source with its CF packing: physical = stored * scale + offset."""

    name: str
    """Name in the group; a path with slashes for an array of a group inside it."""
    array: zarr.Array[Any]
    """The stored array, packed."""
    dims: tuple[str, ...]
    """Dimension names; the first is the sample axis, unless the variable is static."""
    scale: float
    """CF scale_factor."""
    offset: float
    """CF add_offset."""
    missing: int | float | None
    """Stored value that means "no data" (CF _FillValue, else missing_value); in floats NaN is "no data" as well."""
    fill: float | None
    """Physical value that the ingest recipe declares for missing data, if any."""
    unit: str
    """CF units."""
    spatial: int = 2
    """Trailing axes that are space; the axes before them are channels. 1 for unstructured grids (cells)."""
    rows: npt.NDArray[np.int64] | None = None
    """Position of each record along the array's first axis, where the records are some of those stored, or in another
    order (stores aligned on a coordinate); None where record i is position i."""

    @property
    def records(self) -> int:
        """Length of the sample axis."""
        return int(self.array.shape[0]) if self.rows is None else len(self.rows)

    def stored_at(self, records: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Positions of records along the array's first axis, of the same shape."""
        return records if self.rows is None else self.rows[records]

    def read(self, first: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Stored values of the records from `first` to `stop`, without it."""
        return self.taken(self.array, first, stop)

    def taken(self, array: zarr.Array[Any], first: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """What an array that lies along the stored sample axis, such as recorded statistics, has for some records."""
        if self.rows is None:
            return np.asarray(array[first:stop])
        return np.asarray(array.oindex[self.rows[first:stop]])


def read_variable(name: str, array: zarr.Array[Any]) -> Variable:
    """What an array's attributes say of its values."""
    attributes: dict[str, Any] = array.attrs.asdict()
    dims = getattr(array.metadata, "dimension_names", None) or attributes.get("_ARRAY_DIMENSIONS")
    given = tuple(dims) if dims and len(dims) == array.ndim else (None,) * array.ndim
    fill = attributes.get("gpuops_fill")
    return Variable(
        name,
        array,
        tuple(f"dim_{axis}" if dim is None else str(dim) for axis, dim in enumerate(given)),
        float(attributes.get("scale_factor", 1.0)),
        float(attributes.get("add_offset", 0.0)),
        _missing(array, attributes),
        None if fill is None else float(fill),
        str(attributes.get("units", "1")),
    )


def _missing(array: zarr.Array[Any], attributes: dict[str, Any]) -> int | float | None:
    """The stored value that means "no data"; None where there is none, or it is NaN, which always means that."""
    if array.dtype.kind not in "iuf":
        return None
    values = [attributes.get("_FillValue"), attributes.get("missing_value")]
    if values[0] is None and array.metadata.zarr_format == 2:
        # xarray keeps _FillValue in v2's fill_value, where 0 is also what libraries write when nobody chose one.
        chosen = array.fill_value
        values[0] = chosen if "scale_factor" in attributes or chosen else None
    # A _FillValue of NaN, which xarray adds by itself, leaves missing_value to be looked at.
    return next((found for value in values if (found := _in_dtype(value, array.dtype)) is not None), None)


def _in_dtype(value: Any, dtype: np.dtype[Any]) -> int | float | None:
    """A declared value as an array of this dtype holds it; None if it cannot, or it is not finite."""
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    if value is None:
        return None
    if isinstance(value, str):
        value = _float_in_text(value)
    number = float(value)
    if not math.isfinite(number):
        return None
    if dtype.kind == "f":
        held = float(dtype.type(number))  # 1e20 is another number in float32
        return held if math.isfinite(held) else None
    limits = np.iinfo(dtype)
    return int(value) if limits.min <= int(value) <= limits.max else None


def _float_in_text(value: str) -> float:
    """A float that JSON holds as text: "NaN", or the base64 of a little-endian double, as xarray writes in Zarr v3."""
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return float(struct.unpack("<d", base64.standard_b64decode(value))[0])
    except (binascii.Error, struct.error):
        return math.nan


def decoded(variable: Variable) -> npt.NDArray[Any]:
    """All values of a one-dimensional variable, times as datetime64[ns] where CF units (`hours since ...`) say so.

    Raises:
        InputError: times in a calendar that datetime64 has no dates for (noleap, 360_day), or unreadable units.
    """
    values = variable.read()
    if values.dtype.kind == "M":
        return values.astype("datetime64[ns]")
    if " since " not in variable.unit or values.dtype.kind not in "iuf":
        return values
    import xarray as xr

    calendar = str(variable.array.attrs.get("calendar", "standard"))
    told = {"units": variable.unit, "calendar": calendar}
    try:
        # Nothing but units and calendar: whatever else the array declares has been read already.
        times = xr.decode_cf(xr.Dataset({"t": ("i", values, told)}))["t"].values
    except (ValueError, OverflowError, ImportError) as error:
        raise InputError(
            f"{variable.name!r} ({variable.unit}, calendar {calendar}) does not decode to times: split by another "
            "variable on the sample axis"
        ) from error
    if times.dtype.kind != "M":
        raise InputError(
            f"{variable.name!r} uses calendar {calendar}, whose dates datetime64 cannot hold: split by another "
            "variable on the sample axis"
        )
    return times.astype("datetime64[ns]")


def is_time(variable: Variable) -> bool:
    """Whether a variable holds points in time."""
    return bool(variable.array.dtype.kind == "M" or " since " in variable.unit)
