"""The Triton kernel itself, run element by element in Triton's interpreter on the CPU.

Not collected with the other tests: TRITON_INTERPRET=1 must be set before gpuops_kernels is imported, and it breaks
torch.compile in the same process. test_transform_interpreted.py runs this file in a process of its own.

Programs are slow (about 1 ms) and elements are cheap, so the shapes are chosen to need few tiles.
"""

import numpy as np
import pytest
import torch
from guard import at_page_end, poisoned_output
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oracle import POISON, Case, assert_nearest_even, integers, make_case, poisoned, roundings, unwritten

from gpuops_kernels import transform as room


def interpret(case: Case, dtype: torch.dtype, tile: tuple[int, int] | None = None) -> torch.Tensor:
    """Run the kernel on a poisoned output in a poisoned buffer: it must write every element of it and nothing else."""
    with poisoned_output(case.x.shape, dtype) as y:
        run_on(case, y, tile)
    return y


def run_on(case: Case, y: torch.Tensor, tile: tuple[int, int] | None = None) -> None:
    kernel, grid, arguments = room.plan(case.x, y, case.coefficients, case.missing, case.functions)
    *rest, planes, inner, channels, rows, cols, code, number, _ = arguments
    if tile is not None:
        rows, cols = tile
        grid = (-(-planes // rows) * -(-inner // cols),)
    with np.errstate(all="ignore"):  # the interpreter computes with numpy, which warns of overflow
        kernel[grid](*rest, planes, inner, channels, rows, cols, code, number, True)


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


@pytest.mark.parametrize("functions", ["log", "asinh", "log,asinh", "asinh,log,asinh", "each,each"])
def test_functions_match_float64(functions: str) -> None:
    for dtype in (torch.float32, torch.int16, torch.uint8):
        check(make_case((5, 7, 331), dtype, seed=len(functions), functions=functions))


def test_asinh_is_right_to_four_units_from_the_smallest_to_where_squares_overflow() -> None:
    infinity = float("inf")
    x = torch.cat([torch.logspace(-38, 38, 9000), torch.linspace(0.3, 1.0, 9000), torch.tensor([0.0, infinity])])
    x = torch.cat([x, -x]).reshape(1, 1, -1)
    plain = [1.0, 0.0, -infinity, infinity]
    case = Case(
        x, torch.tensor([*plain, 0.0, *plain, 0.0, 0.0])[:, None], torch.zeros(2, 1, dtype=torch.int32), "asinh"
    )
    got, want = interpret(case, torch.float32).double(), torch.asinh(x.double())
    unit = torch.exp2(torch.floor(torch.log2(want.abs())) - 23)
    finite = want.isfinite() & (want != 0)
    assert ((got - want).abs() / unit)[finite].max() <= 4
    assert torch.equal(got[~finite], want[~finite])
    assert torch.equal(got[x != 0].signbit(), x[x != 0].signbit())


@pytest.mark.parametrize(
    "shape", [(2, 3), (3, 3, 31), (2, 70, 5, 9), (1, 16, 4, 8, 16), (2, 1, 2049), (2, 200, 3)], ids=str
)
@pytest.mark.parametrize("layout", room.LAYOUTS[1:])
def test_layouts_move_the_channels(layout: str, shape: tuple[int, ...]) -> None:
    case = make_case(shape, torch.int16, seed=sum(shape))
    last = layout == "NHWC->NCHW"
    x = case.x.movedim(1, -1).contiguous() if last else case.x
    moved = shape if last else (shape[0], *shape[2:], shape[1])
    with poisoned_output(moved, torch.float32) as y:
        kernel, grid, arguments = room.plan(x, y, case.coefficients, case.missing, "", layout)
        kernel[grid](*arguments[:-1], True)
    assert roundings(y if last else y.movedim(-1, 1), case, exact_fma=False) <= 1


def test_the_poison_is_a_value_the_kernel_never_writes() -> None:
    for dtype, bits in POISON.items():
        assert poisoned((1,), dtype).isnan().item()
        assert unwritten(torch.full((3,), float("nan"), dtype=dtype)) == 0, hex(bits)
