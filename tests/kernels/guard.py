"""Memory that shows a stray access: outputs full of poison between poisoned guards, inputs that end at a dead page."""

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from oracle import poisoned, unwritten

GUARD = 4096
"""Elements on each side of an output that a kernel must leave alone."""


@contextmanager
def poisoned_output(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """A poisoned tensor in a poisoned buffer, of which the block must write every element and nothing else."""
    n = torch.Size(shape).numel()
    buffer = poisoned((n + 2 * GUARD,), dtype)
    y = buffer[GUARD : GUARD + n].view(shape)
    yield y
    assert unwritten(y) == 0, "the kernel left elements of its output unwritten"
    assert unwritten(buffer) == 2 * GUARD, "the kernel wrote outside its output"


def at_page_end(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of `tensor` that ends where a page without any access rights begins."""
    return _beside_dead_page(tensor, end=True)


def at_page_start(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of `tensor` that begins where a page without any access rights ends."""
    return _beside_dead_page(tensor, end=False)


def _beside_dead_page(tensor: torch.Tensor, *, end: bool) -> torch.Tensor:
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    dead = ctypes.c_void_p(address + (pages * mmap.PAGESIZE if end else 0))
    if libc.mprotect(dead, ctypes.c_size_t(mmap.PAGESIZE), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")
    start = pages * mmap.PAGESIZE - size if end else mmap.PAGESIZE
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    return copy.copy_(tensor)
