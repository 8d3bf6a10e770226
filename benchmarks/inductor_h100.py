"""What torch.compile makes of the reference pipelines for an H100, written out on a machine without a GPU.

    python benchmarks/inductor_h100.py      one JSON document a line: pipeline, kernels, extern, instructions, ...

Inductor is told the properties of an H100 and asked for its code; the kernels are compiled with the ptxas of the triton
wheel, each in the first configuration of its heuristic. It runs in a process of its own, because it replaces parts of
torch. The day one of these rows reaches ours, the kernel it belongs to can be deleted.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import cubin
import kernel_pipelines
import torch
import triton
from torch._dynamo import device_interface
from torch._inductor import config
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _triton

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    gcnArchName="",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
)
WINDOWS, CHUNKS = 32, 16


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A pipeline in plain torch, and what it takes."""

    name: str
    function: Callable[..., Any]
    inputs: Sequence[tuple[tuple[int, ...], torch.dtype]]
    dynamic: bool = False
    """Samples, height and width are symbols."""
    cooperative: bool = False
    """With cooperative reductions, which PyTorch does not use unless told to."""


def pipelines() -> list[Pipeline]:
    """What our kernels are measured against."""
    packed = kernel_pipelines.SHAPE, torch.int16
    tables = [((kernel_pipelines.SHAPE[1],), torch.float32)] * 2
    entries = (WINDOWS, 3), torch.int64
    chunk = kernel_pipelines.SHAPE[1:], torch.int16
    ragged = (32, 8, 512, 480), torch.int16
    return [
        Pipeline("transform", kernel_pipelines.transform, [packed, *tables]),
        Pipeline("transform, dynamic shapes", kernel_pipelines.transform, [ragged, *tables], dynamic=True),
        Pipeline("transform asinh", kernel_pipelines.transform_asinh, [packed, *tables]),
        Pipeline("transform_stats", kernel_pipelines.transform_stats, [packed, *tables]),
        Pipeline("transform_stats, cooperative", kernel_pipelines.transform_stats, [packed, *tables], cooperative=True),
        Pipeline("window, slab", kernel_pipelines.window_slab, [packed, entries, *tables]),
        Pipeline("window, chunks", kernel_pipelines.window_chunks, [entries, *tables, *[chunk] * CHUNKS]),
        Pipeline("histogram", kernel_pipelines.histogram, [packed]),
        Pipeline("resize antialias", kernel_pipelines.resize, [packed, *tables]),
    ]


class Driver(cubin.FakeDriver):
    """What Inductor asks of Triton's driver beside that."""

    class Utils:
        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    utils = Utils()

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def pretend() -> None:
    """This process has an H100."""
    triton.runtime.driver.set_active(Driver(90))
    cuda, worker = device_interface.CudaInterface, device_interface.CudaInterface.Worker
    properties = {"get_device_properties": lambda device=None: H100, "current_device": lambda: 0}
    answers: list[tuple[Any, dict[str, Callable[..., Any]]]] = [
        (torch.cuda, properties | {"is_available": lambda: True, "device_count": lambda: 1}),
        (torch.cuda, {"get_device_capability": lambda device=None: (9, 0), "_lazy_init": lambda: None}),
        (torch.cuda, {"synchronize": lambda device=None: None}),
        (cuda, properties | {"get_compute_capability": lambda device=None: 90, "is_available": lambda: True}),
        (cuda, {"is_triton_capable": lambda device=None: True}),
        (cuda, {"raise_if_triton_unavailable": lambda device=None: None}),
        (worker, properties),
        (_triton, {"has_triton": lambda *_, **__: True}),
        (joint_graph, {"lazy_init": lambda *_, **__: None}),
        (post_grad, {"lazy_init": lambda *_, **__: None}),
        (triton_helpers, {"set_driver_to_gpu": lambda: None}),
    ]
    for target, functions in answers:
        for name, function in functions.items():
            method = staticmethod(function) if isinstance(target, type) else function
            mock.patch.object(target, name, method, create=True).start()
    config.compile_threads = 1
    config.joint_graph_constant_folding = False
    config.force_disable_caches = True
    config.triton.unique_kernel_names = True


def emit(pipeline: Pipeline) -> str:
    """Inductor's code of a pipeline."""
    config.triton.cooperative_reductions = pipeline.cooperative
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    shapes = [shape for shape, _ in pipeline.inputs]
    if pipeline.dynamic:
        free = [DimDynamic.DYNAMIC, DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.DYNAMIC]
        context = StatelessSymbolicContext(dynamic_sizes=free)
        source = torch._dynamo.source.ConstantSource("x")
        whole = mode.from_tensor(torch.empty(shapes[0], device="meta"), source=source, symbolic_context=context)
        shapes[0] = tuple(whole.shape)
    # Traced on the CPU, because indexing on CUDA asks a driver, then moved.
    with mode:
        on_cpu, on_cuda = (
            [torch.empty(s, dtype=d, device=device) for s, (_, d) in zip(shapes, pipeline.inputs, strict=True)]
            for device in ("cpu", "cuda")
        )
        graph = make_fx(pipeline.function, decomposition_table=select_decomp_table())(*on_cpu)
    for node in graph.graph.nodes:
        node.meta.pop("val", None)
        node.meta.pop("tensor_meta", None)
        if node.op == "call_function" and node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    graph.graph.eliminate_dead_code()
    graph.recompile()
    with mode:
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*on_cuda)
    with V.set_fake_mode(mode):
        joint_graph.joint_graph_passes(graph)
        post_grad.post_grad_passes(graph, True)
        lowering = GraphLowering(graph, example_inputs=on_cuda, shape_env=env, cpp_wrapper=False, aot_mode=False)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*on_cuda)
            code = lowering.codegen()[0]
    return str(getattr(code, "value", code))


def compile_kernels(code: str, folder: Path) -> list[tuple[cubin.Code, int]]:
    """Every Triton kernel in Inductor's code, with the elements that a program or a turn of its loop computes."""
    found = []
    quotes = "'" * 3
    for name, source in re.findall(
        rf"async_compile\.triton\('([^']+)', {quotes}(.*?){quotes}, device_str", code, re.DOTALL
    ):
        path = folder / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        tuner = getattr(module, name)
        chosen, meta = tuner.configs[0], tuner.triton_meta
        compiled = triton.compile(
            triton.compiler.ASTSource(
                fn=tuner.fn,
                signature=dict(meta["signature"]),
                constexprs=dict(meta["constants"]) | chosen.kwargs,
                attrs=dict(meta["configs"][0]),
            ),
            target=cubin.GPUTarget("cuda", 90, 32),
            options={"num_warps": chosen.num_warps, "num_stages": chosen.num_stages},
        )
        binary = folder / f"{name}.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        resources, sass = cubin.disassemble(binary)
        threads = 32 * compiled.metadata.num_warps
        blocks = [size for key, size in chosen.kwargs.items() if re.fullmatch(r"[XYZ]BLOCK|R\d_BLOCK", key)]
        found.append((cubin.Code(compiled.asm["ttir"], b"", resources, sass, threads), math.prod(blocks)))
    return found


def main() -> None:
    """Print one line a pipeline."""
    warnings.simplefilter("ignore")
    pretend()
    for pipeline in pipelines():
        code = emit(pipeline)
        call = code[code.index("def call(") :]
        extern = [a or b for a, b in re.findall(r"extern_kernels\.(\w+)|(?<!op = )torch\.ops\.(aten[\w.]+)\(", call)]
        with tempfile.TemporaryDirectory() as folder:
            kernels = compile_kernels(code, Path(folder))
        main_kernel, elements = max(kernels, key=lambda found: found[1])  # others merge or copy
        row = {
            "pipeline": pipeline.name,
            "launches": len(re.findall(r"triton_\w+\.run\(", call)) + len(extern),
            "extern": extern,
            "instructions_per_element": main_kernel.instructions * main_kernel.threads / elements,
            "vector_bits": min(main_kernel.bits("LDG"), main_kernel.bits("STG")),
            "spills": sum(code.spills for code, _ in kernels),
            "registers": main_kernel.registers,
        }
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
