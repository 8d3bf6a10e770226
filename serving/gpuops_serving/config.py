"""config.pbtxt as a typed value: from a signature and a few choices to a ModelConfig protobuf and its text.

Built as protobuf, never by string templates, so a field that Triton does not have cannot be written; fields that the
target server does not have yet are refused before anything is published (gpuops_serving.gates).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from gpuops.bundle import FORMAT_FILES
from gpuops.errors import InputError
from gpuops.spec import Signature
from gpuops_serving.gates import parse_version, require
from gpuops_serving.scheduling import MOST, RateLimit, Sequences, Step
from gpuops_serving.scheduling import Batching as Batching

CONFIG = "config.pbtxt"
WARMUP = "warmup"
"""Folder beside config.pbtxt where Triton looks for warm-up data."""
VERSION_ID = "gpuops.version_id"
"""Model parameter that holds the version id of the newest version; with `.<number>` appended, that of each version."""
SAMPLE = "gpuops.sample"
"""Model parameter that holds the manifest's "sample" as JSON: how a client cuts a sample out of its arrays."""
THREADS = "gpuops.threads"
"""Model parameter that holds the number of runtime threads of an instance."""
MICRO_BATCH = "gpuops.micro_batch"
"""Model parameter that holds the most samples that the shim gives the graph at once."""
FORMAT = "gpuops.format"
"""Model parameter that tells the shim which of the bundle's formats it runs."""
TENSORS = "gpuops.tensors"
"""Model parameter that holds, as JSON, how a backend takes the tensors of the signature where it does so otherwise."""
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

MOST_INSTANCES, MOST_THREADS = 1024, 4096
"""Largest numbers of a model's instances and of an instance's threads that are taken for meant."""
OLDEST_SERVER = "2.51.0"
"""The server that a configuration is written for unless another is named: the embedded one."""
ENSEMBLE = "ensemble"
"""Backend of a bundle that joins other models (gpuops_serving.ensemble)."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One way in which Triton can run a bundle's model."""

    format: str | None
    """Format of the bundle; None if the file is not one that a bundle holds."""
    file: str
    """Name that the backend expects in the version folder; empty for none."""
    backend: str = ""
    """`backend` of the configuration."""
    platform: str = ""
    """`platform` of the configuration, where the backend is chosen by that."""
    threads: str = ""
    """Model parameter that sets the threads of an instance; empty if there is none."""
    gates: tuple[str, ...] = ()
    """Features that the server must have (gpuops_serving.gates)."""


BACKENDS = {
    "python": Backend("onnx", FORMAT_FILES["onnx"], backend="python", threads=THREADS),
    "python-int8": Backend("int8", FORMAT_FILES["int8"], backend="python", threads=THREADS),
    "python-pt2": Backend("pt2", FORMAT_FILES["pt2"], backend="python", threads=THREADS),
    "python-aoti": Backend("aoti", FORMAT_FILES["aoti"], backend="python", threads=THREADS),
    "onnxruntime": Backend("onnx", "model.onnx", backend="onnxruntime", threads="intra_op_thread_count"),
    "torch_aoti": Backend(
        "aoti",
        "model.pt2",
        platform="torch_aoti",
        threads="INTRA_OP_THREAD_COUNT",
        gates=("torch_aoti", "aoti_names", "aoti_batching"),
    ),
    "tensorrt": Backend(None, "model.plan", backend="tensorrt", platform="tensorrt_plan"),
    ENSEMBLE: Backend(None, "", platform="ensemble"),
}
"""What `Options.backend` may be. The python ones run our shim, which proves the version before it answers."""


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
    micro_batch: int = 0
    """Most samples that the shim gives the graph at once, where smaller ones are faster (they stay in the processor's
    caches); 0 is the whole batch. Larger ones still cost the server less, so requests are joined as without it."""
    batching: Batching | Sequences = field(default_factory=Batching)
    """How requests are joined; sequences are for models that are no bundle (`own_config`)."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Labels that Triton puts on the metrics of all versions of the model. A version id is not one of them: two
    versions are served by one configuration, and the older one's metrics would carry the newer one's id."""
    server_version: str = OLDEST_SERVER
    """Version of the server that will read the configuration."""
    cache: bool = False
    """Answer a request that was answered before from the server's cache, which it has with `--cache-config`."""
    limit: RateLimit | None = None
    """What an instance needs before it may run; None is nothing."""
    max_inflight: int = 0
    """For an ensemble: requests that may be between two of its steps at a time; 0 is no limit."""

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise InputError(f"backend {self.backend!r} is unknown; there are {', '.join(BACKENDS)}")
        ranges = {
            "instances": (self.instances, 1, MOST_INSTANCES),
            "threads": (self.threads, 0, MOST_THREADS),
            "micro_batch": (self.micro_batch, 0, MOST),
            "max_inflight": (self.max_inflight, 0, MOST),
        }
        for name, (number, least, most) in ranges.items():
            if not least <= number <= most:
                raise InputError(f"{name} is {number}: give at least {least}, at most {most}")
        if self.micro_batch and not self.runs_shim:
            raise InputError(f"backend {self.backend!r} runs batches as they are: leave micro_batch")
        for text in (text for tag in self.tags.items() for text in tag):
            if text != text.encode(errors="ignore").decode():
                raise InputError(f"tag {text!r} is not text that UTF-8 can write: name another")
        parse_version(self.server_version)
        if self.cache and isinstance(self.batching, Sequences):
            raise InputError("answers of a sequence depend on what came before and cannot be cached: leave cache")
        for gate in (*BACKENDS[self.backend].gates, *(["max_inflight_requests"] if self.max_inflight else [])):
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
    steps: Sequence[Step] = (),
) -> Any:
    """Return the ModelConfig protobuf that serves versions of a bundle's model.

    Args:
        name: Model name.
        versions: Version id by version number; all are loaded, the highest answers who names none.
        signature: What crosses the wire, the same for each version.
        sample: The newest manifest's "sample", any JSON value.
        options: How it is served.
        warmup: File in `WARMUP` by input name, one sample each as the backend takes it; for backends other than python,
            whose shim answers golden samples before it takes a request.
        tuning: The measurement behind `options`.
        steps: The models of an ensemble.

    Raises:
        InputError: the signature serves no batch at all, no version is given, or these options are not for a bundle.
    """
    options = Options() if options is None else options
    if not versions:
        raise InputError(f"model {name!r} has no version to serve: deploy a bundle")
    if isinstance(options.batching, Sequences):
        raise InputError(f"model {name!r}: a bundle keeps nothing between requests, so it has no sequences; leave them")
    how = BACKENDS[options.backend]
    config = own_config(name, signature, options, steps=steps)
    config.version_policy.specific.versions.extend(sorted(versions))
    newest = versions[max(versions)]
    parameters = {VERSION_ID: newest, SAMPLE: json.dumps(sample, sort_keys=True)}
    parameters |= {f"{VERSION_ID}.{number}": version_id for number, version_id in versions.items()}
    if options.runs_shim:
        parameters[FORMAT] = str(how.format)
    if tensors := _backend_tensors(signature, options.backend):
        parameters[TENSORS] = json.dumps(tensors, sort_keys=True)
    if tuning is not None:
        parameters[TUNING] = json.dumps(tuning, sort_keys=True)
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    if warmup:
        _warm_up(config, signature, warmup)
    return config


def own_config(name: str, signature: Signature, options: Options, *, steps: Sequence[Step] = ()) -> Any:
    """As `model_config`, for a model that is no bundle, such as a model.py of one's own; its newest version is served.

    Raises:
        InputError: the signature serves no batch at all, or the options contradict each other.
    """
    if signature.max_batch < 1:
        # 0 would mean "no batch axis" to Triton, and proto3 text would leave the field out.
        raise InputError(f"model {name!r} has max_batch {signature.max_batch}: export it with at least 1")
    ensemble = options.backend == ENSEMBLE
    if ensemble != bool(steps) or (options.max_inflight and not ensemble):
        raise InputError(f"model {name!r}: steps, max_inflight and backend {ENSEMBLE!r} are for each other only")
    plain = Options(options.backend, tags=options.tags, server_version=options.server_version, cache=options.cache)
    if ensemble and replace(options, max_inflight=0) != plain:
        raise InputError(f"model {name!r}: an ensemble has no instances, threads, queues or limit; its steps have them")
    how = BACKENDS[options.backend]
    config = model_config_pb2.ModelConfig(
        name=name, backend=how.backend, platform=how.platform, max_batch_size=signature.max_batch
    )
    names = _backend_tensors(signature, options.backend)
    for side, specs, tensors in (
        ("inputs", signature.inputs, config.input),
        ("outputs", signature.outputs, config.output),
    ):
        for spec in specs:
            if not spec.shape:
                raise InputError(
                    f"tensor {spec.name!r} has no axis but the batch, and Triton wants one: give it shape [1]"
                )
            name = names.get(side, {}).get(spec.name, spec.name)
            tensors.add(name=name, data_type=TRITON_TYPES[backend_dtype(options.backend, spec.dtype)], dims=spec.shape)
    if ensemble:
        for step in steps:
            step.write(config.ensemble_scheduling)
        if options.max_inflight:
            config.ensemble_scheduling.max_inflight_requests = options.max_inflight
    else:
        group = model_config_pb2.ModelInstanceGroup
        config.instance_group.add(kind=group.KIND_GPU if options.gpu else group.KIND_CPU, count=options.instances)
        if options.limit is not None:
            options.limit.write(config.instance_group[0])
        options.batching.write(config)
    if options.cache:
        config.response_cache.enable = True
    if how.threads and (options.threads or options.runs_shim):
        config.parameters[how.threads].string_value = str(options.threads)
    if options.micro_batch:
        config.parameters[MICRO_BATCH].string_value = str(options.micro_batch)
    for key, value in options.tags.items():
        config.metric_tags[key] = value
    return config


def options_of(config: Any, server_version: str = OLDEST_SERVER) -> Options:
    """The options by which `model_config` or `own_config` wrote a configuration: their inverse.

    Args:
        config: ModelConfig protobuf.
        server_version: Version of the server that reads it, which the configuration does not tell.

    Raises:
        InputError: it is none of ours.
    """
    backend = backend_of(config)
    if backend != ENSEMBLE and len(config.instance_group) != 1:
        raise InputError(
            f"{config.name!r} has {len(config.instance_group)} groups of instances: deploy its bundle again"
        )
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    group = None if backend == ENSEMBLE else config.instance_group[0]
    sequences = config.HasField("sequence_batching")
    return Options(
        backend,
        gpu=group is not None and group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU,
        instances=1 if group is None else group.count,
        threads=int(parameters.get(BACKENDS[backend].threads, "0")),
        micro_batch=int(parameters.get(MICRO_BATCH, "0")),
        batching=Sequences.read(config) if sequences else Batching.read(config),
        tags=dict(config.metric_tags),
        server_version=server_version,
        cache=config.response_cache.enable,
        limit=RateLimit.read(group) if group is not None and group.HasField("rate_limiter") else None,
        max_inflight=config.ensemble_scheduling.max_inflight_requests,
    )


def backend_of(config: Any) -> str:
    """Which of `BACKENDS` a configuration of ours is for; InputError if it is none of ours."""
    format = config.parameters[FORMAT].string_value if FORMAT in config.parameters else None
    for name, how in BACKENDS.items():
        if (how.backend, how.platform) == (config.backend, config.platform) and format in (None, how.format):
            return name
    raise InputError(f"the configuration of {config.name!r} is not one that gpuops wrote: deploy the bundle again")


def backend_dtype(backend: str, dtype: str) -> str:
    """Dtype in which a backend takes a tensor of the signature: TensorRT has no 16-bit integers and takes int32."""
    return "int32" if backend == "tensorrt" and dtype in ("int16", "uint16") else dtype


def _backend_tensors(signature: Signature, backend: str) -> dict[str, Any]:
    """How the tensors of a signature go to a backend that takes them otherwise; empty if it does not.

    TensorRT gets 16-bit integers as int32. An AOTInductor package has its own names: its call specification names
    tensors by place (ARGS[0], RESULT[0], or RESULT where forward returns a bare tensor). It takes ordinal names
    as well, which do not depend on what forward returns.
    """
    if backend == "tensorrt":
        widened = {spec.name: "int32" for spec in signature.inputs if backend_dtype(backend, spec.dtype) != spec.dtype}
        return {"widened": widened} if widened else {}
    if backend != "torch_aoti":
        return {}
    return {
        "inputs": {spec.name: f"INPUT__{place}" for place, spec in enumerate(signature.inputs)},
        "outputs": {spec.name: f"OUTPUT__{place}" for place, spec in enumerate(signature.outputs)},
    }


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
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a model configuration ({error}): deploy the bundle again") from error


def served_version_ids(config: Any) -> dict[int, str]:
    """Version id by number of the versions that a configuration of ours serves; empty if it is not ours."""
    numbers: Iterable[int] = config.version_policy.specific.versions
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    found = {number: parameters.get(f"{VERSION_ID}.{number}", "") for number in numbers}
    if len(found) == 1 and VERSION_ID in parameters:  # as gpuops 0 wrote it
        return dict.fromkeys(found, parameters[VERSION_ID])
    return found if found and all(found.values()) else {}
