"""Every kernel compiled to machine code for GPUs that are not here, against the committed figures.

`python benchmarks/bench_kernels.py --no-gpu` writes them anew; a change that is meant is committed with them.
"""

import json
import re
from importlib.metadata import version

import bench_kernels
import kernel_cases
import pytest

QUICK = {
    ("transform asinh, int16 to bfloat16", 90),
    ("transform NHWC->NCHW 3, uint8 to bfloat16", 90),
    ("window slab, int16 to bfloat16", 80),
    ("window slab, int16 to bfloat16", 90),
    ("window aligned chunks, int16 to bfloat16", 90),
    ("window pad turned, int16 to bfloat16", 90),
    ("transform_stats, int16 to bfloat16", 90),
    ("histogram, int16", 90),
}
CASES = {case.name: case for case in kernel_cases.cases()}
"""By name, so that the kernels of one case do not hide another's."""

GOLDEN = json.loads(bench_kernels.GOLDEN.read_text())
FIGURES = {(row["case"], row["metric"]): row["value"] for row in GOLDEN["rows"] if row["subject"] == "gpuops"}


def test_every_case_has_committed_figures() -> None:
    assert len(CASES) == len(list(kernel_cases.cases())), "two cases have one name"
    cells = {f"{name}, sm_{target}" for name in CASES for target in kernel_cases.TARGETS}
    assert cells == {case for case, _ in FIGURES}, "write them: python benchmarks/bench_kernels.py --no-gpu"


@pytest.mark.parametrize(
    ("name", "target"),
    [
        pytest.param(name, target, marks=() if (name, target) in QUICK else pytest.mark.slow)
        for name in CASES
        for target in kernel_cases.TARGETS
    ],
)
def test_machine_code(name: str, target: int) -> None:
    case = CASES[name]
    code = bench_kernels.compile_case(case, target)
    rows = {row.metric: row for row in bench_kernels.rows_of(case, target, code)}
    assert rows["spills"].value == 0, code.resources
    assert rows["registers"].value <= case.registers
    assert_offsets_are_64_bit(code.ttir)
    if GOLDEN["versions"]["triton"] != version("triton"):
        pytest.skip(f"figures are of triton {GOLDEN['versions']['triton']}, this is {version('triton')}")
    committed = {metric: FIGURES[f"{name}, sm_{target}", metric] for metric in rows}
    assert rows["vector_bits"].value >= committed["vector_bits"]
    assert rows["instructions_per_element"].value <= 1.05 * committed["instructions_per_element"]


def assert_offsets_are_64_bit(ttir: str) -> None:
    """What is added to an array's first address fits any array: tensors above 2^31 elements are not read elsewhere."""
    arrays = {"x_ptr", "slab_ptr", "y_ptr"}
    arrays |= {name for name, of in re.findall(r"%(\w+) = tt\.splat %(\w+) ", ttir) if of in arrays}
    sums = [line for line in ttir.splitlines() if (m := re.search(r"tt\.addptr %(\w+),", line)) and m[1] in arrays]
    assert sums, "no array is read or written"
    assert all("i64" in line for line in sums), sums


@pytest.mark.slow
def test_torch_compile_has_not_caught_up() -> None:
    """Where our kernels exist because PyTorch's compiler cannot do it in one good pass: delete ours when it can."""
    rows = list(bench_kernels.torch_compile())
    theirs = {(row.case.removesuffix(", int16 to bfloat16, sm_90"), row.metric): row.value for row in rows}
    assert rows, "torch.compile's code could not be written out: see benchmarks/inductor_h100.py"
    assert theirs["transform", "launches"] == 1  # a tie by design, and a sign that the peer is measured fairly
    assert theirs["transform", "vector_bits"] == 128
    assert theirs["transform, dynamic shapes", "vector_bits"] < 128
    assert theirs["transform_stats", "launches"] > 2
    assert theirs["window, chunks", "launches"] > 1
    assert theirs["histogram", "launches"] > 1
