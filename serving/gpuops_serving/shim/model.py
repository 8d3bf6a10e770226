"""Serve an exported graph from Triton's python backend.

This file is copied into every version folder and runs inside the server's stub process: standard library, numpy,
Triton's own module and the one runtime that its format needs (onnxruntime, or torch), nothing of gpuops.

Under NumPy 2, `Tensor.as_numpy()` and `Tensor(name, array)` of the python backend are silently wrong (every element is
the first one; an empty answer with HTTP 200). So arrays go in and out through DLPack only, and `initialize` proves that
this works here, and that the model still gives its golden answers, before a single request is taken.
"""

import contextlib
import ctypes
import gc
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as triton

_set_destructor = ctypes.pythonapi.PyCapsule_SetDestructor
_set_destructor.argtypes = [ctypes.py_object, ctypes.c_void_p]
_set_destructor.restype = ctypes.c_int

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
RTOL = 1e-5  # as gpuops.bundle.RTOL, by which the bundle was proved
FILES = {"onnx": "model.onnx", "int8": "model_int8.onnx", "pt2": "model.pt2", "aoti": "model_aoti.pt2"}


class _Given:
    """A tensor of the python backend as NumPy asks for DLPack.

    NumPy asks with arguments first, which the tensor does not take: the error that says so costs more than the rest.
    """

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __dlpack__(self, **unused: object) -> Any:
        return self.tensor.to_dlpack()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)  # kDLCPU


def to_triton(name: str, array: Array) -> Any:
    """Return `array` as a tensor of the python backend.

    The stub renames the capsule and calls the tensor's deleter itself. NumPy's capsule destructor does not know the new
    name and would print a traceback for every request, so it is taken off; nothing leaks, as the deleter still runs.
    """
    capsule = array.__dlpack__()
    _set_destructor(capsule, None)
    return triton.Tensor.from_dlpack(name, capsule)


def from_triton(tensor: Any) -> Array:
    """Return a tensor of the python backend as an array."""
    return np.from_dlpack(_Given(tensor))


def open_onnx(path: Path, names: list[str], threads: int, gpu: int | None) -> Callable[[Arrays], list[Array]]:
    """An ONNX graph as a function from inputs by name to its outputs `names`; on GPU number `gpu`, if that is one."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # A thread that spins while it waits takes the core from the server, which has the next request.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # As it was proved: convolutions of 24 bits, not TF32's 11.
    cuda = [] if gpu is None else [("CUDAExecutionProvider", {"use_tf32": 0, "device_id": gpu})]
    session = onnxruntime.InferenceSession(str(path), options, providers=[*cuda, "CPUExecutionProvider"])
    if cuda and session.get_providers()[0] != "CUDAExecutionProvider":
        refuse("onnxruntime has no CUDA here, the configuration asks for a GPU")
    return lambda inputs: session.run(names, inputs)


def open_torch(path: Path, names: list[str], threads: int, gpu: int | None) -> Callable[[Arrays], list[Array]]:
    """An exported program (.pt2) or an AOTInductor package as a function; `names` are its inputs in their order."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # as it was proved
    device = "cpu" if gpu is None else f"cuda:{gpu}"
    if path.name == FILES["aoti"]:
        from torch._inductor import aoti_load_package

        module: Any = aoti_load_package(str(path), device_index=-1 if gpu is None else gpu)
    else:
        program = torch.export.load(path)
        if gpu is not None:
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        module = program.module()

    def run(inputs: Arrays) -> list[Array]:
        with torch.inference_mode():
            answers = module(*(torch.from_numpy(inputs[name]).to(device) for name in names))
        return [answer.cpu().numpy() for answer in answers]

    return run


class TritonPythonModel:
    """One instance of one version."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the graph; refuse to start unless bytes, DLPack and golden answers are right."""
        folder = Path(args["model_repository"]) / args["model_version"]
        config = json.loads(args["model_config"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]
        self.max_batch = int(config["max_batch_size"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        manifest = json.loads((folder / "manifest.json").read_text())
        version_id = parameters[f"gpuops.version_id.{args['model_version']}"]
        file = FILES[parameters["gpuops.format"]]
        self.check_bytes(folder, file, manifest, version_id)
        threads = int(parameters["gpuops.threads"])
        self.micro_batch = int(parameters.get("gpuops.micro_batch", 0)) or self.max_batch
        gpu = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        if file.endswith(".onnx"):
            self.graph = open_onnx(folder / file, self.outputs, threads, gpu)
        else:
            self.graph = open_torch(folder / file, self.inputs, threads, gpu)
        forget_bytecode(folder)
        self.parameters = response_parameters(version_id)
        self.check_dlpack()
        with np.load(folder / "golden.npz") as golden:
            self.golden = {key: golden[key] for key in golden.files}
        proved = manifest["int8"] if file == FILES["int8"] else manifest
        self.tolerance = float(proved["tolerance"])
        for size in sorted({1, self.max_batch}):  # also warms up what is allocated at a first run
            if wrong := self.differs_from_golden(size):
                refuse(wrong)
        gc.collect()
        gc.freeze()  # what is here now stays: no collection looks at it again while a request waits

    def is_ready(self) -> bool:
        """Answer a golden sample; asked by servers from 26.03 (2.67) on."""
        return not self.differs_from_golden(1)

    def check_bytes(self, folder: Path, file: str, manifest: dict[str, Any], version_id: str) -> None:
        """Compare what lies here with its manifest."""
        if manifest["version_id"] != version_id:
            refuse(f"{folder} holds version id {manifest['version_id']}, config.pbtxt says {version_id}")
        for name in (file, "golden.npz"):
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != manifest["files"][name]:
                refuse(f"{folder / name} differs from its manifest")

    def check_dlpack(self) -> None:
        """Send a known array through the backend and back."""
        for dtype in (np.uint8, np.int8, np.int16, np.uint16, np.int32, np.float32):
            known = np.arange(24, dtype=dtype).reshape(2, 3, 4)
            if not np.array_equal(from_triton(to_triton("known", known)), known):
                refuse(f"the DLPack round trip of {known.dtype} is broken with NumPy {np.__version__}")

    def differs_from_golden(self, size: int) -> str:
        """Answer golden samples as if they were a request of `size`; what is wrong with the answer, or nothing."""
        rows = np.arange(size) % len(next(iter(self.golden.values())))
        inputs = {name: from_triton(to_triton(name, self.golden[f"input/{name}"][rows])) for name in self.inputs}
        for name, answer in self.run(inputs).items():
            wanted = self.golden[f"output/{name}"][rows]
            if answer.dtype != np.float32 or answer.shape != wanted.shape:
                return f"output {name} is {answer.dtype} {answer.shape}, its golden answer {wanted.shape}"
            if not np.allclose(answer, wanted, rtol=RTOL, atol=self.tolerance, equal_nan=True):
                worst = np.abs(answer.astype(np.float64) - wanted).max()
                return f"output {name} differs from its golden answer by {worst:g}, tolerance {self.tolerance:g}"
        return ""

    def run(self, inputs: Arrays) -> Arrays:
        """Answer one batch of arrays by input name, a micro-batch at a time."""
        size = len(next(iter(inputs.values())))
        if size <= self.micro_batch:
            return dict(zip(self.outputs, self.graph(inputs), strict=True))
        starts = range(0, size, self.micro_batch)
        parts = [self.graph({name: a[at : at + self.micro_batch] for name, a in inputs.items()}) for at in starts]
        return dict(zip(self.outputs, map(np.concatenate, zip(*parts, strict=True)), strict=True))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer the requests of one dynamic batch: whole requests together, as many as make a micro-batch."""
        responses: list[Any] = [None] * len(requests)
        group: list[tuple[int, int, Arrays]] = []
        samples = 0
        for place, request in enumerate(requests):
            inputs = {tensor.name(): from_triton(tensor) for tensor in request.inputs()}
            size, *others = {len(array) for array in inputs.values()}
            if others or not 1 <= size <= self.max_batch:
                responses[place] = failed(f"a request takes 1 to {self.max_batch} samples, as many in each input")
                continue
            if group and samples + size > self.micro_batch:
                self.answer(group, responses)
                group, samples = [], 0
            group.append((place, size, inputs))
            samples += size
        if group:
            self.answer(group, responses)
        return responses

    def answer(self, group: list[tuple[int, int, Arrays]], responses: list[Any]) -> None:
        """Answer requests, each (place among the responses, samples, inputs), with one run of the graph."""
        parts = [inputs for _, _, inputs in group]
        try:
            answers = self.run(
                parts[0] if len(parts) == 1 else {k: np.concatenate([part[k] for part in parts]) for k in self.inputs}
            )
        except Exception as error:
            if len(group) == 1:
                responses[group[0][0]] = failed(str(error))
                return
            # Values can break a graph (an index out of range): find whose they were, and answer the others.
            for one in group:
                self.answer([one], responses)
            return
        start = 0
        for place, size, _ in group:
            end = start + size
            tensors = [to_triton(name, answer[start:end]) for name, answer in answers.items()]
            responses[place] = triton.InferenceResponse(tensors, **self.parameters)
            start = end


def forget_bytecode(folder: Path) -> None:
    """Remove what the stub left of this file, whatever the environment says: only what was deployed may lie here."""
    with contextlib.suppress(OSError):  # a read-only repository has none
        for file in (folder / "__pycache__").iterdir():
            file.unlink(missing_ok=True)
        (folder / "__pycache__").rmdir()


def response_parameters(version_id: str) -> dict[str, Any]:
    """What a response carries beside its tensors: its version id, where the server has that (25.02, 2.55)."""
    carried = {"parameters": {"gpuops.version_id": version_id}}
    try:
        triton.InferenceResponse([], **carried)
    except TypeError:
        return {}
    return carried


def failed(message: str) -> Any:
    """Return the response to a request that cannot be answered."""
    # INVALID_ARG, as it is the request that is at fault: HTTP 400, not 500.
    return triton.InferenceResponse(error=triton.TritonError(message, triton.TritonError.INVALID_ARG))


def refuse(reason: str) -> NoReturn:
    """Stop this version from being served; gpuops_serving.server looks for the first words in the log."""
    raise RuntimeError(f"gpuops refuses to serve: {reason}")
