"""Files that a graph is exported to, and runners that answer from them in this process."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.bundle import FORMAT_FILES, Bundle, read_bundle
from gpuops.errors import InputError, UnavailableError
from gpuops.export import aoti
from gpuops.spec import Arrays, Signature

Answers = dict[str, npt.NDArray[np.float32]]
Infer = Callable[[Arrays | npt.NDArray[Any]], Answers]
"""Stored samples by input name (a bare array where there is one input) to physical answers by output name."""
DEFAULT_FORMATS = ("pt2", "onnx")
"""Formats whose bytes are the same at every export, and which run on any machine."""
DEVICES = ("cpu", "cuda")


def write(
    graph: Any,
    example: Arrays,
    outputs: Sequence[str],
    max_batch: int,
    directory: Path,
    formats: Sequence[str],
    device: str = "cpu",
) -> None:
    """Export a graph into `directory`, one file a format, with a dynamic batch of 1 to `max_batch`.

    Args:
        graph: the served graph, taking the inputs in the order of `example`.
        example: `max_batch` stored samples by input name, and at least two: of one, torch makes a static batch.
        outputs: output names in the graph's order.
        max_batch: largest batch.
        directory: where the files go.
        formats: "pt2", "onnx" or "aoti", some of them.
        device: what aoti compiles for, "cpu" or "cuda"; the other formats run on both.

    Raises:
        InputError: an unknown format or device, or a model that torch cannot export so.
        UnavailableError: aoti without a C++ compiler, or for CUDA without CUDA; onnx without its packages.
    """
    import torch

    from gpuops_kernels.transform import decompositions

    check_formats(formats, device)
    tensors = tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in example.values())
    batch = torch.export.Dim("batch", min=1, max=max(2, max_batch))
    dynamic = (tuple({0: batch} for _ in tensors),)
    table = torch.export.default_decompositions()
    table.update(decompositions())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates parts of its own exporters while they run
        if {"pt2", "onnx"} & set(formats):
            with _refusing("capture the model as a graph"):
                program = torch.export.export(
                    graph, tuple(tensor[:2].clone() for tensor in tensors), dynamic_shapes=dynamic
                )
        if "pt2" in formats:
            with _refusing("save it as pt2"):
                torch.export.save(_without_history(program.run_decompositions(table)), directory / FORMAT_FILES["pt2"])
        if "onnx" in formats:
            with _refusing("write it as onnx"):
                # Its exporter knows more than aten: what is linear stays one product with constant weights.
                known = _without_history(program.run_decompositions(decompositions()))
                _write_onnx(known, list(example), outputs, directory / FORMAT_FILES["onnx"])
        if "aoti" in formats:
            with _refusing("compile it as aoti"):
                aoti.write(graph, tensors, dynamic, table, directory / FORMAT_FILES["aoti"], device)


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turn whatever an exporter raises into an InputError."""
    try:
        yield
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"torch cannot {what} ({type(error).__name__}: {reason}): write `forward` without branches on values and "
            "without other packages' code, or leave the format out"
        ) from error


def check_formats(formats: Sequence[str], device: str) -> None:
    """Raise InputError or UnavailableError unless these formats can be written here."""
    unknown = set(formats) - FORMAT_FILES.keys()
    if unknown or not formats:
        raise InputError(f"formats {sorted(unknown)} are unknown; there are {', '.join(FORMAT_FILES)}")
    if device not in DEVICES:
        raise InputError(f"device {device!r} is unknown: use {' or '.join(DEVICES)}")
    for package in ("onnx", "onnxscript", "onnxruntime") if {"onnx", "int8"} & set(formats) else ():
        _require(package, "onnx")
    if "aoti" in formats:
        aoti.require_device(device)
        aoti.require_compiler()


def _without_history(program: Any) -> Any:
    """A program without what tells where it came from.

    torch notes memory addresses, and the paths and lines of gpuops' and the user's sources; with them the bytes would
    differ from process to process, and from one place of installation to another.
    """
    import torch

    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("from_node", None)
            node.meta.pop("stack_trace", None)
    return program


def _write_onnx(program: Any, inputs: list[str], outputs: Sequence[str], file: Path) -> None:
    import torch

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


def load_bundle(path: str | Path, format: str | None = None, device: str = "cpu") -> Infer:
    """A bundle as a function of this process: stored samples by name in, physical answers by name out.

    Where the model has one input, its array may be given bare.

    Args:
        path: the bundle; every byte is compared with its manifest first.
        format: "onnx" or "int8" (need onnxruntime), "pt2" or "aoti" (need torch); if None, onnx where the bundle has it
            and onnxruntime is installed, else the first of pt2, aoti and int8 that it has.
        device: "cpu" or "cuda"; answers are NumPy arrays either way. An aoti package runs where it was compiled for.

    Raises:
        InputError: no bundle, no such format or device; when called, a wrong dtype, shape or batch size.
        IntegrityError: the bundle was changed.
        UnavailableError: the runtime is not installed or the device is not here.
    """
    return runner(read_bundle(path), format, device)


def runner(bundle: Bundle, format: str | None = None, device: str = "cpu") -> Infer:
    """`load_bundle` for a bundle that is open already."""
    if device not in DEVICES:
        raise InputError(f"device {device!r} is unknown: use {' or '.join(DEVICES)}")
    chosen = default_format(bundle) if format is None else format
    file = bundle.model_file(chosen)
    run = {"onnx": _onnx, "pt2": _pt2, "aoti": _aoti, "int8": _onnx}[chosen](bundle, file, device)
    signature = bundle.signature

    def infer(inputs: Arrays | npt.NDArray[Any]) -> Answers:
        named = _named(inputs, signature)
        signature.check(named)
        # A compiled graph reads memory as it lies, whatever the strides say.
        return run({name: np.ascontiguousarray(array) for name, array in named.items()})

    return infer


def default_format(bundle: Bundle) -> str:
    """What `load_bundle` takes if it is not told."""
    if "onnx" in bundle.formats and find_spec("onnxruntime") is not None:
        return "onnx"
    return next((format for format in ("pt2", "aoti", "int8") if format in bundle.formats), "pt2")


def _named(inputs: Arrays | npt.NDArray[Any], signature: Signature) -> dict[str, npt.NDArray[Any]]:
    """Arrays by input name; a bare array is the only input's."""
    if isinstance(inputs, Mapping):
        return {name: np.asarray(array) for name, array in inputs.items()}
    names = [spec.name for spec in signature.inputs]
    if len(names) > 1:
        raise InputError(f"the model takes inputs {', '.join(names)}: pass {{name: array}}, not one array")
    return {names[0]: np.asarray(inputs)}


def _onnx(bundle: Bundle, file: Path, device: str) -> Callable[[Arrays], Answers]:
    ort = _require("onnxruntime", "onnx")
    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise UnavailableError("this onnxruntime has no CUDA: pip install onnxruntime-gpu, or use device cpu")
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": 0}))
    session = ort.InferenceSession(str(file), providers=providers)
    if device == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise UnavailableError("onnxruntime found no CUDA device or library that it can use: use device cpu")
    names = [spec.name for spec in bundle.signature.outputs]

    def infer(inputs: Arrays) -> Answers:
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    return infer


def _pt2(bundle: Bundle, file: Path, device: str) -> Callable[[Arrays], Answers]:
    torch = _require("torch", "train")
    aoti.require_device(device)
    program = torch.export.load(file)
    if device == "cuda":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, "cuda")
    return _called(program.module(), bundle.signature, device)


def _aoti(bundle: Bundle, file: Path, device: str) -> Callable[[Arrays], Answers]:
    _require("torch", "train")
    aoti.require_device(device)
    return _called(aoti.load(file, bundle.manifest["aoti"], device), bundle.signature, device)


def _called(module: Any, signature: Signature, device: str) -> Callable[[Arrays], Answers]:
    """A function of tensors in the signature's order as one of arrays by name."""
    import torch

    def infer(inputs: Arrays) -> Answers:
        # torch cannot say that memory must not be written, and warns of it: such arrays are copied.
        writeable = {name: np.require(array, requirements="W") for name, array in inputs.items()}
        raw = [torch.from_numpy(writeable[spec.name]).to(device) for spec in signature.inputs]
        with torch.no_grad(), _full_float32(device):
            answers = module(*raw)
        return {spec.name: answer.cpu().numpy() for spec, answer in zip(signature.outputs, answers, strict=True)}

    return infer


@contextmanager
def _full_float32(device: str) -> Iterator[None]:
    """Convolutions of 24 bits, not TF32's 11, which torch takes on CUDA if it is not told otherwise."""
    import torch

    if device != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    before = cudnn.allow_tf32
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


def _require(package: str, extra: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UnavailableError(f"{package} is not installed: pip install 'gpuops[{extra}]'") from error
