"""What every op here does with a stored number before it writes it: unpack, clip, log or asinh, normalise, fill, round.

    v = clip(fma(a0, float32(x), b0), lo0, hi0)
    v = clip(fma(a1, f1(v), b1), lo1, hi1)         for each function f1, f2, ... of `functions`
    y = fill where x is missing, else v             rounded to nearest even

A function is the same for all channels, or each channel's own.

Unpacking (scale and offset), clipping and normalising between two functions are one affine map and one clip a channel;
the caller folds them in float64. All arithmetic is float32. The kernels' multiply-adds round once (fma); `reference`
rounds twice, because plain aten and ONNX have no fma. A NaN that is not missing stays NaN, in every clip too.

`x` equal to its channel's missing value is missing: integers are compared as integers (`missing`), float32 with the
last row of `coefficients`, where NaN is missing as well.
"""

from collections.abc import Iterable
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

INPUT_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.float32)
"""Dtypes of stored numbers."""

OUTPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of results."""

FUNCTIONS = ("log", "asinh", "each")
"""Functions by name: natural logarithm (negative numbers become NaN, 0 becomes -inf), inverse hyperbolic sine, and what
each channel's `kind` says: 0 for none, 1 for log, 2 for asinh."""

_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@cache
def parse(functions: str) -> tuple[int, int]:
    """(code, number) of a comma-separated list: two bits a function, from the lowest; 1 log, 2 asinh, 3 each.

    Raises:
        ValueError: a name that is not in `FUNCTIONS`, or more than eight of them.
    """
    names = functions.split(",") if functions else []
    unknown = [name for name in names if name not in FUNCTIONS]
    if unknown or len(names) > 8:
        raise ValueError(
            f"functions is {functions!r}: name at most eight of {', '.join(FUNCTIONS)}, separated by commas"
        )
    return sum(FUNCTIONS.index(name) + 1 << 2 * i for i, name in enumerate(names)), len(names)


def rows(functions: str) -> int:
    """Rows of `coefficients`: a, b, lo, hi; for each function kind, a, b, lo, hi; then fill and absent.

    Kind is read where the function is "each".
    """
    return 4 + 5 * parse(functions)[1] + 2


def reference(
    x: Tensor,
    coefficients: Tensor,
    missing: Tensor,
    dtype: torch.dtype,
    functions: str = "",
    outside: Tensor | None = None,
) -> Tensor:
    """The epilogue in plain aten, with nothing in it that an exported graph could not hold.

    Args:
        x: [N, C, *spatial] stored numbers, dtype one of `INPUT_DTYPES`.
        coefficients: [rows(functions), C] float32; lo and hi may be infinite, lo <= hi.
        missing: [2, C] int32, rows value, flag. Where flag is 0 the channel has no missing value.
        dtype: Dtype of the result, one of `OUTPUT_DTYPES`.
        functions: Names from `FUNCTIONS`, separated by commas.
        outside: Bool, shape of `x` or one that broadcasts to it: elements that are filled whatever they hold.

    Returns:
        [N, C, *spatial] of `dtype`.
    """
    per_channel = (x.shape[1],) + (1,) * (x.dim() - 2)
    if x.dtype == torch.uint16:
        x = x.to(torch.int32)  # torch has few uint16 operators; TensorRT has no 16-bit integers at all
    row = [coefficients[i].reshape(per_channel) for i in range(rows(functions))]
    is_missing = missing_of(x, coefficients, missing)
    if outside is not None:
        is_missing = is_missing | outside
    y = _affine_clip(x.to(torch.float32), row[:4])
    for i, name in enumerate(functions.split(",") if functions else []):
        if name == "each":
            kind = row[5 * i + 4]
            y = torch.where(kind == 1, torch.log(y), torch.where(kind == 2, torch.asinh(y), y))
        else:
            y = torch.log(y) if name == "log" else torch.asinh(y)
        y = _affine_clip(y, row[5 * i + 5 : 5 * i + 9])
    return torch.where(is_missing, row[-2], y).to(dtype)


def missing_of(x: Tensor, coefficients: Tensor, missing: Tensor) -> Tensor:
    """Bool, shape of `x`: the stored numbers that are missing. Arguments as `reference`."""
    per_channel = (x.shape[1],) + (1,) * (x.dim() - 2)
    value, flag = (missing[i].reshape(per_channel) for i in range(2))
    if x.is_floating_point():
        is_missing = torch.isnan(x) | (x == coefficients[-1].reshape(per_channel))
    else:  # in float32, 16777216 and 16777217 would be the same missing value
        is_missing = x.to(torch.int32) == value
    return is_missing & (flag != 0)


def _affine_clip(v: Tensor, row: list[Tensor]) -> Tensor:
    a, b, lo, hi = row
    return torch.minimum(torch.maximum(v * a + b, lo), hi)  # both keep NaN


@triton.jit  # type: ignore[untyped-decorator]
def finish(  # type: ignore[no-untyped-def]
    x,
    outside,
    coefficients_ptr,
    missing_ptr,
    channel,
    C,
    CODE: tl.constexpr,
    NUMBER: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The epilogue of a block, in float32: (y, is_missing).

    Args:
        x: Stored numbers.
        outside: Elements that are filled whatever they hold, or False.
        coefficients_ptr: [5 * NUMBER + 6, C] float32.
        missing_ptr: [2, C] int32.
        channel: Channel of each element; a shape that broadcasts to that of `x`, so that a plane loads a number once.
        C: Channels.
        CODE: The functions, as `parse` gives them.
        NUMBER: How many they are.
        INTERPRETED: See `store`.
    """
    last = coefficients_ptr + (5 * NUMBER + 4) * C + channel
    fill = tl.load(last)
    flag = tl.load(missing_ptr + C + channel)
    # The condition is known at compile time: one of the two is compiled, and loads its own row.
    if x.dtype.is_floating():
        is_missing = (x != x) | (x == tl.load(last + C))
    else:
        is_missing = x.to(tl.int32) == tl.load(missing_ptr + channel)
    is_missing = (is_missing & (flag != 0)) | outside
    y = _affine_clip_kernel(x.to(tl.float32), coefficients_ptr + channel, C)
    for i in tl.static_range(NUMBER):
        row = coefficients_ptr + (5 * i + 4) * C + channel
        if ((CODE >> 2 * i) & 3) == 1:
            y = _log(y, INTERPRETED)
        elif ((CODE >> 2 * i) & 3) == 2:
            y = _asinh(y, INTERPRETED)
        else:
            kind = tl.load(row)
            y = tl.where(kind == 1, _log(y, INTERPRETED), tl.where(kind == 2, _asinh(y, INTERPRETED), y))
        y = _affine_clip_kernel(y, row + C, C)
    return tl.where(is_missing, fill, y), is_missing


@triton.jit
def _affine_clip_kernel(v, row_ptr, C):  # type: ignore[no-untyped-def]
    v = tl.fma(v, tl.load(row_ptr), tl.load(row_ptr + C))
    v = tl.maximum(v, tl.load(row_ptr + 2 * C), propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, tl.load(row_ptr + 3 * C), propagate_nan=tl.PropagateNan.ALL)


@triton.jit  # type: ignore[untyped-decorator]
def _log(v, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Natural logarithm from the GPU's own logarithm (PTX ISA: 2^-22 absolute from 1/2 to 2, relative elsewhere).

    tl.log is 24 instructions more exact than the last bit of a bfloat16, and the kernel would wait for them.
    """
    if INTERPRETED:
        return tl.log(v)
    return tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [v], tl.float32, True, 1) * _LN2


@triton.jit  # type: ignore[untyped-decorator]
def _asinh(v, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    """sign(v) ln(|v| + sqrt(v^2 + 1)); a polynomial below 1/2, where the sum would lose what makes the answer.

    The polynomial is the minimax of asinh(u) / u - 1 over u^2 in [0, 1/4], error 3e-9 relative. libdevice's asinh is
    twice as long, and Triton's interpreter does not know it.
    """
    u = tl.abs(v)
    square = u * u
    p = tl.fma(square, -0.0132481074, 0.028175564)
    p = tl.fma(square, p, -0.0443858676)
    p = tl.fma(square, p, 0.074986633)
    p = tl.fma(square, p, -0.166666439)
    small = tl.fma(u * square, p, u)
    square = tl.fma(u, u, 1.0)
    # Nothing from here on is subnormal, and not looking for that (ftz) saves six instructions.
    if INTERPRETED:
        root = tl.sqrt(square)
    else:
        root = tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [square], tl.float32, True, 1)
    total = u + tl.where(u < 1e9, root, u)  # the square of 2e19 is infinite
    if INTERPRETED:
        large = tl.log(total)
    else:
        large = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [total], tl.float32, True, 1) * _LN2
    y = tl.where(u < 0.5, small, large)
    sign = v.to(tl.uint32, bitcast=True) & 0x80000000
    return (y.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def store(y_ptr, y, mask, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round float32 `y` to the dtype behind `y_ptr`, to nearest even, and store it.

    Args:
        y_ptr: Where each element goes.
        y: Results.
        mask: Which of them.
        INTERPRETED: This runs in Triton's interpreter, as only tests do. It cuts the low bits off where a GPU rounds to
            nearest even, so that bfloat16 is rounded with integer arithmetic, and it knows no machine instructions.
    """
    if INTERPRETED and y_ptr.dtype.element_ty == tl.bfloat16:
        bits = y.to(tl.uint32, bitcast=True)
        # Adding half a unit, less one bit when the last kept bit is even, carries exactly when nearest-even rounds up.
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(y == y, rounded, 0x7FC0)  # a NaN must not carry into infinity or zero
        tl.store(y_ptr, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=mask)


def check(
    x: Tensor, channels: int, coefficients: Tensor, missing: Tensor, dtype: torch.dtype, functions: str = ""
) -> None:
    """Refuse what a kernel would read wrongly; shapes and types only, so that it never waits for a device.

    Raises:
        ValueError: An argument has another dtype, shape, device or layout, or needs a gradient (there is none).
    """
    if dtype not in OUTPUT_DTYPES:
        raise ValueError(f"dtype is {dtype}: ask for one of {names(OUTPUT_DTYPES)}")
    tables = ("coefficients", coefficients, rows(functions), torch.float32), ("missing", missing, 2, torch.int32)
    check_tables(x, channels, tables)
    if torch.is_grad_enabled() and (x.requires_grad or coefficients.requires_grad):
        raise ValueError(
            "no gradient passes through this op: call it under torch.no_grad(), or detach x and coefficients"
        )


def check_tables(x: Tensor, channels: int, tables: Iterable[tuple[str, Tensor, int, torch.dtype]]) -> None:
    """Refuse stored numbers that no kernel reads, and tables (name, tensor, rows, dtype) that do not belong to them.

    Raises:
        ValueError: An argument has another dtype, shape, device or layout.
    """
    if x.dtype not in INPUT_DTYPES:
        raise ValueError(f"x is {x.dtype}: pass one of {names(INPUT_DTYPES)} (the dtype that the array is stored in)")
    for name, tensor, height, want in tables:
        if tensor.dtype != want:
            raise ValueError(f"{name} is {tensor.dtype}: convert it with {name}.to({want})")
        if tensor.dim() != 2 or tensor.shape[0] != height or tensor.shape[1] != channels:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: x has {channels} channels, so pass [{height}, {channels}]"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}: move it with {name}.to(x.device)")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous: pass {name}.contiguous()")
    if not x.is_contiguous():
        raise ValueError("x is not contiguous: pass x.contiguous() (a channels_last tensor would be copied by that)")


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    """Dtypes for a message."""
    return ", ".join(str(dtype) for dtype in dtypes)
