"""Rules about the files of one model: version folders and what is in them, warm-up data, Python models."""

from __future__ import annotations

import ast
import stat
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from tritonclient.grpc import model_config_pb2

from gpuops_serving.config import ENSEMBLE, WARMUP
from gpuops_serving.gates import GATES, supports
from gpuops_serving.lint.rules import Finding, Model, Server, found, other_folders, version_folders

_BYTES = {
    "TYPE_BOOL": 1,
    "TYPE_UINT8": 1,
    "TYPE_UINT16": 2,
    "TYPE_UINT32": 4,
    "TYPE_UINT64": 8,
    "TYPE_INT8": 1,
    "TYPE_INT16": 2,
    "TYPE_INT32": 4,
    "TYPE_INT64": 8,
    "TYPE_FP16": 2,
    "TYPE_FP32": 4,
    "TYPE_FP64": 8,
    "TYPE_BF16": 2,
}
_TRITON = "triton_python_backend_utils"
_ENVIRONMENT = "EXECUTION_ENV_PATH"
_BESIDE = "$$TRITON_MODEL_DIRECTORY"


def file_findings(model: Model, server: Server) -> Iterator[Finding]:
    """What is wrong with the files of a model, for a server."""
    yield from _versions(model)
    yield from _backend_files(model)
    yield from _named_files(model)
    yield from _warm_up(model)
    yield from _leavings(model)
    if model.backend == "python":
        yield from _environment(model)
        for number in model.served:
            file = model.path / str(number) / model.file
            if file.is_file():
                yield from python_findings(file, f"{model.name}/{number}/{file.name}", server.version)


def _versions(model: Model) -> Iterator[Finding]:
    taken = {path.name for path in version_folders(model.path)}
    for path in other_folders(model.path):
        place = f"{model.name}/{path.name}"
        if path.name not in taken:
            if not path.name.startswith("."):
                why = "begins with 0" if path.name.isdigit() else "is no number"
                yield found("GT504", place, f"{path.name!r} {why} and is ignored: name versions 1, 2, 3, ...")
        elif not (path.name.isascii() and path.name.isdigit()):
            yield found(
                "GT503",
                place,
                f"the server takes {path.name!r} for a version and looks for another folder, which can hang it: move "
                "it out of the repository",
            )
    specific = model.config.version_policy.specific.versions
    for number in sorted(set(specific) - set(model.versions)):
        yield found(
            "GT505",
            model.at("version_policy", "specific", "versions"),
            f"version {number} is to be served and is not there: put it there, or leave it out",
        )
    if not model.served:
        yield found(
            "GT502",
            model.name,
            f"no version of {model.name!r} is served (folders {list(model.versions)}): make a folder 1, or mend "
            "version_policy",
        )


def _backend_files(model: Model) -> Iterator[Finding]:
    if not model.file or model.backend == ENSEMBLE:
        return
    instead = dict(model.config.cc_model_filenames)  # on a GPU of that compute capability, in place of the file
    for number in model.served:
        for file in {model.file, *instead.values()} if model.backend != "python" else {model.file}:
            if not (model.path / str(number) / file).exists():
                hang = ", and 2.51 waits for it for ever" if model.backend == "python" else ""
                yield found(
                    "GT506",
                    f"{model.name}/{number}",
                    f"the {model.backend} backend looks for {file}{hang}: put it there, or name another with "
                    "default_model_filename",
                )


def _named_files(model: Model) -> Iterator[Finding]:
    for place, tensor in enumerate(model.config.output):
        if tensor.label_filename and not (model.path / tensor.label_filename).is_file():
            yield found(
                "GT507",
                model.at("output", place, "label_filename"),
                f"labels {tensor.label_filename!r} are not in {model.name}: put them there, or leave this out",
            )
    for place, entry in enumerate(model.config.model_warmup):
        for key, tensor in sorted(entry.inputs.items()):
            if tensor.input_data_file and not (model.path / WARMUP / tensor.input_data_file).is_file():
                yield found(
                    "GT507",
                    model.at("model_warmup", place),
                    f"warm-up data {tensor.input_data_file!r} of {key!r} are not in {model.name}/{WARMUP}: put them in",
                )


def _warm_up(model: Model) -> Iterator[Finding]:
    config = model.config
    inputs = {tensor.name: tensor for tensor in config.input}
    for place, entry in enumerate(config.model_warmup):
        at = model.at("model_warmup", place)
        if config.max_batch_size and entry.batch_size > config.max_batch_size:
            yield found(
                "GT508",
                at,
                f"batch_size {entry.batch_size} is beyond {config.max_batch_size}, which 2.51 may die of: take less",
            )
        missing = [name for name, tensor in inputs.items() if name not in entry.inputs and not tensor.optional]
        for name in [*missing, *sorted(set(entry.inputs) - set(inputs))]:
            lack = "is left out" if name in inputs else "is no input of the model"
            yield found("GT508", at, f"{name!r} {lack}: give data for each of {sorted(inputs)}")
        for name in sorted(set(entry.inputs) & set(inputs)):
            if wrong := _sample(model, entry.inputs[name], inputs[name]):
                yield found("GT508", at, f"{name!r} {wrong}")


def _sample(model: Model, given: Any, tensor: Any) -> str:
    """What is wrong with the warm-up data of one input."""
    kind = given.WhichOneof("input_data_type")
    if kind is None:
        return "has neither zero_data nor random_data nor input_data_file: choose one"
    if given.data_type != tensor.data_type:
        have, want = (model_config_pb2.DataType.Name(one.data_type) for one in (given, tensor))
        return f"is {have} and the model takes {want}: make them the same"
    if len(given.dims) != len(tensor.dims) or any(
        want not in (-1, size) for size, want in zip(given.dims, tensor.dims, strict=True)
    ):
        return f"is {list(given.dims)} and the model takes {list(tensor.dims)}: make them the same"
    width = _BYTES.get(model_config_pb2.DataType.Name(given.data_type))
    file = model.path / WARMUP / given.input_data_file
    if kind == "input_data_file" and width is not None and file.is_file():
        needed = width * prod(given.dims)
        if file.stat().st_size != needed:
            return f"needs {needed} bytes and {given.input_data_file!r} has {file.stat().st_size}: write one sample"
    return ""


def _leavings(model: Model) -> Iterator[Finding]:
    for number in model.versions:
        cache = model.path / str(number) / "__pycache__"
        if cache.is_dir():
            yield found(
                "GT509",
                f"{model.name}/{number}/__pycache__",
                "bytecode that Python runs in place of model.py: remove it, and give servers a read-only repository",
            )
    paths = [model.path, *sorted(model.path.rglob("*"))]
    for path in paths:
        if not path.is_symlink() and path.stat().st_mode & stat.S_IWOTH:
            yield found(
                "GT510",
                str(Path(model.name) / path.relative_to(model.path)),
                "everybody on the host may change it, and models are code: chmod -R o-w",
            )
            return


def _environment(model: Model) -> Iterator[Finding]:
    if _ENVIRONMENT not in model.config.parameters:
        return
    named = model.config.parameters[_ENVIRONMENT].string_value
    path = Path(named.replace(_BESIDE, str(model.path)))
    if not path.exists():
        yield found(
            "GT604",
            model.at("parameters", _index(model)),
            f"{_ENVIRONMENT} {named!r} is not there: put it in {model.name} and write {_BESIDE}/NAME",
        )


def _index(model: Model) -> int:
    """Which of the parameters as written names the environment."""
    written = [field for field in model.fields if field.name == "parameters"]
    return next(
        place
        for place, field in enumerate(written)
        if any(part.name == "key" and part.value == _ENVIRONMENT for part in field.fields)
    )


def python_findings(file: Path, place: str, version: str) -> Iterator[Finding]:
    """What is wrong with a Python model, read but never run.

    Args:
        file: Its model.py.
        place: How findings name it.
        version: Version of the server.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        yield found("GT602", f"{place}:{line}", f"it is no Python ({getattr(error, 'msg', error)}): mend it")
        return
    yield from _numpy_traps(tree, place)
    classes = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == "TritonPythonModel"]
    imported = any(
        isinstance(node, ast.ImportFrom | ast.Assign) and "TritonPythonModel" in ast.unparse(node) for node in tree.body
    )
    if not classes and not imported:
        yield found("GT602", place, "it has no class TritonPythonModel, which the server makes: write one")
    for found_class in classes:
        names = {node.name for node in found_class.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        if "execute" not in names and not found_class.bases:
            yield found(
                "GT602",
                f"{place}:{found_class.lineno}",
                "TritonPythonModel has no execute: it is loaded, and every request fails; write one",
            )
    if not supports("response_parameters", version):
        for call in _calls(tree, "InferenceResponse"):
            if any(word.arg == "parameters" for word in call.keywords):
                yield found(
                    "GT603",
                    f"{place}:{call.lineno}",
                    f"Triton {version} has no response parameters, so every answer fails with a TypeError: leave them, "
                    f"or take container {GATES['response_parameters'].container} or later",
                )


def _numpy_traps(tree: ast.Module, place: str) -> Iterator[Finding]:
    traps = [*_calls(tree, "as_numpy"), *(call for call in _calls(tree, "Tensor") if len(call.args) > 1)]
    if traps and _imports_triton(tree):
        lines = sorted({call.lineno for call in traps})
        yield found(
            "GT601",
            f"{place}:{lines[0]}",
            f"Tensor(name, array) and as_numpy() (line {', '.join(map(str, lines))}) give wrong or empty tensors with "
            "NumPy 2, and HTTP 200: use Tensor.from_dlpack and numpy.from_dlpack, or keep NumPy below 2",
        )


def _imports_triton(tree: ast.Module) -> bool:
    return any(
        (isinstance(node, ast.Import) and any(alias.name == _TRITON for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and node.module == _TRITON)
        for node in ast.walk(tree)
    )


def _calls(tree: ast.AST, name: str) -> list[ast.Call]:
    """Calls of a function or method of this name."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and (
            (isinstance(node.func, ast.Attribute) and node.func.attr == name)
            or (isinstance(node.func, ast.Name) and node.func.id == name)
        )
    ]
