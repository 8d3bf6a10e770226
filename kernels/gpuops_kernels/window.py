"""`torch.ops.gpuops.window`: windows and patches gathered out of a batch's distinct chunks, with the whole epilogue.

    y[n, c, i, j] = epilogue(chunk[k, c, y0 + i, x0 + j])      (k, y0, x0, flip, rot) = table[n]

mirrored (flip) and then turned (rot). One launch a batch: no copy of the windows before it, none of the chunks, and the
same kernel whatever the number of chunks. `launch` takes the chunks as one slab, `launch_chunks` as a list of tensors
that were allocated apart. A window of a volume takes a third axis, (k, z0, y0, x0, flip, rot).

The table is read on the host before anything is launched: a window outside its chunk follows the declared rule, and
windows that happen to be aligned are read 128 bits at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op, register_fake

from gpuops_kernels import epilogue
from gpuops_kernels.epilogue import INPUT_DTYPES as INPUT_DTYPES
from gpuops_kernels.epilogue import OUTPUT_DTYPES as OUTPUT_DTYPES
from gpuops_kernels.launching import on_device_of

RULES = ("error", "pad", "wrap")
"""What happens to a window that begins or ends outside its chunk: it is refused, what lies outside is filled as missing
values are, or what lies outside is taken from the other side."""

FLIP_X, FLIP_Y, FLIP_Z = 1, 2, 4
"""Bits of a table's flip column: the axis that is mirrored, the last one first."""

_TILE = 2048


def reference(
    slab: Tensor,
    table: Tensor,
    coefficients: Tensor,
    missing: Tensor,
    dtype: torch.dtype,
    size: Sequence[int],
    rule: str = "error",
    functions: str = "",
) -> Tensor:
    """The op in plain aten, window by window: what the CPU runs and what tests compare with.

    Args:
        slab: [K, C, *chunk] stored numbers of K distinct chunks, two or three spatial axes; dtype one of
            `INPUT_DTYPES`.
        table: int32 [N, axes + 3] on the CPU: chunk, the first element of the window along each axis (negative before
            the chunk), flip (bits, see `FLIP_X`), rot (quarter turns from y towards x, as torch.rot90 turns the last
            two axes).
        coefficients: [epilogue.rows(functions), C] float32, see `gpuops_kernels.transform`.
        missing: [2, C] int32, rows value, flag.
        dtype: Dtype of the result, one of `OUTPUT_DTYPES`.
        size: Size of a window along each axis.
        rule: One of `RULES`.
        functions: Names from `epilogue.FUNCTIONS`, separated by commas.

    Returns:
        [N, C, *size] of `dtype`.
    """
    axes = len(size)
    spatial = slab.shape[2:]
    windows, outside = [], []
    for chunk, *starts, flip, rot in table.tolist():
        piece = slab[chunk]
        beyond = torch.zeros((1,) * (axes + 1), dtype=torch.bool, device=slab.device)
        for axis, (start, length, whole) in enumerate(zip(starts, size, spatial, strict=True), 1):
            index = torch.arange(start, start + length, device=slab.device)
            along = [1] * (axes + 1)
            along[axis] = length
            beyond = beyond | ((index < 0) | (index >= whole)).view(along)
            index = index % whole if rule == "wrap" else index.clamp(0, whole - 1)
            piece = piece.index_select(axis, index)
        if piece.dtype == torch.uint16:
            piece = piece.to(torch.int32)  # which torch can mirror
        mirrored = [axis for axis in range(axes) if flip >> (axes - 1 - axis) & 1]
        piece, beyond = (
            torch.rot90(t.flip([axis + 1 for axis in mirrored]), rot, (-2, -1))
            for t in (piece, beyond.expand(1, *size))
        )
        windows.append(piece)
        outside.append(beyond)
    if not windows:
        return torch.empty((0, slab.shape[1], *size), dtype=dtype, device=slab.device)
    hidden = torch.stack(outside) if rule == "pad" else None
    return epilogue.reference(torch.stack(windows), coefficients, missing, dtype, functions, hidden)


@triton.jit  # type: ignore[untyped-decorator]
def window_kernel(  # type: ignore[no-untyped-def]
    slab_ptr,
    addresses_ptr,
    table_ptr,
    y_ptr,
    coefficients_ptr,
    missing_ptr,
    C,
    Z,
    Y,
    X,
    D,
    H,
    W,
    SEPARATE: tl.constexpr,
    TURNED: tl.constexpr,
    OUTSIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CODE: tl.constexpr,
    NUMBER: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One tile of ROWS by COLS elements of one plane (window, channel, z) of the result.

    Args:
        slab_ptr: [K, C, Z, Y, X] stored numbers; where SEPARATE, any address of their dtype.
        addresses_ptr: int64 [K], addresses of the chunks [C, Z, Y, X] where SEPARATE; not read otherwise.
        table_ptr: int32 [N, 6]: chunk, z, y, x, flip, rot.
        y_ptr: [N, C, D, H, W] results.
        coefficients_ptr: [5 * NUMBER + 6, C] float32.
        missing_ptr: [2, C] int32.
        C: Channels.
        Z: Planes of a chunk and channel.
        Y: Rows of a plane.
        X: Elements of a row.
        D: Planes of a window and channel.
        H: Rows of a plane of a window.
        W: Elements of a row of a window.
        SEPARATE: Chunks are found by their addresses.
        TURNED: Some window is mirrored or turned.
        OUTSIDE: Some window reaches outside its chunk: 0 none does, 1 what is there is filled, 2 it wraps around.
        ALIGN: Every row of every window begins at a multiple of this many elements.
        ROWS: Rows a tile.
        COLS: Elements of a row a tile.
        CODE: Functions, see `epilogue.parse`.
        NUMBER: How many functions.
        INTERPRETED: See `epilogue.store`.
    """
    col_tiles = (W - 1) // COLS + 1
    tiles = ((H - 1) // ROWS + 1) * col_tiles
    pid = tl.program_id(0)
    plane = pid // tiles
    row_start = pid % tiles // col_tiles * ROWS
    col_start = pid % tiles % col_tiles * COLS
    z = plane % D
    channel = plane // D % C
    entry = table_ptr + (plane // D // C).to(tl.int64) * 6
    chunk = tl.load(entry).to(tl.int64)
    from_z = tl.load(entry + 1)
    from_y = tl.load(entry + 2)
    from_x = tl.load(entry + 3)
    rows = row_start + tl.arange(0, ROWS)[:, None]
    cols = col_start + tl.arange(0, COLS)[None, :]
    mask = (rows < H) & (cols < W)
    if TURNED:
        flip = tl.load(entry + 4)
        rot = tl.load(entry + 5)
        z = tl.where((flip & 4) != 0, D - 1 - z, z)
        # rot90 of an H by W window takes element (i, j) from (j, W - 1 - i), (H - 1 - i, W - 1 - j) or (H - 1 - j, i).
        across = (rot & 1) != 0
        y = tl.where(across, cols, rows)
        x = tl.where(across, rows, cols)
        y = tl.where(((rot == 2) | (rot == 3)) != ((flip & 2) != 0), H - 1 - y, y)
        x = tl.where(((rot == 1) | (rot == 2)) != ((flip & 1) != 0), W - 1 - x, x)
    else:
        y = rows
        x = cols
    z += from_z
    outside = False
    if OUTSIDE == 0:
        # One number a window and one a thread: what is inside a plane fits int32.
        place = (from_y.to(tl.int64) * X + from_x) + (y * X + x)
    else:
        y += from_y
        x += from_x
        if OUTSIDE == 1:
            outside = (y < 0) | (y >= Y) | (x < 0) | (x >= X) | (z < 0) | (z >= Z)
        else:  # the host moved the window's first element inside
            y = y % Y
            x = x % X
            z = z % Z
        place = y.to(tl.int64) * X + x
    if SEPARATE:
        # The host looked at the addresses before it promised an alignment.
        source = tl.multiple_of(tl.load(addresses_ptr + chunk).to(slab_ptr.dtype), 16 if ALIGN > 1 else 1)
        start = (channel.to(tl.int64) * Z + z) * Y * X
    else:
        source = slab_ptr
        start = ((chunk * C + channel) * Z + z) * Y * X
    place = tl.multiple_of(start + place, (1, ALIGN)) if ALIGN > 1 else start + place
    if OUTSIDE == 1:
        stored = tl.load(source + place, mask=mask & (outside == 0), other=0)
    else:
        stored = tl.load(source + place, mask=mask, other=0)
    result, _ = epilogue.finish(stored, outside, coefficients_ptr, missing_ptr, channel, C, CODE, NUMBER, INTERPRETED)
    epilogue.store(y_ptr + plane.to(tl.int64) * H * W + (rows * W + cols), result, mask, INTERPRETED)


@dataclass(frozen=True, slots=True)
class Reading:
    """What the host learned from a table."""

    entries: Tensor
    """int32 [N, 6] on the CPU: chunk, z, y, x, flip, rot; wrapped windows begin inside their chunk."""
    turned: bool
    """Some window is mirrored or turned."""
    outside: int
    """Some window reaches outside its chunk: 1 if what is there is filled, 2 if it wraps around; 0 if none does."""
    alignment: int
    """Every window's rows begin at a multiple of this many elements: a power of two, at most 16."""


def launch(
    slab: Tensor,
    table: Tensor,
    coefficients: Tensor,
    missing: Tensor,
    dtype: torch.dtype,
    size: Sequence[int],
    rule: str = "error",
    functions: str = "",
) -> Tensor:
    """The op without PyTorch's dispatcher, for eager loops: the same checks, the same kernel, the same bits.

    Args:
        slab: [K, C, *chunk] stored numbers, contiguous. See `reference`, as for the other arguments.
        table: int32 [N, axes + 3], on the CPU, because it is read before the launch; N may be 0.
        coefficients: float32, contiguous, on the device of `slab`.
        missing: int32, contiguous, on the device of `slab`.
        dtype: Dtype of the result, one of `OUTPUT_DTYPES`.
        size: Size of a window along each axis.
        rule: One of `RULES`.
        functions: Names from `epilogue.FUNCTIONS`, separated by commas.

    Returns:
        [N, C, *size] of `dtype`, contiguous, on the device of `slab`; enqueued on the current stream.

    Raises:
        ValueError: An argument has another dtype, shape, device or layout, needs a gradient (there is none), or the
            table names a chunk, flip or rot that does not exist or, if `rule` is "error", a place outside its chunk.
    """
    if slab.dim() != len(size) + 2:
        raise ValueError(f"slab has shape {tuple(slab.shape)}: windows of {len(size)} axes need [K, C, *chunk]")
    epilogue.check(slab, slab.shape[1], coefficients, missing, dtype, functions)
    reading = read(table, len(slab), slab.shape[2:], size, rule)
    if slab.device.type != "cuda":
        return reference(slab, table, coefficients, missing, dtype, size, rule, functions)
    return _run([slab], slab.shape[1:], reading, coefficients, missing, dtype, size, functions)


def launch_chunks(
    chunks: Sequence[Tensor],
    table: Tensor,
    coefficients: Tensor,
    missing: Tensor,
    dtype: torch.dtype,
    size: Sequence[int],
    rule: str = "error",
    functions: str = "",
) -> Tensor:
    """`launch` for chunks that were allocated one by one and stay where they are.

    Args:
        chunks: K tensors [C, *chunk], contiguous, of one dtype, shape and device. Their memory is not reused before the
            kernel has read it, whatever becomes of the tensors.
        table: See `launch`, as for the other arguments.
        coefficients: float32, contiguous, on the device of the chunks.
        missing: int32, contiguous, on the device of the chunks.
        dtype: Dtype of the result, one of `OUTPUT_DTYPES`.
        size: Size of a window along each axis.
        rule: One of `RULES`.
        functions: Names from `epilogue.FUNCTIONS`, separated by commas.

    Returns:
        [N, C, *size] of `dtype`, contiguous, on the device of the chunks; enqueued on the current stream.

    Raises:
        ValueError: As `launch`; also no chunk at all, or chunks that differ.
    """
    if not chunks:
        raise ValueError("no chunks: a batch has at least one")
    first = chunks[0]
    if first.dim() != len(size) + 1:
        raise ValueError(f"chunks have shape {tuple(first.shape)}: windows of {len(size)} axes need [C, *chunk]")
    for number, chunk in enumerate(chunks):
        if (chunk.dtype, chunk.shape, chunk.device) != (first.dtype, first.shape, first.device):
            raise ValueError(
                f"chunk {number} is {chunk.dtype} {tuple(chunk.shape)} on {chunk.device}, the first {first.dtype} "
                f"{tuple(first.shape)} on {first.device}: pass chunks of one kind"
            )
        epilogue.check(chunk, first.shape[0], coefficients, missing, dtype, functions)
    reading = read(table, len(chunks), first.shape[1:], size, rule)
    if first.device.type != "cuda":
        return reference(torch.stack(list(chunks)), table, coefficients, missing, dtype, size, rule, functions)
    return _run(chunks, first.shape, reading, coefficients, missing, dtype, size, functions)


# Not triton_op: the body reads the table, so it must run with real tensors in compiled graphs too. Neither op is ever
# exported: a served sample is one window, which `transform` takes.
@custom_op("gpuops::window", mutates_args=())
def window(
    slab: Tensor,
    table: Tensor,
    coefficients: Tensor,
    missing: Tensor,
    dtype: torch.dtype,
    size: Sequence[int],
    rule: str = "error",
    functions: str = "",
) -> Tensor:
    """The registered op, also `torch.ops.gpuops.window`: arguments, result and errors as `launch`."""
    return launch(slab, table, coefficients, missing, dtype, size, rule, functions)


@custom_op("gpuops::window_chunks", mutates_args=())
def window_chunks(
    chunks: Sequence[Tensor],
    table: Tensor,
    coefficients: Tensor,
    missing: Tensor,
    dtype: torch.dtype,
    size: Sequence[int],
    rule: str = "error",
    functions: str = "",
) -> Tensor:
    """The registered op, also `torch.ops.gpuops.window_chunks`: arguments, result and errors as `launch_chunks`."""
    return launch_chunks(chunks, table, coefficients, missing, dtype, size, rule, functions)


def _window_shape(
    slab: Tensor, table: Tensor, coefficients: Tensor, missing: Tensor, dtype: torch.dtype, size: Any, *_: Any
) -> Tensor:
    return torch.empty((len(table), slab.shape[1], *size), dtype=dtype, device=slab.device)


def _window_chunks_shape(
    chunks: Sequence[Tensor],
    table: Tensor,
    coefficients: Tensor,
    missing: Tensor,
    dtype: torch.dtype,
    size: Any,
    *_: Any,
) -> Tensor:
    return torch.empty((len(table), chunks[0].shape[0], *size), dtype=dtype, device=chunks[0].device)


register_fake("gpuops::window", _window_shape)
register_fake("gpuops::window_chunks", _window_chunks_shape)


def read(table: Tensor, chunks: int, spatial: Sequence[int], size: Sequence[int], rule: str) -> Reading:
    """Check a table, and find out what the kernel need not look at.

    Raises:
        ValueError: see `launch`.
    """
    axes = len(size)
    if not all(isinstance(length, int) for length in size) or axes not in (2, 3):
        raise ValueError(f"size is {tuple(size)}: windows have two or three axes, of whole elements")
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}: pass one of {', '.join(RULES)}")
    if min(size) < 1 or min(spatial) < 1 or size[-1] * size[-2] >= 2**31 or spatial[-1] * spatial[-2] >= 2**31:
        raise ValueError(f"windows of {tuple(size)} out of {tuple(spatial)}: a plane has 1 to 2**31 - 1 elements")
    if table.device.type != "cpu" or table.dtype != torch.int32:
        raise ValueError(
            f"table is {table.dtype} on {table.device}: pass int32 on the CPU, it is read before the launch"
        )
    if table.dim() != 2 or table.shape[1] != axes + 3:
        raise ValueError(
            f"table has shape {tuple(table.shape)}: windows of {axes} axes need [N, {axes + 3}], a row (chunk, the "
            "first element along each axis, flip, rot)"
        )
    rows = table.numpy()
    entries = np.zeros((len(rows), 6), np.int32)
    if not len(rows):
        return Reading(torch.from_numpy(entries), False, 0, 1)
    # Python integers from here on: a place plus a length may not fit int32, and each call of NumPy costs microseconds.
    low, high = rows.min(0).tolist(), rows.max(0).tolist()
    for column, (name, most) in {0: ("chunk", chunks - 1), -2: ("flip", 2**axes - 1), -1: ("rot", 3)}.items():
        if low[column] < 0 or high[column] > most:
            row = _first(rows[:, column], 0, most)
            raise ValueError(f"table row {row}: {name} {rows[row, column]} is not one of 0 to {most}")
    if high[-1] and size[-1] != size[-2] and (rows[:, -1] & 1).any():
        row = int((rows[:, -1] & 1).argmax())
        raise ValueError(f"table row {row}: a window of {tuple(size)} cannot be turned by 90 degrees")
    entries[:, 0] = rows[:, 0]
    entries[:, 4 - axes :] = rows[:, 1:]
    outside = False
    for axis, (length, whole) in enumerate(zip(size, spatial, strict=True)):
        if low[1 + axis] >= 0 and high[1 + axis] <= whole - length:
            continue
        outside = True
        if rule == "error":
            row = _first(rows[:, 1 + axis], 0, whole - length)
            start = int(rows[row, 1 + axis])
            raise ValueError(
                f"table row {row}: elements {start} to {start + length} of axis {axis} are asked for, a chunk has "
                f"{whole}: pass rule='pad' or rule='wrap' if that is meant"
            )
        if rule == "wrap":
            entries[:, 4 - axes + axis] %= whole
    turned = bool(high[-2] or high[-1])
    alignment = 1
    if not turned and not outside:
        bits = int(np.bitwise_or.reduce(rows[:, -3])) | int(spatial[-1])
        alignment = min(bits & -bits, 16)
    return Reading(torch.from_numpy(entries), turned, 0 if not outside else 1 + (rule == "wrap"), alignment)


def _first(column: npt.NDArray[np.int32], low: int, high: int) -> int:
    """The first row whose value lies outside [low, high]."""
    return int(((column < low) | (column > high)).argmax())


def plan(
    chunks: Sequence[Tensor],
    chunk: Sequence[int],
    y: Tensor,
    reading: Reading,
    coefficients: Tensor,
    missing: Tensor,
    functions: str = "",
) -> tuple[Any, tuple[int], tuple[Any, ...]]:
    """The kernel, the launch grid and the kernel's arguments; `chunks` is one slab or several chunks [C, *chunk]."""
    channels, (depth, height, width) = chunk[0], (1, *chunk[1:])[-3:]
    out_depth, out_height, out_width = (1, *y.shape[2:])[-3:]
    cols = _columns(out_width)
    rows = 1
    while rows < out_height and rows * cols < _TILE:
        rows *= 2
    grid = (y.shape[0] * channels * out_depth * -(-out_height // rows) * -(-out_width // cols),)
    alignment = min(reading.alignment, 16 // chunks[0].element_size())
    separate = chunks[0].dim() == len(chunk)
    addresses = reading.entries  # not read
    if separate:
        addresses = torch.tensor([tensor.data_ptr() for tensor in chunks], dtype=torch.int64)
        if any(tensor.data_ptr() % 16 for tensor in chunks):
            alignment = 1
    device = chunks[0].device
    arguments = (
        chunks[0],
        addresses.to(device, non_blocking=True),
        reading.entries.to(device, non_blocking=True),
        y,
        coefficients,
        missing,
        *(channels, depth, height, width, out_depth, out_height, out_width),
        *(separate, reading.turned, reading.outside, alignment, rows, cols, *epilogue.parse(functions), False),
    )
    return window_kernel, grid, arguments


def _columns(width: int) -> int:
    """Columns a tile: the widest power of two from 16 to 512 that leaves at most an eighth of the lanes idle."""
    waste = {cols: -(-width // cols) * cols for cols in (512, 256, 128, 64, 32, 16)}
    return next((cols for cols, lanes in waste.items() if lanes <= width * 9 / 8), min(waste, key=lambda c: waste[c]))


def _run(
    chunks: Sequence[Tensor],
    chunk: Sequence[int],
    reading: Reading,
    coefficients: Tensor,
    missing: Tensor,
    dtype: torch.dtype,
    size: Sequence[int],
    functions: str,
) -> Tensor:
    """Allocate the result and launch the kernel on it."""
    y = torch.empty((len(reading.entries), chunk[0], *size), dtype=dtype, device=chunks[0].device)
    if y.numel() == 0:
        return y
    kernel, grid, arguments = plan(chunks, chunk, y, reading, coefficients, missing, functions)
    with on_device_of(y):
        kernel[grid](*arguments, enable_fp_fusion=False)
        stream = torch.cuda.current_stream(y.device)
    for tensor in chunks:
        tensor.record_stream(stream)
    return y
