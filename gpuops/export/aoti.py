"""AOTInductor: the graph compiled ahead of time to machine code, for one kind of machine.

Such a package checks nothing that it is given (wrong dtypes and shapes are answered, wrongly), and the checks that it
could be compiled with also refuse batch sizes that are right. So its runner relies on `Signature.check`, and a bundle
is proved at every batch size. Its bytes differ at every build.
"""

from __future__ import annotations

import platform
import shutil
from pathlib import Path
from typing import Any

from gpuops.errors import UnavailableError

ADVICE = "export it again on this kind of machine, or load another format"


def require_compiler() -> None:
    """Raise UnavailableError unless the C++ compiler that AOTInductor calls is installed."""
    from torch._inductor import config

    names = [name for name in config.cpp.cxx if name]
    if not any(map(shutil.which, names)):
        raise UnavailableError(
            f"aoti compiles with {' or '.join(names)}, which is not installed: apt install g++ (or set CXX), or leave "
            "aoti out of --formats"
        )


def require_device(device: str) -> None:
    """Raise UnavailableError for "cuda" where torch sees none."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("torch sees no CUDA device here: use device cpu")


def write(graph: Any, example: tuple[Any, ...], dynamic: Any, decompositions: Any, file: Path, device: str) -> None:
    """Compile a graph into `file`.

    Args:
        graph: the served graph, on the CPU.
        example: its input tensors at the largest served batch: from a smaller one, some kernels are specialised on
            batches up to it only.
        dynamic: dynamic shapes, as torch.export takes them.
        decompositions: table that leaves aten only; on CUDA gpuops' own kernels stay, and are compiled in.
        file: where the package goes.
        device: "cpu" or "cuda".
    """
    import torch

    try:
        program = torch.export.export(
            graph.to(device), tuple(tensor.to(device) for tensor in example), dynamic_shapes=dynamic
        )
    finally:
        graph.to("cpu")
    if device == "cpu":
        program = program.run_decompositions(decompositions)
    torch._inductor.aoti_compile_and_package(program, package_path=str(file))


def facts(file: Path) -> dict[str, Any]:
    """What a package is bound to.

    Returns:
        {"architecture": "x86_64", "torch": version, "isa": CPU instruction sets, "cuda_arch": "sm_90" or None}.
    """
    import torch

    metadata = _metadata(file)
    arch = None
    if metadata["AOTI_DEVICE_KEY"] == "cuda":
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return {
        "architecture": platform.machine(),
        "torch": torch.__version__,
        "isa": metadata["AOTI_CPU_ISA"],
        "cuda_arch": arch,
    }


def load(file: Path, recorded: dict[str, Any], device: str) -> Any:
    """A package as a function of tensors, once this machine is known to be able to run it.

    Args:
        file: the package.
        recorded: its `facts`, from the manifest.
        device: where it is to run.

    Raises:
        UnavailableError: compiled for another device, GPU, torch, processor or instruction set, which could end the
            process.
    """
    import torch

    compiled_for = "cpu" if recorded["cuda_arch"] is None else "cuda"
    if device != compiled_for:
        raise UnavailableError(f"{file} was compiled for {compiled_for}, not {device}: {ADVICE}")
    if _minor(recorded["torch"]) != _minor(torch.__version__):
        raise UnavailableError(
            f"{file} was compiled by torch {recorded['torch']}, here is {torch.__version__}: {ADVICE}"
        )
    if device == "cuda":
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
        if arch != recorded["cuda_arch"]:
            raise UnavailableError(f"{file} was compiled for {recorded['cuda_arch']}, the GPU is {arch}: {ADVICE}")
    if platform.machine() != recorded["architecture"]:
        raise UnavailableError(
            f"{file} was compiled for {recorded['architecture']}, the processor is {platform.machine()}: {ADVICE}"
        )
    if lacking := lacking_isa(recorded["isa"]):
        raise UnavailableError(f"{file} was compiled for {recorded['isa']}, this CPU has no {lacking}: {ADVICE}")
    return torch._inductor.aoti_load_package(str(file))


def lacking_isa(isa: str) -> str:
    """The instruction sets in `isa`, as inductor spells them, that this CPU is known not to have."""
    import torch

    has = torch.cpu.get_capabilities()
    return " ".join(word for word in isa.split() if has.get({"AVX512": "avx512_f"}.get(word, word.lower())) is False)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _metadata(file: Path) -> dict[str, str]:
    import torch

    read = torch._C._aoti.AOTIModelPackageLoader.load_metadata_from_package  # type: ignore[attr-defined]
    metadata: dict[str, str] = read(str(file), "model")
    return metadata
