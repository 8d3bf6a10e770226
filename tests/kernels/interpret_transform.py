"""The Triton kernel itself, run element by element in Triton's interpreter on the CPU.

Not collected with the other tests: TRITON_INTERPRET=1 must be set before gpuops_kernels is imported, and it breaks
torch.compile in the same process. test_transform_interpreted.py runs this file in a process of its own.

Programs are slow (about 1 ms) and elements are cheap, so the shapes are chosen to need few tiles.
"""

import ctypes
import mmap

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transform_oracle import POISON, Case, assert_nearest_even, integers, make_case, poisoned, roundings, unwritten

from gpuops_kernels import transform as room

GUARD = 4096
"""Elements on each side of an output that a kernel must leave alone."""


def interpret(case: Case, dtype: torch.dtype, tile: tuple[int, int] | None = None) -> torch.Tensor:
    """Run the kernel on a poisoned output in a poisoned buffer: it must write every element of it and nothing else."""
    n = case.x.numel()
    buffer = poisoned((n + 2 * GUARD,), dtype)
    y = buffer[GUARD : GUARD + n].view(case.x.shape)
    run_on(case, y, tile)
    assert unwritten(y) == 0, "the kernel left elements of its output unwritten"
    assert unwritten(buffer) == 2 * GUARD, "the kernel wrote outside its output"
    return y.clone()


def run_on(case: Case, y: torch.Tensor, tile: tuple[int, int] | None = None) -> None:
    grid, arguments = room._plan(case.x, y, case.coefficients, case.missing)
    *rest, planes, inner, channels, rows, cols, _ = arguments
    if tile is not None:
        rows, cols = tile
        grid = (-(-planes // rows) * -(-inner // cols),)
    with np.errstate(all="ignore"):  # the interpreter computes with numpy, which warns of overflow
        room.transform_kernel[grid](*rest, planes, inner, channels, rows, cols, y.dtype == torch.bfloat16)


def check(case: Case, tile: tuple[int, int] | None = None) -> None:
    wide = interpret(case, torch.float32, tile)
    # tl.fma rounds twice in the interpreter of Triton 3.6 and 3.7, once in later ones and on a GPU.
    assert roundings(wide, case, exact_fma=False) <= 1
    assert_nearest_even(interpret(case, torch.bfloat16, tile), wide)
    half = wide.to(torch.float16)
    assert torch.equal(
        integers(interpret(case, torch.float16, tile)).where(~half.isnan(), 0), integers(half).where(~half.isnan(), 0)
    )


@pytest.mark.parametrize("dtype", room.INPUT_DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 3),  # no spatial axes: one row of channels a sample
        (40, 70),  # a tile that begins in the middle of a sample
        (3, 200, 1),
        (5, 7, 31),
        (3, 5, 2, 3, 43),  # planes of 258: two above half a tile
        (2, 3, 2047),
        (2, 3, 32, 64),  # exactly one tile a plane
        (2, 2, 2049),  # one element in the last tile
        (1, 1, 1, 1, 1),
    ],
    ids=str,
)
def test_matches_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(make_case(shape, dtype, seed=sum(shape)))


# No shrinking: a failing example costs seconds here, and hypothesis would try hundreds.
@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    samples=st.sampled_from([1, 2, 5]),
    channels=st.integers(1, 200),
    inner=st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 31, 63, 65]),
    tile=st.sampled_from([(1, 1024), (16, 256), (256, 128), (4096, 16), (8192, 1)]),
    dtype=st.sampled_from(room.INPUT_DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_tile_gives_the_same(samples, channels, inner, tile, dtype, seed) -> None:
    rows, cols = tile
    if -(-samples * channels // rows) * -(-inner // cols) <= 40:
        check(make_case((samples, channels, inner), dtype, seed), tile)


def test_more_planes_than_cuda_allows_on_a_second_grid_axis() -> None:
    check(make_case((1001, 70), torch.int16, seed=1), (16384, 1))


def test_bfloat16_ties_and_edges() -> None:
    ties = np.array([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 0x7F7F7FFF, 0x00008000, 0x00018000])
    x = np.concatenate([ties, ties | 0x80000000, [0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF]]).astype(np.uint32)
    infinity = float("inf")
    case = Case(
        torch.from_numpy(x.view(np.float32)).reshape(1, 1, -1),
        torch.tensor([[1.0], [0.0], [-infinity], [infinity], [0.0]]),
        torch.zeros(2, 1, dtype=torch.int32),
    )
    assert_nearest_even(interpret(case, torch.bfloat16), case.x + 0.0)


@pytest.mark.parametrize("dtype", room.INPUT_DTYPES, ids=str)
def test_nothing_is_read_or_written_past_the_end(dtype: torch.dtype) -> None:
    """Input, result and both tables end at a page that may not be touched: one byte too far kills the process."""
    case = make_case((1, 3, 97), dtype, seed=5)
    guarded = Case(*(at_page_end(tensor) for tensor in case.args))
    y = at_page_end(torch.zeros(case.x.shape, dtype=torch.float32))
    run_on(guarded, y)
    assert roundings(y, case, exact_fma=False) <= 1


def at_page_end(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of `tensor` that ends where a page without any access rights begins."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    last_page = ctypes.c_void_p(address + pages * mmap.PAGESIZE)
    if libc.mprotect(last_page, ctypes.c_size_t(mmap.PAGESIZE), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")
    start = pages * mmap.PAGESIZE - size
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    return copy.copy_(tensor)


def test_the_poison_is_a_value_the_kernel_never_writes() -> None:
    for dtype, bits in POISON.items():
        assert poisoned((1,), dtype).isnan().item()
        assert unwritten(torch.full((3,), float("nan"), dtype=dtype)) == 0, hex(bits)
