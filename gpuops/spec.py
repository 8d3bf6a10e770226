"""What crosses the wire: named tensors in stored (packed) form, and the physical values they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.errors import InputError

DTYPES = ("uint8", "int8", "int16", "uint16", "int32", "float32")
"""Stored dtypes that may cross the wire, by their NumPy names."""

Arrays = Mapping[str, npt.NDArray[Any]]
"""Named arrays, batch axis first."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One named tensor without its batch axis; physical = stored * scale + offset."""

    name: str
    """Name on the wire."""
    dtype: str
    """Stored dtype, one of `DTYPES`."""
    shape: tuple[int, ...]
    """Shape of one sample, batch axis left out."""
    unit: str = "1"
    """Unit of the physical value, in UDUNITS spelling; "1" is dimensionless."""
    scale: float = 1.0
    """Physical units per stored step."""
    offset: float = 0.0
    """Physical value of stored 0."""
    missing: int | float | None = None
    """Stored value that means "no data"; None if every value is data. In float32, NaN is always "no data"."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(
                f"tensor {self.name!r}: dtype {self.dtype!r} cannot cross the wire; use one of {', '.join(DTYPES)}"
            )

    def check(self, array: npt.NDArray[Any]) -> None:
        """Raise InputError unless `array` is a batch [n, *shape] of this tensor's dtype."""
        if array.dtype != np.dtype(self.dtype):
            raise InputError(
                f"input {self.name!r} is {array.dtype}, the model takes {self.dtype}: send stored values, not physical"
            )
        if array.ndim != len(self.shape) + 1 or array.shape[1:] != self.shape:
            want = ", ".join(["n", *map(str, self.shape)])
            raise InputError(
                f"input {self.name!r} has shape {list(array.shape)}, the model takes [{want}] with n samples first"
            )


@dataclass(frozen=True, slots=True)
class Signature:
    """What a model takes and what it answers with."""

    inputs: tuple[TensorSpec, ...]
    """Raw stored samples, in the order of the graph."""
    outputs: tuple[TensorSpec, ...]
    """Answers, float32 in physical units."""
    max_batch: int = 32
    """Largest number of samples in one request; every size from 1 up to it is served."""

    def check(self, inputs: Arrays) -> int:
        """Return the batch size of `inputs`, or raise InputError naming what is wrong with them."""
        names = {spec.name for spec in self.inputs}
        if set(inputs) != names:
            raise InputError(f"the model takes inputs {sorted(names)}, got {sorted(inputs)}")
        for spec in self.inputs:
            spec.check(inputs[spec.name])
        sizes = {name: len(array) for name, array in inputs.items()}
        if len(set(sizes.values())) != 1:
            raise InputError(f"inputs differ in batch size: {sizes}")
        size = next(iter(sizes.values()))
        if not 1 <= size <= self.max_batch:
            raise InputError(f"batch of {size} samples; the model takes 1 to {self.max_batch}: split the request")
        return size

    def to_json(self) -> dict[str, Any]:
        """JSON form; `from_json` is its inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Signature:
        """Inverse of `to_json`."""
        inputs, outputs = (
            tuple(TensorSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in document[side])
            for side in ("inputs", "outputs")
        )
        return cls(inputs, outputs, int(document["max_batch"]))
