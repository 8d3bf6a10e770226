"""Separable resampling by tables of weights: antialiased bilinear and bicubic, area, and conservative in latitude.

    y[..., i, j] = sum over k, l of rows[i, k] * x[..., k, l] * cols[j, l]

There is no kernel of ours here. A draft of one took 324 instructions an output (181 registers on an H100), three times
what it may take to be worth having over these two matrix products, and none ships before one wins. What PyTorch offers
(`interpolate(antialias=True)`) is float-only, does not know missing values, and its tables cannot be conservative.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

METHODS = ("bilinear", "bicubic", "area")
"""Weights that `weights` makes: the two antialiased ones are those of torch, area is the exact share of each cell."""


def weights(inputs: int, outputs: int, method: str = "bilinear") -> Tensor:
    """Weights along one evenly spaced axis.

    Source of the antialiased filters: torch, aten/src/ATen/native/cpu/UpSampleKernel.cpp, as Pillow has them (bicubic
    with a = -0.5).

    Args:
        inputs: elements there are.
        outputs: elements wanted.
        method: One of `METHODS`.

    Returns:
        float64 [outputs, inputs]; each row adds up to 1.

    Raises:
        ValueError: Another method, or an axis without elements.
    """
    if inputs < 1 or outputs < 1:
        raise ValueError(f"{outputs} elements out of {inputs}: both axes have at least one")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: pass one of {', '.join(METHODS)}")
    return torch.from_numpy(_table(inputs, outputs, method).copy())


@cache
def _table(inputs: int, outputs: int, method: str) -> npt.NDArray[np.float64]:
    """`weights` in NumPy, so that a graph that is traced holds the numbers and not how they were made."""
    if method == "area":
        return _overlaps(np.arange(inputs + 1) / inputs, np.arange(outputs + 1) / outputs)
    step = inputs / outputs
    centers = (np.arange(outputs) + 0.5) * step
    distance = np.abs(np.arange(inputs) + 0.5 - centers[:, None]) / max(step, 1.0)
    if method == "bilinear":
        found = np.maximum(1 - distance, 0)
    else:
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        found = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return np.asarray(found / found.sum(1, keepdims=True))


def _overlaps(edges: npt.NDArray[np.float64], wanted: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    low = np.maximum(edges[None, :-1], wanted[:-1, None])
    high = np.minimum(edges[None, 1:], wanted[1:, None])
    overlap = np.maximum(high - low, 0)
    return np.asarray(overlap / overlap.sum(1, keepdims=True))


def conservative(edges: Tensor, wanted: Tensor) -> Tensor:
    """First-order conservative weights between cells given by their edges: shares of overlap.

    For latitude pass sines of the edges, because the area of a band is the difference of sines. Source: Jones, "First-
    and second-order conservative remapping schemes for grids in spherical coordinates", Mon. Wea. Rev. 127, 1999.

    Args:
        edges: float64 [inputs + 1], ascending.
        wanted: float64 [outputs + 1], ascending, inside the range of `edges`.

    Returns:
        float64 [outputs, inputs]; each row adds up to 1.

    Raises:
        ValueError: edges that do not ascend or are not covered.
    """
    for name, values in (("edges", edges), ("wanted", wanted)):
        if values.dim() != 1 or len(values) < 2 or not bool((values.diff() > 0).all()):
            raise ValueError(f"{name} must be ascending and at least two")
    if wanted[0] < edges[0] or wanted[-1] > edges[-1]:
        raise ValueError(
            f"cells from {wanted[0]} to {wanted[-1]} are not covered by those from {edges[0]} to {edges[-1]}"
        )
    return torch.from_numpy(_overlaps(edges.double().numpy(), wanted.double().numpy()))


def resample(x: Tensor, rows: Tensor, cols: Tensor, missing: bool = False) -> Tensor:
    """Resample the last two axes; plain aten, so that it is compiled, exported and served as it is.

    Args:
        x: [..., height, width], floating point.
        rows: [height out, height], from `weights` or `conservative`.
        cols: [width out, width].
        missing: NaN is missing data: the others' weights are scaled up, and where there are none the result is NaN.
            False lets NaN spread.

    Returns:
        [..., height out, width out], dtype of `x`; sums are taken in float32, in float64 for float64.

    Raises:
        ValueError: tables of another size, or integers.
    """
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}: resample what `transform` gives")
    if _sizes(rows, cols) != list(x.shape[-2:]):
        raise ValueError(f"tables are for {_sizes(rows, cols)}, x has {list(x.shape[-2:])}")
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    left, right = rows.to(x.device, wide), cols.to(x.device, wide).T
    values = x.to(wide)
    if not missing:
        return (left @ values @ right).to(x.dtype)
    there = ~values.isnan()
    weight = left @ there.to(wide) @ right
    total = left @ torch.where(there, values, 0.0) @ right
    # What is left of a weight by rounding alone is none.
    return torch.where(weight > 1e-6, total / weight, torch.nan).to(x.dtype)


def _sizes(rows: Tensor, cols: Tensor) -> list[int]:
    sizes: Sequence[int] = rows.shape[1], cols.shape[1]
    return list(sizes)
