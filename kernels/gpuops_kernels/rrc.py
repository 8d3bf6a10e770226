"""`torch.ops.gpuops.rrc`: a random resized crop and mirror of each image, in one launch.

    y[n, c, i, j] = affine(bilinear(x[n, :, :, c], at row and column of output (i, j)))

Images come as decoders give them, channels last and packed in uint8; what a sample is cut to is a row of a tensor, so
that no shape, no Python number and no recompilation depends on it. Four neighbours are read for each result and weighed
in float32; there is no antialiasing, as in `torchvision.transforms.v2.RandomResizedCrop(antialias=False)`: where a crop
is much larger than the result, resample instead.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op, register_fake

from gpuops_kernels import epilogue
from gpuops_kernels.epilogue import OUTPUT_DTYPES as OUTPUT_DTYPES
from gpuops_kernels.launching import on_device_of

_TILE = 1024


def reference(
    x: Tensor, boxes: Tensor, scale: Tensor, offset: Tensor, dtype: torch.dtype, height: int, width: int
) -> Tensor:
    """The op in plain aten: what the CPU runs and what tests compare with.

    Args:
        x: [N, H, W, C] uint8.
        boxes: float32 [N, 5] on the CPU: first row, first column, rows, columns (any real numbers inside the image),
            and 1 to mirror left and right, else 0.
        scale: float32 [C], what a stored step is worth.
        offset: float32 [C], what stored 0 is.
        dtype: Dtype of the result, one of `OUTPUT_DTYPES`.
        height: Rows of the result.
        width: Columns of the result.

    Returns:
        [N, C, height, width] of `dtype`.
    """
    box = boxes.to(x.device)
    rows, near_rows = _places(box[:, 0], box[:, 2], height, x.shape[1])
    cols, near_cols = _places(box[:, 1], box[:, 3], width, x.shape[2])
    mirrored = (box[:, 4] != 0)[:, None]
    cols, near_cols = (torch.where(mirrored, t.flip(1), t) for t in (cols, near_cols))
    sample = torch.arange(len(x), device=x.device)[:, None, None]
    images = x.to(torch.float32)

    def at(row: Tensor, col: Tensor) -> Tensor:
        return images[sample, row.clamp(max=x.shape[1] - 1)[:, :, None], col.clamp(max=x.shape[2] - 1)[:, None, :]]

    right, below = near_cols[:, None, :, None], near_rows[:, :, None, None]
    top = at(rows, cols) * (1 - right) + at(rows, cols + 1) * right
    bottom = at(rows + 1, cols) * (1 - right) + at(rows + 1, cols + 1) * right
    y = (top * (1 - below) + bottom * below) * scale + offset
    return y.movedim(-1, 1).to(dtype).contiguous()


def _places(first: Tensor, extent: Tensor, count: int, whole: int) -> tuple[Tensor, Tensor]:
    """(element before, share of the one behind), [N, count], of evenly spaced centres."""
    step = extent[:, None] / count
    at = (first[:, None] + (torch.arange(count, device=first.device) + 0.5) * step - 0.5).clamp(0, whole - 1)
    before = at.floor()
    return before.to(torch.int64), at - before


@triton.jit  # type: ignore[untyped-decorator]
def rrc_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    boxes_ptr,
    scale_ptr,
    offset_ptr,
    y_ptr,
    H,
    W,
    C,
    height,
    width,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One tile of ROWS by COLS results of one image, for all of its channels.

    Args:
        x_ptr: [N, H, W, C] uint8.
        boxes_ptr: [N, 5] float32.
        scale_ptr: [C] float32.
        offset_ptr: [C] float32.
        y_ptr: [N, C, height, width] results.
        H: Rows of an image.
        W: Columns of an image.
        C: Channels.
        height: Rows of a result.
        width: Columns of a result.
        ROWS: Rows a tile.
        COLS: Columns a tile.
        INTERPRETED: See `epilogue.store`.
    """
    col_tiles = (width - 1) // COLS + 1
    tiles = ((height - 1) // ROWS + 1) * col_tiles
    pid = tl.program_id(0)
    sample = (pid // tiles).to(tl.int64)
    rows = pid % tiles // col_tiles * ROWS + tl.arange(0, ROWS)
    cols = pid % tiles % col_tiles * COLS + tl.arange(0, COLS)
    mask = (rows < height)[:, None] & (cols < width)[None, :]
    box = boxes_ptr + sample * 5
    mirrored = tl.load(box + 4) != 0.0
    from_cols = tl.where(mirrored, width - 1 - cols, cols)
    row_step = tl.div_rn(tl.load(box + 2), height.to(tl.float32))
    col_step = tl.div_rn(tl.load(box + 3), width.to(tl.float32))
    at_row = tl.fma(rows.to(tl.float32) + 0.5, row_step, tl.load(box)) - 0.5
    at_col = tl.fma(from_cols.to(tl.float32) + 0.5, col_step, tl.load(box + 1)) - 0.5
    at_row = tl.minimum(tl.maximum(at_row, 0.0), (H - 1).to(tl.float32))
    at_col = tl.minimum(tl.maximum(at_col, 0.0), (W - 1).to(tl.float32))
    row = tl.floor(at_row)
    col = tl.floor(at_col)
    below = (at_row - row)[:, None]
    right = (at_col - col)[None, :]
    top_row = row.to(tl.int32)[:, None]
    left_col = col.to(tl.int32)[None, :]
    bottom_row = tl.minimum(top_row + 1, H - 1)
    right_col = tl.minimum(left_col + 1, W - 1)
    image = x_ptr + sample * H * W * C
    for channel in range(0, C):
        a = tl.load(image + (top_row * W + left_col) * C + channel, mask=mask, other=0).to(tl.float32)
        b = tl.load(image + (top_row * W + right_col) * C + channel, mask=mask, other=0).to(tl.float32)
        c = tl.load(image + (bottom_row * W + left_col) * C + channel, mask=mask, other=0).to(tl.float32)
        d = tl.load(image + (bottom_row * W + right_col) * C + channel, mask=mask, other=0).to(tl.float32)
        top = tl.fma(b - a, right, a)
        bottom = tl.fma(d - c, right, c)
        value = tl.fma(bottom - top, below, top)
        value = tl.fma(value, tl.load(scale_ptr + channel), tl.load(offset_ptr + channel))
        place = (sample * C + channel) * height * width + (rows[:, None] * width + cols[None, :])
        epilogue.store(y_ptr + place, value, mask, INTERPRETED)


def launch(
    x: Tensor, boxes: Tensor, scale: Tensor, offset: Tensor, dtype: torch.dtype, height: int, width: int
) -> Tensor:
    """The op without PyTorch's dispatcher, for eager loops: the same checks, the same kernel, the same bits.

    Args:
        x: [N, H, W, C] uint8, contiguous; N may be 0. See `reference`, as for the other arguments.
        boxes: float32 [N, 5], on the CPU, because it is read before the launch.
        scale: float32 [C], contiguous, on the device of `x`.
        offset: float32 [C], contiguous, on the device of `x`.
        dtype: Dtype of the result, one of `OUTPUT_DTYPES`.
        height: Rows of the result.
        width: Columns of the result.

    Returns:
        [N, C, height, width] of `dtype`, contiguous, on the device of `x`; enqueued on the current stream.

    Raises:
        ValueError: An argument has another dtype, shape, device or layout, or a box is empty or leaves its image.
    """
    _check(x, boxes, scale, offset, dtype, height, width)
    if x.device.type != "cuda":
        return reference(x, boxes, scale, offset, dtype, height, width)
    y = torch.empty((len(x), x.shape[3], height, width), dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y
    kernel, grid, arguments = plan(x, boxes.to(x.device, non_blocking=True), scale, offset, y)
    with on_device_of(x):
        kernel[grid](*arguments, enable_fp_fusion=False)
    return y


# Not triton_op, for the reason that `window` gives: the body reads the boxes.
@custom_op("gpuops::rrc", mutates_args=())
def rrc(x: Tensor, boxes: Tensor, scale: Tensor, offset: Tensor, dtype: torch.dtype, height: int, width: int) -> Tensor:
    """The registered op, also `torch.ops.gpuops.rrc`: arguments, result and errors as `launch`."""
    return launch(x, boxes, scale, offset, dtype, height, width)


def _shape(
    x: Tensor, boxes: Tensor, scale: Tensor, offset: Tensor, dtype: torch.dtype, height: int, width: int
) -> Tensor:
    return torch.empty((len(x), x.shape[3], height, width), dtype=dtype, device=x.device)


register_fake("gpuops::rrc", _shape)


def plan(x: Tensor, boxes: Tensor, scale: Tensor, offset: Tensor, y: Tensor) -> tuple[Any, tuple[int], tuple[Any, ...]]:
    """The kernel, the launch grid and the kernel's arguments."""
    samples, whole_height, whole_width, channels = x.shape
    height, width = y.shape[2:]
    cols = 16
    while cols < 128 and cols < width:
        cols *= 2
    rows = 1
    while rows < height and rows * cols < _TILE:
        rows *= 2
    grid = (samples * -(-height // rows) * -(-width // cols),)
    sizes = whole_height, whole_width, channels, height, width
    return rrc_kernel, grid, (x, boxes, scale, offset, y, *sizes, rows, cols, False)


def _check(
    x: Tensor, boxes: Tensor, scale: Tensor, offset: Tensor, dtype: torch.dtype, height: int, width: int
) -> None:
    if x.dtype != torch.uint8 or x.dim() != 4 or not x.is_contiguous():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}: pass contiguous uint8 images [N, H, W, C]")
    if dtype not in OUTPUT_DTYPES:
        raise ValueError(f"dtype is {dtype}: ask for one of {epilogue.names(OUTPUT_DTYPES)}")
    samples, whole_height, whole_width, channels = x.shape
    if min(height, width, whole_height, whole_width, channels) < 1 or whole_height * whole_width * channels >= 2**31:
        raise ValueError(f"images {tuple(x.shape[1:])} to [{height}, {width}]: each has 1 to 2**31 - 1 elements")
    for name, tensor in (("scale", scale), ("offset", offset)):
        if tensor.dtype != torch.float32 or tensor.shape != (channels,) or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}: pass contiguous float32 [{channels}]")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}: move it with {name}.to(x.device)")
    if boxes.device.type != "cpu" or boxes.dtype != torch.float32 or boxes.shape != (samples, 5):
        raise ValueError(
            f"boxes is {boxes.dtype} {tuple(boxes.shape)} on {boxes.device}: pass float32 [{samples}, 5] on the "
            "CPU, it is read before the launch"
        )
    if not samples:
        return
    first, extent = boxes[:, :2], boxes[:, 2:4]
    inside = (first >= 0) & (extent > 0) & (first + extent <= torch.tensor([whole_height, whole_width]) + 1e-3)
    if not bool(inside.all()):
        row = int((~inside).any(1).to(torch.int8).argmax())
        raise ValueError(
            f"boxes row {row}: {boxes[row].tolist()} is empty or leaves an image of [{whole_height}, {whole_width}]"
        )
