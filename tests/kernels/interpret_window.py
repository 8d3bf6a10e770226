"""The window kernel, run element by element in Triton's interpreter; see interpret_transform.py."""

import mmap

import numpy as np
import pytest
import torch
from guard import at_page_end, at_page_start, poisoned_output
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oracle import assert_nearest_even, expected, integers, worst
from windows import Windows, cut, make_windows

from gpuops_kernels import rrc
from gpuops_kernels import window as room


def interpret(case: Windows, dtype: torch.dtype, *, separate: bool = False) -> torch.Tensor:
    """Run the kernel on a poisoned output."""
    x = case.slab.x
    chunks = [chunk.clone() for chunk in x] if separate else [x]
    reading = room.read(case.table, len(x), x.shape[2:], case.size, case.rule)
    with poisoned_output((len(case.table), x.shape[1], *case.size), dtype) as y:
        kernel, grid, arguments = room.plan(
            chunks, x.shape[1:], y, reading, case.slab.coefficients, case.slab.missing, case.slab.functions
        )
        with np.errstate(all="ignore"):
            kernel[grid](*arguments[:-1], True)
    return y


def check(case: Windows, *, separate: bool = False) -> None:
    shown, outside = cut(case)
    want, allowed, anything = expected(shown, exact_fma=False)
    if case.rule == "pad":
        fill = case.slab.coefficients[-2].numpy().reshape(-1, *(1,) * len(case.size)).astype(np.float64)
        want, allowed = np.where(outside, fill, want), np.where(outside, 0.0, allowed)
    wide = interpret(case, torch.float32, separate=separate)
    assert worst(wide, want, allowed, anything) <= 1
    assert_nearest_even(interpret(case, torch.bfloat16, separate=separate), wide)


@pytest.mark.parametrize("rule", room.RULES)
@pytest.mark.parametrize("dtype", room.INPUT_DTYPES, ids=str)
def test_windows_are_slices(dtype: torch.dtype, rule: str) -> None:
    check(make_windows((20, 30), (9, 13), dtype=dtype, rule=rule, seed=3))
    check(make_windows((20, 30), (16, 16), dtype=dtype, rule=rule, seed=4), separate=True)


@pytest.mark.parametrize("separate", [False, True])
def test_aligned_windows_are_slices(separate: bool) -> None:
    case = make_windows((20, 64), (9, 32), turned=False, seed=5)
    case.table[:, 2] = case.table[:, 2] // 8 * 8
    reading = room.read(case.table, 3, (20, 64), (9, 32), "error")
    assert (reading.alignment, reading.turned, reading.outside) == (8, False, 0)
    check(case, separate=separate)


@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    chunk=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    rule=st.sampled_from(room.RULES),
    turned=st.booleans(),
    separate=st.booleans(),
    functions=st.sampled_from(["", "asinh"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_window_is_a_slice(chunk, size, rule, turned, separate, functions, seed) -> None:
    if rule == "error":
        size = tuple(min(pair) for pair in zip(chunk, size, strict=True))
    case = make_windows(chunk, size, rule=rule, turned=turned, windows=3, seed=seed, functions=functions)
    check(case, separate=separate)


@pytest.mark.parametrize("rule", room.RULES)
def test_windows_of_volumes(rule: str) -> None:
    check(make_windows((5, 12, 17), (3, 8, 8), rule=rule, seed=6), separate=True)
    check(make_windows((5, 12, 17), (2, 7, 9), rule=rule, seed=7, dtype=torch.float32))


@pytest.mark.parametrize("rule", room.RULES)
@pytest.mark.parametrize("place", [at_page_end, at_page_start])
def test_nothing_is_read_or_written_beyond(rule: str, place) -> None:
    """Slab, tables and result lie beside a page that may not be touched: one byte too far kills the process."""
    case = make_windows((11, 13), (7, 7), rule=rule, windows=20, seed=8)
    x, tables = place(case.slab.x), (place(case.slab.coefficients), place(case.slab.missing))
    y = place(torch.zeros((20, 2, 7, 7)))
    reading = room.read(case.table, 3, (11, 13), (7, 7), rule)
    kernel, grid, arguments = room.plan([x], x.shape[1:], y, reading, *tables)
    guarded = list(arguments)
    guarded[2] = place(guarded[2])
    with np.errstate(all="ignore"):
        kernel[grid](*guarded[:-1], True)
    assert torch.equal(integers(y), integers(interpret(case, torch.float32)))


@pytest.mark.parametrize(("image", "out"), [((7, 9, 3), (4, 5)), ((40, 50, 3), (33, 130)), ((1, 1, 1), (3, 3))])
def test_random_resized_crops(image: tuple[int, int, int], out: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    x = at_page_end(torch.from_numpy(rng.integers(0, 256, (5, *image), dtype=np.uint8)))
    extent = rng.uniform(0.1, 1, (5, 2)) * image[:2]
    first = rng.uniform(0, 1, (5, 2)) * (image[:2] - extent)
    boxes = torch.from_numpy(np.concatenate([first, extent, rng.integers(0, 2, (5, 1))], 1).astype(np.float32))
    scale, offset = torch.linspace(0.5, 2, image[2]), torch.linspace(-1, 1, image[2])
    with poisoned_output((5, image[2], *out), torch.float32) as y:
        kernel, grid, arguments = rrc.plan(x, boxes, scale, offset, y)
        kernel[grid](*arguments[:-1], True)
    want = rrc.reference(x, boxes, scale, offset, torch.float32, *out)
    torch.testing.assert_close(y, want, rtol=0, atol=0.02)
    with poisoned_output((5, image[2], *out), torch.bfloat16) as narrow:
        kernel, grid, arguments = rrc.plan(x, boxes, scale, offset, narrow)
        kernel[grid](*arguments[:-1], True)
    assert_nearest_even(narrow, y)


def test_chunks_beyond_two_to_the_31_elements() -> None:
    """Three GiB of address space, of which only the pages of the last window are ever touched."""
    side, chunks = 32768, 3
    memory = mmap.mmap(-1, chunks * side * side, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    slab = torch.frombuffer(memory, dtype=torch.uint8).view(chunks, 1, side, side)
    small = make_windows((8, 8), (8, 8), chunks=1, channels=1, windows=1, turned=False, dtype=torch.uint8)
    slab[-1, 0, -8:, -8:] = small.slab.x[0, 0]
    table = torch.tensor([[chunks - 1, side - 8, side - 8, 0, 0]], dtype=torch.int32)
    reading = room.read(table, chunks, (side, side), (8, 8), "error")
    with poisoned_output((1, 1, 8, 8), torch.float32) as y:
        tables = small.slab.coefficients, small.slab.missing
        kernel, grid, arguments = room.plan([slab], slab.shape[1:], y, reading, *tables)
        with np.errstate(all="ignore"):
            kernel[grid](*arguments[:-1], True)
    assert torch.equal(integers(y), integers(interpret(small, torch.float32)))
