"""What this machine, or a store, can do, and every silent slow or blind path it would take."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from dataclasses import dataclass

from gpuops.energy.sensor import open_sensor
from gpuops.errors import GpuopsError
from gpuops.spec import DTYPES

_EXTRAS = {
    "data": ("zarr", "numcodecs", "icechunk", "xarray", "dask", "h5py"),
    "train": ("torch", "lightning", "triton"),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "report": ("matplotlib",),
    "demo": ("pvlib",),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    level: str
    """"ok", "note" (works, but know it) or "bad" (a command will fail)."""
    what: str
    """What was looked at."""
    detail: str
    """What was found, and the remedy if there is one."""


def machine() -> list[Finding]:
    """Python, packages, accelerator, energy counter and inference server of this machine."""
    return [_python(), _cores(), *_packages(), *_accelerator(), _energy(), _tritonserver()]


def store(url: str) -> list[Finding]:
    """Identity, checksums and layout of a store.

    Raises:
        InputError: there is no store.
    """
    from gpuops.data.shard import layout
    from gpuops.data.source import open

    source = open(url)
    findings = [Finding("ok", "store", f"{source.kind}, {len(source.variables)} variables")]
    if source.weak:
        findings.append(Finding("note", "identity", "weak: no digests in the store, so changed bytes are not noticed"))
    else:
        findings.append(Finding("ok", "identity", f"fingerprint {source.fingerprint[:16]} over contents"))
    for name, variable in sorted(source.variables.items()):
        if variable.array.ndim < 2:
            continue
        try:
            place = layout(variable.array)
        except GpuopsError as error:
            findings.append(Finding("bad", name, str(error)))
            continue
        if (dtype := str(variable.array.dtype)) not in DTYPES:
            detail = f"stored as {dtype}, which no kernel reads: `gpuops train` takes {', '.join(DTYPES)}"
            findings.append(Finding("note", name, detail))
        if not place.checksummed:
            detail = "no checksum on inner chunks: corruption cannot be seen; `gpuops ingest` writes them"
            findings.append(Finding("note", name, detail))
        if place.chunk[0] > 1:
            detail = f"{place.chunk[0]} records a chunk: a random record decodes all of them"
            findings.append(Finding("note", name, detail))
        if place.chunk[1:] != variable.array.shape[1:]:
            detail = (
                f"a record of {variable.array.shape[1:]} straddles chunks of {place.chunk[1:]}: several reads a record"
            )
            findings.append(Finding("note", name, detail))
        if place.checksummed and place.chunk == (1, *variable.array.shape[1:]):
            findings.append(Finding("ok", name, f"one record an inner chunk, checksummed ({', '.join(place.codecs)})"))
    return findings


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
    sensor = open_sensor()
    if sensor.reason is not None:
        return Finding("note", "energy", f"joules will be null: {sensor.reason}")
    return Finding("ok", "energy", f"{sensor.method}, scope {sensor.scope}")


def _tritonserver() -> Finding:
    from gpuops_serving.binary import environment_for, find_tritonserver

    try:
        binary = find_tritonserver()
        environment_for(binary)
    except GpuopsError as error:
        return Finding("bad", "tritonserver", str(error))
    return Finding("ok", "tritonserver", f"{binary}; models run in {sys.executable}")
