"""How kernels are launched: on which device, in which wrapping, in tiles of which shape."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

PROGRAMS = 1024
"""Programs of a reduction: 7 or 8 a multiprocessor of an H100, enough to hide memory, few enough to merge."""


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device. CUDA is not initialised when a graph is traced for a GPU without one."""
    return torch.cuda.device(x.device) if torch.cuda.is_initialized() else nullcontext()


def unwrapped(kernel: Any) -> Any:
    """The kernel as it is, where a registered op takes what `wrap_triton` makes of it."""
    return kernel


def reduction_tiles(samples: int, channels: int, inner: int, tile: int) -> tuple[int, int, int, int]:
    """(rows, columns, tiles a channel, programs a channel) of a reduction over the samples of each channel.

    A tile is `rows` samples by `columns` elements of their planes, `tile` elements together where there are as many.
    """
    cols = tile
    while cols > 16 and cols // 2 >= inner:
        cols //= 2
    rows = 1
    while rows < samples and rows * cols < tile:
        rows *= 2
    tiles = -(-samples // rows) * -(-inner // cols)
    return rows, cols, tiles, min(tiles, max(1, PROGRAMS // channels))
