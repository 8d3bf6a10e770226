"""`torch.ops.gpuops.transform_stats`: `transform`, and statistics of its result a channel, in one pass over memory.

The statistics are those of the float32 values before they are rounded to the result's dtype, without missing values
and NaN, so that they do not depend on the dtype, and merge exactly as the samples do: over batches, ranks and days.

Each program sums differences from the mean of its first tile (a shift, so that squares do not cancel) and the parts are
merged in float64. Source of the merge: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing
sample variances", Stanford STAN-CS-79-773, 1979.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import register_fake, triton_op, wrap_triton

from gpuops_kernels import epilogue
from gpuops_kernels.epilogue import INPUT_DTYPES as INPUT_DTYPES
from gpuops_kernels.epilogue import OUTPUT_DTYPES as OUTPUT_DTYPES
from gpuops_kernels.launching import on_device_of, reduction_tiles, unwrapped

COLUMNS = ("count", "mean", "m2", "min", "max", "nan", "missing")
"""Columns of the statistics. m2 is the sum of squared differences from the mean: variance * count."""

BINS = 256
"""Bins of the histogram."""

_TILE = 2048


def reference(
    x: Tensor,
    coefficients: Tensor,
    missing: Tensor,
    dtype: torch.dtype,
    edges: Tensor | None = None,
    functions: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """The op in plain aten: what the CPU runs and what tests compare with.

    Args:
        x: [N, C, *spatial] stored numbers, dtype one of `INPUT_DTYPES`, 0 to 3 spatial axes.
        coefficients: [epilogue.rows(functions), C] float32, see `gpuops_kernels.transform`.
        missing: [2, C] int32, rows value, flag.
        dtype: Dtype of the result, one of `OUTPUT_DTYPES`.
        edges: [2, C] float32, lower edge of the first bin and upper edge of the last, in the units of the result; the
            upper edge itself is in the last bin. None counts nothing.
        functions: Names from `epilogue.FUNCTIONS`, separated by commas.

    Returns:
        y: [N, C, *spatial] of `dtype`, as `transform` gives it.
        statistics: [C, 7] float64, columns `COLUMNS`. Without any value mean, min and max are NaN and m2 is 0.
        counts: [C, 258] int64: values below the edges, in each bin, above; [C, 0] without `edges`. -inf is below and
            inf above.
    """
    y = epilogue.reference(x, coefficients, missing, torch.float32, functions)
    values, gone = (t.transpose(0, 1).flatten(1) for t in (y, epilogue.missing_of(x, coefficients, missing)))
    is_nan = values.isnan() & ~gone
    valid = ~gone & ~is_nan
    exact = values.double()
    count = valid.sum(1).double()
    mean = torch.where(valid, exact, 0).sum(1) / count
    m2 = torch.where(valid, (exact - mean[:, None]).square(), 0).sum(1)
    lowest, highest = (_extreme(exact, valid, sign) for sign in (-1.0, 1.0))
    columns = [count, mean, m2, lowest, highest, is_nan.sum(1).double(), gone.sum(1).double()]
    counts = torch.zeros((values.shape[0], 0 if edges is None else BINS + 2), dtype=torch.int64, device=x.device)
    if edges is not None:
        lo, hi = edges[0, :, None], edges[1, :, None]
        place = ((values - lo) * (BINS / (hi - lo))).nan_to_num(0).clamp(0, BINS - 1).to(torch.int64) + 1
        place = torch.where(values < lo, 0, torch.where(values > hi, BINS + 1, place))
        counts.scatter_add_(1, place, valid.to(torch.int64))
    return y.to(dtype), torch.stack(columns, 1), counts


def _extreme(values: Tensor, valid: Tensor, sign: float) -> Tensor:
    if values.shape[1] == 0:
        return torch.full_like(values.sum(1), torch.nan)
    found = sign * torch.where(valid, sign * values, -torch.inf).amax(1)
    return torch.where(valid.any(1), found, torch.nan)


def merge(a: Tensor, b: Tensor) -> Tensor:
    """Statistics of two sets of samples together; associative and commutative but for rounding.

    Args:
        a: [C, 7] float64, columns `COLUMNS`.
        b: The same of other samples.

    Returns:
        [C, 7] float64.
    """
    count = a[:, 0] + b[:, 0]
    mine, theirs = (torch.where(s[:, 0] > 0, s[:, 1], 0) for s in (a, b))
    share = b[:, 0] / count
    gap = theirs - mine
    mean = torch.where(count > 0, mine + gap * share, torch.nan)
    m2 = torch.where(count > 0, a[:, 2] + b[:, 2] + gap.square() * a[:, 0] * share, 0)
    extremes = torch.fmin(a[:, 3], b[:, 3]), torch.fmax(a[:, 4], b[:, 4])
    return torch.stack([count, mean, m2, *extremes, a[:, 5] + b[:, 5], a[:, 6] + b[:, 6]], 1)


@triton.jit  # type: ignore[untyped-decorator]
def stats_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
    coefficients_ptr,
    missing_ptr,
    edges_ptr,
    parts_ptr,
    counts_ptr,
    samples,
    inner,
    C,
    tiles,
    parts,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LANE: tl.constexpr,
    HISTOGRAM: tl.constexpr,
    CODE: tl.constexpr,
    NUMBER: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Every `parts`-th tile of one channel; a tile is ROWS samples by COLS elements of their planes.

    Args:
        x_ptr: [samples, C, inner] stored numbers.
        y_ptr: [samples, C, inner] results.
        coefficients_ptr: [5 * NUMBER + 6, C] float32.
        missing_ptr: [2, C] int32.
        edges_ptr: [2, C] float32; read where HISTOGRAM.
        parts_ptr: [C, parts, 7] float64, what this program found.
        counts_ptr: [C, 258] int64, added to where HISTOGRAM.
        samples: N.
        inner: Elements a plane. A multiple of 16 gives 128-bit loads and stores.
        C: Channels.
        tiles: Tiles a channel.
        parts: Programs a channel.
        ROWS: Samples a tile.
        COLS: Elements of a plane a tile.
        LANE: Neighbours that a thread holds, which are summed before any sum is kept: a sum each would take 100
            registers.
        HISTOGRAM: Count values by bin.
        CODE: Functions, see `epilogue.parse`.
        NUMBER: How many functions.
        INTERPRETED: See `epilogue.store`.
    """
    SUMS: tl.constexpr = ROWS * COLS // LANE
    pid = tl.program_id(0)
    channel = pid % C
    first = pid // C
    valid_sum = tl.zeros([SUMS], tl.int32)
    gone_sum = tl.zeros([SUMS], tl.int32)
    elements = tl.zeros([1], tl.int64)
    total = tl.zeros([SUMS], tl.float32)
    squares = tl.zeros([SUMS], tl.float32)
    lowest = tl.full([SUMS], float("inf"), tl.float32)
    highest = tl.full([SUMS], float("-inf"), tl.float32)
    below = tl.zeros([SUMS], tl.int32)
    above = tl.zeros([SUMS], tl.int32)
    bins = tl.zeros([256], tl.int32)
    if HISTOGRAM:
        lo = tl.load(edges_ptr + channel)
        hi = tl.load(edges_ptr + C + channel)
        scale = tl.div_rn(256.0, hi - lo)
    # The shift is the mean of the first tile, which is read twice, the second time from a cache.
    start, inside, mask, _ = _tile(first, channel, samples, inner, C, ROWS, COLS)
    x = tl.load(x_ptr + start + inside, mask=mask, other=0)
    y, gone = epilogue.finish(x, False, coefficients_ptr, missing_ptr, channel, C, CODE, NUMBER, INTERPRETED)
    valid = mask & (gone == 0) & (y == y)
    shift = tl.sum(tl.where(valid, y, 0.0)) / tl.maximum(tl.sum(valid.to(tl.float32)), 1.0)
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
    for tile in range(first, tiles, parts):
        start, inside, mask, number = _tile(tile, channel, samples, inner, C, ROWS, COLS)
        x = tl.load(x_ptr + start + inside, mask=mask, other=0)
        y, gone = epilogue.finish(x, False, coefficients_ptr, missing_ptr, channel, C, CODE, NUMBER, INTERPRETED)
        epilogue.store(y_ptr + start + inside, y, mask, INTERPRETED)

        gone = gone & mask
        counted = tl.where(gone | (mask == 0), float("nan"), y)
        valid = counted == counted
        moved = tl.reshape(tl.where(valid, y - shift, 0.0), [SUMS, LANE])
        total += tl.sum(moved, axis=1)
        squares += tl.sum(moved * moved, axis=1)
        valid_sum += tl.sum(tl.reshape(valid.to(tl.int32), [SUMS, LANE]), axis=1)
        gone_sum += tl.sum(tl.reshape(gone.to(tl.int32), [SUMS, LANE]), axis=1)
        elements += number
        # A GPU's minimum and maximum pass over NaN; the interpreter's keep it.
        small = tl.where(valid, counted, float("inf")) if INTERPRETED else counted
        large = tl.where(valid, counted, float("-inf")) if INTERPRETED else counted
        lowest = tl.minimum(lowest, tl.min(tl.reshape(small, [SUMS, LANE]), axis=1))
        highest = tl.maximum(highest, tl.max(tl.reshape(large, [SUMS, LANE]), axis=1))
        if HISTOGRAM:
            under = valid & (y < lo)
            over = valid & (y > hi)
            within = valid & (under == 0) & (over == 0)
            place = tl.minimum(tl.where(within, (y - lo) * scale, 0.0).to(tl.int32), 255)
            bins += tl.histogram(tl.reshape(place, [ROWS * COLS]), 256, mask=tl.reshape(within, [ROWS * COLS]))
            below += tl.sum(tl.reshape(under.to(tl.int32), [SUMS, LANE]), axis=1)
            above += tl.sum(tl.reshape(over.to(tl.int32), [SUMS, LANE]), axis=1)

    count = tl.sum(valid_sum).to(tl.float64)
    missing_count = tl.sum(gone_sum).to(tl.float64)
    moved_sum = tl.sum(total.to(tl.float64))
    divisor = tl.maximum(count, 1.0)
    part = parts_ptr + (channel.to(tl.int64) * parts + first) * 7
    tl.store(part, count)
    tl.store(part + 1, tl.where(count > 0, shift.to(tl.float64) + moved_sum / divisor, 0.0))
    tl.store(part + 2, tl.maximum(tl.sum(squares.to(tl.float64)) - moved_sum * moved_sum / divisor, 0.0))
    tl.store(part + 3, tl.min(lowest).to(tl.float64))
    tl.store(part + 4, tl.max(highest).to(tl.float64))
    tl.store(part + 5, tl.sum(elements).to(tl.float64) - count - missing_count)
    tl.store(part + 6, missing_count)
    if HISTOGRAM:
        row = counts_ptr + channel.to(tl.int64) * 258
        tl.atomic_add(row + 1 + tl.arange(0, 256), bins.to(tl.int64), sem="relaxed")
        tl.atomic_add(row, tl.sum(below).to(tl.int64), sem="relaxed")
        tl.atomic_add(row + 257, tl.sum(above).to(tl.int64), sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator]
def _tile(tile, channel, samples, inner, C, ROWS: tl.constexpr, COLS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One channel's tile: its first offset, offsets in it, which of them exist, how many they are.

    No pointer goes in: PyTorch would take what is stored behind the results for a change of it, and copy the input.
    """
    col_tiles = (inner - 1) // COLS + 1
    sample = (tile // col_tiles).to(tl.int64) * ROWS
    col_start = (tile % col_tiles).to(tl.int64) * COLS
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    rows_left = tl.minimum(samples - sample, ROWS).to(tl.int32)
    cols_left = tl.minimum(inner - col_start, COLS).to(tl.int32)
    mask = (rows < rows_left) & (cols < cols_left)
    start = (sample * C + channel) * inner + col_start
    inside = rows.to(tl.int64) * C * inner + cols if ROWS > 1 else cols
    return start, inside, mask, rows_left * cols_left


@triton.jit  # type: ignore[untyped-decorator]
def merge_kernel(parts_ptr, statistics_ptr, parts, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The parts of one channel become its row of statistics.

    Args:
        parts_ptr: [C, parts, 7] float64.
        statistics_ptr: [C, 7] float64.
        parts: Programs a channel had.
        PARTS: The power of two that holds them.
    """
    channel = tl.program_id(0)
    part = tl.arange(0, PARTS)
    mask = part < parts
    source = parts_ptr + (channel.to(tl.int64) * parts + part) * 7
    count = tl.load(source, mask=mask, other=0.0)
    means = tl.load(source + 1, mask=mask, other=0.0)
    total = tl.sum(count)
    mean = tl.sum(count * means) / total
    gap = tl.where(count > 0, means - mean, 0.0)
    m2 = tl.sum(tl.load(source + 2, mask=mask, other=0.0) + count * gap * gap)
    nothing = mean * 0.0 if total > 0 else mean  # NaN without any value
    row = statistics_ptr + channel.to(tl.int64) * 7
    tl.store(row, total)
    tl.store(row + 1, mean)
    tl.store(row + 2, tl.where(total > 0, m2, 0.0))
    tl.store(row + 3, tl.where(total > 0, tl.min(tl.load(source + 3, mask=mask, other=float("inf"))), nothing))
    tl.store(row + 4, tl.where(total > 0, tl.max(tl.load(source + 4, mask=mask, other=float("-inf"))), nothing))
    tl.store(row + 5, tl.sum(tl.load(source + 5, mask=mask, other=0.0)))
    tl.store(row + 6, tl.sum(tl.load(source + 6, mask=mask, other=0.0)))


def launch(
    x: Tensor,
    coefficients: Tensor,
    missing: Tensor,
    dtype: torch.dtype,
    edges: Tensor | None = None,
    functions: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """The op without PyTorch's dispatcher, for eager loops: the same checks, the same kernels, the same bits.

    Two launches: the second merges what at most 1024 programs, or one a channel, have found.

    Args:
        x: [N, C, *spatial] stored numbers, contiguous. See `reference`, as for the other arguments.
        coefficients: float32, contiguous, on the device of `x`.
        missing: int32, contiguous, on the device of `x`.
        dtype: Dtype of the result, one of `OUTPUT_DTYPES`.
        edges: [2, C] float32, contiguous, on the device of `x`, or None.
        functions: Names from `epilogue.FUNCTIONS`, separated by commas.

    Returns:
        (y, statistics, counts) as `reference` gives them, on the device of `x`; enqueued on the current stream.

    Raises:
        ValueError: An argument has another dtype, shape, device or layout, or needs a gradient (there is none).
    """
    _check(x, coefficients, missing, dtype, edges, functions)
    if x.device.type != "cuda":
        return reference(x, coefficients, missing, dtype, edges, functions)
    return _run(unwrapped, x, coefficients, missing, dtype, edges, functions, enable_fp_fusion=True)


def _transform_stats(
    x: Tensor,
    coefficients: Tensor,
    missing: Tensor,
    dtype: torch.dtype,
    edges: Tensor | None = None,
    functions: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, coefficients, missing, dtype, edges, functions)
    if x.device.type != "cuda":
        return reference(x, coefficients, missing, dtype, edges, functions)
    return _run(wrap_triton, x, coefficients, missing, dtype, edges, functions)


transform_stats = triton_op("gpuops::transform_stats", _transform_stats, mutates_args=())
"""The registered op, also `torch.ops.gpuops.transform_stats`: arguments, result and errors as `launch`."""


def _shapes(
    x: Tensor,
    coefficients: Tensor,
    missing: Tensor,
    dtype: torch.dtype,
    edges: Tensor | None = None,
    functions: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, coefficients, missing, dtype, edges, functions)
    channels = x.shape[1]
    return (
        torch.empty_like(x, dtype=dtype),
        torch.empty((channels, len(COLUMNS)), dtype=torch.float64, device=x.device),
        torch.empty((channels, 0 if edges is None else BINS + 2), dtype=torch.int64, device=x.device),
    )


register_fake("gpuops::transform_stats", _shapes)


def plan(
    x: Tensor, y: Tensor, coefficients: Tensor, missing: Tensor, edges: Tensor | None, functions: str = ""
) -> tuple[Any, tuple[int], tuple[Any, ...]]:
    """The first kernel, its launch grid and its arguments, of which the sixth and seventh are the parts and counts."""
    samples, channels = x.shape[:2]
    inner = 1
    for size in x.shape[2:]:
        inner *= size
    tile = _TILE if edges is None else _TILE // 2  # counting takes registers
    rows, cols, tiles, parts = reduction_tiles(samples, channels, inner, tile)
    found = torch.empty((channels, parts, len(COLUMNS)), dtype=torch.float64, device=x.device)
    counts = torch.zeros((channels, 0 if edges is None else BINS + 2), dtype=torch.int64, device=x.device)
    lane = min(cols, 16 // x.element_size())
    tensors = (x, y, coefficients, missing, coefficients if edges is None else edges, found, counts)
    sizes = (samples, inner, channels, tiles, parts, rows, cols, lane)
    arguments = (*tensors, *sizes, edges is not None, *epilogue.parse(functions), False)
    return stats_kernel, (channels * parts,), arguments


def _run(
    wrap: Callable[[Any], Any],
    x: Tensor,
    coefficients: Tensor,
    missing: Tensor,
    dtype: torch.dtype,
    edges: Tensor | None,
    functions: str,
    **options: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the results and launch the kernels, or what `wrap` makes of them, on them."""
    y = torch.empty_like(x, dtype=dtype)
    channels = x.shape[1]
    if x.numel() == 0:
        nothing = torch.tensor([0.0, torch.nan, 0.0, torch.nan, torch.nan, 0.0, 0.0], dtype=torch.float64)
        counts = torch.zeros((channels, 0 if edges is None else BINS + 2), dtype=torch.int64, device=x.device)
        return y, nothing.to(x.device).repeat(channels, 1), counts
    statistics = torch.empty((channels, len(COLUMNS)), dtype=torch.float64, device=x.device)
    kernel, grid, arguments = plan(x, y, coefficients, missing, edges, functions)
    found, counts = arguments[5:7]
    parts = found.shape[1]
    with on_device_of(x):
        wrap(kernel)[grid](*arguments, **options)
        wrap(merge_kernel)[(channels,)](found, statistics, parts, triton.next_power_of_2(parts), **options)
    return y, statistics, counts


def _check(
    x: Tensor, coefficients: Tensor, missing: Tensor, dtype: torch.dtype, edges: Tensor | None, functions: str
) -> None:
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"x has shape {tuple(x.shape)}: pass [N, C, *spatial] with 0 to 3 spatial axes")
    channels = x.shape[1]
    epilogue.check(x, channels, coefficients, missing, dtype, functions)
    if edges is None:
        return
    if edges.dtype != torch.float32 or edges.shape != (2, channels) or not edges.is_contiguous():
        raise ValueError(f"edges is {edges.dtype} {tuple(edges.shape)}: pass contiguous float32 [2, {channels}]")
    if edges.device != x.device:
        raise ValueError(f"edges is on {edges.device} and x on {x.device}: move it with edges.to(x.device)")
