"""`torch.ops.gpuops.transform`: stored numbers in, model inputs out, in one pass over memory.

Each stored number is read once, goes through the epilogue (see `gpuops_kernels.epilogue`: unpack, missing, fill, clip,
log, asinh, normalise, round), and is written once, in its place or with the channels moved to the other end.

The kernels differ from `reference` by at most half a unit in the last place of a * x and one of y for each
multiply-add, and by 2^-21 (absolute up to 1, relative above) for a logarithm or asinh.
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
from gpuops_kernels.launching import on_device_of, unwrapped

LAYOUTS = ("keep", "NHWC->NCHW", "NCHW->NHWC")
"""What happens to the axes, for any number of spatial axes; "keep" takes and gives [N, C, *spatial]."""

# Elements a program: 16 a thread in Triton's default of 4 warps, enough for 128-bit accesses at every pair of dtypes.
# The default is kept because wrap_triton turns an explicit num_warps into a second, autotuned kernel.
_TILE = 2048


def reference(
    x: Tensor, coefficients: Tensor, missing: Tensor, dtype: torch.dtype, functions: str = "", layout: str = "keep"
) -> Tensor:
    """The op in plain aten: what the CPU runs, what tests compare with, and what an exported graph holds.

    It checks nothing, so that a graph exported from it has no Python in it; `launch` and the op check.

    Args:
        x: [N, C, *spatial] stored numbers, or [N, *spatial, C] if `layout` begins with NHWC; dtype one of
            `INPUT_DTYPES`, 0 to 3 spatial axes.
        coefficients: [epilogue.rows(functions), C] float32: a, b, lo, hi; kind, a, b, lo, hi for each function; fill,
            absent. lo and hi may be infinite; lo <= hi. A float32 `x` equal to absent is missing; NaN there means
            that there is no such value.
        missing: [2, C] int32, rows value, flag. Where flag is 0 the channel has no missing value. For float32 `x` NaN
            and absent are missing and the value row is not read.
        dtype: Dtype of the result, one of `OUTPUT_DTYPES`.
        functions: Names from `epilogue.FUNCTIONS`, separated by commas, in the order in which they are applied.
        layout: One of `LAYOUTS`.

    Returns:
        [N, C, *spatial] of `dtype`, or [N, *spatial, C] if `layout` ends with NHWC, in the units that `coefficients`
        map to; contiguous.
    """
    if layout == "NHWC->NCHW":
        x = x.movedim(-1, 1)
    y = epilogue.reference(x, coefficients, missing, dtype, functions)
    if layout == "NCHW->NHWC":
        y = y.movedim(1, -1)
    return y if layout == "keep" else y.contiguous()


@triton.jit  # type: ignore[untyped-decorator]
def transform_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
    coefficients_ptr,
    missing_ptr,
    planes,
    inner,
    C,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CODE: tl.constexpr,
    NUMBER: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One tile of ROWS planes by COLS elements; a plane is one [*spatial] of one sample and channel.

    Args:
        x_ptr: [planes, inner] stored numbers.
        y_ptr: [planes, inner] results.
        coefficients_ptr: [5 * NUMBER + 6, C] float32.
        missing_ptr: [2, C] int32.
        planes: N * C.
        inner: Elements a plane. A multiple of 16 gives 128-bit loads and stores, which Triton picks at each call.
        C: Channels.
        ROWS: Planes a tile.
        COLS: Elements of a plane a tile.
        CODE: Functions, see `epilogue.parse`.
        NUMBER: How many functions.
        INTERPRETED: See `epilogue.store`.
    """
    # One grid axis holds all tiles: CUDA allows 2**31 - 1 blocks on the first axis and 65535 on the others, and both
    # N * C and inner / COLS can be larger than that.
    col_tiles = (inner - 1) // COLS + 1  # tl.cdiv would overflow int32 for the last 2047 values of inner
    pid = tl.program_id(0)
    row_start = (pid // col_tiles).to(tl.int64) * ROWS
    col_start = (pid % col_tiles).to(tl.int64) * COLS
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    # The tile's own place needs int64 (tensors above 2**31 elements). Offsets inside the tile fit int32: ROWS is 1
    # unless the whole plane fits in COLS.
    start = row_start * inner + col_start
    inside = rows * inner + cols
    rows_left = tl.minimum(planes - row_start, ROWS).to(tl.int32)
    cols_left = tl.minimum(inner - col_start, COLS).to(tl.int32)
    mask = (rows < rows_left) & (cols < cols_left)
    channel = ((row_start % C).to(tl.int32) + rows) % C

    x = tl.load(x_ptr + start + inside, mask=mask, other=0)
    y, _ = epilogue.finish(x, False, coefficients_ptr, missing_ptr, channel, C, CODE, NUMBER, INTERPRETED)
    epilogue.store(y_ptr + start + inside, y, mask, INTERPRETED)


@triton.jit  # type: ignore[untyped-decorator]
def move_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
    coefficients_ptr,
    missing_ptr,
    inner,
    C,
    FROM_LAST: tl.constexpr,
    COLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CODE: tl.constexpr,
    NUMBER: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One tile of COLS pixels by CHANNELS channels of one sample, read in one order of axes and written in the other.

    Args:
        x_ptr: [N, inner, C] stored numbers if FROM_LAST, else [N, C, inner].
        y_ptr: The results, in the other order.
        coefficients_ptr: [5 * NUMBER + 6, C] float32.
        missing_ptr: [2, C] int32.
        inner: Pixels a sample.
        C: Channels.
        FROM_LAST: Channels are the last axis of `x`, and of the result otherwise.
        COLS: Pixels a tile.
        CHANNELS: Channels a tile.
        CODE: Functions, see `epilogue.parse`.
        NUMBER: How many functions.
        INTERPRETED: See `epilogue.store`.
    """
    col_tiles = (inner - 1) // COLS + 1
    channel_tiles = (C - 1) // CHANNELS + 1
    pid = tl.program_id(0)
    col_start = (pid % col_tiles).to(tl.int64) * COLS
    channel_start = (pid // col_tiles % channel_tiles) * CHANNELS
    start = (pid // col_tiles // channel_tiles).to(tl.int64) * inner * C
    cols = tl.arange(0, COLS)[:, None]
    channels = tl.arange(0, CHANNELS)[None, :]
    mask = (cols < tl.minimum(inner - col_start, COLS).to(tl.int32)) & (channels < C - channel_start)
    channel = tl.minimum(channel_start + channels, C - 1)
    last = start + col_start * C + channel_start, cols * C + channels
    first = start + channel_start.to(tl.int64) * inner + col_start, channels.to(tl.int64) * inner + cols
    if FROM_LAST:
        x = tl.load(x_ptr + last[0] + last[1], mask=mask, other=0)
    else:
        x = tl.load(x_ptr + first[0] + first[1], mask=mask, other=0)
    y, _ = epilogue.finish(x, False, coefficients_ptr, missing_ptr, channel, C, CODE, NUMBER, INTERPRETED)
    if FROM_LAST:
        epilogue.store(y_ptr + first[0] + first[1], y, mask, INTERPRETED)
    else:
        epilogue.store(y_ptr + last[0] + last[1], y, mask, INTERPRETED)


def launch(
    x: Tensor, coefficients: Tensor, missing: Tensor, dtype: torch.dtype, functions: str = "", layout: str = "keep"
) -> Tensor:
    """The op without PyTorch's dispatcher, for eager loops: the same checks, the same kernel, the same bits.

    Nothing here waits for the GPU: values are not looked at, so a NaN coefficient is the caller's to find.

    Args:
        x: Stored numbers, contiguous; the number of samples may be 0. See `reference`, as for the other arguments.
        coefficients: float32, contiguous, on the device of `x`.
        missing: int32, contiguous, on the device of `x`.
        dtype: Dtype of the result, one of `OUTPUT_DTYPES`.
        functions: Names from `epilogue.FUNCTIONS`, separated by commas.
        layout: One of `LAYOUTS`.

    Returns:
        The result, contiguous, on the device of `x`; enqueued on the current stream.

    Raises:
        ValueError: An argument has another dtype, shape, device or layout, or needs a gradient (there is none).
    """
    _check(x, coefficients, missing, dtype, functions, layout)
    if x.device.type != "cuda":
        return reference(x, coefficients, missing, dtype, functions, layout)
    # Nothing here can be contracted (each multiply-add is an explicit fma), but Triton's default changes between
    # releases, so it is pinned where a launch takes options. wrap_triton takes none; a test compares the two codes.
    return _run(unwrapped, x, coefficients, missing, dtype, functions, layout, enable_fp_fusion=False)


def _transform(
    x: Tensor, coefficients: Tensor, missing: Tensor, dtype: torch.dtype, functions: str = "", layout: str = "keep"
) -> Tensor:
    # The branch is in the body because a separately registered CPU kernel breaks torch.compile, opcheck and AOTInductor
    # on machines without a GPU ("0 active drivers"): they trace the body whatever is registered.
    _check(x, coefficients, missing, dtype, functions, layout)
    if x.device.type != "cuda":
        return reference(x, coefficients, missing, dtype, functions, layout)
    return _run(wrap_triton, x, coefficients, missing, dtype, functions, layout)


transform = triton_op("gpuops::transform", _transform, mutates_args=())
"""The registered op, also `torch.ops.gpuops.transform`: arguments, result and errors as `launch`."""


def _transform_shape(
    x: Tensor, coefficients: Tensor, missing: Tensor, dtype: torch.dtype, functions: str = "", layout: str = "keep"
) -> Tensor:
    # Without this, exporting on CUDA would run `plan` on symbols, and the choice of a tile would limit dynamic spatial
    # sizes to the range that has the same tile.
    _check(x, coefficients, missing, dtype, functions, layout)
    return _result(x, dtype, layout)


register_fake("gpuops::transform", _transform_shape)


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Tensor]]:
    """The op as aten, for graphs that must run without this package.

    torch.export keeps the op on purpose. To leave it::

        table = torch.export.default_decompositions()
        table.update(decompositions())
        program = program.run_decompositions(table)

    Returns:
        A decomposition table of one entry.
    """
    return {torch.ops.gpuops.transform.default: reference}


def plan(
    x: Tensor, y: Tensor, coefficients: Tensor, missing: Tensor, functions: str = "", layout: str = "keep"
) -> tuple[Any, tuple[int], tuple[Any, ...]]:
    """The kernel, the launch grid and the kernel's arguments.

    The tile depends on channels and spatial axes only, so that a graph compiled for any batch size has one kernel.
    """
    stored = tuple(x.shape)
    channels = stored[-1] if layout == "NHWC->NCHW" else stored[1]
    inner = 1
    for size in stored[1:-1] if layout == "NHWC->NCHW" else stored[2:]:
        inner *= size
    functions_of = epilogue.parse(functions)
    tensors = (x, y, coefficients, missing)
    if layout == "keep":
        cols = _halved(_TILE, inner)
        rows = _TILE // cols
        planes = stored[0] * channels
        grid = (-(-planes // rows) * -(-inner // cols),)  # both rounded up; triton.cdiv costs 2 us a call
        return transform_kernel, grid, (*tensors, planes, inner, channels, rows, cols, *functions_of, False)
    across = _halved(64, channels)
    cols = _halved(_TILE // across, inner)
    grid = (stored[0] * -(-channels // across) * -(-inner // cols),)
    from_last = layout == "NHWC->NCHW"
    return move_kernel, grid, (*tensors, inner, channels, from_last, cols, across, *functions_of, False)


def _halved(most: int, size: int) -> int:
    """The smallest power of two that is at least `size`, and at most `most`."""
    while most > 1 and most // 2 >= size:
        most //= 2
    return most


def _run(
    wrap: Callable[[Any], Any],
    x: Tensor,
    coefficients: Tensor,
    missing: Tensor,
    dtype: torch.dtype,
    functions: str,
    layout: str,
    **options: bool,
) -> Tensor:
    """Allocate the result and launch the kernel, or what `wrap` makes of it, on it."""
    y = _result(x, dtype, layout)
    if x.numel() == 0:
        return y
    kernel, grid, arguments = plan(x, y, coefficients, missing, functions, layout)
    with on_device_of(x):
        wrap(kernel)[grid](*arguments, **options)
    return y


def _result(x: Tensor, dtype: torch.dtype, layout: str) -> Tensor:
    if layout == "keep":
        return torch.empty_like(x, dtype=dtype)
    samples, *rest = x.shape
    moved = [rest[-1], *rest[:-1]] if layout == "NHWC->NCHW" else [*rest[1:], rest[0]]
    return torch.empty([samples, *moved], dtype=dtype, device=x.device)


def _check(x: Tensor, coefficients: Tensor, missing: Tensor, dtype: torch.dtype, functions: str, layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}: pass one of {', '.join(LAYOUTS)}")
    if not 2 <= x.dim() <= 5:
        axes = "[N, *spatial, C]" if layout == "NHWC->NCHW" else "[N, C, *spatial]"
        raise ValueError(f"x has shape {tuple(x.shape)}: pass {axes} with 0 to 3 spatial axes")
    channels = x.shape[-1] if layout == "NHWC->NCHW" else x.shape[1]
    epilogue.check(x, channels, coefficients, missing, dtype, functions)
