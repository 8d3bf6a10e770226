"""config.pbtxt as a typed value: from a signature and a few choices to a ModelConfig protobuf and its text.

Built as protobuf, never by string templates, so a field that Triton does not have cannot be written; fields that the
target server does not have yet are refused before anything is published (gpuops_serving.gates).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from gpuops.bundle import FORMAT_FILES
from gpuops.errors import InputError
from gpuops.spec import Signature, TensorSpec
from gpuops_serving.gates import require

CONFIG = "config.pbtxt"
WARMUP = "warmup"
"""Folder beside config.pbtxt where Triton looks for warm-up data."""
VERSION_ID = "gpuops.version_id"
"""Model parameter that holds the version id of the newest version; with `.<number>` appended, that of each version."""
SAMPLE = "gpuops.sample"
"""Model parameter that holds the manifest's "sample" as JSON: how a client cuts a sample out of its arrays."""
THREADS = "gpuops.threads"
"""Model parameter that holds the number of runtime threads of an instance."""
FORMAT = "gpuops.format"
"""Model parameter that tells the shim which of the bundle's formats it runs."""
TUNING = "gpuops.tuning"
"""Model parameter that holds the measurement that instances, threads and batch sizes were chosen by, as JSON."""

TRITON_TYPES = {
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "uint16": "TYPE_UINT16",
    "int32": "TYPE_INT32",
    "float32": "TYPE_FP32",
}
"""Triton's name of each dtype that may cross the wire."""

_TENSORRT_TYPES = {**TRITON_TYPES, "int16": "TYPE_INT32", "uint16": "TYPE_INT32"}  # it has no 16-bit integers
OLDEST_SERVER = "2.51.0"
"""The server that a configuration is written for unless another is named: the embedded one."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One way in which Triton can run a bundle's model."""

    format: str | None
    """Format of the bundle; None if the file is not one that a bundle holds."""
    file: str
    """Name that the backend expects in the version folder."""
    backend: str = ""
    """`backend` of the configuration."""
    platform: str = ""
    """`platform` of the configuration, where the backend is chosen by that."""
    gates: tuple[str, ...] = ()
    """Features that the server must have (gpuops_serving.gates)."""


BACKENDS = {
    "python": Backend("onnx", FORMAT_FILES["onnx"], backend="python"),
    "python-pt2": Backend("pt2", FORMAT_FILES["pt2"], backend="python"),
    "python-aoti": Backend("aoti", FORMAT_FILES["aoti"], backend="python"),
    "onnxruntime": Backend("onnx", "model.onnx", backend="onnxruntime"),
    "torch_aoti": Backend("aoti", "model.pt2", platform="torch_aoti", gates=("torch_aoti", "aoti_batching")),
    "tensorrt": Backend(None, "model.plan", backend="tensorrt", platform="tensorrt_plan"),
}
"""What `Options.backend` may be. The python ones run our shim, which proves the version before it answers."""


@dataclass(frozen=True, slots=True)
class Batching:
    """How Triton joins waiting requests to one batch."""

    preferred: tuple[int, ...] = ()
    """Batch sizes beyond which waiting longer brings nothing; empty joins what waits, up to the largest batch."""
    delay_us: int = 0
    """Longest wait for more requests, in microseconds; it is added to the latency of a single request."""
    queue_size: int = 0
    """Requests that may wait; more are rejected at once. 0 is no limit."""
    timeout_us: int = 0
    """A request that waited longer is rejected, in microseconds; 0 is never."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a model is served."""

    backend: str = "python"
    """One of `BACKENDS`."""
    gpu: bool = False
    """Instances on GPUs, one set on each visible one, rather than on the CPU."""
    instances: int = 1
    """Copies of the model that run at the same time (on each GPU)."""
    threads: int = 0
    """Runtime threads of an instance; 0 is one a core."""
    batching: Batching = field(default_factory=Batching)
    """How requests are joined."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Labels that Triton puts on the model's metrics."""
    server_version: str = OLDEST_SERVER
    """Version of the server that will read the configuration."""

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise InputError(f"backend {self.backend!r} is unknown; there are {', '.join(BACKENDS)}")
        if self.instances < 1 or self.threads < 0:
            raise InputError(f"{self.instances} instances of {self.threads} threads: at least 1 instance, 0 threads")
        for gate in BACKENDS[self.backend].gates:
            require(gate, self.server_version)

    @property
    def runs_shim(self) -> bool:
        """Whether the model is run by our shim."""
        return BACKENDS[self.backend].backend == "python"


def model_config(
    name: str,
    versions: Mapping[int, str],
    signature: Signature,
    *,
    sample: Any,
    options: Options | None = None,
    warmup: Mapping[str, str] | None = None,
    tuning: Mapping[str, Any] | None = None,
) -> Any:
    """Return the ModelConfig protobuf that serves versions of a model.

    Args:
        name: Model name.
        versions: Version id by version number; all are loaded, the highest answers who names none.
        signature: What crosses the wire, the same for each version.
        sample: The newest manifest's "sample", any JSON value.
        options: How it is served.
        warmup: File in `WARMUP` by input name, one stored sample each; for backends other than python, whose shim
            answers golden samples before it takes a request.
        tuning: The measurement behind `options`.

    Raises:
        InputError: the signature serves no batch at all, or no version is given.
    """
    options = Options() if options is None else options
    if signature.max_batch < 1:
        # 0 would mean "no batch axis" to Triton, and proto3 text would leave the field out.
        raise InputError(f"model {name!r} has max_batch {signature.max_batch}: export it with at least 1")
    if not versions:
        raise InputError(f"model {name!r} has no version to serve: deploy a bundle")
    how = BACKENDS[options.backend]
    config = model_config_pb2.ModelConfig(
        name=name, backend=how.backend, platform=how.platform, max_batch_size=signature.max_batch
    )
    for side, specs, tensors, message in (
        ("INPUT", signature.inputs, config.input, model_config_pb2.ModelInput),
        ("OUTPUT", signature.outputs, config.output, model_config_pb2.ModelOutput),
    ):
        tensors.extend(_tensor(spec, place, side, options.backend, message) for place, spec in enumerate(specs))
    group = model_config_pb2.ModelInstanceGroup
    config.instance_group.add(kind=group.KIND_GPU if options.gpu else group.KIND_CPU, count=options.instances)
    config.version_policy.specific.versions.extend(sorted(versions))
    _batch(config.dynamic_batching, options.batching)
    if options.backend == "onnxruntime" and options.threads:
        config.parameters["intra_op_thread_count"].string_value = str(options.threads)
    newest = versions[max(versions)]
    parameters = {VERSION_ID: newest, SAMPLE: json.dumps(sample, sort_keys=True)}
    parameters |= {f"{VERSION_ID}.{number}": version_id for number, version_id in versions.items()}
    if options.runs_shim:
        parameters |= {THREADS: str(options.threads), FORMAT: str(how.format)}
    if tuning is not None:
        parameters[TUNING] = json.dumps(tuning, sort_keys=True)
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    for key, value in options.tags.items():
        config.metric_tags[key] = value
    if warmup:
        _warm_up(config, signature, warmup)
    return config


def _tensor(spec: TensorSpec, place: int, side: str, backend: str, message: Any) -> Any:
    # An AOTInductor package knows its tensors by their places only.
    name = f"{side}__{place}" if backend == "torch_aoti" else spec.name
    types = _TENSORRT_TYPES if backend == "tensorrt" else TRITON_TYPES
    return message(name=name, data_type=types[spec.dtype], dims=spec.shape)


def _batch(dynamic: Any, batching: Batching) -> None:
    dynamic.SetInParent()
    dynamic.preferred_batch_size.extend(batching.preferred)
    dynamic.max_queue_delay_microseconds = batching.delay_us
    if batching.queue_size or batching.timeout_us:
        policy = dynamic.default_queue_policy
        policy.max_queue_size = batching.queue_size
        policy.default_timeout_microseconds = batching.timeout_us


def _warm_up(config: Any, signature: Signature, files: Mapping[str, str]) -> None:
    """The first golden sample, alone and as a batch of the largest size: Triton repeats it."""
    for size in sorted({1, signature.max_batch}):
        entry = config.model_warmup.add(name=f"golden-{size}", batch_size=size, count=1)
        for spec, tensor in zip(signature.inputs, config.input, strict=True):
            entry.inputs[tensor.name].data_type = tensor.data_type
            entry.inputs[tensor.name].dims.extend(spec.shape)
            entry.inputs[tensor.name].input_data_file = files[spec.name]


def config_text(config: Any) -> str:
    """Text of a ModelConfig protobuf, as config.pbtxt holds it."""
    return str(text_format.MessageToString(config))


def read_config(path: Path) -> Any:
    """Parse a config.pbtxt to a ModelConfig protobuf; InputError says in which line it is wrong."""
    try:
        return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise InputError(f"{path} is not a model configuration ({error}): deploy the bundle again") from error


def served_version_ids(config: Any) -> dict[int, str]:
    """Version id by number of the versions that a configuration of ours serves; empty if it is not ours."""
    numbers: Iterable[int] = config.version_policy.specific.versions
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    found = {number: parameters.get(f"{VERSION_ID}.{number}", "") for number in numbers}
    if len(found) == 1 and VERSION_ID in parameters:  # as gpuops 0 wrote it
        return dict.fromkeys(found, parameters[VERSION_ID])
    return found if found and all(found.values()) else {}
