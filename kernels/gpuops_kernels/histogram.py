"""`torch.ops.gpuops.histogram`: 256 bins a channel in one pass over stored numbers, of any number of them.

Counts are int64, so that nothing ends at 2^24 values, and those of parts (batches, ranks, days) add up to those of the
whole. `quantile` finds exact quantiles of 8- and 16-bit integers with them: the high byte first, then the low byte.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import register_fake, triton_op, wrap_triton

from gpuops_kernels import epilogue
from gpuops_kernels.epilogue import INPUT_DTYPES as INPUT_DTYPES
from gpuops_kernels.launching import on_device_of, reduction_tiles, unwrapped

BINS = 256
"""Bins of a channel."""

CELLS = BINS + 3
"""Counts of a channel: below the first bin, the bins, above the last one, missing (NaN among them)."""


def reference(x: Tensor, scale: Tensor, missing: Tensor) -> Tensor:
    """The op in plain aten: what the CPU runs and what tests compare with.

    A stored number falls in bin floor(v), v = fma(a[c], float32(x), b[c]); 256 itself is in the last bin.

    Args:
        x: [N, C, *spatial] stored numbers, dtype one of `INPUT_DTYPES`, 0 to 3 spatial axes.
        scale: [3, C] float32, rows a, b, absent. Absent is a float32 `x` that is missing, NaN if there is none.
        missing: [2, C] int32, rows value, flag. NaN is missing whatever the flag.

    Returns:
        int64 [C, 259]: numbers below the first bin, in each, above the last, and missing ones.
    """
    gone = epilogue.missing_of(x, scale, missing)
    per_channel = (x.shape[1],) + (1,) * (x.dim() - 2)
    stored = x.to(torch.int32) if x.dtype == torch.uint16 else x
    v = stored.to(torch.float32) * scale[0].reshape(per_channel) + scale[1].reshape(per_channel)
    gone = gone | v.isnan()
    place = v.nan_to_num(0).clamp(0, BINS - 1).to(torch.int64) + 1
    place = torch.where(v < 0, 0, torch.where(v > BINS, BINS + 1, place))
    place = torch.where(gone, BINS + 2, place).transpose(0, 1).flatten(1)
    counts = torch.zeros((x.shape[1], CELLS), dtype=torch.int64, device=x.device)
    return counts.scatter_add_(1, place, torch.ones_like(place))


@triton.jit  # type: ignore[untyped-decorator]
def histogram_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    scale_ptr,
    missing_ptr,
    counts_ptr,
    samples,
    inner,
    C,
    tiles,
    parts,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Every `parts`-th tile of one channel; a tile is ROWS samples by COLS elements of their planes.

    Args:
        x_ptr: [samples, C, inner] stored numbers.
        scale_ptr: [3, C] float32.
        missing_ptr: [2, C] int32.
        counts_ptr: [C, 259] int64, added to.
        samples: N.
        inner: Elements a plane. A multiple of 16 gives 128-bit loads.
        C: Channels.
        tiles: Tiles a channel.
        parts: Programs a channel.
        ROWS: Samples a tile.
        COLS: Elements of a plane a tile.
    """
    pid = tl.program_id(0)
    channel = pid % C
    first = pid // C
    col_tiles = (inner - 1) // COLS + 1
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    a = tl.load(scale_ptr + channel)
    b = tl.load(scale_ptr + C + channel)
    absent = tl.load(scale_ptr + 2 * C + channel)
    value = tl.load(missing_ptr + channel)
    flag = tl.load(missing_ptr + C + channel)
    bins = tl.zeros([256], tl.int32)
    below = tl.zeros([1], tl.int64)
    above = tl.zeros([1], tl.int64)
    elements = tl.zeros([1], tl.int64)
    for tile in range(first, tiles, parts):
        sample = (tile // col_tiles).to(tl.int64) * ROWS
        col_start = (tile % col_tiles).to(tl.int64) * COLS
        rows_left = tl.minimum(samples - sample, ROWS).to(tl.int32)
        cols_left = tl.minimum(inner - col_start, COLS).to(tl.int32)
        mask = (rows < rows_left) & (cols < cols_left)
        start = (sample * C + channel) * inner + col_start
        inside = rows.to(tl.int64) * C * inner + cols if ROWS > 1 else cols
        x = tl.load(x_ptr + start + inside, mask=mask, other=0)
        v = tl.fma(x.to(tl.float32), a, b)
        if x.dtype.is_floating():
            there = mask & (v == v) & (((x != x) | (x == absent)) & (flag != 0) == 0)
        else:
            there = mask & ((x.to(tl.int32) == value) & (flag != 0) == 0) & (v == v)
        within = there & (v >= 0.0) & (v <= 256.0)
        place = tl.minimum(tl.where(within, v, 0.0).to(tl.int32), 255)
        bins += tl.histogram(tl.reshape(place, [ROWS * COLS]), 256, mask=tl.reshape(within, [ROWS * COLS]))
        outside = tl.where(there & (v < 0.0), 1, tl.where(there & (v > 256.0), 65536, 0))
        both = tl.sum(outside)  # at most 4096 of each
        below += both & 65535
        above += both >> 16
        elements += rows_left * cols_left
    row = counts_ptr + channel.to(tl.int64) * 259
    tl.atomic_add(row + 1 + tl.arange(0, 256), bins.to(tl.int64), sem="relaxed")
    counted = tl.sum(bins.to(tl.int64)) + tl.sum(below) + tl.sum(above)
    tl.atomic_add(row, tl.sum(below), sem="relaxed")
    tl.atomic_add(row + 257, tl.sum(above), sem="relaxed")
    tl.atomic_add(row + 258, tl.sum(elements) - counted, sem="relaxed")


def launch(x: Tensor, scale: Tensor, missing: Tensor) -> Tensor:
    """The op without PyTorch's dispatcher, for eager loops: the same checks, the same kernel, the same counts.

    Args:
        x: [N, C, *spatial] stored numbers, contiguous. See `reference`, as for the other arguments.
        scale: [3, C] float32, contiguous, on the device of `x`.
        missing: [2, C] int32, contiguous, on the device of `x`.

    Returns:
        int64 [C, 259], on the device of `x`; enqueued on the current stream.

    Raises:
        ValueError: An argument has another dtype, shape, device or layout.
    """
    _check(x, scale, missing)
    if x.device.type != "cuda":
        return reference(x, scale, missing)
    return _run(unwrapped, x, scale, missing, enable_fp_fusion=False)


def _histogram(x: Tensor, scale: Tensor, missing: Tensor) -> Tensor:
    _check(x, scale, missing)
    if x.device.type != "cuda":
        return reference(x, scale, missing)
    return _run(wrap_triton, x, scale, missing)


histogram = triton_op("gpuops::histogram", _histogram, mutates_args=())
"""The registered op, also `torch.ops.gpuops.histogram`: arguments, result and errors as `launch`."""


def _counts_shape(x: Tensor, scale: Tensor, missing: Tensor) -> Tensor:
    _check(x, scale, missing)
    return torch.empty((x.shape[1], CELLS), dtype=torch.int64, device=x.device)


register_fake("gpuops::histogram", _counts_shape)


def quantile(x: Tensor, q: Sequence[float], missing: Tensor, merge: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Exact quantiles of 8- and 16-bit integers: one pass over memory, and one more for each of `q`.

    The q-quantile is the smallest stored number that at least q of all are not larger than, as NumPy's
    `inverted_cdf` has it (Hyndman and Fan 1996, definition 1): a stored number, so that it is exact.

    Args:
        x: [N, C, *spatial] stored numbers, contiguous, dtype uint8, int8, int16 or uint16.
        q: Shares from 0 to 1.
        missing: [2, C] int32, rows value, flag, on the device of `x`.
        merge: What adds up int64 counts over ranks, such as an all_reduce that returns its tensor; None for one rank.

    Returns:
        int64 [len(q), C] on the device of `x`: stored numbers.

    Raises:
        ValueError: Another dtype, a share outside [0, 1], or a channel without any number.
    """
    if x.dtype not in (torch.uint8, torch.int8, torch.int16, torch.uint16):
        raise ValueError(f"x is {x.dtype}: exact quantiles need 8- or 16-bit integers; histogram takes any dtype")
    if not q or not all(0 <= share <= 1 for share in q):
        raise ValueError(f"q is {list(q)}: give shares from 0 to 1")
    channels, device = x.shape[1], x.device
    lowest = torch.iinfo(x.dtype).min
    wide = torch.iinfo(x.dtype).bits == 16

    def count(start: Tensor, step: int) -> Tensor:
        """Numbers below `start` [C], and in each of the 256 bins of `step` from there."""
        width = torch.full((channels,), 1.0 / step, device=device)
        rows = [width, -start.to(torch.float32) / step, torch.full_like(width, torch.nan)]
        counts = launch(x, torch.stack(rows), missing)
        return (counts if merge is None else merge(counts))[:, : BINS + 1]

    coarse = count(torch.full((channels,), lowest, device=device), 256 if wide else 1)
    total = coarse.sum(1)
    if not bool(total.all()):
        raise ValueError(f"channel {int((total == 0).to(torch.int8).argmax())} has no number that is not missing")
    found = []
    for share in q:
        # In float64 a product just above a whole number would ask for one more; NumPy rounds likewise.
        rank = (total.double() * share).ceil().to(torch.int64).clamp(min=1)[:, None]
        place = (coarse.cumsum(1) >= rank).to(torch.int8).argmax(1) - 1
        if wide:
            start = lowest + 256 * place
            fine = count(start, 1)
            place = (fine.cumsum(1) >= rank).to(torch.int8).argmax(1) - 1
            found.append(start + place)
        else:
            found.append(lowest + place)
    return torch.stack(found)


def plan(x: Tensor, scale: Tensor, missing: Tensor, counts: Tensor) -> tuple[Any, tuple[int], tuple[Any, ...]]:
    """The kernel, the launch grid and the kernel's arguments."""
    samples, channels = x.shape[:2]
    inner = math.prod(x.shape[2:])
    tile = 4096 if x.element_size() == 1 else 2048  # with 2048 bytes a B200 spills a register
    rows, cols, tiles, parts = reduction_tiles(samples, channels, inner, tile)
    arguments = (x, scale, missing, counts, samples, inner, channels, tiles, parts, rows, cols)
    return histogram_kernel, (channels * parts,), arguments


def _run(wrap: Callable[[Any], Any], x: Tensor, scale: Tensor, missing: Tensor, **options: bool) -> Tensor:
    """Allocate the counts and launch the kernel, or what `wrap` makes of it, on them."""
    counts = torch.zeros((x.shape[1], CELLS), dtype=torch.int64, device=x.device)
    if x.numel() == 0:
        return counts
    kernel, grid, arguments = plan(x, scale, missing, counts)
    with on_device_of(x):
        wrap(kernel)[grid](*arguments, **options)
    return counts


def _check(x: Tensor, scale: Tensor, missing: Tensor) -> None:
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"x has shape {tuple(x.shape)}: pass [N, C, *spatial] with 0 to 3 spatial axes")
    tables = ("scale", scale, 3, torch.float32), ("missing", missing, 2, torch.int32)
    epilogue.check_tables(x, x.shape[1], tables)
