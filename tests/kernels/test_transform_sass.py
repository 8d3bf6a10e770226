"""What `transform` becomes for real GPUs, compiled to machine code on a machine that has none.

Arguments come from `plan`, so that the specialisation (which of them Triton knows to be multiples of 16) is the one of
a real launch.
"""

import re

import cubin
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional
from torch._subclasses.fake_tensor import FakeTensorMode

from gpuops_kernels import epilogue
from gpuops_kernels import transform as room


def compile_for(
    capability: int, dtype: torch.dtype, out: torch.dtype, shape: tuple[int, ...], functions: str = "", **options: bool
) -> cubin.Code:
    x, y = torch.empty(shape, dtype=dtype, device="meta"), torch.empty(shape, dtype=out, device="meta")
    tables = (
        torch.empty(epilogue.rows(functions), 8, device="meta"),
        torch.empty(2, 8, dtype=torch.int32, device="meta"),
    )
    kernel, _, arguments = room.plan(x, y, *tables, functions)
    return cubin.compile_for(capability, kernel, arguments, **options)


def assert_lean(code: cubin.Code, registers: int) -> None:
    """No spills, and few enough registers for `registers` a thread."""
    assert code.spills == 0
    assert code.registers <= registers


ALIGNED = (4, 8, 256, 256)
CELLS = [
    (capability, dtype, out) for capability in (80, 90) for dtype in room.INPUT_DTYPES for out in room.OUTPUT_DTYPES
]
QUICK = {
    (80, torch.uint8, torch.float32),
    (80, torch.int16, torch.bfloat16),
    (90, torch.uint16, torch.bfloat16),
    (90, torch.int16, torch.float32),
    (90, torch.int16, torch.bfloat16),
    (90, torch.float32, torch.float32),
    (90, torch.int8, torch.float16),
    (90, torch.int32, torch.bfloat16),
}


@pytest.mark.parametrize(
    ("capability", "dtype", "out"),
    [
        pytest.param(*cell, marks=() if cell in QUICK else pytest.mark.slow, id="-".join(map(str, cell)))
        for cell in CELLS
    ],
)
def test_aligned_planes_move_128_bits_at_a_time(capability: int, dtype: torch.dtype, out: torch.dtype) -> None:
    code = compile_for(capability, dtype, out, ALIGNED, enable_fp_fusion=False)
    assert_lean(code, registers=64)  # 64 leaves room for 1024 threads a multiprocessor, more than the memory needs
    # 2048 elements on 128 threads are 16 a thread, so this many accesses of 16 bytes, and no narrower one for x or y.
    assert code.count(r"STG\.E\.128") == out.itemsize
    assert code.count(r"LDG\.E\.128[\w.]*") == dtype.itemsize
    assert code.count(r"STG[\w.]*") == out.itemsize
    # What is left are one load a coefficient: a, b, lo, hi, fill, flag, and the missing value of one kind or the other.
    assert code.count(r"LDG[\w.]*") == dtype.itemsize + 7
    assert code.count(r"FFMA[\w.]*") >= 16, "the multiply-add is not one instruction"
    # The interpreter keeps NaN in every minimum and maximum; a GPU drops it unless told not to.
    assert code.count(r"FMNMX\.NAN") == code.count(r"FMNMX[\w.]*") == 32


@pytest.mark.parametrize("functions", ["", "log", "asinh"])
def test_fusion_option_changes_nothing(functions: str) -> None:
    """`launch` passes it and wrap_triton cannot, and both must give the same bits."""
    without, with_fusion = (
        compile_for(90, torch.int16, torch.bfloat16, ALIGNED, functions, enable_fp_fusion=fuse)
        for fuse in (False, True)
    )
    assert without.sass == with_fusion.sass


@pytest.mark.parametrize(
    "shape",
    [
        (64, 8),
        (64, 8, 16),
        (64, 8, 256),
        pytest.param((3, 5), marks=pytest.mark.slow),
        pytest.param((4, 8, 255, 257), marks=pytest.mark.slow),
        pytest.param((1, 1), marks=pytest.mark.slow),
        pytest.param((1, 200, 1, 1, 7), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_small_and_odd_planes_compile_without_spills(shape: tuple[int, ...]) -> None:
    code = compile_for(90, torch.int16, torch.bfloat16, shape, enable_fp_fusion=False)
    assert_lean(code, registers=168)
    if shape[0] == 64:  # whole tiles of small planes are one contiguous run: still 128 bits at a time
        assert code.count(r"STG\.E\.128") == 2
        assert code.count(r"LDG\.E\.128[\w.]*") == 2


@pytest.mark.parametrize("shape", [ALIGNED, (1, 1, 2**31 + 4096)], ids=["many planes", "a plane above 2**31"])
def test_offsets_are_64_bit(shape: tuple[int, ...]) -> None:
    code = compile_for(90, torch.uint8, torch.bfloat16, shape, enable_fp_fusion=False)
    assert_lean(code, registers=64)
    for pointer, element in (("x_ptr", "i8"), ("y_ptr", "bf16")):
        tile_start = rf"tt\.addptr %{pointer}, %\w+ : !tt\.ptr<{element}>, i64"
        assert re.search(tile_start, code.ttir), f"the tile's offset from {pointer} is not int64:\n{code.ttir}"
    assert "arith.muli" in code.ttir
    assert not re.search(r"arith\.muli %(row_start|col_start)\w*, .*: i32", code.ttir), (
        "an offset is multiplied in int32"
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_for_cuda_is_one_kernel_that_writes_only_y(dynamic: bool) -> None:
    """Traced on tensors without memory; Inductor would copy every tensor that it thinks the kernel writes."""
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=aot_autograd(fw_compiler=record))
    def compiled(x: torch.Tensor, coefficients: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
        return torch.ops.gpuops.transform(x, coefficients, missing, torch.bfloat16)

    with cubin.driver_for(90), FakeTensorMode():
        x = torch.empty(6, 3, 128, 33, dtype=torch.int16, device="cuda")
        tables = torch.empty(6, 3, device="cuda"), torch.empty(2, 3, dtype=torch.int32, device="cuda")
        y = compiled(x, *tables)
    assert (y.shape, y.dtype, y.device.type) == (x.shape, torch.bfloat16, "cuda")
    (graph,) = graphs
    (call,) = graph.graph.find_nodes(op="call_function", target=triton_kernel_wrapper_functional)
    assert call.kwargs["tensors_to_clone"] == ["y_ptr"]
    if not dynamic:
        assert call.kwargs["grid"] == [(6 * 3 * 3, 1, 1)]


@pytest.mark.parametrize(
    ("shape", "programs"),
    [
        ((70_000, 1, 4096), 140_000),  # above 65535, the limit of the other grid axes
        ((1, 1, 2**28), 2**17),
        ((2**21, 200), 204_800),
        ((2**17, 32, 1024, 2), 2**22),  # 2**33 elements
    ],
)
def test_the_grid_has_one_axis(shape: tuple[int, ...], programs: int) -> None:
    x = torch.empty(shape, dtype=torch.uint8, device="meta")
    _, grid, _ = room.plan(x, x, x, x)
    assert grid == (programs,)
    assert programs < 2**31
