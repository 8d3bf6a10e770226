"""gpuops::transform on its way out of PyTorch: torch.export, .pt2, ONNX, AOTInductor, and traces for an absent GPU."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from oracle import Case, integers, make_case, roundings
from torch._subclasses.fake_tensor import FakeTensorMode

from gpuops_kernels import transform as room

op = torch.ops.gpuops.transform

pytestmark = [
    # torch's own run_decompositions uses its own deprecated tree API,
    pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"),
    # and imports its own deprecated TorchScript when Inductor is first loaded.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


class EveryDtype(torch.nn.Module):
    """One op for each input dtype, so that one export proves them all."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        for index, case in enumerate(cases):
            self.register_buffer(f"coefficients{index}", case.coefficients)
            self.register_buffer(f"missing{index}", case.missing)

    def forward(self, *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(
            op(x, self.get_buffer(f"coefficients{i}"), self.get_buffer(f"missing{i}"), torch.float32)
            for i, x in enumerate(xs)
        )


def cases_of(samples: int) -> list[Case]:
    """The same tables for any number of samples."""
    cases = [make_case((6, 5, 9, 16), dtype, seed=21) for dtype in room.INPUT_DTYPES]
    return [Case(case.x[:samples].clone(), case.coefficients, case.missing) for case in cases]


@pytest.fixture(scope="module")
def exported() -> torch.export.ExportedProgram:
    cases = cases_of(4)
    batch = torch.export.Dim("batch", min=1, max=32)
    return torch.export.export(
        EveryDtype(cases), tuple(case.x for case in cases), dynamic_shapes={"xs": tuple({0: batch} for _ in cases)}
    )


@pytest.fixture(scope="module")
def decomposed(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    table = torch.export.default_decompositions()
    table.update(room.decompositions())
    return exported.run_decompositions(table)


def namespaces(program: torch.export.ExportedProgram) -> set[str]:
    return {node.target.namespace for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}


def assert_right(results: list[torch.Tensor], cases: list[Case]) -> None:
    assert len(results) == len(cases)
    for result, case in zip(results, cases, strict=True):
        assert roundings(result, case, exact_fma=False) <= 1
        assert torch.equal(result.isnan(), op(*case.args, torch.float32).isnan())


def test_export_keeps_the_op(exported: torch.export.ExportedProgram) -> None:
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert targets.count(op.default) == len(room.INPUT_DTYPES)
    cases = cases_of(5)
    for result, case in zip(exported.module()(*(case.x for case in cases)), cases, strict=True):
        assert torch.equal(integers(result), integers(op(*case.args, torch.float32)))


def test_decomposed_graph_is_aten_and_bit_equal(decomposed: torch.export.ExportedProgram) -> None:
    assert namespaces(decomposed) == {"aten"}
    for samples in (1, 2, 6):
        cases = cases_of(samples)
        for result, case in zip(decomposed.module()(*(case.x for case in cases)), cases, strict=True):
            assert torch.equal(integers(result), integers(op(*case.args, torch.float32)))


def test_pt2_runs_in_a_process_without_this_package(decomposed: torch.export.ExportedProgram, tmp_path: Path) -> None:
    torch.export.save(decomposed, tmp_path / "model.pt2")
    cases = cases_of(3)
    torch.save([case.x for case in cases], tmp_path / "inputs.pt")
    program = f"""
import sys, torch
results = torch.export.load({str(tmp_path / "model.pt2")!r}).module()(*torch.load({str(tmp_path / "inputs.pt")!r}))
assert "gpuops_kernels" not in sys.modules and not hasattr(torch.ops.gpuops, "transform")
torch.save(list(results), {str(tmp_path / "results.pt")!r})
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for result, case in zip(torch.load(tmp_path / "results.pt"), cases, strict=True):
        assert torch.equal(integers(result), integers(op(*case.args, torch.float32)))


def test_onnx_equals_the_op(decomposed: torch.export.ExportedProgram, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    torch.onnx.export(decomposed, (), dynamo=True, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]
    for samples in (1, 4, 6):
        cases = cases_of(samples)
        feed = {name: case.x.numpy() for name, case in zip(names, cases, strict=True)}
        results = [torch.from_numpy(result) for result in session.run(None, feed)]
        assert_right(results, cases)
        for result, case in zip(results, cases, strict=True):
            np.testing.assert_array_equal(result.numpy(), op(*case.args, torch.float32).numpy())


class Curves(torch.nn.Module):
    """Functions by channel, and channels moved to the front."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.register_buffer("coefficients", case.coefficients)
        self.register_buffer("missing", case.missing)
        self.functions = case.functions

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return op(x, self.coefficients, self.missing, torch.float32, self.functions, "NHWC->NCHW")


@pytest.mark.parametrize("functions", ["asinh", "log,each"])
def test_functions_and_layouts_leave_pytorch_too(functions: str, tmp_path: Path) -> None:
    case = make_case((6, 5, 9, 16), torch.int16, seed=3, functions=functions)
    x = case.x.movedim(1, -1).contiguous()
    batch = torch.export.Dim("batch", min=1, max=32)
    program = torch.export.export(Curves(case), (x[:4].clone(),), dynamic_shapes={"x": {0: batch}})
    table = torch.export.default_decompositions()
    table.update(room.decompositions())
    program = program.run_decompositions(table)
    assert namespaces(program) == {"aten"}
    want = op(*case.args, torch.float32, functions)
    torch.testing.assert_close(program.module()(x), want, rtol=0, atol=0, equal_nan=True)
    torch.onnx.export(program, (), dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert roundings(torch.from_numpy(got), case, exact_fma=False) <= 1


@pytest.mark.slow
def test_aot_inductor_package_is_right(exported: torch.export.ExportedProgram, tmp_path: Path) -> None:
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    cases = cases_of(4)
    assert_right(list(torch._inductor.aoti_load_package(package)(*(case.x for case in cases))), cases)


def test_exports_for_cuda_without_a_gpu_and_with_free_sizes() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, coefficients: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
            return op(x, coefficients, missing, torch.bfloat16)

    with FakeTensorMode():
        x = torch.empty(4, 3, 16, 16, dtype=torch.int16, device="cuda")
        tables = torch.empty(6, 3, device="cuda"), torch.empty(2, 3, dtype=torch.int32, device="cuda")
        y = op(x, *tables, torch.bfloat16)
        assert (y.shape, y.dtype, y.device.type) == (x.shape, torch.bfloat16, "cuda")
        sizes = {0: torch.export.Dim("batch", min=0, max=64), 2: torch.export.Dim("height", min=8, max=4096)}
        program = torch.export.export(Model(), (x, *tables), dynamic_shapes=(sizes, None, None))
        with pytest.raises(ValueError, match=r"coefficients\.to\(x\.device\)"):
            op(x, torch.empty(6, 3), tables[1], torch.bfloat16)
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [op.default]
    limits = sorted((limit.lower, limit.upper) for limit in program.range_constraints.values())
    assert limits == [(0, 64), (8, 4096)]
