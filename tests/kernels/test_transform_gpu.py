"""The kernel on a real GPU. What a machine without one can prove about it is in the other files of this folder."""

import pytest
import torch
from oracle import Case, assert_nearest_even, integers, make_case, poisoned, roundings, unwritten

from gpuops_kernels import transform as room

op = torch.ops.gpuops.transform

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="torch sees no CUDA device: benchmarks/gpu.sh runs this on one"
    ),
]


def on_gpu(case: Case) -> Case:
    return Case(*(tensor.cuda() for tensor in case.args), case.functions)


def run_on(case: Case, y: torch.Tensor) -> None:
    """What `launch` does, on an output that the caller has poisoned."""
    kernel, grid, arguments = room.plan(case.x, y, case.coefficients, case.missing, case.functions)
    kernel[grid](*arguments, enable_fp_fusion=False)


SHAPES = [
    (0, 3, 8),
    (2, 3),
    (40, 70),
    (3, 200, 1),
    (5, 7, 31),
    (3, 5, 2, 3, 43),
    (2, 8, 256, 256),
    (2, 3, 255, 257),
    (70_001, 2, 17),
]


@pytest.mark.parametrize("out", room.OUTPUT_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", room.INPUT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape: tuple[int, ...], dtype: torch.dtype, out: torch.dtype) -> None:
    case = make_case(shape, dtype, seed=sum(shape))
    y = room.launch(*on_gpu(case).args, out)
    assert (y.shape, y.dtype, y.device.type) == (case.x.shape, out, "cuda")
    assert roundings(y.cpu(), case, exact_fma=True) <= 1
    assert torch.equal(integers(y), integers(op(*on_gpu(case).args, out)))
    if out == torch.bfloat16:
        assert_nearest_even(y.cpu(), room.launch(*on_gpu(case).args, torch.float32).cpu())


@pytest.mark.parametrize("functions", ["log", "asinh", "each", "asinh,log,each"])
@pytest.mark.parametrize("out", room.OUTPUT_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=str)
def test_functions_match_float64(dtype: torch.dtype, out: torch.dtype, functions: str) -> None:
    case = make_case((3, 7, 331), dtype, seed=5, functions=functions)
    y = room.launch(*on_gpu(case).args, out, functions)
    assert roundings(y.cpu(), case, exact_fma=True) <= 1
    assert torch.equal(integers(y), integers(op(*on_gpu(case).args, out, functions)))


@pytest.mark.parametrize("layout", room.LAYOUTS[1:])
@pytest.mark.parametrize("shape", [(2, 3), (3, 3, 31), (2, 70, 5, 9), (1, 16, 4, 8, 16), (2, 200, 3)], ids=str)
def test_layouts_match_float64(shape: tuple[int, ...], layout: str) -> None:
    case = make_case(shape, torch.int16, seed=sum(shape))
    last = layout == "NHWC->NCHW"
    x = (case.x.movedim(1, -1).contiguous() if last else case.x).cuda()
    y = room.launch(x, *on_gpu(case).args[1:], torch.bfloat16, "", layout)
    assert roundings((y if last else y.movedim(-1, 1)).cpu(), case, exact_fma=True) <= 1


@pytest.mark.parametrize("out", room.OUTPUT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_writes_every_element_and_nothing_else(shape: tuple[int, ...], out: torch.dtype) -> None:
    case = make_case(shape, torch.int16, seed=1)
    guard, n = 1 << 16, case.x.numel()
    buffer = poisoned((n + 2 * guard,), out, "cuda")
    y = buffer[guard : guard + n].view(shape)
    run_on(on_gpu(case), y)
    assert unwritten(y) == 0
    assert unwritten(buffer) == 2 * guard
    assert roundings(y.cpu(), case, exact_fma=True) <= 1


@pytest.mark.parametrize("offset", [1, 3, 8])
def test_views_that_do_not_begin_at_16_bytes(offset: int) -> None:
    case = make_case((2, 3, 64, 64), torch.int16, seed=9)
    buffer = torch.zeros(case.x.numel() + offset, dtype=torch.int16, device="cuda")
    x = buffer[offset:].view(case.x.shape).copy_(case.x)
    y = room.launch(x, case.coefficients.cuda(), case.missing.cuda(), torch.float32)
    assert roundings(y.cpu(), case, exact_fma=True) <= 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_op_is_bit_equal(dynamic: bool) -> None:
    compiled = torch.compile(lambda *args: op(*args, torch.bfloat16), fullgraph=True, dynamic=dynamic)
    for samples in (3, 5):
        case = on_gpu(make_case((samples, 4, 33, 16), torch.int16, seed=samples))
        assert torch.equal(integers(compiled(*case.args)), integers(room.launch(*case.args, torch.bfloat16)))


@pytest.mark.parametrize("shape", [(2**17 + 3, 1, 2**14), (1, 1, 2**31 + 4096 + 5), (2**28 + 1, 8)], ids=str)
def test_more_than_two_to_the_31_elements(shape: tuple[int, ...]) -> None:
    """Also more planes than the second grid axis allows, one plane longer than int32, and many planes a tile."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    channels = shape[1]
    x = torch.empty(shape, dtype=torch.uint8, device="cuda")
    x.random_(0, 256, generator=torch.Generator("cuda").manual_seed(0))
    scale = torch.linspace(0.5, 2.0, channels)
    rows = [
        scale,
        -scale,
        torch.full_like(scale, -torch.inf),
        torch.full_like(scale, 300.0),
        torch.full_like(scale, -7.0),
        torch.full_like(scale, torch.nan),
    ]
    missing = torch.tensor([[255] * channels, [1] * channels], dtype=torch.int32)
    case = Case(x, torch.stack(rows).cuda(), missing.cuda())
    y = poisoned(shape, torch.bfloat16, "cuda")
    run_on(case, y)
    # The reference on pieces of whole samples or, for the one long plane, of that plane: the pieces cover everything.
    samples = x.view(-1, channels, *shape[2:]) if shape[0] > 1 else x.view(-1, 1, 1)
    results = y.view(samples.shape)
    step = max(1, 2**26 // max(1, samples[0].numel()))
    for begin in range(0, samples.shape[0], step):
        want = room.reference(samples[begin : begin + step], case.coefficients, case.missing, torch.bfloat16)
        # Small integers times these scales: the two roundings of the reference may differ from fma by one unit.
        got = results[begin : begin + step]
        assert unwritten(got) == 0
        assert int((integers(got).int() - integers(want).int()).abs().max()) <= 1
    assert begin + step >= samples.shape[0]


def test_the_check_and_the_launch_do_not_wait_for_the_gpu() -> None:
    case = on_gpu(make_case((4, 3, 512, 512), torch.int16, seed=2))
    room.launch(*case.args, torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        room.launch(*case.args, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
