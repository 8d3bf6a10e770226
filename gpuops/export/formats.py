"""Files that a graph is exported to, and runners that answer from them in this process."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.bundle import FORMAT_FILES, Bundle, read_bundle
from gpuops.errors import InputError, UnavailableError
from gpuops.spec import Arrays, Signature

Answers = dict[str, npt.NDArray[np.float32]]
Infer = Callable[[Arrays], Answers]
"""Stored samples by input name to physical answers by output name."""


def write(
    graph: Any, example: Arrays, outputs: Sequence[str], max_batch: int, directory: Path, formats: Sequence[str]
) -> None:
    """Export a graph into `directory`, one file a format, with a dynamic batch of 1 to `max_batch`.

    Args:
        graph: the served graph, taking the inputs in the order of `example`.
        example: stored samples by input name, at least two of them.
        outputs: output names in the graph's order.
        max_batch: largest batch.
        directory: where the files go.
        formats: of `gpuops.bundle.FORMAT_FILES`.
    """
    import torch

    from gpuops_kernels.transform import decompositions

    unknown = set(formats) - FORMAT_FILES.keys()
    if unknown or not formats:
        raise InputError(f"formats {sorted(unknown)} are unknown; there are {', '.join(FORMAT_FILES)}")
    tensors = tuple(torch.from_numpy(np.ascontiguousarray(array[:2])) for array in example.values())
    batch = torch.export.Dim("batch", min=1, max=max_batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates parts of its own exporters while they run
        program = torch.export.export(graph, tensors, dynamic_shapes=(tuple({0: batch} for _ in tensors),))
        table = torch.export.default_decompositions()
        table.update(decompositions())
        program = program.run_decompositions(table)
        if "pt2" in formats:
            for node in program.graph.nodes:
                node.meta.pop("from_node", None)  # debugging history with memory addresses: other bytes every time
            torch.export.save(program, directory / FORMAT_FILES["pt2"])
        if "onnx" in formats:
            _write_onnx(program, list(example), outputs, directory / FORMAT_FILES["onnx"])


def _write_onnx(program: Any, inputs: list[str], outputs: Sequence[str], file: Path) -> None:
    import torch

    for package in ("onnx", "onnxscript"):
        _require(package, "onnx")
    # It says of each torchvision operator that torchvision is not installed.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    exported = torch.onnx.export(
        program, (), dynamo=True, input_names=inputs, output_names=list(outputs), verbose=False
    )
    assert exported is not None
    for value in (*exported.model.graph.inputs, *exported.model.graph.outputs):
        assert value.shape is not None
        value.shape[0] = "batch"
    exported.save(str(file), external_data=False)


def load_bundle(path: str | Path, format: str = "onnx") -> Infer:
    """A bundle as a function of this process: stored samples by name in, physical answers by name out.

    Args:
        path: the bundle; every byte is compared with its manifest first.
        format: "onnx" (needs onnxruntime) or "pt2" (needs torch).

    Raises:
        InputError: no bundle, no such format; when called, a wrong dtype, shape or batch size.
        IntegrityError: the bundle was changed.
        UnavailableError: the runtime is not installed.
    """
    return runner(read_bundle(path), format)


def runner(bundle: Bundle, format: str) -> Infer:
    """`load_bundle` for a bundle that is open already."""
    load = {"onnx": _onnx, "pt2": _pt2}
    run = load[format](bundle.model_file(format), bundle.signature)
    signature = bundle.signature

    def infer(inputs: Arrays) -> Answers:
        signature.check(inputs)
        return run(inputs)

    return infer


def _onnx(file: Path, signature: Signature) -> Infer:
    ort = _require("onnxruntime", "onnx")
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [spec.name for spec in signature.outputs]

    def infer(inputs: Arrays) -> Answers:
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    return infer


def _pt2(file: Path, signature: Signature) -> Infer:
    torch = _require("torch", "train")
    module = torch.export.load(file).module()

    def infer(inputs: Mapping[str, npt.NDArray[Any]]) -> Answers:
        raw = [torch.from_numpy(np.ascontiguousarray(inputs[spec.name])) for spec in signature.inputs]
        with torch.no_grad():
            answers = module(*raw)
        return {spec.name: answer.numpy() for spec, answer in zip(signature.outputs, answers, strict=True)}

    return infer


def _require(package: str, extra: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UnavailableError(f"{package} is not installed: pip install 'gpuops[{extra}]'") from error
