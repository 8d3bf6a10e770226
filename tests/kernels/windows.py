"""Random slabs and tables of windows, and what they must give, cut out by NumPy slicing."""

from dataclasses import dataclass

import numpy as np
import torch
from oracle import Case, make_case


@dataclass(frozen=True, slots=True)
class Windows:
    """Arguments of one call."""

    slab: Case
    """[K, C, *chunk] and its tables."""
    table: torch.Tensor
    """int32 [N, axes + 3]."""
    size: tuple[int, ...]
    rule: str


def make_windows(
    chunk: tuple[int, ...],
    size: tuple[int, ...],
    *,
    chunks: int = 3,
    channels: int = 2,
    windows: int = 6,
    rule: str = "error",
    turned: bool = True,
    dtype: torch.dtype = torch.int16,
    seed: int = 0,
    functions: str = "",
) -> Windows:
    """Windows anywhere in the chunks, and for the other rules far outside them too."""
    rng = np.random.default_rng(seed)
    slab = make_case((chunks, channels, *chunk), dtype, seed, functions)
    columns = [rng.integers(0, chunks, windows)]
    for whole, length in zip(chunk, size, strict=True):
        inside = rng.integers(0, max(whole - length, 0) + 1, windows)
        columns.append(inside if rule == "error" else rng.integers(-2 * whole - length, 3 * whole, windows))
    square = size[-1] == size[-2]
    flip, rot = rng.integers(0, 2 ** len(size), windows), rng.integers(0, 4, windows) if square else None
    rot = 2 * rng.integers(0, 2, windows) if rot is None else rot
    columns += [flip * turned, rot * turned]
    return Windows(slab, torch.from_numpy(np.stack(columns, 1).astype(np.int32)), size, rule)


def cut(case: Windows) -> tuple[Case, np.ndarray]:
    """(the windows as a contiguous case for `transform`, which of their elements lie outside), by slicing alone."""
    x = case.slab.x.numpy()
    pieces, outside = [], []
    for chunk, *starts, flip, rot in case.table.tolist():
        padded = x[chunk]
        hidden = np.zeros(x.shape[2:], bool)
        if case.rule == "wrap":
            starts = [start % whole for start, whole in zip(starts, x.shape[2:], strict=True)]
        # Enough on every side that a slice is always inside.
        margins = [(max(0, -s), max(0, s + n - w)) for s, n, w in zip(starts, case.size, x.shape[2:], strict=True)]
        mode = "wrap" if case.rule == "wrap" else "edge"
        padded = np.pad(padded, [(0, 0), *margins], mode=mode)
        hidden = np.pad(hidden, margins, constant_values=True)
        place = tuple(
            slice(s + before, s + before + n) for s, n, (before, _) in zip(starts, case.size, margins, strict=True)
        )
        piece, beyond = padded[(slice(None), *place)], hidden[place]
        for axis in range(len(case.size)):
            if flip >> (len(case.size) - 1 - axis) & 1:
                piece, beyond = np.flip(piece, axis + 1), np.flip(beyond, axis)
        pieces.append(np.rot90(piece, rot, (-2, -1)))
        outside.append(np.rot90(beyond, rot, (-2, -1)))
    whole = np.stack(pieces) if pieces else np.empty((0, x.shape[1], *case.size), x.dtype)
    hidden = np.stack(outside)[:, None] if pieces else np.empty((0, 1, *case.size), bool)
    shown = Case(
        torch.from_numpy(np.ascontiguousarray(whole)), case.slab.coefficients, case.slab.missing, case.slab.functions
    )
    return shown, np.broadcast_to(hidden, whole.shape)
