"""`torch.ops.gpuops.transform`: stored numbers in, model inputs out, in one pass over memory.

    y[n, c, ...] = fill[c]                                                   where x[n, c, ...] is missing
                   min(max(fma(a[c], float32(x[n, c, ...]), b[c]), lo[c]), hi[c])   elsewhere

Unpacking (scale and offset), clipping and normalising are one affine map and one clip a channel. The caller folds them
into `coefficients` in float64; the op reads each stored number once and writes each result once.

All arithmetic is float32. The kernel's multiply-add rounds once (fma); `reference` rounds twice, because plain aten and
ONNX have no fma: the two differ by at most half a unit in the last place of a * x and one of y. The result is rounded
to the output dtype to nearest even; what overflows float16 becomes infinite. A NaN that is not missing stays NaN.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import register_fake, triton_op, wrap_triton

INPUT_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.float32)
"""Dtypes of `x`."""

OUTPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of the result."""

# Elements a program: 16 a thread in Triton's default of 4 warps, enough for 128-bit accesses at every pair of dtypes.
# The default is kept because wrap_triton turns an explicit num_warps into a second, autotuned kernel.
_TILE = 2048


def reference(x: Tensor, coefficients: Tensor, missing: Tensor, dtype: torch.dtype) -> Tensor:
    """The op in plain aten: what the CPU runs, what tests compare with, and what an exported graph holds.

    It checks nothing, so that a graph exported from it has no Python in it; `launch` and the op check.

    Args:
        x: [N, C, *spatial] stored numbers, dtype one of `INPUT_DTYPES`, 0 to 3 spatial axes.
        coefficients: [6, C] float32, rows a, b, lo, hi, fill, absent. lo and hi may be infinite; lo <= hi. A float32
            `x` equal to absent is missing; NaN there means that there is no such value.
        missing: [2, C] int32, rows value, flag. Where flag is 0 the channel has no missing value. For float32 `x` NaN
            and absent are missing and the value row is not read.
        dtype: Dtype of the result, one of `OUTPUT_DTYPES`.

    Returns:
        [N, C, *spatial] of `dtype`, in the units that `coefficients` maps to.
    """
    per_channel = (x.shape[1],) + (1,) * (x.dim() - 2)
    a, b, lo, hi, fill, absent = (coefficients[row].reshape(per_channel) for row in range(6))
    value, flag = (missing[row].reshape(per_channel) for row in range(2))
    if x.dtype == torch.uint16:
        x = x.to(torch.int32)  # torch has few uint16 operators; TensorRT has no 16-bit integers at all
    # Integers are compared as integers: in float32, 16777216 and 16777217 would be the same missing value.
    is_missing = torch.isnan(x) | (x == absent) if x.is_floating_point() else x.to(torch.int32) == value
    y = x.to(torch.float32) * a + b
    y = torch.minimum(torch.maximum(y, lo), hi)  # both keep NaN
    return torch.where(is_missing & (flag != 0), fill, y).to(dtype)


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
    ROUND_BY_BITS: tl.constexpr,
):
    """One tile of ROWS planes by COLS elements; a plane is one [*spatial] of one sample and channel.

    Args:
        x_ptr: [planes, inner] stored numbers.
        y_ptr: [planes, inner] results.
        coefficients_ptr: [6, C] float32.
        missing_ptr: [2, C] int32.
        planes: N * C.
        inner: Elements a plane. A multiple of 16 gives 128-bit loads and stores, which Triton picks at each call.
        C: Channels.
        ROWS: Planes a tile.
        COLS: Elements of a plane a tile.
        ROUND_BY_BITS: Round to bfloat16 with integer arithmetic. Triton's interpreter cuts the low bits off instead of
            rounding to nearest even as a GPU does; only tests that run the interpreter set this.
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
    a = tl.load(coefficients_ptr + channel)
    b = tl.load(coefficients_ptr + C + channel)
    lo = tl.load(coefficients_ptr + 2 * C + channel)
    hi = tl.load(coefficients_ptr + 3 * C + channel)
    fill = tl.load(coefficients_ptr + 4 * C + channel)
    flag = tl.load(missing_ptr + C + channel)
    # The condition is known at compile time: one of the two is compiled, and loads its own row.
    if x.dtype.is_floating():
        is_missing = (x != x) | (x == tl.load(coefficients_ptr + 5 * C + channel))
    else:
        is_missing = x.to(tl.int32) == tl.load(missing_ptr + channel)

    y = tl.fma(x.to(tl.float32), a, b)
    y = tl.maximum(y, lo, propagate_nan=tl.PropagateNan.ALL)
    y = tl.minimum(y, hi, propagate_nan=tl.PropagateNan.ALL)
    y = tl.where(is_missing & (flag != 0), fill, y)

    if ROUND_BY_BITS:
        bits = y.to(tl.uint32, bitcast=True)
        # Adding half a unit, less one bit when the last kept bit is even, carries exactly when nearest-even rounds up.
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(y == y, rounded, 0x7FC0)  # a NaN must not carry into infinity or zero
        tl.store(y_ptr + start + inside, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(y_ptr + start + inside, y.to(y_ptr.dtype.element_ty), mask=mask)


def launch(x: Tensor, coefficients: Tensor, missing: Tensor, dtype: torch.dtype) -> Tensor:
    """The op without PyTorch's dispatcher, for eager loops: the same checks, the same kernel, the same bits.

    Nothing here waits for the GPU: values are not looked at, so a NaN coefficient is the caller's to find.

    Args:
        x: [N, C, *spatial] stored numbers, contiguous, dtype one of `INPUT_DTYPES`, 0 to 3 spatial axes; N may be 0.
        coefficients: [5, C] float32, rows a, b, lo, hi, fill; contiguous, on the device of `x`.
        missing: [2, C] int32, rows value, flag; contiguous, on the device of `x`. See `reference`.
        dtype: Dtype of the result, one of `OUTPUT_DTYPES`.

    Returns:
        [N, C, *spatial] of `dtype`, contiguous, on the device of `x`; enqueued on the current stream.

    Raises:
        ValueError: An argument has another dtype, shape, device or layout, or needs a gradient (there is none).
    """
    _check(x, coefficients, missing, dtype)
    if x.device.type != "cuda":
        return reference(x, coefficients, missing, dtype)
    # Nothing here can be contracted (the one multiply-add is an explicit fma), but Triton's default changes between
    # releases, so it is pinned where a launch takes options. wrap_triton takes none; a test compares the two codes.
    return _run(transform_kernel, x, coefficients, missing, dtype, enable_fp_fusion=False)


def _transform(x: Tensor, coefficients: Tensor, missing: Tensor, dtype: torch.dtype) -> Tensor:
    # The branch is in the body because a separately registered CPU kernel breaks torch.compile, opcheck and AOTInductor
    # on machines without a GPU ("0 active drivers"): they trace the body whatever is registered.
    _check(x, coefficients, missing, dtype)
    if x.device.type != "cuda":
        return reference(x, coefficients, missing, dtype)
    return _run(wrap_triton(transform_kernel), x, coefficients, missing, dtype)


transform = triton_op("gpuops::transform", _transform, mutates_args=())
"""The registered op, also `torch.ops.gpuops.transform`: arguments, result and errors as `launch`."""


def _transform_shape(x: Tensor, coefficients: Tensor, missing: Tensor, dtype: torch.dtype) -> Tensor:
    # Without this, exporting on CUDA would run `_plan` on symbols, and the choice of a tile would limit dynamic spatial
    # sizes to the range that has the same tile.
    _check(x, coefficients, missing, dtype)
    return torch.empty_like(x, dtype=dtype)


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


def _run(kernel: Any, x: Tensor, coefficients: Tensor, missing: Tensor, dtype: torch.dtype, **options: bool) -> Tensor:
    """Allocate the result and launch `kernel` (the JIT function, or what wrap_triton made of it) on it."""
    y = torch.empty_like(x, dtype=dtype)
    if x.numel() == 0:
        return y
    grid, arguments = _plan(x, y, coefficients, missing)
    with _on_device_of(x):
        kernel[grid](*arguments, **options)
    return y


def _plan(x: Tensor, y: Tensor, coefficients: Tensor, missing: Tensor) -> tuple[tuple[int], tuple[Any, ...]]:
    """The launch grid and the kernel's arguments.

    The tile depends on the spatial axes only, so that a graph compiled for any batch size has one kernel.
    """
    samples, channels = x.shape[0], x.shape[1]
    inner = 1
    for size in x.shape[2:]:
        inner *= size
    cols = _TILE
    while cols > 1 and cols // 2 >= inner:
        cols //= 2
    rows = _TILE // cols
    planes = samples * channels
    grid = (-(-planes // rows) * -(-inner // cols),)  # both rounded up; triton.cdiv costs 2 us a call
    return grid, (x, y, coefficients, missing, planes, inner, channels, rows, cols, False)


def _on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device. CUDA is not initialised when a graph is traced for a GPU without one."""
    return torch.cuda.device(x.device) if torch.cuda.is_initialized() else nullcontext()


def _check(x: Tensor, coefficients: Tensor, missing: Tensor, dtype: torch.dtype) -> None:
    """Refuse what the kernel would read wrongly; shapes and types only, so that it never waits for a device."""
    if x.dtype not in INPUT_DTYPES:
        raise ValueError(f"x is {x.dtype}: pass one of {_names(INPUT_DTYPES)} (the dtype that the array is stored in)")
    if dtype not in OUTPUT_DTYPES:
        raise ValueError(f"dtype is {dtype}: ask for one of {_names(OUTPUT_DTYPES)}")
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"x has shape {tuple(x.shape)}: pass [N, C, *spatial] with 0 to 3 spatial axes")
    channels = x.shape[1]
    for name, tensor, rows, want in (
        ("coefficients", coefficients, 6, torch.float32),
        ("missing", missing, 2, torch.int32),
    ):
        if tensor.dtype != want:
            raise ValueError(f"{name} is {tensor.dtype}: convert it with {name}.to({want})")
        if tensor.dim() != 2 or tensor.shape[0] != rows or tensor.shape[1] != channels:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: x has {channels} channels, so pass [{rows}, {channels}]"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}: move it with {name}.to(x.device)")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous: pass {name}.contiguous()")
    if not x.is_contiguous():
        raise ValueError("x is not contiguous: pass x.contiguous() (a channels_last tensor would be copied by that)")
    if torch.is_grad_enabled() and (x.requires_grad or coefficients.requires_grad):
        raise ValueError(
            "no gradient passes through this op: call it under torch.no_grad(), or detach x and coefficients"
        )


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
