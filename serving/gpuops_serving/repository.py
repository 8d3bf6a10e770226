"""Publish a bundle as a model version in a Triton model repository.

    REPOSITORY/<name>/config.pbtxt     the pointer: which version is served, and its wire format
    REPOSITORY/<name>/<version>/       immutable: model.py (the shim), model.onnx, golden.npz, manifest.json

A version folder is written under a temporary name and renamed; only then is config.pbtxt replaced, in one step, and it
names the one version to serve. So whoever reads the repository sees the old version or the new one, never a mixture.
Triton's stub leaves a `__pycache__` in a version folder; only the four files are ever read or copied.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from gpuops.atomic import locked, new_directory
from gpuops.bundle import GOLDEN, MANIFEST, Bundle, Golden, file_sha256, read_bundle
from gpuops.errors import InputError, IntegrityError
from gpuops.spec import Signature, TensorSpec

CONFIG = "config.pbtxt"
SHIM = Path(__file__).with_name("shim") / "model.py"
ONNX = "model.onnx"
VERSION_ID = "gpuops.version_id"
"""Model parameter that holds the bundle's version id."""
SAMPLE = "gpuops.sample"
"""Model parameter that holds the manifest's "sample" as JSON: how a client cuts a sample out of its arrays."""
THREADS = "gpuops.threads"
"""Model parameter that holds the number of onnxruntime threads of an instance."""

TRITON_TYPES = {
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "uint16": "TYPE_UINT16",
    "int32": "TYPE_INT32",
    "float32": "TYPE_FP32",
}
"""Triton's name of each dtype that may cross the wire."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class Deployment:
    """A version of a model in a repository."""

    name: str
    """Model name, as clients ask for it."""
    version: int
    """Version number, counted from 1 in this repository."""
    path: Path
    """Version folder."""
    version_id: str
    """Version id of the bundle."""
    new: bool
    """False if the repository served exactly this already and nothing was written."""


@dataclass(frozen=True, slots=True)
class ServedVersion:
    """What a repository says about the version of a model that is to be served."""

    name: str
    """Model name."""
    version: int
    """Version number."""
    version_id: str
    """Version id of the bundle it was made from."""
    golden: Golden
    """Golden samples and answers."""
    tolerance: float
    """Largest absolute difference that passes, in physical units."""


def model_config(
    name: str, version: int, signature: Signature, *, version_id: str, sample: Any, threads: int = 0
) -> Any:
    """Return the ModelConfig protobuf that serves `version` of a model through the shim.

    Args:
        name: Model name.
        version: The one version to serve.
        signature: What crosses the wire.
        version_id: Version id of the bundle.
        sample: The manifest's "sample", any JSON value.
        threads: onnxruntime threads of an instance; 0 is one a core.

    Raises:
        InputError: the signature serves no batch at all.
    """
    if signature.max_batch < 1:
        # 0 would mean "no batch axis" to Triton, and proto3 text would leave the field out.
        raise InputError(f"model {name!r} has max_batch {signature.max_batch}: export it with at least 1")
    config = model_config_pb2.ModelConfig(name=name, backend="python", max_batch_size=signature.max_batch)
    for specs, field, message in (
        (signature.inputs, config.input, model_config_pb2.ModelInput),
        (signature.outputs, config.output, model_config_pb2.ModelOutput),
    ):
        field.extend(_tensor(spec, message) for spec in specs)
    config.instance_group.add(kind=model_config_pb2.ModelInstanceGroup.KIND_CPU, count=1)
    config.version_policy.specific.versions.append(version)
    config.dynamic_batching.SetInParent()
    parameters = {VERSION_ID: version_id, SAMPLE: json.dumps(sample, sort_keys=True), THREADS: str(threads)}
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    return config


def _tensor(spec: TensorSpec, message: Any) -> Any:
    return message(name=spec.name, data_type=TRITON_TYPES[spec.dtype], dims=spec.shape)


def config_text(config: Any) -> str:
    """Text of a ModelConfig protobuf, as config.pbtxt holds it."""
    return str(text_format.MessageToString(config))


def read_config(path: Path) -> Any:
    """Parse a config.pbtxt to a ModelConfig protobuf; InputError says in which line it is wrong."""
    try:
        return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise InputError(f"{path} is not a model configuration ({error}): deploy the bundle again") from error


def deploy(bundle_path: str | Path, repository: str | Path, *, name: str | None = None, threads: int = 0) -> Deployment:
    """Publish a bundle in a model repository as the next version of a model.

    Args:
        bundle_path: Bundle directory; every byte is compared with its manifest first.
        repository: Model repository; made if it is not there.
        name: Model name; by default the bundle's.
        threads: onnxruntime threads of an instance; 0 is one a core.

    Returns:
        The version that is now to be served. A running server takes it up when it is started again.

    Raises:
        InputError: no bundle there, no ONNX model in it, or an unusable name.
        IntegrityError: the bundle differs from its manifest; the repository is as it was.
    """
    bundle = read_bundle(bundle_path)
    bundle.model_file("onnx")  # an error that names the formats there are
    name = bundle.name if name is None else name
    if not _NAME.fullmatch(name):
        raise InputError(f"model name {name!r}: use letters, digits, '_', '-' and '.' (it is put in URLs)")
    repository = Path(repository)
    repository.mkdir(parents=True, exist_ok=True)
    model = repository / name

    def pointer(version: int) -> str:
        sample = bundle.manifest["sample"]
        return config_text(
            model_config(name, version, bundle.signature, version_id=bundle.version_id, sample=sample, threads=threads)
        )

    with locked(repository):  # one deployment at a time chooses a version number
        newest = max(_versions(model), default=0)
        folder = model / str(newest)
        if newest and _is_served(model, pointer(newest)) and _holds(folder, bundle):
            return Deployment(name, newest, folder, bundle.version_id, new=False)
        version = newest + 1
        folder = model / str(version)
        if newest:
            with new_directory(folder, overwrite=False) as temporary:
                _fill(temporary, bundle)
            _replace_text(model / CONFIG, pointer(version))
        else:
            with _staged(model) as temporary:
                (temporary / str(version)).mkdir()
                _fill(temporary / str(version), bundle)
                (temporary / CONFIG).write_text(pointer(version))
    return Deployment(name, version, folder, bundle.version_id, new=True)


def served_versions(repository: str | Path) -> list[ServedVersion]:
    """What a repository asks a server to serve, by model name.

    Raises:
        InputError: no repository there, nothing deployed in it, or a model that `deploy` did not write.
        IntegrityError: a version's manifest has another version id than the model's configuration.
    """
    repository = Path(repository)
    if not repository.is_dir():
        raise InputError(f"{repository} is not a model repository: make one with `gpuops deploy BUNDLE {repository}`")
    served = [_served(folder) for folder in sorted(repository.iterdir()) if folder.is_dir()]
    if not served:
        raise InputError(f"{repository} holds no model: put one there with `gpuops deploy BUNDLE {repository}`")
    return served


def _served(model: Path) -> ServedVersion:
    config = read_config(model / CONFIG) if (model / CONFIG).is_file() else model_config_pb2.ModelConfig()
    versions = list(config.version_policy.specific.versions)
    if VERSION_ID not in config.parameters or len(versions) != 1:
        raise InputError(
            f"{model} was not written by `gpuops deploy`, so nothing proves its answers: move it to another repository"
        )
    folder = model / str(versions[0])
    version_id = config.parameters[VERSION_ID].string_value
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        seal, tolerance, found = manifest["files"][GOLDEN], float(manifest["tolerance"]), manifest["version_id"]
        if file_sha256(folder / GOLDEN) != seal:
            raise IntegrityError(f"{folder / GOLDEN} differs from its manifest: deploy its bundle again")
    except (OSError, ValueError, KeyError) as error:
        raise IntegrityError(f"{folder} is incomplete ({error}): deploy its bundle again") from error
    if found != version_id:
        raise IntegrityError(f"{folder} holds another version id than {model / CONFIG}: deploy its bundle again")
    golden = Golden.load(folder / GOLDEN)
    return ServedVersion(model.name, versions[0], version_id, golden, tolerance)


def _versions(model: Path) -> list[int]:
    """Version numbers in a model's folder; empty if there is none."""
    return [int(p.name) for p in model.iterdir() if p.name.isdigit()] if model.is_dir() else []


def _is_served(model: Path, text: str) -> bool:
    return (model / CONFIG).is_file() and (model / CONFIG).read_text() == text


def _holds(folder: Path, bundle: Bundle) -> bool:
    """Whether a version folder is what `_fill` would write (a re-export may differ in its manifest alone)."""
    digests = {**_digests(bundle), "model.py": file_sha256(SHIM)}
    return (folder / MANIFEST).is_file() and all(
        (folder / file).is_file() and file_sha256(folder / file) == digest for file, digest in digests.items()
    )


def _digests(bundle: Bundle) -> dict[str, str]:
    return {file: str(bundle.manifest["files"][file]) for file in (ONNX, GOLDEN)}


def _fill(folder: Path, bundle: Bundle) -> None:
    """Copy what a version needs, and compare the copies with the manifest."""
    shutil.copyfile(SHIM, folder / "model.py")
    for file in (ONNX, GOLDEN, MANIFEST):
        shutil.copyfile(bundle.path / file, folder / file)
    for file, digest in _digests(bundle).items():
        if file_sha256(folder / file) != digest:
            raise IntegrityError(f"{bundle.path / file} changed while it was copied: deploy a bundle at rest")


def _replace_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


@contextmanager
def _staged(model: Path) -> Iterator[Path]:
    """A temporary directory beside the repository that becomes the folder of a new model when the block ends.

    It may not lie in the repository: Triton takes every folder there for a model, hidden ones too, and would not start.
    """
    repository = model.parent.absolute()

    def refusal(error: OSError) -> InputError:
        return InputError(
            f"{model} cannot be published in one step ({error.strerror}): use a repository inside a folder of the same "
            f"file system that can be written to, such as {repository / 'models'}"
        )

    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{repository.name}-", dir=repository.parent))
    except OSError as error:
        raise refusal(error) from error
    try:
        temporary.chmod(0o755)
        yield temporary
        try:
            temporary.rename(model)
        except OSError as error:  # the repository is a mount point, for example
            raise refusal(error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
