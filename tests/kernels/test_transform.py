"""gpuops::transform on the CPU: the reference, the op and `launch`, against float64 and against each other."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Case, assert_nearest_even, integers, make_case, roundings

from gpuops_kernels import transform as room

op = torch.ops.gpuops.transform

# torch imports its own deprecated TorchScript when Inductor is first loaded.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

ROOT = Path(__file__).parents[2]
SIZES = [0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 61, 64, 65, 127, 128, 129, 251, 255, 256, 257]


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """[N, C, *spatial] of at most 40,000 elements: 0, 1, primes, powers of two and their neighbours."""
    shape = [draw(st.sampled_from([0, 1, 2, 3, 5])), draw(st.one_of(st.integers(1, 8), st.integers(1, 200)))]
    for _ in range(draw(st.integers(0, 3))):
        room_left = 40_000 // max(1, int(np.prod(shape)))
        shape.append(draw(st.sampled_from([size for size in SIZES if size <= max(1, room_left)])))
    return tuple(shape)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    shape=shapes(),
    dtype=st.sampled_from(room.INPUT_DTYPES),
    out=st.sampled_from(room.OUTPUT_DTYPES),
    functions=st.sampled_from(["", "", "log", "asinh", "log,asinh", "asinh,each,log", "each"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_matches_float64(
    shape: tuple[int, ...], dtype: torch.dtype, out: torch.dtype, functions: str, seed: int
) -> None:
    case = make_case(shape, dtype, seed, functions)
    y = op(*case.args, out, functions)
    assert (y.shape, y.dtype, y.is_contiguous()) == (case.x.shape, out, True)
    assert roundings(y, case, exact_fma=False) <= 1
    for other in (room.reference, room.launch):
        assert torch.equal(integers(other(*case.args, out, functions)), integers(y))


@pytest.mark.parametrize("shape", [(2, 3), (0, 3, 5), (2, 3, 7), (2, 3, 5, 7), (1, 70, 4, 3, 2)], ids=str)
def test_layouts_move_the_channels(shape: tuple[int, ...]) -> None:
    case = make_case(shape, torch.int16, seed=4, functions="asinh")
    want = op(*case.args, torch.bfloat16, "asinh")
    last = case.x.movedim(1, -1).contiguous()
    for run in (op, room.launch):
        got = run(last, *case.args[1:], torch.bfloat16, "asinh", "NHWC->NCHW")
        assert got.is_contiguous()
        assert torch.equal(integers(got), integers(want))
        got = run(*case.args, torch.bfloat16, "asinh", "NCHW->NHWC")
        assert got.is_contiguous()
        assert torch.equal(integers(got), integers(want.movedim(1, -1)))


@pytest.mark.parametrize("dtype", room.INPUT_DTYPES, ids=str)
def test_bfloat16_is_float32_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    case = make_case((3, 50, 97), dtype, seed=11)
    wide, narrow = op(*case.args, torch.float32), op(*case.args, torch.bfloat16)
    assert_nearest_even(narrow, wide)


def simple(x: torch.Tensor, *, lo: float = -np.inf, hi: float = np.inf, missing: int = 0, flag: int = 0) -> Case:
    """One channel, y = x unless clipped or missing (then -1)."""
    return Case(
        x,
        torch.tensor([[1.0], [0.0], [lo], [hi], [-1.0], [torch.nan]]),
        torch.tensor([[missing], [flag]], dtype=torch.int32),
    )


def test_int32_missing_is_compared_exactly() -> None:
    x = torch.tensor([[[2**31 - 1, 2**31 - 2, 2**24, 2**24 + 1, -(2**31)]]], dtype=torch.int32)
    for value, position in ((2**31 - 1, 0), (2**31 - 2, 1), (2**24 + 1, 3), (-(2**31), 4)):
        y = op(*simple(x, missing=value, flag=1).args, torch.float32)
        assert (y == -1).nonzero()[:, 2].tolist() == [position]


def test_missing_value_outside_the_dtype_matches_nothing() -> None:
    # 65535 - 65536 = -1: a comparison after a cast to the stored dtype would find all of these.
    for dtype, stored, value in (
        (torch.uint16, 65535, -1),
        (torch.uint8, 255, -1),
        (torch.int16, -1, 65535),
        (torch.int8, -1, 255),
    ):
        y = op(*simple(torch.tensor([[stored]]).to(dtype), missing=value, flag=1).args, torch.float32)
        assert y.item() == stored


def test_nan_is_missing_only_where_flagged_and_survives_the_clip() -> None:
    x = torch.tensor([[[np.nan, np.inf, -np.inf, 5.0, 0.0]]])
    plain = op(*simple(x, lo=-2, hi=2).args, torch.float32).flatten()
    assert plain[0].isnan()
    assert plain[1:].tolist() == [2, -2, 2, 0]
    # The value row is not read for float32: 5.0 and 0.0 stay.
    flagged = op(*simple(x, lo=-2, hi=9, missing=5, flag=1).args, torch.float32).flatten()
    assert flagged.tolist() == [-1, 9, -2, 5, 0]


def test_missing_is_filled_after_the_clip() -> None:
    y = op(
        *simple(torch.tensor([[[-32768, 7]]], dtype=torch.int16), lo=0, hi=5, missing=-32768, flag=1).args,
        torch.float16,
    )
    assert y.flatten().tolist() == [-1, 5]


def arguments() -> dict[str, object]:
    case = make_case((2, 3, 4, 4), torch.int16, seed=0)
    return {"x": case.x, "coefficients": case.coefficients, "missing": case.missing, "dtype": torch.float32}


BAD_ARGUMENTS = [
    ("x", torch.zeros(2, 3, 4, dtype=torch.float64), "x is torch.float64: pass one of torch.uint8"),
    ("x", torch.zeros(2, 3, 4, dtype=torch.int64), "x is torch.int64"),
    ("x", torch.zeros(2, 3, 4, dtype=torch.bool), "x is torch.bool"),
    ("x", torch.zeros(3, dtype=torch.int16), r"x has shape \(3,\): pass \[N, C, \*spatial\]"),
    ("x", torch.zeros(1, 3, 1, 1, 1, 1, dtype=torch.int16), "0 to 3 spatial axes"),
    ("x", torch.zeros(2, 4, 4, dtype=torch.int16), r"x has 4 channels, so pass \[6, 4\]"),
    ("x", torch.zeros(2, 4, 3, dtype=torch.int16).transpose(1, 2), r"x\.contiguous\(\)"),
    ("x", torch.zeros(2, 3, 4, 4, dtype=torch.int16).to(memory_format=torch.channels_last), r"x\.contiguous\(\)"),
    ("x", torch.zeros(2, 3, 4, 4, dtype=torch.int16)[:, :, :, ::2], r"x\.contiguous\(\)"),
    ("x", torch.zeros(2, 3, requires_grad=True), "no gradient passes"),
    ("x", torch.zeros(2, 3, 4, 4, dtype=torch.int16, device="meta"), r"coefficients is on cpu and x on meta"),
    ("coefficients", torch.zeros(6, 3, dtype=torch.float64), r"coefficients\.to\(torch\.float32\)"),
    ("coefficients", torch.zeros(4, 3), r"coefficients has shape \(4, 3\).*pass \[6, 3\]"),
    ("coefficients", torch.zeros(6, 1), r"coefficients has shape \(6, 1\)"),
    ("coefficients", torch.zeros(6, 3, 1), r"coefficients has shape \(6, 3, 1\)"),
    ("coefficients", torch.zeros(3, 6).t(), r"coefficients\.contiguous\(\)"),
    ("coefficients", torch.zeros(6, 3, requires_grad=True), "no gradient passes"),
    ("coefficients", torch.zeros(6, 3, device="meta"), r"coefficients\.to\(x\.device\)"),
    ("missing", torch.zeros(2, 3, dtype=torch.int64), r"missing\.to\(torch\.int32\)"),
    ("missing", torch.zeros(3, dtype=torch.int32), r"missing has shape \(3,\)"),
    ("missing", torch.zeros(3, 2, dtype=torch.int32).t(), r"missing\.contiguous\(\)"),
    ("missing", torch.zeros(2, 3, device="meta", dtype=torch.int32), r"missing\.to\(x\.device\)"),
    ("dtype", torch.float64, "dtype is torch.float64: ask for one of torch.float32"),
    ("dtype", torch.int16, "dtype is torch.int16"),
    ("functions", "sqrt", "functions is 'sqrt': name at most eight of log, asinh, each"),
    ("functions", "log", r"coefficients has shape \(6, 3\): x has 3 channels, so pass \[11, 3\]"),
    ("layout", "NHWC", "layout is 'NHWC': pass one of keep, NHWC->NCHW, NCHW->NHWC"),
    ("layout", "NHWC->NCHW", r"x has 4 channels, so pass \[6, 4\]"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused(name: str, value: object, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(*_: object, **__: object) -> None:
        raise AssertionError("bad arguments got past the check")

    monkeypatch.setattr(room, "reference", ran)
    monkeypatch.setattr(room, "_run", ran)
    with pytest.raises(ValueError, match=message):
        room.launch(**arguments() | {name: value})  # type: ignore[arg-type]
    if "gradient" not in message and "meta" not in str(getattr(value, "device", "")):
        with pytest.raises(ValueError, match=message):
            op(**arguments() | {name: value})


def test_backward_is_an_error_and_no_wrong_gradient() -> None:
    case = make_case((2, 3, 4), torch.float32, seed=0)
    y = op(case.x.requires_grad_(), case.coefficients, case.missing, torch.float32)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        y.nansum().backward()
    with torch.no_grad():
        assert not room.launch(*case.args, torch.float32).requires_grad


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16, torch.float32], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    # opcheck compares NaN as unequal, so these are plain numbers.
    case = simple(torch.arange(2 * 5 * 8).reshape(2, 1, 5, 8).to(dtype), lo=3, missing=17, flag=1)
    torch.library.opcheck(op, (*case.args, torch.bfloat16))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph_for_any_batch(backend: str) -> None:
    compile_graph = torch._dynamo.lookup_backend(backend)
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return compile_graph(graph, inputs)

    @torch.compile(fullgraph=True, backend=counting)
    def compiled(x: torch.Tensor, coefficients: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
        return op(x, coefficients, missing, torch.bfloat16) * 2

    for samples in (4, 7, 64):
        case = make_case((samples, 3, 16, 17), torch.int16, seed=samples)
        torch._dynamo.mark_dynamic(case.x, 0)
        want = op(*case.args, torch.bfloat16) * 2
        torch.testing.assert_close(compiled(*case.args), want, rtol=0, atol=0, equal_nan=True)
    assert len(graphs) == 1


def test_importing_needs_no_gpu_and_the_package_imports_nothing() -> None:
    program = """
import sys, gpuops_kernels
assert not {"torch", "triton", "numpy"} & sys.modules.keys(), "import gpuops_kernels must import nothing heavy"
import gpuops_kernels.transform as room, torch
assert not torch.cuda.is_initialized()
ours = [name for name in sys.modules if name.split(".")[0] in ("gpuops", "gpuops_serving", "zarr", "dask", "lightning")]
assert not ours, ours
assert room.decompositions() == {torch.ops.gpuops.transform.default: room.reference}
"""
    environment = os.environ | {"PYTHONPATH": "kernels", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, env=environment, cwd=ROOT)
