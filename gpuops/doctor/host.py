"""What this machine can do: Python, packages, accelerator, energy counter, inference server."""

from __future__ import annotations

import importlib.metadata
import os
import sys

from gpuops.doctor.finding import Finding
from gpuops.energy.nvml import open_gpus
from gpuops.errors import GpuopsError

_EXTRAS = {
    "data": ("zarr", "numcodecs", "icechunk", "xarray", "dask", "h5py"),
    "train": ("torch", "lightning", "triton"),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "report": ("matplotlib",),
    "demo": ("pvlib",),
}


def machine() -> list[Finding]:
    """Python, packages, accelerator, energy counter and inference server of this machine."""
    return [_python(), _cores(), *_packages(), *_accelerator(), _energy(), _tritonserver()]


def _python() -> Finding:
    return Finding("ok", "python", f"{'.'.join(map(str, sys.version_info[:3]))} at {sys.executable}")


def _cores() -> Finding:
    return Finding("ok", "cores", f"{len(os.sched_getaffinity(0))} usable by this process")


def _packages() -> list[Finding]:
    findings = []
    for extra, packages in _EXTRAS.items():
        versions, absent = [], []
        for package in packages:
            try:
                versions.append(f"{package} {importlib.metadata.version(package)}")
            except importlib.metadata.PackageNotFoundError:
                absent.append(package)
        if absent:
            remedy = f"missing {', '.join(absent)}: pip install 'gpuops[{extra}]' for the commands that need it"
            findings.append(Finding("note", f"extra {extra}", remedy))
        else:
            findings.append(Finding("ok", f"extra {extra}", ", ".join(versions)))
    return findings


def _accelerator() -> list[Finding]:
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return [Finding("note", "accelerator", "no CUDA device: kernels run as their reference on the CPU")]
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [Finding("ok", "accelerator", f"{', '.join(names)}; CUDA {torch.version.cuda}")]


def _energy() -> Finding:
    found = open_gpus()
    if found.reason is not None:
        return Finding("note", "energy", f"joules will be null: {found.reason}")
    sensors = ", ".join(sorted({f"{sensor.method}, scope {sensor.scope}" for sensor in found.sensors}))
    return Finding("ok", "energy", sensors)


def _tritonserver() -> Finding:
    from gpuops_serving.binary import environment_for, find_tritonserver

    try:
        binary = find_tritonserver()
        environment_for(binary)
    except GpuopsError as error:
        return Finding("bad", "tritonserver", str(error))
    return Finding("ok", "tritonserver", f"{binary}; models run in {sys.executable}")
