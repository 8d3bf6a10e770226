"""The kernels: what their machine code says, and on a GPU how fast they are against a copy and against torch.compile.

    python benchmarks/bench_kernels.py --no-gpu --out FILE

Without a GPU every kernel is compiled for the A100, H100 and B200 and its machine code read: spills, registers,
instructions an element, and how many bits its widest load and store move. Rows of the subject torch.compile are what
PyTorch's compiler makes of the same pipelines for an H100. On a GPU it measures (see gpu_kernels.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cubin
import harness
import torch
from kernel_cases import TARGETS, KernelCase, cases

PACKAGES = ("torch", "triton")
GOLDEN = harness.RESULTS / "no-gpu" / "kernels.json"
"""What `make test` compares with: instructions an element must not grow by more than 5 %."""


def main() -> None:
    """Measure, or compile where there is nothing to measure on."""
    parser = harness.arguments(__doc__ or "", "kernels")
    parser.add_argument("--no-gpu", action="store_true", help="compile only, as where torch sees no GPU")
    options = parser.parse_args()
    if torch.cuda.is_available() and not options.no_gpu:
        import gpu_kernels  # slow to import, and of no use without a GPU

        gpu_kernels.run(options.out, quick=options.quick)
        return
    out = GOLDEN if options.out == parser.get_default("out") else options.out
    rows = [*compiled(TARGETS[:1] if options.quick else TARGETS), *torch_compile()]
    harness.report(out, packages=PACKAGES, limits={}, rows=rows)


def compiled(targets: tuple[int, ...]) -> Iterator[harness.Row]:
    """Four rows a kernel and target."""
    for case in cases():
        for capability in targets:
            yield from rows_of(case, capability, compile_case(case, capability))


def compile_case(case: KernelCase, capability: int) -> cubin.Code:
    """The machine code of one case."""
    return cubin.compile_for(capability, case.kernel, case.arguments, **dict(case.options))


def rows_of(case: KernelCase, capability: int, code: cubin.Code) -> Iterator[harness.Row]:
    """What the machine code of one case says."""
    name = f"{case.name}, sm_{capability}"
    note = f"loads of {code.bits('LDG')} bits, stores of {code.bits('STG')}; {code.shared_bytes} B of shared memory"
    yield harness.Row(name, "gpuops", "spills", code.spills, "bytes and instructions")
    yield harness.Row(name, "gpuops", "registers", code.registers, "a thread")
    per_element = code.instructions * code.threads / case.elements
    yield harness.Row(name, "gpuops", "instructions_per_element", per_element, "instructions")
    yield harness.Row(name, "gpuops", "vector_bits", min(code.bits("LDG"), code.bits("STG") or 128), "bits", note=note)


def torch_compile() -> Iterator[harness.Row]:
    """What PyTorch's compiler makes of the same pipelines for an H100, in a process that it changes for that."""
    script = Path(__file__).with_name("inductor_h100.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    if done.returncode:
        print(f"torch.compile's code could not be written out (its internals differ here?):\n{done.stderr[-2000:]}")
    for line in done.stdout.splitlines():
        found = json.loads(line)
        note = f"the largest of its kernels; also {', '.join(found['extern'])}" if found["extern"] else ""
        for metric, unit in (
            ("launches", "launches"),
            ("spills", "bytes and instructions"),
            ("registers", "a thread"),
            ("instructions_per_element", "instructions"),
            ("vector_bits", "bits"),
        ):
            case = f"{found['pipeline']}, int16 to bfloat16, sm_90"
            yield harness.Row(case, "torch.compile", metric, found[metric], unit, note=note)


if __name__ == "__main__":
    main()
